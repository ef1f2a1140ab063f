"""Plans of rows, made on the host while the device works, so that nothing waits for them."""

from collections.abc import Callable
from typing import Any

from otpo.trl_seam import ROW_PLAN

from .plan import plan_rows
from .scoring import PLANNED


class PlanningCollator:
    """A data collator that adds the plan of the rows to a batch, for [`otpo.layouts.scoring.plan_of`].

    Args:
        collator: Makes everything else of a batch.
        share: Whether tokens that both rows of a pair begin with are run once.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], *, share: bool) -> None:
        self.collator, self.share = collator, share

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch, with its plan under `row_plan`."""
        batch = self.collator(examples)
        return {**batch, ROW_PLAN: plan_rows(*(batch[name] for name in PLANNED), share=self.share)}

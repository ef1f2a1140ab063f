"""A micro-batch in one row, on its way to the model, and the model's answers on their way back to padded rows.

Shapes: R rows, T scored positions of the padded batch, N tokens that are run, S scores, D hidden size.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from otpo.trl_seam import ROW_PLAN, implementations, row_arguments

from .attention import flash_arguments, lengths_arguments, mask_arguments
from .choice import Layout
from .plan import RowPlan, plan_rows

PLANNED = ("input_ids", "attention_mask", "completion_mask")
"""The entries of a batch that a plan is made of."""


def plan_of(inputs: Mapping[str, Any], layout: Layout) -> RowPlan:
    """The plan of a batch: its collator's, or one that is made now, for which the host waits for the device."""
    made = inputs.get(ROW_PLAN)
    if made is not None:
        return made
    masks = (inputs[name].cpu() for name in PLANNED)
    return plan_rows(*masks, share=layout.shares).to(inputs["input_ids"].device)


def planned_arguments(
    plan: RowPlan, layout: Layout, causal_lm: Any, longest_row: int | None, *, router_logits: bool
) -> dict[str, Any]:
    """What the model is called with in place of the padded batch.

    Args:
        plan: The rows.
        layout: How attention tells them apart.
        causal_lm: The model without engines around it.
        longest_row: How many tokens a row of the run may have; None for any number.
        router_logits: Whether the routers' loss is asked for.
    """
    if layout.way == "lengths":
        attention = lengths_arguments(plan, longest_row)
    elif layout.way == "flash":
        attention = flash_arguments(plan)
    else:
        attention = mask_arguments(plan, implementations(causal_lm.config)[0], causal_lm.dtype)
    tokens = {"input_ids": plan.ids, "position_ids": plan.positions, **attention}
    return row_arguments(tokens, plan.scored, plan.targets, plan.copies, router_logits=router_logits)


def as_padded(outputs: Any, plan: RowPlan) -> Any:
    """A `FusedCausalLMOutput` of scores `[1, S]` as one of padded rows `[R, T]`, zero where nothing is scored."""
    scored = {name: value for name, value in outputs.items() if name not in ("loss", "aux_loss", "label_mask")}
    padded = {name: in_slots(value[0], plan) for name, value in scored.items() if value is not None}
    mask = in_slots(torch.ones_like(plan.slots, dtype=torch.bool), plan)
    return type(outputs)(**padded, label_mask=mask, aux_loss=outputs.get("aux_loss"))


def padded_states(states: Tensor, plan: RowPlan) -> Tensor:
    """Hidden states `[1, N, D]` at the scored positions, as `[R, T, D]`, zero elsewhere."""
    return in_slots(states[0].index_select(0, plan.scored.to(states.device)), plan)


def in_slots(values: Tensor, plan: RowPlan) -> Tensor:
    """A value of each score, `[S, ...]`, as `[R, T, ...]`, zero where nothing is scored; differentiable."""
    rows, width = plan.shape
    padded = values.new_zeros((rows * width, *values.shape[1:]))
    return padded.index_copy(0, plan.slots.to(values.device), values).unflatten(0, plan.shape)

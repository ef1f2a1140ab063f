"""The options of the transport: one frozen object, which is checked when it is made and handed to all that use it."""

from collections.abc import Callable
from dataclasses import InitVar, dataclass, field, fields
from typing import Any, TypedDict

from otpo.registry import Option, always, at_least_one, never, one_of, positive

from .registry import COST_SCALES, COSTS, SOLVERS, Cost, CostScale, Solver, solver_names

PREFIX = "ot_"
"""`OTPOConfig` has each of these options under this prefix."""


def _said(
    help: str, check: Callable[[str, Any], None], shown: Callable[[Any], bool] = never, *, own_defaults: bool = False
) -> dict[str, Any]:
    """What an [`Option`] says beside its name and default; `shown` is called with an `OTPOConfig`."""
    return {"help": help, "check": check, "shown": shown, "own_defaults": own_defaults}


def _listed(helps: dict[Any, str]) -> str:
    words = [f"{text} ({name!r})" for name, text in helps.items()]
    return f"{', '.join(words[:-1])} or {words[-1]}"


_SOLVER_HELPS = {name: kind.help for name, kind in SOLVERS.items()} | {"auto": "the first of them that can run"}


@dataclass(frozen=True)
class TransportOptions:
    r"""How the transport problem is posed and solved.

    The defaults are the official OTPO release's for its 8B models; its 3B recipes set `reg` to 0.1.

    Attributes:
        reg: Weight of the entropy of the plan, > 0. Small values concentrate the weights: at 1 they are within 5% of
            uniform on a 135M chat model, at 0.02 the largest is 2.6 times the mean.
        reg_m: Weight of the two marginal terms, > 0. Large values push the weights towards uniform.
        cost: What moving mass between two tokens costs. `"euclidean"`: the distance of their hidden states, as in the
            paper. `"cosine"`: `1 - <h, g> / (|h| |g|)`, within [0, 2], and 1 where a state is zero. The paper's
            ablation weighs tokens by cosine similarity; this cost is our choice.
        cost_scale: What the largest cost is taken over before the costs are divided by it, where it exceeds 1.
            `"release"`: the costs and the norms of the hidden states, which is what the official release computes
            because it pads with zero vectors. `"pairwise"`: the costs between real tokens alone, which keeps more
            contrast where the states share a large common part. Both are the same for cosines: zero vectors cost 1
            there, and the maximum is at least 1 anyway.
        tolerance: Largest relative violation of the optimality condition at which the solver stops, > 0.
        max_iterations: Most sweeps of the solver, >= 1; the residual says what was reached.
        solver: `"triton"`: the library's kernels, on a GPU, for 16-bit and float32 hidden states; under half a percent
            of a training step. `"torch"`: plain torch in float64, anywhere. `"auto"`: the kernels where they can run;
            on a GPU where they cannot, a warning says why.

    Args:
        prefix: Stands before an option's name in the messages of errors.

    Raises:
        ValueError: An option is outside its range; the message names it, its value and the range.
    """

    reg: float = field(
        default=1.0,
        metadata=_said(
            "Weight of the plan's entropy, > 0. Small values (0.02) concentrate the weights.",
            positive,
            always,
            own_defaults=True,
        ),
    )
    reg_m: float = field(
        default=0.2,
        metadata=_said(
            "Weight of the marginal terms, > 0. Large values push the weights towards uniform.", positive, always
        ),
    )
    cost: Cost = field(
        default="euclidean",
        metadata=_said(
            f"Cost between two tokens: {_listed({name: kind.help for name, kind in COSTS.items()})}.",
            one_of(COSTS),
            lambda args: args.ot_cost != "euclidean",
            own_defaults=True,
        ),
    )
    cost_scale: CostScale = field(
        default="release",
        metadata=_said(
            f"Largest cost that the costs are divided by: {_listed(COST_SCALES)}.",
            one_of(COST_SCALES),
            lambda args: COSTS[args.ot_cost].from_zero is not None,
        ),
    )
    tolerance: float = field(
        default=1e-6, metadata=_said("Residual at which the transport solver stops, > 0.", positive)
    )
    max_iterations: int = field(
        default=1000, metadata=_said("Most iterations of the transport solver, >= 1.", at_least_one)
    )
    solver: Solver = field(
        default="auto",
        metadata=_said(
            f"What solves the transport: {_listed(_SOLVER_HELPS)}.",
            lambda name, value: one_of(solver_names())(name, value),
        ),
    )
    prefix: InitVar[str] = ""

    def __post_init__(self, prefix: str) -> None:
        for entry in fields(self):
            entry.metadata["check"](f"{prefix}{entry.name}", getattr(self, entry.name))

    @classmethod
    def of(cls, args: Any) -> "TransportOptions":
        """Those of an `OTPOConfig`, whose fields bear the same names after `ot_`.

        Raises:
            ValueError: An option is outside its range; the message names the field of `args`.
        """
        values = {entry.name: getattr(args, f"{PREFIX}{entry.name}") for entry in fields(cls)}
        return cls(**values, prefix=PREFIX)

    @property
    def numbers(self) -> dict[str, Any]:
        """What every solver of the posed problem takes: `reg`, `reg_m`, `tolerance` and `max_iterations`."""
        names = ("reg", "reg_m", "tolerance", "max_iterations")
        return {name: getattr(self, name) for name in names}


class ProblemKeywords(TypedDict, total=False):
    """[`TransportOptions`] as keywords, without the solver, for type checkers."""

    reg: float
    reg_m: float
    cost: Cost
    cost_scale: CostScale
    tolerance: float
    max_iterations: int


class TransportKeywords(ProblemKeywords, total=False):
    """[`TransportOptions`] as keywords, for type checkers."""

    solver: Solver


TRANSPORT_OPTIONS = tuple(
    Option(
        f"{PREFIX}{entry.name}",
        type(entry.default),
        entry.default,
        **entry.metadata,
        keyword=entry.name,
        shared=True,  # `otpo explain` draws the plan whatever the weighting
        bundled=True,
    )
    for entry in fields(TransportOptions)
)
"""The same as options of `OTPOConfig`."""

"""The costs and the solvers of the transport, by name; a new one is a function and an entry here.

Type checkers need the names written out, so a name stands in its `Literal` and, a few lines below, before its entry;
the annotation of the registry holds the second to the first and a test the first to the second.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from otpo.lazy import load
from otpo.registry import Registered

Cost = Literal["euclidean", "cosine"]
CostScale = Literal["release", "pairwise"]
Solver = Literal["auto", "triton", "torch"]


@dataclass(frozen=True)
class CostKind(Registered):
    """What moving mass between two tokens costs.

    Its function takes states `(B, M, D)` and `(B, N, D)` of one dtype, zero outside the masks, and the keyword
    `by_product`, which says that a matrix product is precise enough, and returns costs `(B, M, N)`, non-negative.

    Attributes:
        from_zero: Where the function is that returns the costs `(B, W)` between states `(B, W, D)` and a vector of
            zeros, with which the official release pads. None: they are never the largest, so that the cost scale
            makes no difference.
    """

    from_zero: str | Callable[..., Any] | None = None

    def load_from_zero(self) -> Callable[..., Any] | None:
        """The function of `from_zero`."""
        return None if self.from_zero is None else load(self.from_zero)


COSTS: dict[Cost, CostKind] = {
    "euclidean": CostKind(
        "otpo.transport.cost:euclidean",
        help="the distance of their hidden states",
        source="arXiv 2505.18720",
        from_zero="otpo.transport.cost:norms",
    ),
    "cosine": CostKind(
        "otpo.transport.cost:cosine",
        help="one less the cosine of their hidden states",
        source="our choice, after the ablation of arXiv 2505.18720",
    ),
}

COST_SCALES: dict[CostScale, str] = {
    "release": "over the costs and the norms of the hidden states, as the official code",
    "pairwise": "over the costs between real tokens alone",
}
"""What the largest cost is taken over, by the scale's name."""


@dataclass(frozen=True)
class SolverKind(Registered):
    """A way from hidden states to token weights.

    Its function takes chosen and rejected states, their masks, the [`TransportOptions`] and a byte budget, and returns
    a [`otpo.transport.solution.TransportWeights`].

    Attributes:
        title: What messages call it.
        obstacle: Where the function is that takes chosen and rejected states and the [`TransportOptions`] and says in
            words why the solver can't run for them, or returns None. None: it always can.
        devices: Types of the devices on whose states `"auto"` tries it. None: all.
    """

    title: str
    obstacle: str | Callable[..., Any] | None = None
    devices: frozenset[str] | None = None

    def find_obstacle(self, *asked: Any) -> str | None:
        """Why the solver can't run, or None; arguments as the function of `obstacle` takes them."""
        return None if self.obstacle is None else load(self.obstacle)(*asked)


SOLVERS: dict[Solver, SolverKind] = {
    "triton": SolverKind(
        "otpo.transport.triton_solver:solve",
        help="the GPU kernels",
        source="ours",
        title="Triton",
        obstacle="otpo.transport.triton_solver:obstacle",
        devices=frozenset({"cuda"}),
    ),
    "torch": SolverKind(
        "otpo.transport.torch_solver:solve", help="float64 in plain torch", source="ours", title="plain torch"
    ),
}
"""In the order in which `"auto"` tries them; the last one always can."""


def solver_names() -> list[str]:
    """What the option `solver` may be."""
    return ["auto", *SOLVERS]

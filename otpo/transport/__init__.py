"""Unbalanced optimal transport between the tokens of two responses: the problem, its solvers, its marginals."""

from typing import TYPE_CHECKING

from otpo.lazy import lazy_names

if TYPE_CHECKING:
    from .cost import pairwise_cost as pairwise_cost
    from .options import TransportOptions as TransportOptions
    from .registry import Cost as Cost
    from .registry import CostScale as CostScale
    from .registry import Solver as Solver
    from .solve import TransportWeights as TransportWeights
    from .solve import transport_plan as transport_plan
    from .solve import transport_weights as transport_weights
    from .solve import warn_unsolved as warn_unsolved

_HOMES = {
    "Cost": "otpo.transport.registry",
    "CostScale": "otpo.transport.registry",
    "Solver": "otpo.transport.registry",
    "TransportOptions": "otpo.transport.options",
    "TransportWeights": "otpo.transport.solve",
    "pairwise_cost": "otpo.transport.cost",
    "transport_plan": "otpo.transport.solve",
    "transport_weights": "otpo.transport.solve",
    "warn_unsolved": "otpo.transport.solve",
}
__getattr__ = lazy_names(__name__, _HOMES)

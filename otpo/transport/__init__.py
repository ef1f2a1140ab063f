"""Unbalanced optimal transport between the tokens of two responses: the problem, its solvers, its marginals."""

from .solve import Cost as Cost
from .solve import CostScale as CostScale
from .solve import transport_plan as transport_plan
from .solve import transport_weights as transport_weights

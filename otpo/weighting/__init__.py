"""Token weightings: how much each token of a response counts in the preference loss."""

from .methods import WEIGHTINGS as WEIGHTINGS
from .methods import PairBatch as PairBatch
from .methods import TokenWeights as TokenWeights
from .methods import Weighting as Weighting
from .methods import budget as budget
from .methods import d2po as d2po
from .methods import ld as ld
from .methods import length as length
from .methods import otpo as otpo
from .methods import sampo as sampo
from .methods import uniform as uniform

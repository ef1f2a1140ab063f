"""Token weightings: how much each token of a response counts in the preference loss."""

from typing import TYPE_CHECKING

from otpo.lazy import lazy_names

if TYPE_CHECKING:
    from .batch import PairBatch as PairBatch
    from .batch import TokenWeights as TokenWeights
    from .batch import Weighting as Weighting
    from .methods import budget as budget
    from .methods import columns as columns
    from .methods import confpo as confpo
    from .methods import d2po as d2po
    from .methods import diff as diff
    from .methods import ld as ld
    from .methods import length as length
    from .methods import product as product
    from .methods import sampo as sampo
    from .methods import surprisal as surprisal
    from .methods import uniform as uniform
    from .optimal_transport import contrast as contrast
    from .optimal_transport import otpo as otpo
    from .registry import WEIGHTINGS as WEIGHTINGS

_HOMES = {
    "WEIGHTINGS": "otpo.weighting.registry",
    **dict.fromkeys(("contrast", "otpo"), "otpo.weighting.optimal_transport"),
    **dict.fromkeys(("PairBatch", "TokenWeights", "Weighting"), "otpo.weighting.batch"),
    **dict.fromkeys(("budget", "columns", "confpo", "d2po", "diff", "ld", "length"), "otpo.weighting.methods"),
    **dict.fromkeys(("product", "sampo", "surprisal", "uniform"), "otpo.weighting.methods"),
}
__getattr__ = lazy_names(__name__, _HOMES)

"""Align language models on preference pairs, with token weights from optimal transport.

Names are loaded when they are first touched, so `import otpo` costs no import of torch, trl or triton.
"""

from typing import TYPE_CHECKING

from .lazy import lazy_names
from .version import __version__

if TYPE_CHECKING:
    from .callbacks import LogTokenWeightsCallback as LogTokenWeightsCallback
    from .config import OTPOConfig as OTPOConfig
    from .trainer import OTPOTrainer as OTPOTrainer
    from .weighting.batch import PairBatch as PairBatch
    from .weighting.batch import TokenWeights as TokenWeights

_HOMES = {
    "LogTokenWeightsCallback": "otpo.callbacks",
    "OTPOConfig": "otpo.config",
    "OTPOTrainer": "otpo.trainer",
    "PairBatch": "otpo.weighting.batch",
    "TokenWeights": "otpo.weighting.batch",
}
__all__ = ["LogTokenWeightsCallback", "OTPOConfig", "OTPOTrainer", "PairBatch", "TokenWeights", "__version__"]
__getattr__ = lazy_names(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__

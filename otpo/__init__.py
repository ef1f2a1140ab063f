"""Align language models on preference pairs, with token weights from optimal transport.

Names are loaded when they are first touched, so `import otpo` costs no import of torch, trl or triton.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .callbacks import LogTokenWeightsCallback as LogTokenWeightsCallback
    from .config import OTPOConfig as OTPOConfig
    from .trainer import OTPOTrainer as OTPOTrainer
    from .weighting.methods import PairBatch as PairBatch
    from .weighting.methods import TokenWeights as TokenWeights

_HOMES = {
    "LogTokenWeightsCallback": "otpo.callbacks",
    "OTPOConfig": "otpo.config",
    "OTPOTrainer": "otpo.trainer",
    "PairBatch": "otpo.weighting.methods",
    "TokenWeights": "otpo.weighting.methods",
}
__all__ = ["LogTokenWeightsCallback", "OTPOConfig", "OTPOTrainer", "PairBatch", "TokenWeights", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'otpo' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__

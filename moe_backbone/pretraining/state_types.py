"""Guards the states that an optimizer loads from a checkpoint: their kind and their types.

torch casts the states that it loads to the types of their weights. Adafactor's, which are float32 beside bfloat16
weights, would be rounded, and a resumed training would be another one.
"""

from itertools import chain
from typing import Any

from torch import Tensor

from .master_adamw import MasterAdamW, refuse_remainders


def guard_states(optimizer: Any) -> None:
    """Has an optimizer refuse [`MasterAdamW`]'s states, and load each tensor in the type that it was saved in.

    Args:
        optimizer: torch's, on whose `load_state_dict` hooks are set. A `MasterAdamW` looks at its states itself, and
            one that takes no hooks is left as it is.
    """
    if isinstance(optimizer, MasterAdamW) or not hasattr(optimizer, "register_load_state_dict_pre_hook"):
        return
    optimizer.register_load_state_dict_pre_hook(refuse_remainders)
    loading: list[dict[str, Any]] = []

    def remember(_: Any, state_dict: dict[str, Any]) -> None:
        loading[:] = [state_dict]

    def restore(_: Any) -> None:
        saved = loading.pop()
        numbers = chain.from_iterable(group["params"] for group in saved["param_groups"])
        weights = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        for number, weight in zip(numbers, weights, strict=True):
            state = optimizer.state.get(weight, {})
            for name, value in saved["state"].get(number, {}).items():
                cast = state.get(name)
                if isinstance(value, Tensor) and isinstance(cast, Tensor) and cast.dtype != value.dtype:
                    state[name] = value.to(cast.device)

    optimizer.register_load_state_dict_pre_hook(remember)
    optimizer.register_load_state_dict_post_hook(restore)

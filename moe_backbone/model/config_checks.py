"""Checks of users' configurations: refusals in one line, values that the model would fail on, and the rows' length."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_compass import CompassConfig

_NUMBERS = {"rope_theta", "factor", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "mscale"}
_NUMBERS |= {"high_freq_factor", "original_max_position_embeddings", "short_factor", "long_factor", "mscale_all_dim"}
"""Rotary parameters whose values are numbers or lists of numbers."""


@contextmanager
def one_line_refusals() -> Iterator[None]:
    """Turns any error that refuses a configuration, ours or transformers', into a `ValueError` of one line."""
    try:
        yield
    except (StrictDataclassError, KeyError, TypeError, ValueError, RuntimeError) as error:
        cause = error.__cause__ or error
        text = str(cause.args[0]) if isinstance(cause, KeyError) and cause.args else str(cause)
        raise ValueError(" ".join(text.partition(" Errors: ")[0].split())) from error


def check_config(config: CompassConfig) -> None:
    """Raises a `ValueError` for values that `CompassConfig` takes and the model's constructor would fail on."""
    kinds = ["default", *ROPE_INIT_FUNCTIONS]
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind not in kinds:
        raise ValueError(f"`rope_parameters`: `rope_type` must be one of {', '.join(kinds)}, got {kind!r}.")
    for name, value in (config.rope_parameters or {}).items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if name in _NUMBERS and not _is_positive(number):
                raise ValueError(f"`rope_parameters`: `{name}` must be a finite number above 0, got {number!r}.")
    if not 0.0 <= config.attention_dropout < 1.0:
        raise ValueError(f"`attention_dropout` must be within [0, 1), got {config.attention_dropout}.")
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"`hidden_act` must be one of {', '.join(ACT2FN)}, got {config.hidden_act!r}.")


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def describe_longer_rows(config: CompassConfig, sequence_length: int) -> str | None:
    """Sentence on how pretraining raises the model's limit of positions for longer rows; None where rows fit.

    Pretraining raises `max_position_embeddings` because a model that trains on rows of a length can read this length.
    A plan does the same.
    """
    limit = config.max_position_embeddings
    if sequence_length <= limit:
        return None
    return f"`max_position_embeddings` is raised from {limit} to {sequence_length}, the `sequence_length`"

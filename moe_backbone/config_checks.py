"""What users' values make of a configuration: refusals in one line, and the limit of positions."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_compass import CompassConfig


@contextmanager
def one_line_refusals() -> Iterator[None]:
    """Makes a `ValueError` of one line of what a configuration is refused with, be it by us or by transformers."""
    try:
        yield
    except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
        cause = error.__cause__ or error
        text = str(cause.args[0]) if isinstance(cause, KeyError) and cause.args else str(cause)
        raise ValueError(" ".join(text.partition(" Errors: ")[0].split())) from error


def check_config(config: CompassConfig) -> None:
    """Raises a `ValueError` for names that only the making of the model would look up."""
    kinds = ["default", *ROPE_INIT_FUNCTIONS]
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind not in kinds:
        raise ValueError(f"`rope_parameters`: `rope_type` must be one of {', '.join(kinds)}, got {kind!r}.")
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"`hidden_act` must be one of {', '.join(ACT2FN)}, got {config.hidden_act!r}.")


def describe_longer_rows(config: CompassConfig, sequence_length: int) -> str | None:
    """What pretraining does to a model's limit when rows are longer; None where they are not.

    Training at a length is what makes a model able to read it, so the limit is raised, in a plan too.
    """
    limit = config.max_position_embeddings
    if sequence_length <= limit:
        return None
    return f"`max_position_embeddings` is raised from {limit} to {sequence_length}, the `sequence_length`"

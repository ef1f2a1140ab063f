"""Tensors that a weighting is lent and may not write into, since the loss and its gradient still need them."""

from torch import Tensor

from otpo.weighting import PairBatch


def tensor_versions(batch: PairBatch) -> dict[str, int]:
    """Counts the writes so far to each tensor that the weighting shares with the loss."""
    lent = {"hidden_states": batch.hidden_states}
    lent |= {f"inputs[{name!r}]": value for name, value in batch.inputs.items() if isinstance(value, Tensor)}
    return {name: writes_to(value) for name, value in lent.items()}


def writes_to(tensor: Tensor) -> int:
    """Counts the writes to a tensor so far; 0 for one of inference mode, which does not know."""
    return 0 if tensor.is_inference() else tensor._version


def require_unwritten(batch: PairBatch, versions: dict[str, int]) -> None:
    """Raises a `ValueError` that names a tensor of the batch that a weighting has written into.

    Args:
        batch: What the weighting was given.
        versions: Of [`tensor_versions`], before it ran.
    """
    written = [name for name, version in tensor_versions(batch).items() if version != versions[name]]
    if written:
        raise ValueError(
            f"The weighting has written into `batch.{written[0]}`, which the loss still needs. Let it write into a "
            f"copy: `batch.{written[0]}.clone()`."
        )

"""Copies of batches to the device, in a resumed epoch too."""

from typing import Any


def copy_without_waiting(accelerator: Any) -> None:
    """Lets the loader that is iterated over copy batches to the device as the options say.

    accelerate's `skip_first_batches` makes the loader of a resumed epoch anew without `non_blocking`, and each of its
    batches would wait for the device. Loaders read `_non_blocking` at each batch.

    Args:
        accelerator: The trainer's.
    """
    loader = accelerator.gradient_state.active_dataloader
    if loader is not None:
        loader._non_blocking = accelerator.non_blocking

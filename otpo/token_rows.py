"""Per-token values of completions as rows of one width, so that a dataset can store them.

Shapes: R rows (responses), T positions of a padded batch, W width of a stored row.
"""

import torch
from torch import Tensor


def pack_rows(values: Tensor, mask: Tensor, width: int) -> Tensor:
    """Moves the values at completion tokens to the front of rows of `width`, zero after them.

    Args:
        values: `(R, T)` float.
        mask: `(R, T)` bool, at most `width` true in a row.
        width: Columns of the result.

    Returns:
        `(R, width)` float32.
    """
    index = (mask.cumsum(1) - 1).masked_fill(~mask, width)
    rows = torch.zeros(values.size(0), width + 1, dtype=torch.float32, device=values.device)
    return rows.scatter(1, index, values.float().masked_fill(~mask, 0.0))[:, :width]


def unpack_rows(rows: Tensor, mask: Tensor) -> Tensor:
    """The inverse of [`pack_rows`]: puts stored rows back at the completion tokens of a batch.

    Args:
        rows: `(R, W)` float.
        mask: `(R, T)` bool.

    Returns:
        `(R, T)` float, zero outside the mask.

    Raises:
        ValueError: A response of the batch has more tokens than a stored row.
    """
    longest = int(mask.sum(1).max())
    if longest > rows.size(1):
        raise ValueError(
            f"A completion of the batch has {longest} tokens, the precomputed reference log-probabilities have "
            f"{rows.size(1)} per row. They were made with another truncation: precompute them again."
        )
    index = (mask.cumsum(1) - 1).clamp(min=0)
    return rows.gather(1, index).masked_fill(~mask, 0.0)

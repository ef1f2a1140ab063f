"""Per-token values of completions as rows without padding, so that a dataset can store them.

Shapes: R rows (responses), T positions of a padded batch, W width of rows, at least the longest completion.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def pack_rows(values: Tensor, mask: Tensor) -> Tensor:
    """Moves the values at completion tokens to the front of rows as wide as the longest completion, zero after them.

    Args:
        values: `(R, T)` float.
        mask: `(R, T)` bool.

    Returns:
        `(R, W)` float32.
    """
    width = int(mask.sum(1).max()) if len(mask) else 0
    index = (mask.cumsum(1) - 1).masked_fill(~mask, width)
    rows = torch.zeros(values.size(0), width + 1, dtype=torch.float32, device=values.device)
    return rows.scatter(1, index, values.float().masked_fill(~mask, 0.0))[:, :width]


def unpack_rows(
    rows: Tensor,
    mask: Tensor,
    read: Callable[[Tensor, Callable[[Tensor], None]], None] | None = None,
    *,
    what: str = "precomputed reference log-probabilities",
) -> Tensor:
    """The inverse of [`pack_rows`]: puts rows back at the completion tokens of a batch.

    Args:
        rows: `(R, W)` float.
        mask: `(R, T)` bool.
        read: Brings a tensor to the host, now or later, and hands it to a function that raises what is below; see
            `LateReads.add`. None: now.
        what: What the values are, in the plural.

    Returns:
        `(R, T)` float, zero outside the mask.

    Raises:
        ValueError: A response of the batch has more tokens than its row, or fewer.
    """
    width, counts = rows.size(1), mask.sum(1)
    outside = torch.arange(width, device=rows.device) >= counts[:, None]
    found = torch.stack([counts.max(), ((rows != 0) & outside).count_nonzero()])

    def require_same_lengths(found: Tensor) -> None:
        longest, excess = found.tolist()
        if longest > width or excess:
            raise ValueError(
                f"The completions of the batch have up to {longest} tokens, their {what} up to {width}, and the "
                "numbers of tokens differ. They were made with another truncation: precompute them again, and let a "
                "data collator of your own truncate as `max_length` and `truncation_mode` say."
            )

    if read is None:
        require_same_lengths(found)
    else:
        read(found, require_same_lengths)
    if not width:
        return torch.zeros_like(mask, dtype=rows.dtype)
    # The upper bound matters where rows that are too short are refused later.
    index = (mask.cumsum(1) - 1).clamp(min=0, max=width - 1)
    return rows.gather(1, index).masked_fill(~mask, 0.0)

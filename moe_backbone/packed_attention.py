"""Attention over packed rows by their documents' lengths: the attention implementation `torch_varlen`.

`sdpa` tells documents apart by a mask, which no flash kernel takes, and computes what the mask leaves out as well.
Flash kernels for rows of different lengths need no mask and compute what is seen alone: torch's own, or those of
FlashAttention-4 where that is installed, see `otpo_kernels.flash`. They take half precision on a GPU. A call that does
not say where documents end, such as one in `generate`, runs as `sdpa`, so a model may keep the implementation after
its training.

Importing this module, as `import moe_backbone` does, registers the name with transformers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from otpo_kernels.flash import attend_within, flash_can_run

NAME = "torch_varlen"


def varlen_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document, as an attention function of transformers.

    Args:
        module: The attention module.
        query: `[1, heads, N, D]` of all documents' tokens in one row. Under autocast it may be float32, and so may
            `key` and `value`.
        key: `[1, key heads, N, D]`, the heads a multiple of the key heads.
        value: `[1, key heads, N, D]`.
        attention_mask: Unused where `cu_seq_lens_q` is given.
        scaling: Multiplies the products of queries and keys; None for `D ** -0.5`.
        dropout: Must be 0 where `cu_seq_lens_q` is given.
        cu_seq_lens_q: `[documents + 1]` int32: 0, and where each document ends. None runs `sdpa`.
        max_length_q: A bound of the documents' lengths.
        sliding_window: How many tokens each one sees, itself included; None for all.
        kwargs: Other options of attention functions.

    Returns:
        `[1, N, heads, D]`, and None in place of the attention's weights.

    Raises:
        ValueError: Dropout, several rows, or one of `cu_seq_lens_q` and `max_length_q` alone.
    """
    if (cu_seq_lens_q is None) != (max_length_q is None):
        raise ValueError(
            f"`cu_seq_lens_q` and `max_length_q` go together: got {cu_seq_lens_q!r} and {max_length_q!r}. Give both, "
            "or neither."
        )
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if dropout:
        raise ValueError(
            f"`attention_dropout={dropout}`: attention by lengths has none. Set it to 0, or "
            "`attn_implementation=sdpa`."
        )
    if len(query) != 1:
        raise ValueError(f"`cu_seq_lens_q` speaks of one row of documents, got a batch of {len(query)} rows.")
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    query, key, value = (part[0].transpose(0, 1).to(dtype) for part in (query, key, value))
    left = -1 if sliding_window is None else sliding_window - 1
    return attend_within(query, key, value, cu_seq_lens_q, max_length_q, scaling, left)[None], None


def choose_attention(config: Any, device: torch.device, dtype: torch.dtype) -> tuple[str, str | None]:
    """The attention implementation that a training on packed rows takes where its user names none.

    Args:
        config: Of the model; has `head_dim` and `attention_dropout`.
        device: That trains.
        dtype: That attention is computed in, which is autocast's where it is on.

    Returns:
        `torch_varlen`, or `sdpa` and the reason why a GPU does not run the faster one.
    """
    if config.attention_dropout:
        return "sdpa", f"`attention_dropout={config.attention_dropout}` is more than attention by lengths can do"
    if flash_can_run(device, dtype, config.head_dim):
        return NAME, None
    if device.type != "cuda":
        return "sdpa", None
    computed = str(dtype).removeprefix("torch.")
    return "sdpa", f"attention by lengths does not take {computed} heads of {config.head_dim} numbers on this GPU"


def joins_rows(implementation: str | None) -> bool:
    """Whether an attention implementation takes packed rows as a single one, told where its documents end.

    `CompassModel` knows these by the same words, since its code travels with checkpoints and this module does not.
    """
    return implementation == NAME or "flash" in str(implementation)


AttentionInterface.register(NAME, varlen_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)

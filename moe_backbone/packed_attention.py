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
# Options of attention functions that change the result and that neither the kernels nor `sdpa` know.
_UNKNOWN = ("softcap", "s_aux", "sinks", "indices", "block_indices")
_WINDOWED = ("sliding_attention", "chunked_attention")  # kinds of layers that do not see all earlier tokens


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
    cu_seq_lens_k: Tensor | None = None,
    max_length_k: int | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document, as an attention function of transformers.

    Args:
        module: The attention module.
        query: `[1, heads, N, D]` of all documents' tokens in one row. Under autocast it may be float32, and so may
            `key` and `value`.
        key: `[1, key heads, M, D]`, the heads a multiple of the key heads.
        value: `[1, key heads, M, D]`.
        attention_mask: Unused where `cu_seq_lens_q` is given.
        scaling: Multiplies the products of queries and keys; None for `D ** -0.5`.
        dropout: Must be 0 where `cu_seq_lens_q` is given.
        cu_seq_lens_q: `[documents + 1]` int32: 0, and where each document ends. None runs `sdpa`.
        max_length_q: A bound of the documents' lengths.
        cu_seq_lens_k: The same of the keys, of which a query sees those up to its own place, both counted from the
            document's end. None for those of the queries, and then M is N.
        max_length_k: See there.
        sliding_window: How many tokens each one sees, itself included; None for all.
        is_causal: Must not be False where `cu_seq_lens_q` is given; None for the module's own.
        kwargs: Other options of attention functions.

    Returns:
        `[1, N, heads, D]`, and None in place of the attention's weights.

    Raises:
        ValueError: An option that changes the result and is not known here, dropout, several rows, or one of
            `cu_seq_lens_q` and `max_length_q` alone.
    """
    _refuse_unknown(kwargs, _UNKNOWN)
    _require_pair("q", cu_seq_lens_q, max_length_q)
    _require_pair("k", cu_seq_lens_k, max_length_k)
    if cu_seq_lens_q is None or max_length_q is None:
        if cu_seq_lens_k is not None:
            raise ValueError(
                f"`cu_seq_lens_k={cu_seq_lens_k!r}` without `cu_seq_lens_q`. Give the queries' too, or neither."
            )
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal, **kwargs
        )
    _refuse_unknown(kwargs, ("position_bias",))
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(
            f"`is_causal=False` of {type(module).__name__}: attention by lengths (`attn_implementation={NAME}`) is "
            "causal. Set `attn_implementation` to sdpa or a flash attention."
        )
    if sliding_window is None and (kind := _kind(module)) in _WINDOWED:
        raise ValueError(
            f"`layer_types` has {kind} for {type(module).__name__}, which gives no `sliding_window`: attention by "
            f"lengths (`attn_implementation={NAME}`) takes none from a mask. Set `attn_implementation` to sdpa."
        )
    if dropout:
        raise ValueError(
            f"`attention_dropout={dropout}`: attention by lengths has none. Set it to 0, or "
            "`attn_implementation=sdpa`."
        )
    if cu_seq_lens_q.size(0) < 2:
        raise ValueError(
            "`cu_seq_lens_q` has no document. Who cuts a batch for several processes must leave it whole: do not set "
            "`dispatch_batches`."
        )
    if len(query) != 1:
        raise ValueError(f"`cu_seq_lens_q` speaks of one row of documents, got a batch of {len(query)} rows.")
    if cu_seq_lens_k is None and key.size(2) != query.size(2):
        raise ValueError(
            f"`cu_seq_lens_q` speaks of {query.size(2)} queries, and there are {key.size(2)} keys. Give the keys' "
            "`cu_seq_lens_k` and `max_length_k`, or run without a cache."
        )
    keys = None if cu_seq_lens_k is None or max_length_k is None else (cu_seq_lens_k, max_length_k)
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    query, key, value = (part[0].transpose(0, 1).to(dtype) for part in (query, key, value))
    left = -1 if sliding_window is None else sliding_window - 1
    return attend_within(query, key, value, cu_seq_lens_q, max_length_q, scaling, left, keys)[None], None


def _refuse_unknown(options: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if options.get(name) is not None:
            value = options[name]
            shown = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else value
            raise ValueError(
                f"`{name}={shown}`: `attn_implementation={NAME}` does not know it, with lengths or by sdpa, and would "
                "leave it out. Set `attn_implementation` to eager, or to one that the model's page names."
            )


def _require_pair(of: str, ends: Tensor | None, longest: int | None) -> None:
    if (ends is None) != (longest is None):
        raise ValueError(
            f"`cu_seq_lens_{of}` and `max_length_{of}` go together: got {ends!r} and {longest!r}. Give both, or "
            "neither."
        )


def _kind(module: nn.Module) -> str | None:
    """The kind of an attention layer by its configuration's `layer_types`; None where these have no windows."""
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    # A graph in which a layer's own number is read serves no other layer, and torch compiles eight of them at most.
    if not kinds or not any(kind in kinds for kind in _WINDOWED):
        return None
    number = getattr(module, "layer_idx", None)
    return kinds[number] if number is not None and number < len(kinds) else None


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

"""Attention of transformers' models in rows without padding: by lengths in kernels, or by a mask.

transformers looks an attention function up by a name in the model's configuration, at each call, also when gradient
checkpointing calls a layer again. So a model gets a name of ours once. The function of that name answers calls that
bring lengths itself and hands all others to the one that the model had.

Shapes: N tokens, H query heads, K key heads, D head dimension.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from otpo.trl_seam import implementations

from .lengths_attention import Bounds, RowLengths, lengths_attention, row_mask
from .plan import RowPlan

_PREFIX = "otpo_rows_"
# Options of attention functions that change the result and that the kernels don't know.
_UNKNOWN_OPTIONS = ("softcap", "s_aux", "position_bias", "sinks", "indices", "block_indices")
# transformers takes a mask of four dimensions as it is, and makes none. Whoever adds to this one changes its shape.
_NO_MASK = (1, 1, 1, 1)


def attend_by_lengths(causal_lm: Any) -> None:
    """Lets a model's attention take [`lengths_arguments`]; calls without them run as before.

    Args:
        causal_lm: A model, or a PEFT model around it.
    """
    implementation = plain_implementation(implementations(causal_lm.config)[0])
    assert implementation is not None
    name = _PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, partial(_rows_attention, ALL_ATTENTION_FUNCTIONS[implementation]))
        AttentionMaskInterface.register(name, AttentionMaskInterface()[implementation])
    causal_lm.set_attn_implementation(name)


def attend_as_before(causal_lm: Any) -> None:
    """Takes [`attend_by_lengths`] back."""
    name = implementations(causal_lm.config)[0]
    if name and name.startswith(_PREFIX):
        causal_lm.set_attn_implementation(plain_implementation(name))


def plain_implementation(name: str | None) -> str | None:
    """The attention that a model had before [`attend_by_lengths`]."""
    return name.removeprefix(_PREFIX) if name else name


def lengths_arguments(plan: RowPlan, longest_row: int | None = None) -> dict[str, Any]:
    """What the model is called with so that its tokens see their own rows alone, by lengths.

    Args:
        plan: The rows.
        longest_row: How many tokens a row of the run may have; None for any number.
    """
    ends = plan.segment_ends, plan.branch_ends, plan.shared_ends
    bounds = Bounds(plan.shared_tokens, *plan.longest)
    lengths = RowLengths(*ends, bounds, plan.shared_tokens > 0, longest_row)
    return {"row_lengths": lengths, "attention_mask": plan.ids.new_ones(_NO_MASK, dtype=torch.bool)}


def flash_arguments(plan: RowPlan) -> dict[str, Any]:
    """The same for transformers' flash attention, of plans that share nothing."""
    ends, longest = plan.segment_ends, plan.longest[0]
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    return {**dict(zip(names, (ends, ends, longest, longest), strict=True)), "attention_mask": None}


def mask_arguments(plan: RowPlan, implementation: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """The same by a mask, for any attention that takes one: `[1, 1, N, N]`.

    Args:
        plan: The rows.
        implementation: `"sdpa"` takes a bool mask, others add theirs.
        dtype: Of the model's attention scores.
    """
    sees = row_mask(plan.pairs, plan.branches)[None, None]
    if plain_implementation(implementation) == "sdpa":
        return {"attention_mask": sees}
    added = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
    return {"attention_mask": added.masked_fill(~sees, torch.finfo(dtype).min)}


def _rows_attention(
    otherwise: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    row_lengths: RowLengths | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: `[1, heads, N, D]` in, `[1, N, H, D]` out."""
    if row_lengths is None:
        return otherwise(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options)
    # What the kernels can't do. Short rows look right all the same where a window or a choice of keys does not bind.
    unknown = [name for name in _UNKNOWN_OPTIONS if options.get(name) is not None]
    if dropout:
        unknown.append("dropout")
    if options.get("is_causal") is False:
        unknown.append("is_causal=False")
    if attention_mask is not None and attention_mask.shape != _NO_MASK:
        unknown.append("a mask of its own")
    if "sliding_window" not in options and _slides(module):
        unknown.append("a sliding window that its mask alone tells")
    if unknown:
        raise NotImplementedError(f"attention with {', '.join(unknown)} in rows without padding")

    # Norms and rotary angles may leave float32 under autocast, which the kernels don't take.
    dtype = value.dtype
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    scale = query.size(-1) ** -0.5 if scaling is None else scaling
    query, key, value = (part[0].transpose(0, 1).to(dtype) for part in (query, key, value))
    return lengths_attention(query, key, value, row_lengths, scale, options.get("sliding_window"))[None], None


def _slides(layer: nn.Module) -> bool:
    """Whether an attention layer has a sliding window by its configuration."""
    config: Any = getattr(layer, "config", None)
    kinds = getattr(config, "layer_types", None)
    # A graph in which a layer's own number is read serves no other layer, and torch compiles eight of them at most.
    if kinds and "sliding_attention" not in kinds:
        return False
    if kinds and (number := getattr(layer, "layer_idx", None)) is not None:
        return kinds[number] == "sliding_attention"
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)

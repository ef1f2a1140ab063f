"""What torch's ring attention calls on a GPU, computed by torch's attention for the CPU, for which it has no operator.

All else of context parallelism is torch's own: how rows are cut and rearranged, the ring, its merging of partial
results and its backward pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

aten: Any = torch.ops.aten
_plain = F.scaled_dot_product_attention


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """`aten::_scaled_dot_product_flash_attention` on the CPU; what it returns for other devices' backward is zero."""
    out, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, scale=scale
    )
    nothing = torch.zeros((), dtype=torch.int64)
    lengths = (nothing, nothing.clone(), query.shape[2], key.shape[2])
    return out, log_sum, *lengths, nothing.clone(), nothing.clone(), query.new_zeros(())


def flash_attention_backward(grad: Tensor, *rest: Any, scale: float | None = None) -> Any:
    """`aten::_scaled_dot_product_flash_attention_backward` on the CPU."""
    tensors, (dropout_p, is_causal) = rest[:5], rest[9:11]
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad.contiguous(), *tensors, dropout_p, is_causal, scale=scale
    )


def scaled_dot_product_attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """torch's own, which calls the operator above where a row is shared."""
    if not isinstance(query, DTensor):
        return _plain(query, key, value, *args, **kwargs)
    assert not args and kwargs.pop("attn_mask", None) is None
    if kwargs.pop("enable_gqa", False):
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    return aten._scaled_dot_product_flash_attention(query, key, value, **kwargs)[0]


def install() -> Any:
    """Makes torch take these in this process, as long as the result lives."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_flash_attention", flash_attention, "CPU")
    library.impl("_scaled_dot_product_flash_attention_backward", flash_attention_backward, "CPU")
    F.scaled_dot_product_attention = scaled_dot_product_attention
    return library

"""Flash attention by lengths, whichever kernels of it are the fastest here: FlashAttention-4's, or torch's own.

torch brings FlashAttention-2. The package `flash-attn-4` has kernels for Hopper, which take half to two thirds of that
time (one H100, heads of 64 and 128 numbers, documents of 600 tokens and rows of 4096); where it is installed, they run
for heads of such widths on GPUs of compute capability 9. Both give and take the logarithm of the softmax's mass, which
tells parts of an attention apart.

Shapes: N queries, M keys, H query heads, K key heads, D head dimension, S segments.
"""

import importlib
import importlib.metadata
import math
import os
import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

FLASH_DTYPES = (torch.float16, torch.bfloat16)
"""What the kernels take."""

OWN = "OTPO_FLASH_ATTENTION"
"""A variable of the environment: `torch` leaves FlashAttention-4 alone where it is installed, `auto` does not."""

OLDEST = "4.0.0b36"
"""Of `flash-attn-4`, whose functions have other arguments and results before."""

_aten = torch.ops.aten


class Segments(NamedTuple):
    """Which queries see which keys: those of one segment the keys of the same one.

    Attributes:
        ends_q: `[S + 1]` int32: 0, and where the queries of each segment end.
        ends_k: `[S + 1]` int32, the same of keys. A segment may have none.
        longest_q: A bound of the segments' queries.
        longest_k: A bound of their keys.
        causal: Whether a query sees the keys up to its own place, both counted from the segment's end.
        left: How many keys before its own place a query sees; -1 for all.
    """

    ends_q: Tensor
    ends_k: Tensor
    longest_q: int
    longest_k: int
    causal: bool = True
    left: int = -1


def flash_can_run(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch's flash kernels take such heads: half precision on a GPU of compute capability 8.0 or later.

    Args:
        device: Of the model.
        dtype: That attention is computed in, which is autocast's where it is on.
        head_dim: Width of a head.
    """
    if device.type != "cuda" or torch.version.hip is not None or dtype not in FLASH_DTYPES:
        return False
    capable = torch.cuda.get_device_capability(device) >= (8, 0)
    return capable and head_dim <= 256 and head_dim % 8 == 0 and torch.backends.cuda.is_flash_attention_available()


def flash_kernels(device: torch.device, head_dim: int) -> str:
    """Whose kernels run, in words; where FlashAttention-4 is installed and does not run, why.

    Args:
        device: That [`flash_can_run`] on.
        head_dim: Width of a head.
    """
    reason = why_not_fourth(device, head_dim)
    if reason is None:
        return "FlashAttention-4"
    return "torch's kernels" if not _installed() else f"torch's kernels, since {reason}"


def why_not_fourth(device: torch.device, head_dim: int) -> str | None:
    """What keeps FlashAttention-4 from running; None if nothing does.

    Args:
        device: Of the tensors.
        head_dim: Width of a head.
    """
    if device.type != "cuda":
        return "there is no GPU"
    asked = os.environ.get(OWN, "auto")
    if asked == "torch":
        return f"{OWN}=torch"
    if asked != "auto":
        raise ValueError(f"`{OWN}={asked}` is not known. Set it to torch or auto.")
    if not 64 <= head_dim <= 128 or head_dim % 8:
        return f"heads of {head_dim} numbers were not tried with it"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "it was tried on GPUs of compute capability 9 alone"
    return _broken()


def flash_forward(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention within each segment, without a gradient.

    Args:
        query: `[N, H, D]`, contiguous.
        key: `[M, K, D]`, contiguous, H a multiple of K.
        value: `[M, K, D]`, contiguous.
        segments: Who sees whom.
        scale: Multiplies the products of queries and keys; None for `D ** -0.5`.

    Returns:
        The output `[N, H, D]`, and the logarithm of the softmax's mass `[H, N]` in float32: -inf, and an output of
        zeros, for a query that sees no key.
    """
    ends_q, ends_k, longest_q, longest_k, causal, _ = segments
    if why_not_fourth(query.device, query.size(-1)) is None:
        lengths = {"max_seqlen_q": longest_q, "max_seqlen_k": longest_k, **_of_fourth(segments)}
        with torch.cuda.device_of(query):
            output, log_mass, *_ = _fourth()._flash_attn_fwd(
                query, key, value, softmax_scale=scale, return_lse=True, **lengths
            )
        return output, log_mass
    output, log_mass, *_ = _aten._flash_attention_forward(
        *(query, key, value, ends_q, ends_k, longest_q, longest_k, 0.0, causal, False),
        scale=scale,
        **_window(segments),
    )
    return output, log_mass.masked_fill(log_mass == math.inf, -math.inf)  # torch's word for no mass is +inf


def flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_mass: Tensor,
    segments: Segments,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value: those of an attention over these keys whose whole mass is the one given.

    Args:
        grad: Of the output `[N, H, D]`, contiguous.
        query: As in [`flash_forward`].
        key: See there.
        value: See there.
        output: `[N, H, D]`, of all that a query sees, here or in other calls.
        log_mass: `[H, N]` float32, of the same.
        segments: Who sees whom.
        scale: See there.
    """
    ends_q, ends_k, longest_q, longest_k, causal, _ = segments
    if why_not_fourth(query.device, query.size(-1)) is None:
        lengths = {"max_seqlen_q": longest_q, "max_seqlen_k": longest_k, **_of_fourth(segments)}
        exact = torch.are_deterministic_algorithms_enabled()
        with torch.cuda.device_of(query):
            grads = _fourth()._flash_attn_bwd(
                query, key, value, output, grad, log_mass, softmax_scale=scale, deterministic=exact, **lengths
            )
        return grads[0], grads[1], grads[2]
    unused = torch.zeros(2, dtype=torch.uint64, device=query.device), query.new_empty(0)  # of dropout
    grads = _aten._flash_attention_backward(
        *(grad, query, key, value, output, log_mass, ends_q, ends_k, longest_q, longest_k, 0.0, causal, *unused),
        scale=scale,
        **_window(segments),
    )
    return grads[0], grads[1], grads[2]


def _window(segments: Segments) -> dict[str, int]:
    """Which keys a query sees, as torch's kernels are told; without a mask they are told nothing."""
    return {"window_size_left": segments.left, "window_size_right": 0} if segments.causal else {}


def attend_within(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    longest: int,
    scale: float | None = None,
    left: int = -1,
    keys: tuple[Tensor, int] | None = None,
) -> Tensor:
    """Causal attention of each token within its own segment, `[N, H, D]`, differentiable once.

    Args:
        query: `[N, H, D]`, float16 or bfloat16 on CUDA.
        key: `[M, K, D]`, H a multiple of K.
        value: `[M, K, D]`.
        ends: `[S + 1]` int32: 0, and where each segment ends.
        longest: A bound of the segments.
        scale: Multiplies the products of queries and keys; None for `D ** -0.5`.
        left: How many tokens before its own each one sees; -1 for all.
        keys: `ends` and `longest` of the keys, of which a query sees those up to its own place, both counted from the
            segment's end. None for those of the queries, and then M is N.
    """
    scale = query.size(-1) ** -0.5 if scale is None else scale
    parts = (part.contiguous() for part in (query, key, value))
    ends_k, longest_k = (ends, longest) if keys is None else keys
    return _attend_within(*parts, ends, ends_k, longest, longest_k, scale, left)[0]


# The two operators are opaque to `torch.compile`, which could not trace the kernels' wrappers.


@torch.library.custom_op("otpo::attend_within", mutates_args=())
def _attend_within(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    longest_q: int,
    longest_k: int,
    scale: float,
    left: int,
) -> tuple[Tensor, Tensor]:
    query, key, value = (part.contiguous() for part in (query, key, value))
    return flash_forward(query, key, value, Segments(ends_q, ends_k, longest_q, longest_k, True, left), scale)


@_attend_within.register_fake
def _(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    tokens, heads, _dim = query.shape
    return query.new_empty(query.shape), query.new_empty((heads, tokens), dtype=torch.float32)


@torch.library.custom_op("otpo::attend_within_backward", mutates_args=())
def _attend_within_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_mass: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    longest_q: int,
    longest_k: int,
    scale: float,
    left: int,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, query, key, value = (part.contiguous() for part in (grad, query, key, value))
    segments = Segments(ends_q, ends_k, longest_q, longest_k, True, left)
    return flash_backward(grad, query, key, value, output, log_mass, segments, scale)


@_attend_within_backward.register_fake
def _(_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:5])
    ctx.numbers = inputs[5:]


def _gradients(ctx: Any, grad: Tensor, _grad_log_mass: Tensor) -> tuple[Tensor | None, ...]:
    return *_attend_within_backward(grad, *ctx.saved_tensors, *ctx.numbers), *[None] * 6


_attend_within.register_autograd(_gradients, setup_context=_keep_for_backward)


# FlashAttention-4


def _of_fourth(segments: Segments) -> dict[str, Any]:
    """Segments as its functions name them; it counts a window's absence as None."""
    windowed = segments.left >= 0
    return {
        "cu_seqlens_q": segments.ends_q,
        "cu_seqlens_k": segments.ends_k,
        "causal": segments.causal,
        "window_size_left": segments.left if windowed else None,
        "window_size_right": 0 if windowed and segments.causal else None,
    }


def _installed() -> bool:
    return _version() is not None


@cache
def _version() -> str | None:
    try:
        return importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def _broken() -> str | None:
    """Why the package can't be used here; None if it can. Looked into once."""
    version = _version()
    if version is None:
        return "`flash-attn-4` is not installed"
    if TorchVersion(version) < OLDEST:  # any package's version, in spite of the name
        return f"flash-attn-4 {version} is older than {OLDEST}"
    try:
        module = _fourth()
    except Exception as error:  # whatever a package for another CUDA, driver or Python raises
        return f"flash-attn-4 {version} can't be imported: {type(error).__name__}: {error}"
    missing = [name for name in ("_flash_attn_fwd", "_flash_attn_bwd") if not hasattr(module, name)]
    if missing:
        return f"flash-attn-4 {version} has no {' and no '.join(missing)}"
    # Its kernels are compiled when they are called, which is when a driver or a CUDA that does not fit speaks up.
    part = torch.zeros(1, 1, 64, dtype=torch.bfloat16, device="cuda")
    ends = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
    one = _of_fourth(Segments(ends, ends, 1, 1))
    try:
        module._flash_attn_fwd(part, part, part, max_seqlen_q=1, max_seqlen_k=1, return_lse=True, **one)
    except Exception as error:
        return f"flash-attn-4 {version} does not run here: {type(error).__name__}: {error}"
    return None


@cache
def _fourth() -> Any:
    # Its compiler says of each kernel that one argument is a plain object, which is meant so.
    warnings.filterwarnings("ignore", "Argument aux_data .* cannot be converted to a JitArgument", UserWarning)
    return importlib.import_module("flash_attn.cute.interface")

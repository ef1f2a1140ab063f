"""torch's flash kernels for rows by lengths, written out in plain torch, in any precision and on any device.

Shapes: N queries, M keys, H query heads, K key heads, D head dimension.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    _longest_q: int,
    _longest_k: int,
    _dropout: float,
    causal: bool,
    _debug: bool,
    scale: float,
    window_size_left: int = -1,
    window_size_right: int = 0,
) -> tuple[Any, ...]:
    """Output `[N, H, D]` and logarithm of the softmax's mass `[H, N]`: +inf where a query has no keys, as there."""
    output = torch.zeros_like(query)
    log_mass = query.new_full((query.size(1), len(query)), math.inf)
    for rows, seen in _segments(ends_q, ends_k):
        scores = _scores(query[rows], key[seen], causal, scale, window_size_left)
        log_mass[:, rows] = scores.logsumexp(-1)
        output[rows] = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), _for_queries(value[seen], query))
    return output, log_mass


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_mass: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    _longest_q: int,
    _longest_k: int,
    _dropout: float,
    causal: bool,
    *_unused: Tensor,
    scale: float,
    window_size_left: int = -1,
    window_size_right: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value: probabilities come from the mass that is given, as there."""
    groups = query.size(1) // key.size(1)
    grads = grad_query, grad_key, grad_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    delta = (grad * output).sum(-1).t()
    for rows, seen in _segments(ends_q, ends_k):
        scores = _scores(query[rows], key[seen], causal, scale, window_size_left)
        shares = (scores - log_mass[:, rows, None]).exp()
        of_shares = torch.einsum("nhd,mhd->hnm", grad[rows], _for_queries(value[seen], query))
        of_scores = shares * (of_shares - delta[:, rows, None]) * scale
        grad_query[rows] += torch.einsum("hnm,mhd->nhd", of_scores, _for_queries(key[seen], query))
        grad_key[seen] += torch.einsum("hnm,nhd->mhd", of_scores, query[rows]).unflatten(1, (-1, groups)).sum(2)
        grad_value[seen] += torch.einsum("hnm,nhd->mhd", shares, grad[rows]).unflatten(1, (-1, groups)).sum(2)
    return grads


def _segments(ends_q: Tensor, ends_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Each segment's queries and keys, where it has both."""
    of_queries, of_keys = ends_q.tolist(), ends_k.tolist()
    for i in range(len(of_queries) - 1):
        rows, seen = slice(of_queries[i], of_queries[i + 1]), slice(of_keys[i], of_keys[i + 1])
        if rows.start < rows.stop and seen.start < seen.stop:
            yield rows, seen


def _for_queries(part: Tensor, query: Tensor) -> Tensor:
    return part.repeat_interleave(query.size(1) // part.size(1), 1)


def _scores(query: Tensor, key: Tensor, causal: bool, scale: float, left: int) -> Tensor:
    scores = torch.einsum("nhd,mhd->hnm", query, _for_queries(key, query)) * scale
    if not causal:
        return scores
    places = torch.arange(len(query)) + len(key) - len(query)  # counted from the segment's end, as there
    distance = places[:, None] - torch.arange(len(key))
    sees = (distance >= 0) & ((distance <= left) | torch.tensor(left < 0))
    return scores.masked_fill(~sees, -math.inf)

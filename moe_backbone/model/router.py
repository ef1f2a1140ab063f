"""The router: which experts a token takes, the losses that keep the load even, and how even it is.

Shapes: T tokens, E experts, K experts that a token takes, L layers.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_compass import CompassConfig


class CompassRouter(nn.Module):
    """Softmax router in float32 over all experts, then the K most probable ones.

    With `router_bias_update_speed > 0` a bias for each expert is added to the probabilities for the choice alone; the
    weights stay those of the router (arXiv 2408.15664).
    """

    e_score_correction_bias: Tensor | None

    def __init__(self, config: CompassConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        bias = torch.zeros(config.num_experts) if config.router_bias_update_speed else None
        self.register_buffer("e_score_correction_bias", bias)

    def _apply(self, fn: Any, recurse: bool = True) -> "CompassRouter":
        """Leaves the biases in float32 where the model is cast: bfloat16 would lose their small steps."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if bias is not None and moved is not None and moved.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(moved.device)
        return self

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Chooses experts.

        Args:
            hidden_states: `[T, hidden]`.

        Returns:
            Logits `[T, E]` in float32, weights `[T, K]` in the dtype of `hidden_states`, experts `[T, K]` in int64.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states.float(), self.weight.float())
            probabilities = logits.softmax(dim=-1)
        if self.e_score_correction_bias is None:
            weights, experts = probabilities.topk(self.top_k, dim=-1)
        else:
            experts = (probabilities + self.e_score_correction_bias).topk(self.top_k, dim=-1).indices
            weights = probabilities.gather(-1, experts)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights.to(hidden_states.dtype), experts


def load_balancing_loss(logits: Sequence[Tensor], experts: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Mean over layers of `E * sum_e f_e p_e` (arXiv 2101.03961, eq. 4 to 6), which is K at an even load.

    `f_e` is how many of the layer's tokens took expert e, over their number; `p_e` its mean probability. transformers'
    own function takes both over all layers together, where uneven layers can even each other out.

    Args:
        logits: A tensor `[T, E]` for each layer.
        experts: A tensor `[T, K]` for each layer.
        mask: `[T]`, nonzero for the tokens that count; None for all.
    """
    losses = []
    for layer_logits, layer_experts in zip(logits, experts, strict=True):
        share, probability = layer_logits.new_ones(len(layer_logits)), layer_logits.softmax(dim=-1)
        if mask is not None:
            share = mask.reshape(-1).to(share)
        taken = torch.zeros_like(probability).scatter_(1, layer_experts, 1.0)
        tokens = share.sum().clamp(min=1)
        fraction, mean = share @ taken / tokens, share @ probability / tokens
        losses.append(probability.size(-1) * (fraction * mean).sum())
    return torch.stack(losses).mean()


def router_z_loss(logits: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Mean over layers and tokens of `logsumexp(logits)^2` (arXiv 2202.08906, eq. 5).

    Args:
        logits: A tensor `[T, E]` for each layer.
        mask: `[T]`, nonzero for the tokens that count; None for all.
    """
    squares = torch.stack([layer.logsumexp(dim=-1).square() for layer in logits])
    if mask is None:
        return squares.mean()
    share = mask.reshape(-1).to(squares)
    return (squares * share).mean(dim=0).sum() / share.sum().clamp(min=1)


def expert_load(experts: Sequence[Tensor], num_experts: int, mask: Tensor | None = None) -> Tensor:
    """How many tokens each expert of each layer takes, `[L, E]` in int64.

    Args:
        experts: A tensor `[T, K]` for each layer.
        num_experts: E.
        mask: `[T]`, nonzero for the tokens that count; None for all.
    """
    stacked = torch.stack(tuple(experts))
    ones = torch.ones_like(stacked)
    if mask is not None:
        ones = ones * (mask.reshape(-1, 1) != 0)
    load = stacked.new_zeros(len(experts), num_experts)
    return load.scatter_add_(1, stacked.flatten(1), ones.flatten(1))


def router_health(load: Tensor) -> dict[str, float]:
    """How even the load is.

    Args:
        load: Tokens of each expert, `[L, E]`.

    Returns:
        `load_entropy`: entropy of an expert's share of its layer's load over that of an even load, mean over layers,
        0 to 1. `max_load`: the busiest expert's load over its layer's mean, the worst layer's, 1 to E.
        `dead_experts`: how many experts took no token.
    """
    load = load.cpu().double()  # not every device has float64, and the numbers are read on the host
    share = load / load.sum(dim=-1, keepdim=True).clamp(min=1)
    entropy = torch.special.entr(share).sum(dim=-1).mean()
    return {
        "load_entropy": float(entropy) / math.log(load.size(-1)) if load.size(-1) > 1 else 1.0,
        "max_load": float(share.max() * load.size(-1)),
        "dead_experts": float((load == 0).sum()),
    }


@torch.no_grad()
def update_router_biases(routers: Iterable[CompassRouter], load: Tensor, speed: float) -> None:
    """Raises the biases of experts with less than their layer's mean load by `speed`, and lowers the others'.

    Args:
        routers: The routers, layer by layer, MTP layers last.
        load: Tokens of each expert since the last update, over all processes, `[L, E]`. Routers past the L-th one,
            those of MTP layers that did not run, stay as they are.
        speed: The step, arXiv 2408.15664's u.

    Raises:
        ValueError: There are fewer than L routers, or they have no biases.
    """
    routers = list(routers)
    if len(load) > len(routers):
        raise ValueError(
            f"The argument `load` has {len(load)} layers, but there are {len(routers)} router(s). Pass the routers of "
            "all layers of the model that the load is of."
        )
    for router, layer_load in zip(routers, load.float(), strict=False):
        bias = router.e_score_correction_bias
        if bias is None:
            raise ValueError("The routers have no biases: set `router_bias_update_speed` before the model is made.")
        bias += speed * (layer_load.mean() - layer_load).sign().to(bias)

"""The router: it chooses each token's experts; losses and biases keep the experts' load even; metrics say how even.

Shapes: T tokens, E experts, K experts that a token takes, H hidden size, L layers. A suffix such as `logits_TE` names
a tensor's dimensions.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_compass import CompassConfig


class CompassRouter(nn.Module):
    """Takes a softmax over all experts in float32, then the K most probable experts.

    With `router_bias_update_speed > 0` each expert has a bias. The router adds the biases to the probabilities to
    choose experts, and weighs the chosen experts by the probabilities without them (arXiv 2408.15664).
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
        """Casts and moves the router, but keeps the biases in float32: bfloat16 would lose their small steps."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if bias is not None and moved is not None and moved.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(moved.device)
        return self

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Chooses each token's experts and weighs them.

        Args:
            hidden_states: `[T, H]`.

        Returns:
            Logits `[T, E]` in float32, weights `[T, K]` in the dtype of `hidden_states`, experts `[T, K]` in int64.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits_TE = F.linear(hidden_states.float(), self.weight.float())
            probabilities_TE = logits_TE.softmax(dim=-1)
        if self.e_score_correction_bias is None:
            weights_TK, experts_TK = probabilities_TE.topk(self.top_k, dim=-1)
        else:
            experts_TK = (probabilities_TE + self.e_score_correction_bias).topk(self.top_k, dim=-1).indices
            weights_TK = probabilities_TE.gather(-1, experts_TK)
        if self.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return logits_TE, weights_TK.to(hidden_states.dtype), experts_TK


def load_balancing_loss(
    logits: Sequence[Tensor] | Tensor,
    experts: Sequence[Tensor],
    mask: Tensor | None = None,
    load: Tensor | None = None,
) -> Tensor:
    """Mean over layers of `E * sum_e f_e p_e` (arXiv 2101.03961, eq. 4 to 6), which is K at an even load.

    `f_e` is the share of the layer's tokens that took expert e, and `p_e` the mean of expert e's probability.
    transformers' own function pools all layers before it takes the product, so that uneven layers can even each other
    out.

    Args:
        logits: A tensor `[T, E]` for each layer, or one of all layers, `[L, T, E]`.
        experts: A tensor `[T, K]` for each layer.
        mask: `[T]`, nonzero for the tokens that count; None for all.
        load: What [`expert_load`] counts by these experts and this mask, `[L, E]`; None counts it here.
    """
    probabilities_LTE = _all_layers(logits).softmax(dim=-1)
    layers, tokens, num_experts = probabilities_LTE.shape
    if load is None:
        load = expert_load(experts, num_experts, mask)
    if load.shape != (layers, num_experts):
        raise ValueError(
            f"The experts' load is of {list(load.shape)}, and the logits are of {layers} layers with {num_experts} "
            "experts. Give `experts`, and `load`, of the same layers."
        )
    if mask is not None:
        counts_T = _counts(mask, probabilities_LTE)
        probabilities_LTE, tokens = probabilities_LTE * counts_T.unsqueeze(-1), counts_T.sum().clamp(min=1)
    fractions_LE, means_LE = load.to(probabilities_LTE) / tokens, probabilities_LTE.sum(dim=1) / tokens
    return num_experts * (fractions_LE * means_LE).sum() / layers


def router_z_loss(logits: Sequence[Tensor] | Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over layers and tokens of `logsumexp(logits)^2` (arXiv 2202.08906, eq. 5).

    Args:
        logits: A tensor `[T, E]` for each layer, or one of all layers, `[L, T, E]`.
        mask: `[T]`, nonzero for the tokens that count; None for all.
    """
    squares_LT = _all_layers(logits).logsumexp(dim=-1).square()
    if mask is None:
        return squares_LT.mean()
    counts_T = _counts(mask, squares_LT)
    return (squares_LT * counts_T).mean(dim=0).sum() / counts_T.sum().clamp(min=1)


def _all_layers(logits: Sequence[Tensor] | Tensor) -> Tensor:
    """The logits of all layers in one tensor, of at least float32: an operation starts once, not once a layer."""
    layers = logits if isinstance(logits, Tensor) else torch.stack(tuple(logits))
    return layers.to(torch.promote_types(layers.dtype, torch.float32))


def _counts(mask: Tensor, like: Tensor) -> Tensor:
    """1 for the tokens that count and 0 for the others, `[T]` in the dtype of `like`."""
    return (mask.reshape(-1) != 0).to(like)


def expert_load(experts: Sequence[Tensor], num_experts: int, mask: Tensor | None = None) -> Tensor:
    """Number of tokens that each expert of each layer takes, `[L, E]` in int64.

    Args:
        experts: A tensor `[T, K]` for each layer.
        num_experts: E.
        mask: `[T]`, nonzero for the tokens that count; None for all.
    """
    experts_LTK = torch.stack(tuple(experts))
    counts_LTK = torch.ones_like(experts_LTK)
    if mask is not None:
        counts_LTK = counts_LTK * (mask.reshape(-1, 1) != 0)
    load_LE = experts_LTK.new_zeros(len(experts), num_experts)
    return load_LE.scatter_add_(1, experts_LTK.flatten(1), counts_LTK.flatten(1))


def router_health(load: Tensor) -> dict[str, float]:
    """Metrics of how even the experts' load is.

    Args:
        load: Number of tokens that each expert took, `[L, E]`.

    Returns:
        `load_entropy`: the entropy of the experts' shares of their layer's load, divided by the entropy of an even
        load, mean over layers, 0 to 1. `max_load`: the busiest expert's load divided by its layer's mean load, in the
        worst layer, 1 to E. `dead_experts`: the number of experts that took no token.
    """
    load = load.cpu().double()  # not every device has float64, and the host reads the numbers anyway
    share = load / load.sum(dim=-1, keepdim=True).clamp(min=1)
    entropy = torch.special.entr(share).sum(dim=-1).mean()
    return {
        "load_entropy": float(entropy) / math.log(load.size(-1)) if load.size(-1) > 1 else 1.0,
        "max_load": float(share.max() * load.size(-1)),
        "dead_experts": float((load == 0).sum()),
    }


@torch.no_grad()
def update_router_biases(routers: Iterable[CompassRouter], load: Tensor, speed: float) -> None:
    """Raises the bias of each expert below its layer's mean load by `speed`, and lowers it above the mean.

    Args:
        routers: The routers, layer by layer, MTP layers last.
        load: Number of tokens that each expert took since the last update, over all processes, `[L, E]`. Routers past
            the L-th one stay as they are; they belong to MTP layers that did not run.
        speed: The step, arXiv 2408.15664's u.

    Raises:
        ValueError: `routers` has fewer than L routers, or they have no biases.
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

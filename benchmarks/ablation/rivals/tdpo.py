"""TDPO2: DPO whose margin holds the rejected response back from drifting away from the reference.

Source: TDPO, arXiv 2404.11999:

    loss = -log sigmoid(beta ((m_c - m_r) - alpha (KL_r - sg(KL_c)))),   KL_x = sum_t KL(pi_ref(.|y<t) || pi(.|y<t))

with the log-ratios m, and sg for no gradient. TRL sums a row's log-probabilities, so `alpha KL_t` added to each of the
policy's gives this margin. Shapes: B pairs, T scored positions, V words; rows are chosen, then rejected responses.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from otpo import OTPOTrainer
from otpo.training.scoring import Scored

_TOKENS = 1024
"""Positions whose `V` logits are held at a time."""
_SCALES = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")


class TDPOTrainer(OTPOTrainer):
    """An [`otpo.OTPOTrainer`] with TDPO2's divergence; with `weighting="uniform"` it is TDPO2.

    Under other weights the divergence of each token is weighted too, as in TIS-DPO. The logged `rewards/*` hold the
    divergence, `rewards/*_unweighted` do not.

    Args:
        model: As in [`otpo.OTPOTrainer`], and so are all arguments that are not named here.
        alpha: Weight of the divergence, >= 0; the paper's is 0.5.

    Raises:
        ValueError: The run has an adapter, stored reference log-probabilities, sharded weights, scaled logits, or
            another loss or divergence than DPO's own; the message names it.
    """

    def __init__(self, model: Any, *args: Any, alpha: float = 0.5, **kwargs: Any) -> None:
        if not alpha >= 0:
            raise ValueError(f"`alpha` must be at least 0, got {alpha}.")
        self.alpha = alpha
        super().__init__(model, *args, **kwargs)
        text = self.model.config.get_text_config()
        obstacles = {
            "an adapter: train all weights": is_peft_model(self.model),
            "`precompute_ref_log_probs`: set it to False": self.args.precompute_ref_log_probs,
            "another loss: set `loss_type=['sigmoid']`": self.loss_types != ["sigmoid"],
            "another divergence: set `f_divergence_type='reverse_kl'`": self.args.f_divergence_type != "reverse_kl",
            "`use_weighting`: set it to False": self.args.use_weighting,
            "weights sharded by FSDP or DeepSpeed": self.is_fsdp_enabled or self.is_deepspeed_enabled,
            "capped logits (`final_logit_softcapping`)": getattr(text, "final_logit_softcapping", None),
            **{f"scaled logits (`{name}`)": getattr(text, name, None) not in (None, 1.0) for name in _SCALES},
        }
        if found := [what for what, there in obstacles.items() if there]:
            raise ValueError(f"TDPO2 can't be trained with {'; '.join(found)}.")

    def score_batch(
        self, model: Callable[..., Any], inputs: Mapping[str, Any], *, reference: bool = True, **asked: Any
    ) -> Scored:
        """As in [`otpo.OTPOTrainer`], with the divergence in the policy's outputs."""
        if not reference:
            raise ValueError("TDPO2 needs the reference's distributions: explain with `reference=True`.")
        policy: Any = self.accelerator.unwrap_model(self.model)
        other: Any = self.accelerator.unwrap_model(self.ref_model)
        with _states(policy) as of_policy, _states(other) as of_reference:
            scored = super().score_batch(model, inputs, **asked)
        heads = policy.get_output_embeddings(), other.get_output_embeddings()
        divergence = torch.zeros_like(scored.policy_logps)
        rows = len(scored.mask) // 2
        for side, grad in ((slice(0, rows), False), (slice(rows, None), torch.is_grad_enabled())):
            mask = scored.mask[side]
            own, other = (kept[-1][side, :-1][mask] for kept in (of_policy, of_reference))
            with torch.set_grad_enabled(grad):
                divergence[side] = divergence[side].masked_scatter(mask, _divergence(own, other, *heads))
        log_probs = scored.outputs.log_probs + self.alpha * divergence
        outputs = type(scored.outputs)(**{**scored.outputs, "log_probs": log_probs})
        return dataclasses.replace(scored, outputs=outputs)


def _divergence(policy: Tensor, reference: Tensor, policy_head: Any, reference_head: Any) -> Tensor:
    """`KL(reference || policy)` in nats at N positions, `(N,)` float32, from last hidden states `(N, D)`."""

    def part(own: Tensor, other: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = reference_head(other.to(reference_head.weight.dtype)).float().log_softmax(1)
        found = policy_head(own.to(policy_head.weight.dtype)).float().log_softmax(1)
        return (wanted.exp() * (wanted - found)).sum(1)

    parts = [
        checkpoint(part, own, other, use_reentrant=False)
        for own, other in zip(policy.split(_TOKENS), reference.split(_TOKENS), strict=True)
    ]
    return torch.cat(parts) if parts else policy.new_zeros(0, dtype=torch.float32)  # pyright: ignore[reportArgumentType]


@contextmanager
def _states(causal_lm: Any) -> Iterator[list[Tensor]]:
    """The backbone's last hidden states, with their gradient."""
    kept: list[Tensor] = []
    handle = causal_lm.base_model.register_forward_hook(
        lambda _module, _args, output: kept.append(output.last_hidden_state)
    )
    try:
        yield kept
    finally:
        handle.remove()

"""A DPO step of a 1.7B model, the yardstick for what the token weights may cost.

The model has the shape of Qwen3-1.7B and random weights. A step is what DPO needs and no more: the policy's
log-probabilities with gradient checkpointing, the reference's without gradients, backward, AdamW, in bfloat16.
"""

import torch
from torch.nn.functional import cross_entropy, logsigmoid
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.harness import measure

PAIRS, LENGTH = 8, 1024


def dpo_step_ms() -> float:
    """Median time of a step of 8 pairs of 1024 tokens, in ms."""
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        use_cache=False,
    )
    with torch.device("cuda"):
        policy = Qwen3ForCausalLM(config).bfloat16()
        reference = Qwen3ForCausalLM(config).bfloat16().eval().requires_grad_(False)
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    policy.train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
    ids = torch.randint(config.vocab_size, (2 * PAIRS, LENGTH), device="cuda")

    def step() -> None:
        with torch.no_grad():
            wanted = _sequence_logps(reference, ids)
        chosen, rejected = (_sequence_logps(policy, ids) - wanted).chunk(2)
        loss = -logsigmoid(0.1 * (chosen - rejected)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss of the DPO step is {loss}")

    step()
    step()
    return measure(step, seconds=4, most=5)[0]


def _sequence_logps(model: Qwen3ForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    rows = zip(hidden, ids[:, 1:], strict=True)
    return torch.stack([checkpoint(_logps, model.lm_head.weight, *row, use_reentrant=False) for row in rows])


def _logps(head: torch.Tensor, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -cross_entropy((hidden @ head.T).float(), targets, reduction="sum")

"""Tiny Compass models with weights large enough to tell tokens, experts and positions apart."""

from collections.abc import Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moe_backbone import CompassConfig, CompassForCausalLM

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm", "memcpy")
GROUPED = ("grouped_mm", "memcpy")  # run by torch's grouped products
TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
}
"""Sizes of any Mixture-of-Experts model of transformers."""

SIZES = {**TINY, "moe_intermediate_size": 24, "num_experts": 5, "max_position_embeddings": 64}

FULL = {"num_mtp_layers": 1, "num_shared_experts": 2, "router_bias_update_speed": 1e-3}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 16}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32, with sums in another order


def compass_config(**changes: Any) -> CompassConfig:
    return CompassConfig(**{**SIZES, **changes})


def compass_model(seed: int = 0, model_class: Any = CompassForCausalLM, **changes: Any) -> Any:
    """A random model in training mode; `implementation` and `attention` choose how experts and attention run.

    Norms and the routers' biases get random values too, since ones and zeros would hide a missing one.
    """
    implementation = changes.pop("implementation", None)
    attention = changes.pop("attention", None)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = model_class._from_config(compass_config(**changes), attn_implementation=attention)
    if implementation is not None:
        model.set_experts_implementation(implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return model.train()


def token_ids(rows: int, length: int, seed: int = 0, vocabulary: int = 61) -> Tensor:
    return torch.randint(1, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradient of each parameter that has one."""
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def assert_gradients_close(left: dict[str, Tensor], right: dict[str, Tensor], **tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def pack(documents: Sequence[Tensor]) -> dict[str, Tensor]:
    """One row that holds the documents one after the other, as `CompassForCausalLM.forward` wants it."""
    labels = torch.cat(list(documents)).clone()
    starts = torch.tensor([0, *(len(document) for document in documents[:-1])]).cumsum(0)
    labels[starts] = -100
    return {
        "input_ids": torch.cat(list(documents))[None],
        "position_ids": torch.cat([torch.arange(len(document)) for document in documents])[None],
        "labels": labels[None],
    }


def overfit(model: Any, ids: Tensor, steps: int = 60, learning_rate: float = 3e-3) -> float:
    """Trains on one batch until the model knows it; the last loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    model.train()
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def qwen(model, **changes):
    twin = Qwen3MoeForCausalLM._from_config(
        Qwen3MoeConfig(**{**SIZES, **changes}, norm_topk_prob=model.config.norm_topk_prob, intermediate_size=8)
    )
    twin.load_state_dict(model.state_dict())
    return twin.train(model.training)


def assert_same_state(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    different = [name for name in left if left[name].dtype != right[name].dtype or not left[name].equal(right[name])]
    assert not different, different


def stored_keys(folder):
    keys = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            keys |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return keys


def ahead(model, ids, position_ids=None, attention_mask=None):
    """The MTP layers' states in training."""
    hidden = model.model(
        ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    ).last_hidden_state
    embedded = model.model.embed_tokens(ids)
    return model.model.predict_ahead(hidden, embedded, attention_mask, position_ids).states

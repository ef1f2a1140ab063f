"""A layer of Compass-v3's width: what `otpo pretrain` runs by default on a GPU but for attention, beside float32.

Each gradient is compared by its name. In bfloat16 rounding sends some tokens to other experts, whoever computes, so
the default may be as far from float32 as `grouped_mm` is, and no further. `pytest -rP` shows the errors.
"""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_backbone import CompassForCausalLM
from moe_backbone.model.presets import preset
from moe_backbone.pretraining.token_losses import find_token_loss
from otpo.layouts.compiled import compile_layers

pytestmark = pytest.mark.gpu
WIDE: dict[str, Any] = {"num_hidden_layers": 1, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 32_000}
TOKENS, DEVICE = 4096, torch.device("cuda")


def gradients_of(dtype: torch.dtype, experts: str, compiled: bool) -> tuple[float, dict[str, Tensor]]:
    """The loss of seeded tokens, and each parameter's gradient on the CPU, of the same weights whatever the type."""
    config = preset("compass-v3", **WIDE)
    with DEVICE:
        torch.manual_seed(0)
        model: Any = CompassForCausalLM._from_config(config, attn_implementation="sdpa")
    model.train().to(torch.bfloat16).to(dtype)
    model.set_experts_implementation(experts)
    if compiled:
        model.token_loss = find_token_loss("auto", model, DEVICE)
        compile_layers(model, dynamic=None)
    ids = torch.randint(3, config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: value.grad.float().cpu() for name, value in model.named_parameters()}


def errors(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((value - exact[name]).norm() / exact[name].norm()) for name, value in gradients.items()}


def test_default_is_as_near_to_float32_as_grouped_products():
    loss, exact = gradients_of(torch.float32, "eager", compiled=False)
    plain_loss, plain = gradients_of(torch.bfloat16, "grouped_mm", compiled=False)
    default_loss, default = gradients_of(torch.bfloat16, "memcpy", compiled=True)
    assert plain_loss == pytest.approx(loss, rel=1e-3)
    assert default_loss == pytest.approx(loss, rel=1e-3)
    of_plain, of_default = errors(plain, exact), errors(default, exact)
    assert set(of_plain) == set(of_default) == set(exact)
    for name, error in of_default.items():
        sys.stdout.write(f"{name},{of_plain[name]:.4f},{error:.4f}\n")
        assert error < 1.2 * of_plain[name] + 2e-3, name

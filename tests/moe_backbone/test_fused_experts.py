"""experts_implementation="fused": SwiGLU experts against their own eager forward, and what it refuses."""

import copy
from types import SimpleNamespace

import pytest
import torch
from compass_helpers import TINY
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moe_backbone import CompassConfig
from moe_backbone.experts_choice import ExpertsKind, find_experts, known_experts, obstacle
from moe_backbone.fused_experts import why_not_fused
from moe_backbone.memcpy_experts import ADAPTERS
from moe_backbone.model.moe_block import CompassExperts

SWIGLU = {
    "mixtral": (MixtralExperts, MixtralConfig(**TINY, intermediate_size=24, num_local_experts=5)),
    "qwen3": (Qwen3MoeExperts, Qwen3MoeConfig(**TINY, moe_intermediate_size=24, num_experts=5)),
    "compass": (CompassExperts, CompassConfig(hidden_size=32, moe_intermediate_size=24, num_experts=5)),
}
OTHERS = {
    "is not SwiGLU": (MixtralExperts, {"num_local_experts": 6, "intermediate_size": 24, "hidden_act": "gelu"}),
    "has biases": (
        GptOssExperts,
        {"num_local_experts": 6, "intermediate_size": 24, "swiglu_alpha": 1.7, "swiglu_limit": 0.6},
    ),
    "transposed": (AriaExperts, {"moe_num_experts": 6, "intermediate_size": 24}),
    "has no gate": (
        NemotronHExperts,
        {"n_routed_experts": 6, "moe_intermediate_size": 24, "moe_latent_size": None, "mlp_hidden_act": "relu2"},
    ),
}


def other_experts(reason):
    of_class, sizes = OTHERS[reason]
    return of_class(SimpleNamespace(hidden_size=32, **sizes, _experts_implementation="fused"))


def swiglu_experts(name):
    of_class, config = SWIGLU[name]
    module = of_class(copy.deepcopy(config))
    for weight in module.parameters():
        weight.data = torch.randn(weight.shape) * weight.size(-1) ** -0.5
    return module


@pytest.mark.parametrize("name", SWIGLU)
def test_equals_eager(name):
    module = swiglu_experts(name)
    index, weights = torch.rand(19, 5).argsort(1)[:, :2], torch.rand(19, 2)
    x, grad = torch.randn(2, 19, 32)
    found = []
    for implementation in ("eager", "fused"):
        module.config._experts_implementation = implementation
        leaves = {"x": x.clone().requires_grad_(), "router": weights.clone().requires_grad_()}
        leaves |= dict(module.named_parameters())
        output = module(leaves["x"], index, leaves["router"])
        gradients = torch.autograd.grad(output, list(leaves.values()), grad)
        found.append({"output": output, **dict(zip(leaves, gradients, strict=True))})
    for name, eager in found[0].items():
        torch.testing.assert_close(found[1][name], eager, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("reason", OTHERS)
def test_other_experts_are_refused_with_a_remedy(reason):
    module = other_experts(reason)
    assert reason in why_not_fused(module)
    with pytest.raises(ValueError, match="Set experts_implementation='memcpy'"):
        module(torch.randn(3, 32), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1))


def test_adapters_on_spread_experts_are_refused():
    module = swiglu_experts("qwen3")
    assert why_not_fused(module) is None
    vars(module)[ADAPTERS] = [object()]
    assert "adapters" in why_not_fused(module)


def test_what_is_in_the_way_is_said_before_anything_runs():
    (kind,) = find_experts(torch.nn.Sequential(swiglu_experts("mixtral").bfloat16()))
    assert kind.not_fused is None and "fused" in known_experts()
    assert obstacle("fused", [kind], "cuda", 4, True) is None
    assert obstacle("fused", [kind], "cuda", 4, False) == "Triton is not installed"
    assert "bfloat16 on a GPU" in obstacle("fused", [kind], "cpu", 4, True)
    assert "bfloat16 on a GPU" in obstacle("fused", [kind._replace(dtype=torch.float32)], "cuda", 4, True)
    (other,) = find_experts(torch.nn.Sequential(other_experts("has no gate")))
    assert obstacle("fused", [other], "cuda", 4, True) == "NemotronHExperts has no gate"
    assert isinstance(other, ExpertsKind) and obstacle("memcpy", [other], "cuda", 4, True) is None

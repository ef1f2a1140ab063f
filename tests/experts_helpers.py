"""Small MoE models of transformers, and experts modules with each flag that its experts interface knows."""

import copy
from types import SimpleNamespace

import pytest
import torch
from compass_helpers import SIZES, TINY
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from moe_backbone import CompassConfig

try:
    from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
except ImportError:  # younger than the lowest transformers that is supported
    MuseSparkExperts = None

COMMON = {**TINY, "max_position_embeddings": 64}
CONFIGS = {
    "mixtral": MixtralConfig(**COMMON, intermediate_size=24, num_local_experts=5),
    "qwen3_moe": Qwen3MoeConfig(**COMMON, moe_intermediate_size=24, num_experts=5),
    "olmoe": OlmoeConfig(**COMMON, intermediate_size=24, num_experts=5),
    "glm4_moe": Glm4MoeConfig(**COMMON, moe_intermediate_size=24, n_routed_experts=6, first_k_dense_replace=1),
    "gpt_oss": GptOssConfig(**COMMON, intermediate_size=24, num_local_experts=5),
    "compass": CompassConfig(**SIZES),
}
EXPERTS = {
    "gated": (MixtralExperts, {"num_local_experts": 6, "intermediate_size": 24, "hidden_act": "gelu"}),
    "interleaved, transposed, biases": (
        GptOssExperts,
        {"num_local_experts": 6, "intermediate_size": 24, "swiglu_alpha": 1.7, "swiglu_limit": 0.6},
    ),
    "transposed": (AriaExperts, {"moe_num_experts": 6, "intermediate_size": 24}),
    "not gated": (
        NemotronHExperts,
        {"n_routed_experts": 6, "moe_intermediate_size": 24, "moe_latent_size": None, "mlp_hidden_act": "relu2"},
    ),
    "norm after": (
        MuseSparkExperts,
        {
            "num_local_experts": 6,
            "moe_hidden_size": 32,
            "moe_intermediate_size": 24,
            "hidden_act": "silu",
            "post_norm_eps": 1e-6,
        },
    ),
}


def make_model(name, implementation="memcpy", seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(CONFIGS[name]), experts_implementation=implementation, attn_implementation="eager", dtype=dtype
    )
    for parameter in model.parameters():  # ones and zeros would hide a parameter that is left out
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def make_experts(name, implementation="memcpy", seed=0):
    of_class, sizes = EXPERTS[name]
    if of_class is None or not hasattr(of_class, "_apply_gate"):
        pytest.skip("this transformers has no such experts")
    config = SimpleNamespace(**{"hidden_size": 32, **sizes}, _experts_implementation=implementation)
    module = of_class(config)
    torch.manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    return module


def prompts(rows=3, length=9):
    return torch.randint(0, 61, (rows, length))

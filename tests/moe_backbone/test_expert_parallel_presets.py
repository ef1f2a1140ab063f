"""Models of transformers whose experts DeepSpeed spreads by one entry each: two processes against one."""

import shutil

import pytest
import torch
from compass_helpers import TINY
from expert_parallel_helpers import result
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    OlmoeConfig,
    Qwen3NextConfig,
)

from moe_backbone.expert_parallel.deepspeed_config import MODEL_TYPES, expert_parallel_config
from moe_backbone.expert_parallel.presets import EXPERT_COUNTS, OBSTACLES, PRESETS, require_preset

pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its operator for the CPU")
GROUPED = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
CONFIGS = {
    # A dense layer first, groups of experts, a bias of the router and shared experts; latent attention.
    "deepseek_v3": DeepseekV3Config(
        **{**TINY, "num_key_value_heads": 4, "head_dim": 4},
        **GROUPED,
        **{"intermediate_size": 40, "moe_intermediate_size": 24, "q_lora_rank": 16, "kv_lora_rank": 16},
        **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
    ),
    "glm4_moe": Glm4MoeConfig(**TINY, **GROUPED, intermediate_size=40, moe_intermediate_size=24),
    "olmoe": OlmoeConfig(**TINY, intermediate_size=24, num_experts=4, router_aux_loss_coef=0.1, pad_token_id=0),
    # One layer of linear attention, one of full attention; a shared expert with a gate.
    "qwen3_next": Qwen3NextConfig(
        **TINY,
        **{"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16},
        **{"layer_types": ["linear_attention", "full_attention"], "router_aux_loss_coef": 0.1},
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8},
        linear_value_head_dim=8,
    ),
}
ELSEWHERE = {"compass", "mixtral", "qwen3_moe"}  # test_expert_parallel.py trains these in every stage


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Each model's errors; one pair of processes trains all of them, since starting it takes longest."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.randn_like(buffer))
        model.save_pretrained(folder / name)
    stages = {"deepseek_v3": 2, "glm4_moe": 3, "olmoe": 1, "qwen3_next": 3}
    folders = {str(folder / name): stage for name, stage in stages.items()}
    errors = result("engines", tmp_path_factory.mktemp("run"), stages=folders)
    return {name: errors[str(folder / name)] for name in stages}


def test_each_entry_is_trained_by_a_test():
    assert set(MODEL_TYPES) == set(CONFIGS) | ELSEWHERE
    for model_type in MODEL_TYPES:
        config = CONFIGS.get(model_type) or AutoConfig.for_model(model_type)
        assert getattr(config, EXPERT_COUNTS[model_type]) > 1


@pytest.mark.lengthy
@pytest.mark.parametrize("name", CONFIGS)
def test_five_steps_and_what_is_saved_are_those_of_the_whole_model(found, name):
    errors = found[name]
    of_experts = [part for part in errors if ".experts.experts.w" in part or ".experts.w" in part]
    assert len(of_experts) == 3 * (1 if name in ("deepseek_v3", "glm4_moe") else 2)
    assert sum(part.startswith("gradient") for part in errors) > 20
    assert {"loss", "saved"} <= errors.keys() and ("aux_loss" in errors) == (name in ("olmoe", "qwen3_next"))
    assert max(errors.values()) < 1e-3, max(errors, key=errors.__getitem__)


@pytest.mark.lengthy
def test_gpt_oss_is_spread_by_transformers(tmp_path):
    """Which DeepSpeed can't."""
    pytest.importorskip("transformers.distributed.expert_parallel", reason="transformers 5.21 or later")
    config = GptOssConfig(**TINY, intermediate_size=24, num_local_experts=4, router_aux_loss_coef=0.1)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    errors = result("native_engine", tmp_path / "run", model=str(tmp_path / "model"))
    assert {"gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"} <= {
        name.rpartition(".")[2] for name in errors if ".experts." in name
    }
    assert max(errors.values()) < 1e-3, max(errors, key=errors.__getitem__)


@pytest.mark.parametrize("asked", [None, True, False])
def test_samples_are_counted_without_waiting_unless_that_is_asked_for(asked):
    pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
    base = {} if asked is None else {"timers": {"throughput": {"synchronized": asked}}}
    config = expert_parallel_config("compass", 2, base=base)
    assert config["timers"] == {"throughput": {"synchronized": bool(asked)}}


def test_what_has_no_entry_is_refused_with_the_reason():
    message = (
        r"'gpt_oss' can't be spread by DeepSpeed here: its experts have biases.*`expert_parallel_backend` to tran"
    )
    with pytest.raises(ValueError, match=message):
        expert_parallel_config("gpt_oss", 2)
    with pytest.raises(ValueError, match=r"'jamba' can't.*needs one entry in moe_backbone/expert_parallel/presets.py"):
        require_preset("jamba")
    assert not OBSTACLES.keys() & PRESETS.keys()

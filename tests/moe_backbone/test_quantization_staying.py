"""Which linear layers stay in full precision, and which share a scale, in models of several architectures."""

import json
import re

import pytest
import torch
from quantization_helpers import needs_compressed_tensors
from safetensors.torch import load_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moe_backbone.conversion.tensors import read_tensors, split_experts
from moe_backbone.quantization.observing import observe
from moe_backbone.quantization.scales import input_scales, weight_scales
from moe_backbone.quantization.scheme import find_targets, make_scheme
from moe_backbone.quantization.staying import find_staying, is_ignored
from moe_backbone.quantization.tapping import find_places
from moe_backbone.quantization.writing import quantized_tensors, write_folder

SIZES = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64, "num_experts": 4}
SIZES |= {"num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}
MLA = {"first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "n_group": 1}
MLA |= {"qk_nope_head_dim": 8, "v_head_dim": 8, "topk_group": 1, "mlp_layer_types": ["dense", "sparse"]}
DELTA = {"head_dim": 8, "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
DELTA |= {"linear_value_head_dim": 8, "shared_expert_intermediate_size": 4}
DELTA |= {"layer_types": ["linear_attention", "full_attention"]}
MODELS = {
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 2},
    "deepseek_v3": MLA,
    "glm4_moe_lite": MLA,
    "qwen3_next": DELTA,
    "minimax": {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
}
# What stays beside the head, layers left out.
STAYING = {
    "hunyuan_v1_moe": {"mlp.gate.wg"},
    "deepseek_v3": {"mlp.gate", "self_attn.kv_b_proj"},
    "glm4_moe_lite": {"mlp.gate", "self_attn.kv_b_proj"},
    "qwen3_next": {
        *("mlp.gate", "mlp.shared_expert_gate"),
        *(f"linear_attn.{name}" for name in ("in_proj_qkvz", "in_proj_ba", "out_proj")),
    },
    "minimax": {"block_sparse_moe.gate", *(f"self_attn.{name}" for name in ("qkv_proj", "out_proj", "output_gate"))},
}


def small(kind, folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SIZES, **MODELS[kind]})).eval()
    model.save_pretrained(folder)
    return model


@needs_compressed_tensors
@pytest.mark.parametrize("scales", ["static", "dynamic"])
@pytest.mark.parametrize("kind", MODELS)
def test_routers_gates_and_what_vllm_merges_stay(tmp_path, kind, scales):
    model = small(kind, tmp_path)
    places = find_places(model)
    tensors = split_experts(read_tensors(tmp_path), places.num_experts)
    targets, scheme = find_targets(tensors, places), make_scheme(scales)
    inputs = None
    if scales == "static":
        inputs = input_scales(observe(model, places, [[[3, 4, 5], [6, 7]]]), [0, 1], scheme.input_activations)
    weights = weight_scales(tensors, targets, scheme.weights)
    written = quantized_tensors(tensors, targets, scheme, weights, inputs)
    (tmp_path / "fp8").mkdir()
    write_folder(tensors, targets, scheme, written, tmp_path, tmp_path / "fp8", "1GB")

    ignore = set(json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]["ignore"])
    assert {re.sub(r"model\.layers\.\d+\.", "", name) for name in ignore} == {"lm_head", *STAYING[kind]}
    after = load_file(tmp_path / "fp8" / "model.safetensors")
    for name in ignore:
        assert after[f"{name}.weight"].dtype == torch.float32 and f"{name}.weight_scale" not in after
    quantized = {name.removesuffix(".weight") for name, it in after.items() if it.dtype == torch.float8_e4m3fn}
    assert quantized == {target.name for target in targets} and not quantized & ignore


@needs_compressed_tensors
@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe_lite"])
def test_compressing_projections_of_latent_attention_share_their_scales(tmp_path, kind):
    """vLLM multiplies them as one, `fused_qkv_a_proj`, and rounds what came with other scales once more."""
    model = small(kind, tmp_path)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_a_proj.weight *= 3
    model.save_pretrained(tmp_path)
    places = find_places(model)
    tensors = split_experts(read_tensors(tmp_path), places.num_experts)
    targets, scheme = find_targets(tensors, places), make_scheme("static")
    inputs = input_scales(observe(model, places, [[[3, 4, 5], [6, 7]]]), [0, 1], scheme.input_activations)
    weights = weight_scales(tensors, targets, scheme.weights)
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn"
        names = [f"{prefix}.{name}" for name in ("q_a_proj", "kv_a_proj_with_mqa")]
        largest = max(tensors[f"{name}.weight"].whole().abs().max() for name in names)
        for name in names:
            torch.testing.assert_close(weights[name], largest.reshape(1) / 448)
        assert inputs.linears[names[0]] == inputs.linears[names[1]]
        assert weights[f"{prefix}.q_b_proj"] != weights[names[0]]


@pytest.mark.parametrize(("kind", "found"), [("hunyuan_v1_moe", "mlp.gate.wg"), ("minimax", "self_attn.qkv_proj")])
def test_where_a_layer_is_tells_without_its_name(tmp_path, monkeypatch, kind, found):
    monkeypatch.setattr("moe_backbone.quantization.tapping.is_ignored", lambda name: False)
    places = find_places(small(kind, tmp_path))
    assert "lm_head" in places.linears and not any(name.endswith(found) for name in places.linears)


@pytest.mark.parametrize(
    ("name", "stays"),
    [
        ("lm_head", True),
        ("model.layers.0.mlp.gate", True),
        ("model.layers.0.mlp.gate.wg", True),
        ("model.layers.0.mlp.router.classifier", True),
        ("model.layers.0.mlp.shared_expert_gate", True),
        ("model.layers.0.linear_attn.in_proj_ba", True),
        ("model.layers.0.self_attn.indexer.weights_proj", True),
        ("model.layers.0.self_attn.kv_b_proj", True),
        ("model.layers.0.self_attn.q_b_proj", False),
        ("model.layers.0.self_attn.gate_proj", False),
        ("model.layers.0.mlp.shared_experts.gate_proj", False),
        ("model.layers.0.mlp.gate_up_proj", False),
    ],
)
def test_any_part_of_a_name_tells(name, stays):
    assert is_ignored(name) == stays


def block(**modules):
    found = nn.Module()
    for name, module in modules.items():
        found.add_module(name, module)
    return found


def test_routers_of_other_names_and_layers_with_a_state_are_found():
    shared = block(one=nn.Linear(8, 4), two=nn.Linear(8, 4), three=nn.Linear(4, 8))  # as wide as there are experts
    chooser = block(norm=nn.LayerNorm(8), out=nn.Linear(8, 4))
    mlp = block(experts=nn.Module(), chooser=chooser, flat=nn.Linear(8, 4), wide=nn.Linear(8, 5), shared=shared)
    mixer = block(conv=nn.Conv1d(8, 8, 2), inner=block(into=nn.Linear(8, 4)))
    other = block(into=nn.Linear(8, 4))
    other.A_log = nn.Parameter(torch.zeros(2))
    model = block(layer=block(mlp=mlp, mixer=mixer, other=other, attention=block(into=nn.Linear(8, 4))))
    routers = {"layer.mlp.chooser.out", "layer.mlp.flat"}
    states = {"layer.mixer.inner.into", "layer.other.into"}
    assert find_staying(model, ["layer.mlp.experts"], 4) == routers | states
    assert find_staying(model, [], 4) == states
    assert find_staying(block(experts=nn.Module(), flat=nn.Linear(8, 4)), ["experts"], 4) == {"flat"}

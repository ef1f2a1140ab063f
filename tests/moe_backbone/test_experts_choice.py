"""Which experts function runs by default: the choice as a function of facts, and the facts read off models."""

import copy
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from compass_helpers import SIZES, TINY, compass_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from moe_backbone import CompassConfig, experts_choice
from moe_backbone.experts_choice import Choice, ExpertsKind, choose_experts, find_experts, obstacle

PLAIN = ExpertsKind(
    "Experts", True, torch.bfloat16, None, (("hidden_size", 64), ("moe_intermediate_size", 24)), "grouped_mm"
)
OWN = ExpertsKind("OldExperts", False, None, None, (), "eager")
CONFIGS = {
    "compass": CompassConfig(**SIZES),
    "qwen3_moe": Qwen3MoeConfig(**TINY, moe_intermediate_size=24, num_experts=5),
    "mixtral": MixtralConfig(**TINY, intermediate_size=24, num_local_experts=5),
    "gpt_oss": GptOssConfig(**TINY, intermediate_size=24, num_local_experts=5),
}


def model_of(config, **options):
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_memcpy_on_a_gpu_and_grouped_products_on_the_cpu(dtype):
    kinds = [PLAIN._replace(dtype=dtype)]
    assert choose_experts(kinds, "cuda", 4, True) == Choice("memcpy", None)
    assert (
        choose_experts(kinds, "cpu", 4, True) == choose_experts(kinds, "cpu", 4, False) == Choice("grouped_mm", None)
    )
    assert choose_experts(kinds, "mps", 4, True) == Choice("grouped_mm", "its kernels need CUDA, and this is mps")
    assert choose_experts(kinds, "cuda", 4, False) == Choice("grouped_mm", "Triton is not installed")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("changes", "name", "reason"),
    [
        ({"quantized": "float8_e4m3fn"}, "grouped_mm", "the weights of Experts are quantized (float8_e4m3fn)"),
        ({"quantized": "uint8", "running": "deepgemm"}, "deepgemm", "are quantized (uint8)"),
        ({"dtype": torch.float64}, "eager", "grouped products take no float64, the dtype of Experts"),
        ({"widths": (("hidden_size", 20),)}, "eager", "`hidden_size=20` of Experts must be a multiple of 8 in this"),
        (
            {"widths": (("hidden_size", 8), ("moe_intermediate_size", 33))},
            "eager",
            "`moe_intermediate_size=33` of Experts must be a multiple of 8",
        ),
    ],
)
def test_what_is_in_the_way_of_grouped_products(device, changes, name, reason):
    for kinds in ([PLAIN._replace(**changes)], [PLAIN, PLAIN._replace(**changes)]):
        found = choose_experts(kinds, device, 2, True)
        assert found.name == name and reason in found.reason


@pytest.mark.parametrize(
    ("dtype", "itemsize", "multiple"),
    [(torch.float32, 4, 4), (torch.float32, 2, 8), (torch.bfloat16, 4, 8), (torch.float16, 2, 8)],
)
def test_the_width_goes_by_what_products_compute_with(dtype, itemsize, multiple):
    for width in range(1, 25):
        kind = PLAIN._replace(dtype=dtype, widths=(("hidden_size", width),))
        expected = "memcpy" if width % multiple == 0 else "eager"
        assert choose_experts([kind], "cuda", itemsize, True).name == expected
        assert (obstacle("memcpy", [kind], "cuda", itemsize, True) is None) == (expected == "memcpy")
        assert obstacle("batched_mm", [kind], "cuda", itemsize, True) is None


def test_experts_that_go_without_the_decorator():
    found = choose_experts([OWN], "cuda", 4, True)
    assert found.name == "eager" and "OldExperts runs code of its own" in found.reason
    assert choose_experts([OWN, PLAIN], "cuda", 4, True) == Choice("memcpy", None)  # those that can be reached
    assert obstacle("eager", [OWN], "cpu", 4, True) is None
    assert "does not reach" in obstacle("batched_mm", [OWN], "cpu", 4, True)


def test_transformers_own_functions_of_quantized_experts_may_be_asked_for():
    kinds = [PLAIN._replace(quantized="float8_e4m3fn", dtype=torch.float8_e4m3fn)]
    assert obstacle("grouped_mm", kinds, "cuda", 2, True) is None
    assert "quantized" in obstacle("memcpy", kinds, "cuda", 2, True)
    assert obstacle("memcpy", [PLAIN], "cuda", 2, False) == "Triton is not installed"
    assert obstacle("memcpy", [PLAIN], "cpu", 2, False) is None  # the torch reference runs there


@pytest.mark.parametrize("name", CONFIGS)
def test_facts_of_models(name):
    model = model_of(CONFIGS[name], dtype=torch.bfloat16, experts_implementation="batched_mm")
    (kind,) = find_experts(model)
    assert kind.runs_by_name and kind.quantized is None and kind.dtype is torch.bfloat16
    assert kind.widths == (("hidden_size", 32), ("moe_intermediate_size", 24))
    assert kind.running == "batched_mm" and kind.module.endswith("Experts")


def test_facts_behind_an_adapter_are_the_models_own():
    model = model_of(CONFIGS["qwen3_moe"])
    before = find_experts(model)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets))
    assert find_experts(adapted) == before and before[0].runs_by_name


def test_dense_models_have_none():
    sizes = {name: size for name, size in TINY.items() if name != "num_experts_per_tok"}
    assert find_experts(model_of(Qwen3Config(**sizes, intermediate_size=24))) == []


def test_models_without_the_decorator_are_known_as_experts():
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    config = Llama4TextConfig(**sizes, num_key_value_heads=2, intermediate_size=24, intermediate_size_mlp=24,
                              num_local_experts=2, pad_token_id=0)  # fmt: skip
    (kind,) = find_experts(Llama4ForCausalLM(config))
    assert kind == ExpertsKind("Llama4TextExperts", False, None, None, (), "eager")

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    assert [kind.module for kind in find_experts(nn.Sequential(Block()))] == ["Linear"]


def test_weights_in_other_forms_count_as_quantized():
    model = compass_model()
    experts = model.model.layers[1].mlp.experts
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.to(torch.float8_e4m3fn), requires_grad=False)
    plain, packed = find_experts(model)
    assert plain.quantized is None and packed.quantized == "float8_e4m3fn"

    class Packed(torch.Tensor):
        pass

    experts.gate_up_proj = nn.Parameter(torch.zeros(5, 48, 32).as_subclass(Packed))
    assert find_experts(model)[1].quantized == "Packed"


def test_weights_that_an_engine_partitions_tell_their_whole_shape():
    model = compass_model()
    for layer in model.model.layers:
        weight = layer.mlp.experts.down_proj
        weight.ds_shape, weight.data = weight.shape, torch.empty(0)
    assert find_experts(model)[0].widths == (("hidden_size", 32), ("moe_intermediate_size", 24))
    for layer in model.model.layers:
        del layer.mlp.experts.down_proj.ds_shape
    assert find_experts(model)[0].widths == ()


@pytest.mark.parametrize("name", ["deepgemm", "sonicmoe"])
def test_kernels_of_the_hub_run_on_cuda_with_their_package(name, monkeypatch):
    assert obstacle(name, [PLAIN], "cpu", 2, True) == "its kernels need CUDA, and this is cpu"

    def absent(distribution):
        raise PackageNotFoundError(distribution)

    monkeypatch.setattr(experts_choice, "version", absent)
    assert "`pip install kernels`" in obstacle(name, [PLAIN], "cuda", 2, True)
    monkeypatch.setattr(experts_choice, "version", lambda distribution: "1.0")
    assert obstacle(name, [PLAIN], "cuda", 2, True) is None

"""Which adapters are refused where experts are spread: whole copies of experts, and tensors that are not theirs."""

import pytest
import torch
from compass_helpers import TINY, compass_model
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moe_backbone.expert_parallel.adapter_checks import check_adapters

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def compass():
    return compass_model(num_experts=4, num_mtp_layers=1, num_shared_experts=1)


def renamed():
    """A model that has its experts under another name, inside a module of their own."""
    model = compass()
    for layer in model.model.layers:
        layer.mlp.of_all = nn.ModuleDict({"stacked": layer.mlp.experts})
        del layer.mlp.experts
    return model


@pytest.mark.parametrize(
    ("make", "option", "value", "more"),
    [
        (compass, "modules_to_save", "experts", ["lm_head"]),
        (compass, "modules_to_save", "mlp", []),
        (compass, "modules_to_save", "layers.1", []),  # one layer of several
        (renamed, "modules_to_save", "stacked", []),
        (renamed, "modules_to_save", "mlp", ["lm_head"]),
        (compass, "target_parameters", "mlp.gate.weight", EXPERTS),
        (compass, "target_parameters", "embed_tokens.weight", []),
        (compass, "target_parameters", "self_attn.k_proj.weight", EXPERTS[:1]),
        (compass, "target_parameters", "shared_expert.down_proj.weight", []),
    ],
)
def test_what_cannot_be_trained_names_option_value_and_remedy(make, option, value, more):
    model = get_peft_model(make(), LoraConfig(r=2, target_modules=["v_proj"], **{option: [value, *more]}))
    with pytest.raises(ValueError, match=rf"`lora_{option}={value}` names .*`expert_parallel_size` to 1") as caught:
        check_adapters(model)
    assert ("`lora_target_modules` (k_proj)" in str(caught.value)) == ("k_proj" in value)
    assert ("`lora_target_parameters` (`mlp.experts" in str(caught.value)) == (option == "modules_to_save")


@pytest.mark.parametrize(
    "changes",
    [
        {"target_parameters": EXPERTS},
        {"target_parameters": EXPERTS[1:]},
        {"modules_to_save": ["lm_head", "gate", "shared_expert"]},  # no experts beneath
        {"target_modules": "all-linear", "target_parameters": EXPERTS},
    ],
)
def test_adapters_of_experts_and_of_all_else_are_taken(changes):
    options = {"r": 2, "target_modules": ["q_proj"], **changes}
    check_adapters(get_peft_model(compass(), LoraConfig(**options)))
    if "modules_to_save" not in changes:
        check_adapters(get_peft_model(compass().to("meta"), LoraConfig(**options)))


@pytest.mark.filterwarnings("ignore:The following \\w+_pattern keys:RuntimeWarning")
def test_routers_that_peft_adapts_for_all_linear_are_told_so():
    """PEFT turns `all-linear` into tensors of Qwen3-MoE's experts and routers, which no option has named."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 4, "vocab_size": 32}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
    with pytest.raises(ValueError, match=r"gate\.weight.*PEFT made it of `lora_target_modules` \(all-linear"):
        check_adapters(get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")))


def test_experts_of_another_name_may_have_factors():
    targets = ["stacked.gate_up_proj", "stacked.down_proj"]
    check_adapters(get_peft_model(renamed(), LoraConfig(r=2, target_modules=[], target_parameters=targets)))


def test_other_tensors_of_experts():
    model = GptOssForCausalLM(GptOssConfig(**TINY, num_local_experts=4, intermediate_size=24))
    targets = ["experts.gate_up_proj", "experts.gate_up_proj_bias"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=targets))
    with pytest.raises(ValueError, match=r"`lora_target_parameters=experts.gate_up_proj_bias` names .*Name these"):
        check_adapters(adapted)


class Projected(nn.Linear):
    """A block that PEFT adapts by `target_modules`, around experts."""

    def __init__(self, experts: nn.Module):
        super().__init__(4, 4)
        self.inner = experts


def test_a_module_around_experts_that_peft_adapts():
    model = compass()
    for layer in model.model.layers:
        layer.mlp = Projected(layer.mlp)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "mlp"]))
    with pytest.raises(ValueError, match=r"`lora_target_modules=mlp` names .*layers.0.mlp, which holds experts \("):
        check_adapters(adapted)


def test_experts_that_train_beside_their_adapter():
    adapted = get_peft_model(compass(), LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS))
    adapted.get_base_model().model.layers[1].mlp.experts.get_base_layer().down_proj.requires_grad_()
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.*down_proj is trained as a whole.*freeze it"):
        check_adapters(adapted)
    check_adapters(compass())  # without an adapter all of them train


def test_quantized_experts_and_other_adapters_than_lora():
    model = compass()
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(torch.zeros(experts.down_proj.shape, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts holds torch.uint8.*`load_in_4bit`"):
        check_adapters(model)
    with pytest.raises(ValueError, match=r"type IA3 can't be trained.*`use_peft`"):
        check_adapters(get_peft_model(compass(), IA3Config(target_modules=["k_proj"], feedforward_modules=[])))

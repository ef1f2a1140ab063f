"""Options of a new adapter: what a name matches, and refusals that name option, value and remedy."""

import re
import warnings

import pytest
from cli_helpers import arguments, refusal
from compass_helpers import compass_model
from peft import get_peft_model
from trl import ModelConfig

from otpo.cli import align
from otpo.cli.launching import expert_parallel
from otpo.cli.models.adapters import adapter_config, adapter_refusals

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def adapted(**options):
    """A model with the adapter that options of a command ask for, and the modules that have factors."""
    options = {"use_peft": True, "lora_r": 2, "lora_dropout": 0, **options}
    model = ModelConfig(**options)
    with adapter_refusals(model):
        made = get_peft_model(compass_model(num_experts=4, num_shared_experts=1), adapter_config(model))
    names = {name.partition(".lora_A")[0] for name, _ in made.named_parameters() if ".lora_A" in name}
    return {name.partition("layers.0.")[2] for name in names if ".layers.0." in name}


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (["q_proj"], {"self_attn.q_proj"}),
        (["self_attn.q_proj"], {"self_attn.q_proj"}),
        (["q_proj", "v_proj"], {"self_attn.q_proj", "self_attn.v_proj"}),
        ([r".*\.self_attn\.[qk]_proj"], {"self_attn.q_proj", "self_attn.k_proj"}),  # a pattern stays one
        (["model.layers.0.self_attn.o_proj"], {"self_attn.o_proj"}),
    ],
)
def test_one_name_adapts_as_several_do(targets, found):
    assert adapted(lora_target_modules=targets) == found


def test_all_linear_is_no_name():
    found = adapted(lora_target_modules=["all-linear"])
    assert len(found) == 7 and "mlp.shared_expert.up_proj" in found  # four of attention, three of the shared expert


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lora_target_modules": ["q", "v"]},
            r"`lora_target_modules=q v` with `lora_target_parameters=null` names nothing in the model.*q_proj k_proj",
        ),
        (
            {"lora_target_modules": ["gate_proj"], "lora_modules_to_save": ["mlp"]},
            r"`lora_target_modules=gate_proj` with .* to adapt beside `lora_modules_to_save=mlp`, which trains",
        ),
        (
            {"lora_target_modules": ["query"], "lora_target_parameters": EXPERTS},
            r"`lora_target_modules=query` names no module of the model\. .*or leave the option out",
        ),
        (
            {"lora_target_modules": ["q_proj"], "lora_target_parameters": ["mlp.experts.gate_up"]},
            r"`lora_target_parameters=mlp.experts.gate_up` names no tensor of the model\. .*mlp.experts.gate_up_proj",
        ),
        ({"lora_target_modules": ["mlp"]}, r"`lora_target_modules=mlp` names a CompassMoeBlock.*`lora_target_param"),
        ({"lora_target_modules": ["gate"]}, r"`lora_target_modules=gate` names a CompassRouter, which has no adapter"),
        ({}, r"`use_peft=true` without `lora_target_modules`: PEFT knows none for this model\. Name modules"),
    ],
)
def test_targets_that_are_not_there_are_refused_in_the_commands_words(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        adapted(**options)
    assert "\n" not in str(caught.value)


def test_other_complaints_and_runs_without_an_adapter_pass_through():
    with pytest.raises(ValueError, match=r"^other$"), adapter_refusals(ModelConfig(use_peft=True)):
        raise ValueError("other")
    with pytest.warns(RuntimeWarning, match="no module was matched"), adapter_refusals(ModelConfig()):
        warnings.warn("target_modules=x were set but no module was matched.", RuntimeWarning, stacklevel=1)
    assert adapter_config(ModelConfig(lora_target_modules=["q_proj"])) is None


def test_modules_that_transformers_has_spread_cannot_be_copied():
    torchs = "Attempted to call copy_() on an invalid python storage."
    model = ModelConfig(use_peft=True, lora_modules_to_save=["mlp"])
    message = r"`lora_modules_to_save=mlp`: PEFT can't copy .*`expert_parallel_size` to 1"
    with pytest.raises(ValueError, match=message), adapter_refusals(model):
        raise RuntimeError(torchs)
    with pytest.raises(RuntimeError, match="invalid python"), adapter_refusals(ModelConfig(use_peft=True)):
        raise RuntimeError(torchs)


@pytest.mark.usefixtures("own_process")
def test_a_command_refuses_targets_that_are_not_there(capsys, compass_folder, pairs_file, tmp_path):
    options = {"use_peft": True, "lora_dropout": 0, "lora_target_modules": ["q"], "lora_modules_to_save": ["mlp"]}
    said = refusal(align.main, capsys, arguments(compass_folder, pairs_file, tmp_path / "out", **options))
    assert re.search("`lora_target_modules=q` with .*beside `lora_modules_to_save=mlp`.*all-linear", said)


@pytest.mark.parametrize("backend", ["deepspeed", "transformers"])
@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["mlp.gate.weight"], "mlp.gate.weight"),
        ([*EXPERTS, "q_proj.weight", "experts.gate_up_proj_bias"], "q_proj.weight experts.gate_up_proj_bias"),
        (["shared_expert.down_proj.weight"], "shared_expert.down_proj.weight"),  # its name ends in `weight`
    ],
)
def test_tensors_of_no_expert_are_refused_before_a_model_is_loaded(backend, targets, named):
    given = {"expert_parallel_size": 2, "expert_parallel_backend": backend, "use_peft": True}
    message = rf"`lora_target_parameters={named}` is no tensor .*takes mlp.experts.gate_up_proj and .*`lora_target_mod"
    with pytest.raises(ValueError, match=message):
        expert_parallel.prepare({**given, "lora_target_parameters": targets}, {"WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match="needs several processes"):  # experts' own pass
        expert_parallel.prepare({**given, "lora_target_parameters": ["down_proj", *EXPERTS]}, {})

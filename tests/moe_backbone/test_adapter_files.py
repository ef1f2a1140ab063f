"""What resuming an adapter needs beside its tensors: a count of steps, and ranks and scalings to compare."""

import pytest
import torch
from compass_helpers import compass_model
from peft import LoraConfig, get_peft_model

from moe_backbone.expert_parallel.adapter_files import (
    VALUE,
    AdapterSize,
    check_optimizer,
    count_of_steps,
    open_states,
    write_states,
)
from moe_backbone.expert_parallel.adapters import adapter_sizes
from moe_backbone.expert_parallel.resume import ADAPTER_STATES_FILE, find_adapter_states


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_optimizers_with_a_number_for_each_number(optim):
    check_optimizer(optim)


@pytest.mark.parametrize("optim", ["adamw_8bit", "adafactor", "lion_32bit"])
def test_other_optimizers_are_refused(optim):
    with pytest.raises(ValueError, match=f"`optim={optim}` with an adapter.*adamw_torch, adamw_torch_fused, sgd"):
        check_optimizer(optim)


@pytest.mark.parametrize("fused", [False, True])
def test_a_fused_step_finds_its_count_beside_the_parameter(fused):
    parameter = torch.zeros(3, requires_grad=True, device="cpu")
    optimizer = torch.optim.AdamW([parameter], fused=fused)
    assert count_of_steps(optimizer, 7, parameter).device.type == "cpu"
    elsewhere = torch.empty(3, device="meta")
    count = count_of_steps(optimizer, 7, elsewhere)
    assert count.device.type == ("meta" if fused else "cpu")
    assert fused or float(count) == 7.0
    # torch's own count stands in the same place and has the same type.
    parameter.grad = torch.ones(3)
    optimizer.step()
    own = optimizer.state[parameter]["step"]
    assert (own.dtype, own.shape) == (count.dtype, count.shape)


def test_the_newest_states_are_found_by_their_number(tmp_path):
    for step in (9, 10):
        (tmp_path / f"global_step{step}").mkdir()
        (tmp_path / f"global_step{step}" / ADAPTER_STATES_FILE).touch()
    assert find_adapter_states(tmp_path) == tmp_path / "global_step10"
    assert find_adapter_states(tmp_path / "global_step9") is None


OPTIONS = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "embed_tokens"]}
OPTIONS |= {"target_parameters": ["mlp.experts.gate_up_proj"]}


def adapted(**changes):
    return get_peft_model(
        compass_model(num_experts=4, tie_word_embeddings=False), LoraConfig(**{**OPTIONS, **changes})
    )


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters() if tensor.requires_grad}


def saved(folder, model, sizes):
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    states = {
        f"{name}.{key}": tensor.detach().clone() for name, tensor in trained.items() for key in (VALUE, "exp_avg")
    }
    write_states(folder / "global_step4", states, {"steps": 4}, sizes)
    return folder / "global_step4"


def test_an_adapter_opens_as_it_was_written(tmp_path):
    model = adapted()
    sizes = adapter_sizes(model)
    found = open_states(saved(tmp_path, model, sizes), shapes(model), sizes)
    assert found.keys == ["exp_avg"] and found.rest["steps"] == 4
    # one of the embedding; in each of two layers one of attention and one of the experts
    assert len(sizes) == 5 and set(sizes.values()) == {AdapterSize(2, 2.0)}


@pytest.mark.parametrize(
    ("changes", "before", "now"),
    [
        ({"r": 4}, "rank 2 and scaling 2", "rank 4 and scaling 1"),
        ({"lora_alpha": 8}, "rank 2 and scaling 2", "rank 2 and scaling 4"),
        ({"use_rslora": True}, "rank 2 and scaling 2", "rank 2 and scaling 2.82843"),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 1}}, "rank 2 and scaling 2", "rank 2 and scaling 0.5"),
        ({"rank_pattern": {"embed_tokens": 1}}, "rank 2 and scaling 2", "rank 1 and scaling 4"),
        ({"r": 4, "lora_alpha": 8}, "rank 2 and scaling 2", "rank 4 and scaling 2"),
    ],
)
def test_an_adapter_of_another_size_is_refused_with_both(tmp_path, changes, before, now):
    model, other = adapted(), adapted(**changes)
    folder = saved(tmp_path, model, adapter_sizes(model))
    with pytest.raises(ValueError, match=rf"`resume_from_checkpoint=.*of {before} on .*this run's has {now}\. Set"):
        open_states(folder, shapes(other), adapter_sizes(other))


def test_checkpoints_of_before_sizes_were_written_are_compared_by_shapes(tmp_path):
    model, wider, louder = adapted(), adapted(rank_pattern={"layers.1.self_attn.q_proj": 3}), adapted(lora_alpha=8)
    folder = saved(tmp_path, model, {})
    assert open_states(folder, shapes(louder), adapter_sizes(louder)).rest["steps"] == 4
    with pytest.raises(ValueError, match=r"layers\.1\.\S*q_proj.lora_A\S* is \(2, 32\), and this run's is \(3, 32\)"):
        open_states(folder, shapes(wider), adapter_sizes(wider))


def test_an_adapter_of_other_tensors_is_refused_by_name(tmp_path):
    model, other = adapted(), adapted(target_modules=["q_proj"])
    sizes = adapter_sizes(other)
    with pytest.raises(ValueError, match=r"of other tensors than this run's, such as \S*embed_tokens"):
        open_states(saved(tmp_path, model, adapter_sizes(model)), shapes(other), sizes)


def test_adapters_that_stand_still_have_no_size_of_the_run():
    model = adapted()
    model.add_adapter("ref", LoraConfig(**{**OPTIONS, "r": 3}))
    assert {size.rank for size in adapter_sizes(model).values()} == {2}
    model.requires_grad_(False)
    assert adapter_sizes(model) == {}

"""The type of weights that `otpo pretrain` takes where nobody says one."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_backbone import CompassConfig
from moe_backbone.planning.activations import MASTERS
from moe_backbone.planning.setup import TrainingSetup
from otpo.cli.plan import main as plan
from otpo.cli.pretraining.weights import choose_dtype, saved_dtype


def choose(config_dtype=None, *, dtype=None, named=None, previous=None, spread=1, **changed: Any):
    """The choice on one GPU, but for what is changed."""
    options = {"device": torch.device("cuda", 0), "mixed_precision": "bf16", "deepspeed": None, "fsdp": None}
    options |= {"world_size": 1, "optim": "adamw_torch_fused", "resume_from_checkpoint": None, "output_dir": None}
    data: Any = SimpleNamespace(previous_stage=previous, expert_parallel_size=spread)
    model: Any = SimpleNamespace(dtype=dtype, model_name_or_path=named)
    args: Any = SimpleNamespace(**(options | changed))
    return choose_dtype(data, args, model, CompassConfig(dtype=config_dtype))


def test_one_gpu_trains_float32_masters_of_bfloat16_weights():
    assert choose().name == "bfloat16"
    assert choose(optim="adamw_torch").name == "bfloat16"
    assert choose(torch.bfloat16, named="folder").name == "bfloat16"
    assert choose("bfloat16", previous="stage").name == "bfloat16"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_the_option_wins(dtype):
    assert choose(dtype=dtype, named="folder", device=torch.device("cpu")) == (dtype, None)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"device": torch.device("cpu")}, "the device is cpu"),
        ({"mixed_precision": "no"}, "mixed precision is no"),
        ({"mixed_precision": "fp16"}, "mixed precision is fp16"),
        ({"deepspeed": "zero2.json"}, "deepspeed=zero2.json"),
        ({"fsdp": "full_shard"}, "fsdp=full_shard"),
        ({"spread": 2}, "experts are spread"),
        ({"world_size": 2}, "2 processes would reduce gradients in bfloat16"),
        ({"optim": "adafactor"}, "`optim=adafactor` would lose steps"),
        ({"named": "folder"}, "the checkpoint is in float32"),
        ({"named": "folder", "config_dtype": "float32"}, "the checkpoint is in float32"),
        ({"previous": "stage", "config_dtype": torch.float16}, "the checkpoint is in float16"),
    ],
)
def test_all_else_trains_float32_weights_and_says_why(changed, why):
    name, told = choose(**changed)
    assert name == "float32"
    assert why in str(told)


@pytest.mark.parametrize("engine", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_engines_of_a_launcher_keep_float32(monkeypatch, engine):
    monkeypatch.setenv(engine, "true")
    assert choose().name == "float32"


@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
def test_a_resumed_run_goes_on_with_its_own_type(tmp_path, kept):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"dtype": kept}))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    torch.save({}, folder / "optimizer.pt")
    torch.save({}, folder / "scheduler.pt")
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    for device in ("cuda", "cpu"):
        for resume, output in ((str(folder), None), ("true", str(tmp_path))):
            found = choose(device=torch.device(device), resume_from_checkpoint=resume, output_dir=output)
            assert found == (kept, "as in the checkpoint that is resumed")


def test_a_checkpoint_without_a_type_leaves_the_choice(tmp_path):
    assert saved_dtype(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": "float16"}))
    assert saved_dtype(tmp_path) is None


@pytest.mark.parametrize(
    ("words", "precision"),
    [
        (["--gpus_per_node", "1"], MASTERS),
        (["--gpus_per_node", "1", "--optimizer", "adamw_8bit"], "bf16-mixed"),
        (["--gpus_per_node", "1", "--precision", "float32"], "float32"),
        (["--gpus_per_node", "2"], "bf16-mixed"),
    ],
)
def test_the_plan_takes_what_pretraining_takes(capsys, words, precision):
    assert plan(["compass-small", *words, "--gpu", "h200", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["setup"]["precision"] == precision


def test_masters_halves_and_their_gradients_are_planned():
    alone = TrainingSetup(gpus_per_node=1, precision=MASTERS)
    assert (alone.bytes_of.weights, alone.bytes_of.master, alone.bytes_of.gradients) == (2, 2, 2)
    summed = TrainingSetup(gpus_per_node=1, precision=MASTERS, gradient_accumulation_steps=2)
    assert summed.bytes_of.gradients == 4

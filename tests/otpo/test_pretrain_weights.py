"""The type of weights that `otpo pretrain` takes where nobody says one."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moe_backbone import CompassConfig, preset
from moe_backbone.planning.activations import MASTERS
from moe_backbone.planning.memory import plan_memory
from moe_backbone.planning.setup import TrainingSetup
from otpo.cli.plan import main as plan
from otpo.cli.pretraining.options import ModelArguments, PretrainArguments
from otpo.cli.pretraining.weights import choose_dtype, resumed_dtype
from otpo.cli.running.identity import RUN_FILE, require_same_run, run_identity


def choose(config_dtype=None, *, dtype=None, named=None, previous=None, spread=1, **changed: Any):
    """The choice on one GPU, but for what is changed."""
    options = {"device": torch.device("cuda", 0), "mixed_precision": "bf16", "deepspeed": None, "fsdp": None}
    options |= {"world_size": 1, "optim": "adamw_torch_fused", "resume_from_checkpoint": None, "output_dir": None}
    options |= {"gradient_accumulation_steps": 1}
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
        ({"deepspeed": '{"a": 1}'}, "since DEEPSPEED keeps float32 copies"),
        ({"fsdp": "full_shard"}, "since FSDP keeps float32 copies"),
        ({"deepspeed": "file", "spread": 2}, "experts are spread"),
        ({"spread": 2}, "experts are spread"),
        ({"world_size": 2}, "2 processes would reduce gradients in bfloat16"),
        ({"optim": "adafactor"}, "`optim=adafactor` would lose steps"),
        ({"named": "folder"}, "the checkpoint names no type"),
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


@pytest.fixture
def checkpoint(tmp_path):
    """A plain training's."""
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({}, folder / name)
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    return folder


def write_run(folder, **options):
    (folder / RUN_FILE).write_text(json.dumps({"options": options}))


@pytest.mark.parametrize("kept", ["float32", "bfloat16", "float16", "auto"])
def test_a_resumed_run_goes_on_with_its_own_type(checkpoint, kept):
    write_run(checkpoint, dtype=kept)
    (checkpoint / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))  # an engine may have cast the weights
    for device in ("cuda", "cpu"):
        for resume, output in ((str(checkpoint), None), ("true", str(checkpoint.parent))):
            changed = {"device": torch.device(device), "resume_from_checkpoint": resume, "output_dir": output}
            for engine in (None, "file"):
                found = choose(deepspeed=engine, **changed)
                assert found == (kept, "as in the checkpoint that is resumed")


def test_a_checkpoint_without_a_runs_file_has_its_configurations_type(checkpoint):
    resumed = str(checkpoint)
    (checkpoint / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    assert resumed_dtype(resumed, engines=False) == "bfloat16"
    assert resumed_dtype(resumed, engines=True) == "float32"  # which the engine has cast
    for text in ("", "[]", "{}", json.dumps({"dtype": "int8"})):
        (checkpoint / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"checkpoint-3` does not say the type of its weights. Set `dtype`"):
            resumed_dtype(resumed, engines=False)


def test_halves_that_processes_would_sum_are_refused_with_what_works(checkpoint):
    write_run(checkpoint, dtype="bfloat16")
    more: dict[str, Any] = {"resume_from_checkpoint": str(checkpoint), "world_size": 2}
    assert choose(**more).name == "bfloat16"
    with pytest.raises(ValueError, match=r"Set `--num_processes 1` or `gradient_accumulation_steps` to 1, or start"):
        choose(**more, gradient_accumulation_steps=4)
    assert choose(**more, gradient_accumulation_steps=4, deepspeed="file").name == "bfloat16"


def test_the_run_of_a_checkpoint_is_compared_by_what_it_trained(checkpoint):
    kinds, values = [PretrainArguments, ModelArguments], {"dtype": None, "model_revision": None}
    asked = run_identity(kinds, values)
    assert "dtype" not in asked
    recorded = run_identity(kinds, {**values, "dtype": "bfloat16"})
    write_run(checkpoint, **recorded)
    assert require_same_run(asked, str(checkpoint))
    with pytest.raises(ValueError, match=r'`dtype` was "bfloat16" and is "float32"'):
        require_same_run(run_identity(kinds, {**values, "dtype": "float32"}), str(checkpoint))


@pytest.mark.parametrize(
    ("words", "precision"),
    [
        (["--gpus_per_node", "1"], MASTERS),
        (["--gpus_per_node", "1", "--optimizer", "adamw_8bit"], "bf16-mixed"),
        (["--gpus_per_node", "1", "--precision", "float32"], "float32"),
        (["--gpus_per_node", "2"], "bf16-mixed"),
        (["--gpus_per_node", "1", "--strategy", "zero2"], "bf16"),
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


def test_the_plan_of_a_checkpoint_in_float32_has_float32_weights(tmp_path, capsys):
    preset("compass-tiny", dtype="float32").save_pretrained(tmp_path)
    assert plan([str(tmp_path), "--gpus_per_node", "1", "--gpu", "h200", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["setup"]["precision"] == "bf16-mixed"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"strategy": "zero2"}, "`strategy=zero2` do not go together. Set `precision` to bf16"),
        ({"optimizer": "adamw_8bit"}, "`optimizer=adamw_8bit` do not go together. Set `optimizer` to adamw"),
        ({"gpus_per_node": 2, "gradient_accumulation_steps": 2}, "`gradient_accumulation_steps=2` do not go together"),
        ({"gpus_per_node": 2, "expert_parallel_size": 2}, "`expert_parallel_size=2` do not go together"),
    ],
)
def test_masters_are_planned_only_where_they_are_trained(changed, told):
    with pytest.raises(ValueError, match=told):
        TrainingSetup(**{"gpus_per_node": 1, "precision": MASTERS, **changed})


def test_adamw_by_masters_has_no_copies():
    setups = [TrainingSetup(gpus_per_node=1, precision=MASTERS, optimizer=name) for name in ("adamw", "adamw_foreach")]
    config = preset("compass-small")
    assert len({plan_memory(config, setup).allocated for setup in setups}) == 1

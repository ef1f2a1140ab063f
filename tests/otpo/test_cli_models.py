"""Models of the commands: adapters that train on, references of their own, one device or a process on each."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from cli_helpers import arguments, python, refusal
from peft import PeftModel
from transformers import AutoModelForCausalLM

from otpo.cli import align, explain, sft
from otpo.cli.launching.launch import check_options, default_launch, parse_launch
from otpo.cli.models.loading import find_origin, on_one_device

pytestmark = pytest.mark.usefixtures("own_process")
LORA = {"use_peft": True, "lora_r": 2, "lora_target_modules": "all-linear"}


@pytest.fixture(scope="module")
def adapter(model_folder, pairs_file, tmp_path_factory):
    """The folder of an adapter that `otpo align` trained."""
    folder = tmp_path_factory.mktemp("adapter")
    assert align.main(arguments(model_folder, pairs_file, folder, **LORA)) == 0
    return str(folder)


def lines(capsys):
    return dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if " " in line)


def test_an_adapter_trains_on(adapter, model_folder, pairs_file, tmp_path, capsys):
    capsys.readouterr()
    assert align.main(arguments(adapter, pairs_file, tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "reference  the adapter as it starts, on the same model" in printed
    # The first loss is that of a policy which is its reference.
    assert "  loss 0.6931  " in printed
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    before = {name: value.clone() for name, value in PeftModel.from_pretrained(base, adapter).state_dict().items()}
    after = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path).state_dict()
    moved = {name for name, value in after.items() if not value.equal(before[name])}
    assert moved and all("lora_" in name for name in moved)


def test_instructions_train_an_adapter_on(adapter, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "the red", "completion": "box"}\n' * 4)
    assert sft.main(arguments(adapter, str(file), tmp_path / "out")) == 0
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_peft": True}, "`use_peft=True` with `model_name_or_path=.*, which is an adapter"),
        ({"expert_parallel_size": 2}, "`expert_parallel_size=2` with `model_name_or_path=.*, which is an adapter"),
    ],
)
def test_what_an_adapter_refuses(changes, message, capsys, adapter, pairs_file, tmp_path):
    assert re.search(message, refusal(align.main, capsys, arguments(adapter, pairs_file, tmp_path, **changes)))


def test_adapters_that_tell_no_model(tmp_path):
    file = tmp_path / "adapter_config.json"
    for content, message in (
        ("{", "can't be read"),
        ("{}", "can't be read: 'base_model_name_or_path'"),
        ('{"base_model_name_or_path": null}', "names no model"),
        ('{"base_model_name_or_path": "/nowhere"}', "`base_model_name_or_path=/nowhere`: there is no such folder"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            find_origin("model_name_or_path", str(tmp_path))


def test_a_reference_of_its_own(adapter, model_folder, other_model_folder, pairs_file, tmp_path, capsys):
    for model, reference, changes in (
        (model_folder, other_model_folder, {}),
        (model_folder, other_model_folder, {"precompute_ref_log_probs": True}),
        (model_folder, adapter, {}),
        (adapter, model_folder, {}),
    ):
        capsys.readouterr()
        argv = arguments(model, pairs_file, tmp_path / "out", ref_model_name_or_path=reference, **changes)
        assert align.main(argv) == 0
        printed = capsys.readouterr().out
        assert f"reference  {reference}" in printed
        assert ("computed beforehand" in printed) == bool(changes)
        assert "'loss': '0.6931'" not in printed


def test_a_reference_that_is_refused(capsys, model_folder, pairs_file, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(model_folder)
    other.resize_token_embeddings(8)
    other.save_pretrained(tmp_path / "other")
    for name, message in (("/nowhere", "there is no such folder"), (tmp_path / "other", "The reference has 8 tokens")):
        argv = arguments(model_folder, pairs_file, tmp_path / "out", ref_model_name_or_path=name)
        assert message in refusal(align.main, capsys, argv)


def test_the_default_reference_is_told(model_folder, pairs_file, tmp_path, capsys):
    assert align.main(arguments(model_folder, pairs_file, tmp_path)) == 0
    assert "reference  the model as it starts" in capsys.readouterr().out
    assert align.main(arguments(model_folder, pairs_file, tmp_path, **LORA)) == 0
    assert "reference  the model without its adapter" in capsys.readouterr().out


@pytest.mark.parametrize("command", [align, explain])
@pytest.mark.parametrize("layer", [99, -4])
def test_layers_that_the_model_has_not(command, layer, capsys, model_folder, pairs_file, tmp_path):
    argv = arguments(model_folder, pairs_file, tmp_path, hidden_layer=layer)
    if command is explain:
        argv = ["--model_name_or_path", model_folder, "--dataset_name", pairs_file, "--hidden_layer", str(layer)]
        argv.append("--use_cpu")
    found = refusal(command.main, capsys, argv)
    assert "`hidden_layer` must be a whole number within [-3, 2] for this model, which has 2 layers" in found


# Where a command runs


@pytest.mark.parametrize("devices", [0, 1, 2, 8])
def test_a_process_on_each_device(devices):
    words = default_launch(devices, {"use_cpu": False, "model_init_kwargs": None}, {})
    if devices < 2:
        assert words == []
        return
    assert words == ["--accelerate_config", "ddp", "--num_processes", str(devices), "--mixed_precision", "no"]
    args = parse_launch(words, "align", ["--beta", "1"])
    assert (args.num_processes, args.mixed_precision, args.training_script_args) == (devices, "no", ["--beta", "1"])


@pytest.mark.parametrize(
    ("values", "environ"),
    [
        ({"use_cpu": True}, {}),
        ({}, {"ACCELERATE_USE_CPU": "true"}),
        ({"model_init_kwargs": {"device_map": "auto"}}, {}),
        ({"model_init_kwargs": '{"device_map": "auto"}'}, {}),
        ({"load_in_4bit": True}, {}),
        ({"load_in_8bit": True}, {}),
        ({}, {"OMPI_COMM_WORLD_SIZE": "4"}),
        ({}, {"WORLD_SIZE": "2"}),
        ({}, {"SLURM_STEP_NUM_TASKS": "4"}),
    ],
)
def test_one_process_is_right_there(values, environ):
    assert default_launch(8, {"use_cpu": False, **values}, environ) == []


def test_a_process_alone_keeps_the_model_on_one_device(monkeypatch):
    args = SimpleNamespace(
        distributed_state=SimpleNamespace(distributed_type=SimpleNamespace(value="NO")), device=torch.device("cuda:0")
    )
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    assert on_one_device(args, {}) == {}
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert on_one_device(args, {}) == {"device_map": {"": "cuda:0"}}
    assert on_one_device(args, {"device_map": "auto"}) == {"device_map": "auto"}
    args.distributed_state.distributed_type.value = "MULTI_GPU"
    assert on_one_device(args, {}) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_processes", "abc"], "`num_processes`, an option of the launcher: invalid int value: 'abc'"),
        (["--num_processes", "0"], "`num_processes=0`, an option of the launcher, must be at least 1"),
        (["--main_process_port", "x"], "`main_process_port`, an option of the launcher: invalid int value"),
        (["--mixed_precision", "x"], "`mixed_precision`, an option of the launcher: invalid choice"),
        (["--num_processes"], "`num_processes`, an option of the launcher: expected one argument"),
    ],
)
def test_options_of_the_launcher(options, message):
    with pytest.raises(ValueError, match=message):
        check_options(options, "align")


@pytest.mark.parametrize("content", ["", "a: [", "- 1", "num_proc: 3"])
def test_configurations_that_are_none(content, tmp_path, capsys, model_folder, pairs_file):
    (tmp_path / "mine.yaml").write_text(content)
    argv = [*arguments(model_folder, pairs_file, tmp_path / "out"), "--accelerate_config", str(tmp_path / "mine.yaml")]
    assert "mine.yaml" in refusal(align.main, capsys, argv)


@pytest.mark.lengthy
def test_the_package_runs_as_the_script():
    done, script = (python("-m", name, "--version") for name in ("otpo", "otpo.cli.main"))
    assert done.returncode == 0 and done.stdout == script.stdout


# Before anything is loaded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"report": "FOLDER"}, "is a folder. Name a file, such as"),
        ({"report": "/proc/none/report.json"}, "`report=/proc/none/report.json` can't be written"),
        ({"output_dir": "/proc/none"}, "`output_dir=/proc/none` can't be written"),
        ({"report_to": "tensorboard"}, "`report_to=tensorboard` needs the package tensorboard: `pip install"),
        ({"report_to": "paper"}, "`report_to=paper` is not known. Set one or several of: none, all, "),
        ({"loss_type": "sigmod"}, "`loss_type=sigmod` is not known. Set one or several of: sigmoid, hinge"),
        ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` must be at least 1, got 0"),
        ({"num_train_epochs": -1}, "`num_train_epochs` must be a finite number of at least 0, got -1"),
        (
            {"per_device_train_batch_size": 999, "dataloader_drop_last": True},
            "row(s), since a batch of all processes has 999. Leave it out, or lower `per_device_train_batch_size=999`",
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "`lr_scheduler_kwargs` can't be used with `lr_sched"),
        ({"lr_scheduler_kwargs": '{"low": 1}'}, "can't be used with `lr_scheduler_type=linear`: get_linear_schedule"),
        ({"model_init_kwargs": json.dumps({"foo": 1})}, "`model_init_kwargs` has the name `foo`, which is not known"),
    ],
)
def test_what_is_refused_beforehand(changes, message, capsys, model_folder, pairs_file, tmp_path, monkeypatch):
    monkeypatch.setattr("otpo.cli.options.preflight.get_available_reporting_integrations", list)
    changes = {name: str(tmp_path) if value == "FOLDER" else value for name, value in changes.items()}
    argv = arguments(model_folder, pairs_file, **{"output": tmp_path / "out", **changes})
    assert message in refusal(align.main, capsys, argv)


@pytest.mark.parametrize("kind", [ValueError, OSError])
def test_faults_in_a_training_step_keep_their_trace(kind, monkeypatch, model_folder, pairs_file, tmp_path):
    def fail(*_args, **_kwargs):
        raise kind("in a step")

    monkeypatch.setattr("otpo.OTPOTrainer.training_step", fail)
    with pytest.raises(kind, match="in a step"):
        align.main(arguments(model_folder, pairs_file, tmp_path))
    monkeypatch.setattr("trl.SFTTrainer.training_step", fail)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "the red", "completion": "box"}\n' * 4)
    with pytest.raises(kind, match="in a step"):
        sft.main(arguments(model_folder, str(tmp_path / "rows.jsonl"), tmp_path / "out"))

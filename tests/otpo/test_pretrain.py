"""`otpo pretrain`: a new model, stages one after the other, a run that is killed, several processes, refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from pretraining_helpers import chain_documents
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moe_backbone.saved_code import AUTO_MAP
from otpo.cli import pretrain

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _own_process(monkeypatch):
    for name in list(os.environ):
        if name == "LOCAL_RANK" or name.startswith("ACCELERATE_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def tokenizer_folder(tokenizer, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("documents") / "chain.jsonl"
    chain_documents(300).to_json(path)
    return str(path)


def arguments(tokenizer: str, output: Path, **changes) -> list[str]:
    options = {
        "preset": "compass-tiny",
        "tokenizer_name_or_path": tokenizer,
        "output_dir": output,
        "sequence_length": 32,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **changes,
    }
    return [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]


def command(argv: list[str]) -> dict:
    return {
        "args": [sys.executable, "-m", "otpo.cli.main", "pretrain", *argv],
        "env": {
            **{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
            "OMP_NUM_THREADS": "1",
        },
    }


def refusal(capsys, argv: list[str]) -> str:
    capsys.readouterr()
    assert pretrain.main(argv) == 2
    message = capsys.readouterr().err
    assert message.count("error:") == 1
    assert "Traceback" not in message
    return message


def test_a_new_model(tokenizer_folder, tokenizer, documents, tmp_path, capsys):
    argv = arguments(
        tokenizer_folder, tmp_path, dataset_name=documents, report=tmp_path / "report.json",
        config_overrides="num_mtp_layers=2,router_bias_update_speed=0.001,rope_parameters=null", max_train_rows=100,
    )  # fmt: skip
    assert pretrain.main(argv) == 0
    printed = capsys.readouterr().out
    assert "16, 4 a token, 0 shared" in printed
    assert "run by grouped_mm" in printed
    assert "0.1 x MTP (2 layers)" in printed
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.vocab_size == -(-len(tokenizer) // 64) * 64
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert len(model.model.mtp_layers) == 2
    assert model.model.layers[0].mlp.gate.e_score_correction_bias.abs().max() > 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["steps"] == 4
    assert report["metrics"]["train"]["router/dropped"] == 0


def test_the_code_and_a_card_are_saved(tokenizer_folder, documents, tmp_path, capsys):
    first = arguments(
        tokenizer_folder, tmp_path / "first", dataset_name=documents, max_train_rows=100, max_steps=2, save_code=True,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    assert pretrain.main(first) == 0
    assert "model, its code and tokenizer in" in capsys.readouterr().out
    for folder in (tmp_path / "first", tmp_path / "first" / "checkpoint-1"):
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
        assert {"modeling_compass.py", "configuration_compass.py", "moe_block.py"} <= set(os.listdir(folder))
    card = ModelCard.load(tmp_path / "first" / "README.md")
    assert {"otpo", "pretraining", "compass"} <= set(card.data.tags) and not card.data.base_model
    assert "a new model of the preset `compass-tiny`" in card.text and f"on `{documents}`" in card.text
    assert "trust_remote_code=True" in card.text and "import moe_backbone" not in card.text

    second = arguments(
        tokenizer_folder, tmp_path / "second", preset=None, model_name_or_path=tmp_path / "first", max_steps=1,
        dataset_name=documents, max_train_rows=100,
    )  # fmt: skip
    assert pretrain.main(second) == 0
    card = ModelCard.load(tmp_path / "second" / "README.md").text
    assert f"from `{tmp_path / 'first'}`" in card and "import moe_backbone" in card and "remote_code" not in card
    assert not list((tmp_path / "second").glob("*.py"))


def test_going_on_from_a_checkpoint_with_the_bundled_corpus(tokenizer_folder, tmp_path):
    first = arguments(tokenizer_folder, tmp_path / "a", dataset_name="otpo/demo-corpus", dataset_config=40)
    assert pretrain.main(first) == 0
    second = arguments(
        tokenizer_folder, tmp_path / "b", preset=None, tokenizer_name_or_path=None, model_name_or_path=tmp_path / "a",
        dataset_name="otpo/demo-corpus", dataset_config=40, dataset_streaming=True, do_eval=True, max_eval_rows=10,
        learning_rate=0.0, max_steps=1, config_overrides="mtp_loss_coef=0.2", experts_implementation="eager",
    )  # fmt: skip
    assert pretrain.main(second) == 0
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert json.loads((tmp_path / "b/config.json").read_text())["mtp_loss_coef"] == 0.2


def make_mixture(tmp_path: Path, documents: str) -> str:
    path = tmp_path / "mixture.yaml"
    stage = {"steps": 3, "learning_rate": 0.001, "sources": [{"path": documents}]}
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 1024}
    mixture = {
        "evaluation": [{"path": documents, "max_documents": 20}],
        "stages": [
            {**stage, "name": "general", "sequence_length": 32},
            {**stage, "name": "long", "sequence_length": 2048, "rope_parameters": yarn,
             "per_device_train_batch_size": 1},
        ],
    }  # fmt: skip
    path.write_text(yaml.safe_dump(mixture))
    return str(path)


def test_stages(tokenizer_folder, documents, tmp_path, capsys):
    mixture = make_mixture(tmp_path, documents)
    argv = arguments(tokenizer_folder, tmp_path / "run", mixture=mixture, do_eval=True, max_steps=None)
    assert pretrain.main(argv) == 0
    printed = capsys.readouterr().out
    assert "stage      general" in printed
    assert "run/01-general, " in printed  # the model that the second stage starts from
    config = json.loads((tmp_path / "run/02-long/config.json").read_text())
    assert config["max_position_embeddings"] == 2048
    assert config["rope_parameters"]["rope_type"] == "yarn"
    assert json.loads((tmp_path / "run/01-general/config.json").read_text())["max_position_embeddings"] == 1024

    assert "holds finished stages (01-general, 02-long). Set `resume_from_checkpoint=true`" in refusal(capsys, argv)
    (tmp_path / "run/02-long/stage_finished").unlink()
    before = (tmp_path / "run/01-general/model.safetensors").stat().st_mtime_ns
    assert pretrain.main([*argv, "--resume_from_checkpoint", "true"]) == 0
    assert (tmp_path / "run/01-general/model.safetensors").stat().st_mtime_ns == before
    assert (tmp_path / "run/02-long/stage_finished").is_file()


def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(tokenizer_folder, documents, tmp_path):
    options = {"dataset_name": documents, "max_steps": 40, "save_strategy": "steps", "save_steps": 5}
    whole = arguments(tokenizer_folder, tmp_path / "whole", **options)
    assert pretrain.main(whole) == 0

    killed = arguments(tokenizer_folder, tmp_path / "killed", **options)
    process = subprocess.Popen(**command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed/checkpoint-10/trainer_state.json").is_file():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    half = tmp_path / "killed/checkpoint-999"  # what a kill in the middle of saving leaves
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"")
    assert pretrain.main([*killed, "--resume_from_checkpoint", "true"]) == 0
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_two_processes_learn_what_one_learns(tokenizer_folder, documents, tmp_path):
    losses = []
    for processes in (1, 2):
        argv = arguments(
            tokenizer_folder, tmp_path, dataset_name=documents, report=tmp_path / "report.json",
            per_device_train_batch_size=8 // processes, num_processes=processes, logging_steps=4, learning_rate=1e-3,
        )  # fmt: skip
        if processes == 1:
            del argv[argv.index("--num_processes") : argv.index("--num_processes") + 2]
        done = subprocess.run(**command(argv), capture_output=True, text=True, check=False, timeout=180)
        assert done.returncode == 0, done.stderr
        metrics = json.loads((tmp_path / "report.json").read_text())["metrics"]["train"]
        losses.append([metrics[name] for name in ("lm_loss", "mtp_loss", "aux_loss", "z_loss", "router/dropped")])
        assert f"{processes} process" in done.stdout
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert losses[0][:2] == pytest.approx(losses[1][:2], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": None}, "No model is named. Set `preset`"),
        ({"preset": "compass-v9"}, "`compass-v9` is no preset. There are: compass-v3"),
        ({"tokenizer_name_or_path": None}, "needs a tokenizer: set `tokenizer_name_or_path`"),
        ({"dataset_name": None}, "No data is named. Set `dataset_name`"),
        ({"dataset_name": "nowhere.jsonl"}, "Source nowhere.jsonl (split train) can't be read: there is no such file"),
        ({"mixture": "nowhere.yaml", "dataset_name": None}, "`mixture=nowhere.yaml`: there is no such file"),
        ({"config_overrides": "experts=3"}, "'experts=3' is no `name=value` of an option of CompassConfig"),
        ({"config_overrides": "num_experts=3"}, "`num_experts_per_tok=4` is above `num_experts=3`"),
        ({"config_overrides": "num_mtp_layers=0,mtp_loss_coef=0.5"}, "but `num_mtp_layers` is 0"),
        ({"experts_implementation": "fast"}, "fast"),
        ({"resume_from_checkpoint": True}, "there is no checkpoint in `output_dir="),
        ({"sequence_length": 1}, "`sequence_length` must be at least 2"),
        ({"dataset_name": "otpo/demo-corpus", "dataset_config": "many"}, "number of documents to generate"),
    ],
)
def test_refusals(tokenizer_folder, documents, tmp_path, capsys, changes, message):
    assert message in refusal(capsys, arguments(tokenizer_folder, tmp_path, **{"dataset_name": documents, **changes}))


def test_a_dataset_beside_a_mixture(tokenizer_folder, documents, tmp_path, capsys):
    argv = arguments(
        tokenizer_folder, tmp_path, dataset_name=documents, mixture=make_mixture(tmp_path, documents), stage="long"
    )
    assert "Both `dataset_name=" in refusal(capsys, argv)


def test_several_stages_need_processes_of_their_own(tokenizer_folder, documents, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    argv = arguments(tokenizer_folder, tmp_path / "run", mixture=make_mixture(tmp_path, documents))
    assert "Start them one by one with `--stage NAME`" in refusal(capsys, argv)


def test_help_has_our_options_first(capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    ours, theirs = text.index("pretraining (otpo):"), text.index("training (transformers):")
    assert ours < text.index("\n  --mixture") < theirs

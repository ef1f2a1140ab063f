"""`otpo pretrain`: a new model, stages one after the other, a run that is killed, several processes, refusals.

The file is over 350 lines because its runs build on one another: new, staged, killed, resumed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from cli_helpers import HANG
from datasets import Dataset
from huggingface_hub import ModelCard
from pretraining_helpers import chain_documents
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_backbone import CompassConfig, CompassForCausalLM, preset
from moe_backbone.model.saved_code import AUTO_MAP
from otpo.cli import pretrain
from otpo.cli.pretraining import compiling
from otpo.cli.pretraining.data import find_sources, load_rows
from otpo.cli.pretraining.model import parse_overrides

ROOT = Path(__file__).parents[2]
UNSAID = {"max_steps": None, "sequence_length": None, "per_device_train_batch_size": None}
"""Leaves to a stage what a stage sets."""


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
    assert message.count("error:") == message.count("\n") == 1
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


@pytest.mark.lengthy
def test_bfloat16_weights_are_trained_by_float32_masters(tokenizer_folder, documents, tmp_path, capsys):
    losses = {}
    for dtype, optim in [("float32", "adamw_torch"), ("bfloat16", "adamw_torch"), ("bfloat16", "sgd")]:
        folder = tmp_path / f"{dtype}_{optim}"
        options = {"dtype": dtype, "optim": optim, "report": tmp_path / "report.json", "save_strategy": "steps"}
        argv = arguments(tokenizer_folder, folder, dataset_name=documents, save_steps=2, max_steps=2, **options)
        assert pretrain.main(argv) == 0
        told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("optimizer"))
        assert ("float32 masters" in told) == (dtype == "bfloat16" and optim != "sgd")
        assert ("steps below a weight's rounding are lost" in told) == (optim == "sgd")
        losses[dtype, optim] = json.loads((tmp_path / "report.json").read_text())["metrics"]["train"]["loss"]
    adamw = losses["bfloat16", "adamw_torch"]
    assert adamw == pytest.approx(losses["float32", "adamw_torch"], rel=0.02)
    saved = load_file(tmp_path / "bfloat16_adamw_torch" / "model.safetensors")
    types = {name: tensor.dtype for name, tensor in saved.items()}
    assert {name for name, kind in types.items() if kind != torch.bfloat16} == {
        name for name in types if name.endswith("mlp.gate.weight")
    }

    folder = tmp_path / "bfloat16_sgd"
    argv = arguments(tokenizer_folder, folder, dataset_name=documents, dtype="bfloat16", optim="adamw_torch")
    with pytest.raises(ValueError, match="Set `dtype` and `optim` as they were"):
        pretrain.main([*argv, "--resume_from_checkpoint", "true"])


@pytest.mark.lengthy
def test_compiled_layers_learn_the_same(tokenizer_folder, documents, tmp_path, capsys, monkeypatch):
    """The graphs run as they are, without code being generated."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "compile_layers", partial(compiling.compile_layers, backend="aot_eager"))
    losses = []
    for asked in (False, True):
        counters.clear()
        report = tmp_path / f"{asked}.json"
        argv = arguments(
            tokenizer_folder, tmp_path / str(asked), dataset_name=documents, report=report, compile_layers=asked
        )
        assert pretrain.main(argv) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert ("compiled each layer" if asked else "compiled no (`compile_layers`)") in printed
        losses.append(json.loads(report.read_text())["metrics"]["train"]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 2


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


@pytest.mark.lengthy
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


def tiny_compass_of(layers: int) -> CompassForCausalLM:
    return CompassForCausalLM(preset("compass-tiny", num_hidden_layers=layers, num_experts=4, vocab_size=384))


def make_mixture(tmp_path: Path, documents: str, second: dict | None = None) -> str:
    path = tmp_path / "mixture.yaml"
    stage = {"steps": 3, "learning_rate": 0.001, "sources": [{"path": documents}]}
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 1024}
    mixture = {
        "evaluation": [{"path": documents, "max_documents": 20}],
        "stages": [
            {**stage, "name": "general", "sequence_length": 32},
            {**stage, "name": "long", "sequence_length": 2048, "rope_parameters": yarn,
             "per_device_train_batch_size": 1, **(second or {})},
        ],
    }  # fmt: skip
    path.write_text(yaml.safe_dump(mixture))
    return str(path)


@pytest.mark.lengthy
def test_stages(tokenizer_folder, documents, tmp_path, capsys):
    mixture = make_mixture(tmp_path, documents)
    argv = arguments(tokenizer_folder, tmp_path / "run", mixture=mixture, do_eval=True, **UNSAID)
    assert pretrain.main(argv) == 0
    printed = capsys.readouterr().out
    assert "stage      general" in printed
    assert "length     `max_position_embeddings` is raised from 1024 to 2048, the `sequence_length`" in printed
    assert "'factor': 2.0" in printed and "(of the stage)" in printed
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


@pytest.mark.parametrize("several", [False, True])
def test_what_a_stage_says_holds_unless_the_user_says_otherwise(
    tokenizer_folder, documents, tmp_path, capsys, several
):
    stage = {
        "name": "short", "steps": 2, "sequence_length": 32, "learning_rate": 0.01, "warmup_steps": 1,
        "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.005},
        "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "sources": [{"path": documents}],
    }  # fmt: skip
    path = tmp_path / "mixture.yaml"
    path.write_text(yaml.safe_dump({"stages": [stage, {**stage, "name": "other"}] if several else [stage]}))

    def run(folder, **changes):
        report = tmp_path / "report.json"
        argv = arguments(
            tokenizer_folder, tmp_path / folder, mixture=path, report=report, **{**UNSAID, "stage": "short", **changes}
        )
        assert pretrain.main(argv) == 0
        done = json.loads(report.read_text())
        return done["steps"], done["metrics"]["train"]["learning_rate"], done["options"], capsys.readouterr().out

    steps, rate, options, printed = run("stage")
    assert (steps, rate) == (2, 0.01) and options["learning_rate"] == 0.01
    assert "rows of 32 tokens to train on, 0 to evaluate on, 6 rows (192 tokens) in a step" in printed
    line = (
        "stage      short: steps 2 (of the stage), sequence length 32 (of the stage), learning rate 0.01 (of the "
        "stage), lr scheduler type cosine_with_min_lr (of the stage)"
    )
    assert line in printed

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"gradient_accumulation_steps": 1, "warmup_steps": 0}))
    steps, rate, options, printed = run(
        "user", learning_rate=0.0003, max_steps=1, config=recipe, stage=None if not several else "short"
    )  # the rate is the default of the option, said all the same
    assert (steps, rate) == (1, 0.0003)
    for part in (
        "steps 1 (command line; the stage says 2)",
        "learning rate 0.0003 (command line; the stage says 0.01)",
        "warmup steps 0 (recipe; the stage says 1)",
        "gradient accumulation steps 1 (recipe; the stage says 2)",
        "per device train batch size 3 (of the stage)",
    ):
        assert part in printed
    assert "3 rows (96 tokens) in a step" in printed


def test_epochs_are_in_place_of_a_stages_steps(tokenizer_folder, tmp_path, capsys):
    chain_documents(20).to_json(tmp_path / "few.jsonl")
    stage = {"name": "one", "steps": 99, "sequence_length": 64, "learning_rate": 0.01}
    path = tmp_path / "mixture.yaml"
    path.write_text(yaml.safe_dump({"stages": [{**stage, "sources": [{"path": str(tmp_path / "few.jsonl")}]}]}))
    argv = arguments(tokenizer_folder, tmp_path / "run", mixture=path, num_train_epochs=1, **UNSAID)
    assert pretrain.main(argv) == 0
    assert "num train epochs 1 (command line; the stage says 99)" in capsys.readouterr().out


@pytest.mark.lengthy
def test_a_stage_in_launched_processes(tokenizer_folder, documents, tmp_path):
    """Launched by us, a process for each stage."""
    mixture = make_mixture(tmp_path, documents, second={"sequence_length": 48})
    options = {**UNSAID, "num_processes": 1, "learning_rate": 0.002}
    argv = arguments(tokenizer_folder, tmp_path / "run", mixture=mixture, **options)
    done = subprocess.run(**command(argv), capture_output=True, text=True, check=False, timeout=HANG)
    assert done.returncode == 0, done.stderr
    for part in (
        "stage      general: steps 3 (of the stage), sequence length 32 (of the stage), learning rate 0.002 (command "
        "line; the stage says 0.001)",
        "stage      long: steps 3 (of the stage), sequence length 48 (of the stage), learning rate 0.002 (command",
        "run/01-general, ",
    ):
        assert part in done.stdout


def test_a_fault_in_a_step_keeps_its_trace(tokenizer_folder, documents, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("the disk is full")

    monkeypatch.setattr("moe_backbone.pretraining.trainer.PretrainingTrainer.training_step", fail)
    mixture = make_mixture(tmp_path, documents)
    for changes in ({"dataset_name": documents}, {"mixture": mixture}, {"mixture": mixture, "stage": "general"}):
        with pytest.raises(OSError, match="the disk is full"):
            pretrain.main(arguments(tokenizer_folder, tmp_path / "run", **changes))


def test_a_tokenizer_without_a_padding_token(tokenizer_folder, documents, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    argv = arguments(str(tmp_path / "tokenizer"), tmp_path / "run", dataset_name=documents)
    assert pretrain.main(argv) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config.pad_token_id is None and model.model.embed_tokens.padding_idx is None
    assert AutoTokenizer.from_pretrained(tmp_path / "run").pad_token is None


def test_overrides_of_the_configuration():
    text = 'rope_parameters={"rope_type": "yarn", "factor": 4, "x": [1, 2]}, num_experts=8,tie_word_embeddings=False,'
    assert parse_overrides(text) == {
        "rope_parameters": {"rope_type": "yarn", "factor": 4, "x": [1, 2]},
        "num_experts": 8,
        "tie_word_embeddings": False,
    }
    assert parse_overrides("hidden_act=silu,rope_parameters=null,rms_norm_eps=1e-5") == {
        "hidden_act": "silu", "rope_parameters": None, "rms_norm_eps": 1e-5
    }  # fmt: skip
    assert parse_overrides(None) == parse_overrides(" , ") == {}
    whole = parse_overrides("mtp_loss_coef=0,router_aux_loss_coef=1,num_mtp_layers=1,use_cache=true")
    assert [type(value) for value in whole.values()] == [float, float, int, bool]
    assert CompassConfig(**whole).mtp_loss_coef == 0.0


def test_the_documents_that_are_taken_are_drawn_by_the_seed(tmp_path, tokenizer):
    Dataset.from_dict({"input_ids": [[number, 9, 9] for number in range(60)]}).to_json(tmp_path / "a.jsonl")
    parser = pretrain.make_parser()

    def first_tokens(seed):
        argv = arguments("-", tmp_path / "run", dataset_name=tmp_path / "a.jsonl", max_train_rows=8, seed=seed)
        data, args, _ = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        train, _, _ = find_sources(data)
        rows = load_rows(train, None, tokenizer, preset("compass-tiny"), args, streaming=False)
        return sorted(token for row in rows for token in row["input_ids"] if token != 9)

    assert len(first_tokens(0)) == 8
    assert first_tokens(0) != first_tokens(1) and first_tokens(0) != list(range(8))


@pytest.mark.lengthy
def test_a_revision_of_a_checkpoint_on_the_hub(tokenizer_folder, documents, tmp_path):
    """From a cache of two revisions, of one and of two layers."""
    cache = tmp_path / "hub/models--we--ours"
    for revision, layers in (("main", 1), ("v2", 2)):
        commit = str(layers) * 40
        (cache / "refs").mkdir(parents=True, exist_ok=True)
        (cache / "refs" / revision).write_text(commit)
        folder = cache / "snapshots" / commit
        AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
        tiny_compass_of(layers).save_pretrained(folder)
    argv = arguments(
        tokenizer_folder, tmp_path / "run", preset=None, tokenizer_name_or_path=None, max_steps=1,
        model_name_or_path="we/ours", model_revision="v2", dataset_name=documents,
    )  # fmt: skip
    started = command(argv)
    started["env"] |= {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(**started, capture_output=True, text=True, check=False, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/config.json").read_text())["num_hidden_layers"] == 2


@pytest.mark.lengthy
def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(tokenizer_folder, documents, tmp_path):
    options = {"dataset_name": documents, "max_steps": 40, "save_strategy": "steps", "save_steps": 5}
    whole = arguments(tokenizer_folder, tmp_path / "whole", **options)
    assert pretrain.main(whole) == 0

    killed = arguments(tokenizer_folder, tmp_path / "killed", **options)
    process = subprocess.Popen(**command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + HANG
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


@pytest.mark.lengthy
def test_two_processes_learn_what_one_learns(tokenizer_folder, documents, tmp_path):
    losses = []
    for processes in (1, 2):
        argv = arguments(
            tokenizer_folder, tmp_path, dataset_name=documents, report=tmp_path / "report.json",
            per_device_train_batch_size=8 // processes, num_processes=processes, logging_steps=4, learning_rate=1e-3,
        )  # fmt: skip
        if processes == 1:
            del argv[argv.index("--num_processes") : argv.index("--num_processes") + 2]
        done = subprocess.run(**command(argv), capture_output=True, text=True, check=False, timeout=HANG)
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
        ({"experts_implementation": "fast"}, "`experts_implementation=fast` is not known. Set one of: auto, memcpy"),
        ({"resume_from_checkpoint": True}, "there is no checkpoint in `output_dir="),
        ({"sequence_length": 1}, "`sequence_length` must be at least 2"),
        ({"dataset_name": "otpo/demo-corpus", "dataset_config": "many"}, "number of documents to generate"),
        ({"dataset_name": "otpo/demo"}, "Source otpo/demo (split train) can't be read: it holds no documents."),
        (
            {"dataset_name": "otpo/demo-corpus", "dataset_train_split": "all"},
            "has the split(s) ['test', 'train']. Set",
        ),
        ({"do_eval": True}, "`dataset_test_split`: Source "),
        ({"do_eval": True}, "Should be one of ['train']. Set `dataset_test_split`, name a held-out file"),
        ({"eval_strategy": "steps"}, "`dataset_test_split`: Source "),
        ({"dataset_train_split": "validation"}, "`dataset_train_split`: Source "),
        ({"dataset_config": "en"}, "a file has no configurations, and `config` is 'en'"),
        ({"text_column": "body"}, "has no column 'body'; it has ['input_ids']"),
        ({"stage": "general"}, "`stage=general` names a stage of a mixture. Set `mixture`"),
        ({"use_peft": True}, "Unknown option among ['--use_peft', 'True']"),
        ({"load_in_4bit": True}, "Unknown option among ['--load_in_4bit', 'True']"),
        ({"lora_r": 4}, "Unknown option among ['--lora_r', '4']"),
        ({"model_name_or_path": "somewhere"}, "Both `preset=compass-tiny` and `model_name_or_path=somewhere` name"),
        ({"tokenizer_name_or_path": "no/where"}, "`tokenizer_name_or_path=no/where`: there is no tokenizer to read"),
        ({"model_revision": "v2"}, "`model_revision=v2` goes with `model_name_or_path`"),
        ({"dtype": "auto"}, "`dtype=auto` is the type of a checkpoint's weights"),
        ({"config_overrides": "num_experts=many"}, "'num_experts' expected int, got str (value: 'many')"),
        (
            {"config_overrides": "num_expert=3"},
            "is no `name=value` of an option of CompassConfig. Did you mean `num_e",
        ),
        ({"config_overrides": "hidden_act=nope"}, "`hidden_act` must be one of gelu"),
        ({"config_overrides": 'rope_parameters={"rope_type":"yarn"}'}, "Missing required keys in `rope_parameters`"),
        ({"config_overrides": 'rope_parameters={"rope_type":'}, "the value of `rope_parameters` is not JSON"),
        ({"config_overrides": "router_aux_loss_coef=NaN"}, "`router_aux_loss_coef` must be a finite number, got nan"),
        ({"config_overrides": "initializer_range=-0.1"}, "`initializer_range` must be at least 0, got -0.1"),
        ({"config_overrides": "rms_norm_eps=0"}, "`rms_norm_eps` must be above 0, got 0.0"),
        (
            {"config_overrides": "hidden_size=33", "experts_implementation": "grouped_mm"},
            "`hidden_size=33` of CompassExperts must be a multiple of 4 in this precision. Change that, or set",
        ),
        (
            {"config_overrides": "moe_intermediate_size=36", "bf16": True, "experts_implementation": "memcpy"},
            "`moe_intermediate_size=36` of CompassExperts must be a multiple of 8",
        ),
        ({"config_overrides": "num_experts=8,num_experts=4"}, "sets `num_experts` twice"),
        ({"remove_unused_columns": True}, "`remove_unused_columns` must stay false"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor=0.1`"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "can't be used with `lr_scheduler_type=warmup_stable_decay`"),
        ({"use_liger_kernel": True}, "`use_liger_kernel`: Liger has no kernels for Compass"),
        ({"dtype": "float16"}, "Weights in float16 (`dtype=float16`, or `dtype=auto` of such a checkpoint) lose"),
    ],
)
def test_refusals(tokenizer_folder, documents, tmp_path, capsys, changes, message):
    assert message in refusal(capsys, arguments(tokenizer_folder, tmp_path, **{"dataset_name": documents, **changes}))


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        ("dataset_config", "en", "config"),
        ("dataset_train_split", "train", "split"),
        ("dataset_test_split", "validation", "split"),
        ("text_column", "body", "text_column"),
        ("max_train_rows", 3, "max_documents"),
        ("max_eval_rows", 3, "max_documents"),
    ],
)
def test_options_of_a_dataset_beside_a_mixture(tokenizer_folder, documents, tmp_path, capsys, option, value, field):
    argv = arguments(tokenizer_folder, tmp_path, mixture=make_mixture(tmp_path, documents), **{option: value})
    message = f"`{option}={value}` goes with `dataset_name`. Of a mixture set `{field}` of its sources."
    assert message in refusal(capsys, argv)


@pytest.mark.parametrize("stage", [None, "long"])
def test_a_mixture_that_can_not_be(tokenizer_folder, tmp_path, capsys, stage):
    path = tmp_path / "mixture.yaml"
    path.write_text("stages: [{name: long, steps: 1, sequence_length: 8, learning_rate: 1, sources: a.jsonl}]")
    message = refusal(capsys, arguments(tokenizer_folder, tmp_path, mixture=path, stage=stage))
    assert f"`mixture={path}`: `stages[0].sources` must be a list, got 'a.jsonl'" in message


@pytest.mark.parametrize(("name", "told"), [(None, "run by grouped_mm"), ("memcpy", "run by memcpy (`experts_impl")])
def test_the_experts_run_as_the_header_says(tokenizer_folder, documents, tmp_path, capsys, monkeypatch, name, told):
    called = set()
    for known in ("memcpy", "grouped_mm"):
        function = ALL_EXPERTS_FUNCTIONS[known]
        counting = lambda *args, known=known, function=function: called.add(known) or function(*args)  # noqa: E731
        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, known, counting)
    argv = arguments(
        tokenizer_folder,
        tmp_path,
        dataset_name=documents,
        max_train_rows=100,
        max_steps=1,
        experts_implementation=name,
    )
    assert pretrain.main(argv) == 0
    assert f", {told}" in capsys.readouterr().out
    assert called == {name or "grouped_mm"}


def test_widths_that_grouped_products_cannot_take(tokenizer_folder, documents, tmp_path, capsys):
    argv = arguments(
        tokenizer_folder, tmp_path, dataset_name=documents, max_train_rows=100, max_steps=1,
        config_overrides="moe_intermediate_size=33",
    )  # fmt: skip
    assert pretrain.main(argv) == 0
    line = (
        "run by eager, not by memcpy or grouped_mm: `moe_intermediate_size=33` of CompassExperts must be a multiple of"
    )
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("override", ["num_experts=8", "hidden_size=64", "vocab_size=96"])
def test_a_checkpoint_of_other_sizes(tokenizer_folder, compass_folder, documents, tmp_path, capsys, override):
    argv = arguments(
        tokenizer_folder,
        tmp_path,
        preset=None,
        model_name_or_path=compass_folder,
        dataset_name=documents,
        config_overrides=override,
    )
    assert f"weights are of other sizes than its configuration as `config_overrides={override}` ch" in refusal(
        capsys, argv
    )


def test_a_checkpoint_of_another_kind(tokenizer_folder, documents, model_folder, tmp_path, capsys):
    argv = arguments(tokenizer_folder, tmp_path, preset=None, model_name_or_path=model_folder, dataset_name=documents)
    assert "its `model_type` is 'qwen3'; `otpo pretrain` trains 'compass' alone" in refusal(capsys, argv)


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

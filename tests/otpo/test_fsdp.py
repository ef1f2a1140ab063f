"""FSDP2 in two processes is one process that takes the rows of both, for each command and Mixture-of-Experts model."""

import json
import shutil
from importlib import import_module

import pytest
import torch
import transformers
from cli_helpers import LORA
from datasets import Dataset
from fsdp_helpers import FSDP2, PLAIN, STEPS, adapter, farthest, history, start, weights, words, worst_gradient
from fsdp_worker import Record
from helpers import make_pairs, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, Qwen3MoeConfig

from moe_backbone import CompassConfig

pytestmark = pytest.mark.lengthy
CLOSE = 1e-5
OPTIONS = {"align": {"ot_reg": 0.1}, "sft": {}, "pretrain": {"sequence_length": 32}}
SPREAD = {"expert_parallel_size": 2, "expert_parallel_backend": "transformers"}
SPREAD_CASES = [("align", "compass"), ("align", "qwen3_moe"), ("sft", "mixtral"), ("pretrain", "compass")]
CASES = [
    *(("align", name) for name in ("compass", "tied", "qwen3_moe", "mixtral")),
    *(("sft", name) for name in ("compass", "qwen3_moe", "mixtral")),
    *(("pretrain", name) for name in ("compass", "tied")),
]


@pytest.fixture(scope="module")
def models(compass_folder, tmp_path_factory):
    """Compass with MTP layer, biases of the router and all losses, and with tied weights; the two others."""
    folder = tmp_path_factory.mktemp("models")
    shape = CompassConfig.from_pretrained(compass_folder)
    names = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    names += ("initializer_range", "pad_token_id", "eos_token_id", "router_aux_loss_coef")
    sizes = {name: getattr(shape, name) for name in names}
    sizes |= {"intermediate_size": 16, "output_router_logits": True, "num_experts_per_tok": 2}
    biased = {"router_bias_update_speed": 1e-3, "router_z_loss_coef": 0.01, "num_shared_experts": 1}
    configs = {
        "compass": CompassConfig.from_pretrained(compass_folder, **biased),
        "tied": CompassConfig.from_pretrained(compass_folder, tie_word_embeddings=True),
        "qwen3_moe": Qwen3MoeConfig(**sizes, moe_intermediate_size=16, num_experts=4),
        "mixtral": MixtralConfig(**sizes, num_local_experts=4),
    }
    tokenizer, made = AutoTokenizer.from_pretrained(compass_folder), {}
    for name, config in configs.items():
        torch.manual_seed(0)
        made[name] = save_model(AutoModelForCausalLM.from_config(config), folder / name, tokenizer)
    return made


@pytest.fixture(scope="module")
def data(pairs_file, tmp_path_factory):
    """A file of rows for each command: pairs, their chosen conversations, and the words of these."""
    folder, pairs = tmp_path_factory.mktemp("data"), make_pairs(24)
    talks = [prompt + chosen for prompt, chosen in zip(pairs["prompt"], pairs["chosen"], strict=True)]
    rows = {
        "sft": {"messages": talks},
        "pretrain": {"text": [" ".join(turn["content"] for turn in talk) for talk in talks]},
    }
    for command, columns in rows.items():
        Dataset.from_dict(columns).to_json(folder / f"{command}.jsonl")
    return {"align": pairs_file} | {command: str(folder / f"{command}.jsonl") for command in rows}


def ran(folder, models, data, cases, launcher=FSDP2, processes=2, more=(), **changes):
    """The folder of runs of several commands in one launch, and what the launch said; `more` are whole commands."""
    argvs = [
        words(models[name], data[command], folder / f"{command}-{name}", **{**OPTIONS[command], **changes})
        for command, name in cases
    ]
    commands = [{"command": case[0], "argv": argv} for case, argv in zip(cases, argvs, strict=True)]
    done = start(folder, [*commands, *more], launcher, processes)
    assert done.returncode == 0, (done.stdout + done.stderr)[-9000:]
    return folder, done.stdout


@pytest.fixture(scope="module")
def runs(models, data, tmp_path_factory):
    folder, said = ran(tmp_path_factory.mktemp("two"), models, data, CASES)
    assert "engine     FSDP 2, 2 processes" in said
    return folder


def resumed_runs(folder, models, data, **changes):
    """Runs of a whole model and of an adapter, each with another one that goes on from its second step."""
    made = []
    for kind, name, options in (("full", "mixtral", {}), ("lora", "qwen3_moe", LORA)):
        given = {**OPTIONS["align"], **changes, **options, "save_steps": 2}
        for run, checkpoint in ((kind, None), (f"{kind}-again", folder / kind / "checkpoint-2")):
            argv = words(models[name], data["align"], folder / run, **given, resume_from_checkpoint=checkpoint)
            made.append({"command": "align", "argv": argv})
    return made


@pytest.fixture(scope="module")
def spread(models, data, tmp_path_factory):
    """Runs whose experts transformers spreads over two processes, beside an FSDP2 of its own over all of them."""
    made = {}

    def run(processes):
        if processes not in made:
            folder = tmp_path_factory.mktemp("spread")
            changes = {**SPREAD, "use_cpu": True, "per_device_train_batch_size": 4 // processes}
            more = resumed_runs(folder, models, data, **changes) if processes > 2 else ()
            made[processes], said = ran(folder, models, data, SPREAD_CASES, PLAIN, processes, more, **changes)
            assert "over 2 process(es), in" in said
            assert "transformers' own, with FSDP2" in said
        return made[processes]

    return run


def assert_same(two, models, data, tmp_path, monkeypatch, command, name, **changes):
    """Losses, every gradient of five steps by name, routers' biases, and the folder that is saved."""
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*transformers.trainer.DEFAULT_CALLBACKS, Record])
    options = {**OPTIONS[command], "use_cpu": True, "gradient_accumulation_steps": 2, **changes}
    main = import_module(f"otpo.cli.{command}").main
    assert main(words(models[name], data[command], tmp_path, **options)) == 0
    assert len(history(two)) == STEPS
    assert history(two) == pytest.approx(history(tmp_path), abs=CLOSE)
    for step in range(STEPS):
        error, worst = worst_gradient(two, tmp_path, step)
        assert error < 1e-3, (step, worst)
    assert farthest(two, tmp_path) < CLOSE < farthest(two, models[name])
    biases = [weight for key, weight in weights(two).items() if key.endswith("e_score_correction_bias")]
    assert bool(biases) == (name == "compass")
    assert any(bias.any() for bias in biases) == (command == "pretrain" and name == "compass")


@pytest.mark.usefixtures("own_process")
@pytest.mark.parametrize(("command", "name"), CASES)
def test_two_processes_are_one(runs, models, data, tmp_path, monkeypatch, command, name):
    assert_same(runs / f"{command}-{name}", models, data, tmp_path, monkeypatch, command, name)


@pytest.mark.usefixtures("own_process")
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize(("command", "name"), SPREAD_CASES)
def test_spread_experts_beside_fsdp(spread, models, data, tmp_path, monkeypatch, command, name, processes):
    pytest.importorskip("moe_backbone.expert_parallel.native_trainer")
    two = spread(processes) / f"{command}-{name}"
    same = {"gradient_accumulation_steps": processes, "per_device_train_batch_size": 4 // processes}
    assert_same(two, models, data, tmp_path, monkeypatch, command, name, **same)


def test_four_processes_are_a_mesh_of_two_by_two(spread):
    """An expert is in two of them, a half in each; all else is in all four. And both kinds of checkpoints resume."""
    pytest.importorskip("moe_backbone.expert_parallel.native_trainer")
    folder = spread(4)
    parts = json.loads((folder / "sft-mixtral" / "parts.json").read_text())
    experts = {name for name in parts if ".experts." in name}
    assert len(experts) == 4 and len(parts) > 10
    for name, part in parts.items():
        assert part["mesh"] == ({"efsdp": 2, "ep": 2} if name in experts else {"fsdp": 4}), name
        assert part["held"] == pytest.approx(0.25, abs=0.05), name
    for kind, read in (("full", weights), ("lora", adapter)):
        expected, found = (history(folder / run) for run in (kind, f"{kind}-again"))
        assert found == expected and len(set(found)) == STEPS, kind
        saved = read(folder / kind)
        for name, weight in read(folder / f"{kind}-again").items():
            torch.testing.assert_close(weight, saved[name], rtol=0, atol=0, msg=f"{kind} {name}")


RESUMED = {
    "whole": ("align", "compass", {}, "FULL_STATE_DICT"),
    "parts": ("pretrain", "compass", {}, "SHARDED_STATE_DICT"),
    "adapter's parts": ("align", "qwen3_moe", LORA, "SHARDED_STATE_DICT"),
    "killed": ("sft", "mixtral", {}, "SHARDED_STATE_DICT"),
}


def test_checkpoints_resume_in_two_processes_and_in_one(models, data, tmp_path):
    """Those of adapters on attention and experts too, whole or in parts; the last run is killed before it ends."""

    def cases(folder, **changes):
        made = []
        for kind, (command, name, options, states) in RESUMED.items():
            given = {**OPTIONS[command], **options, "save_steps": 2, **changes}
            if changes and kind != "killed":
                given["resume_from_checkpoint"] = tmp_path / "first" / kind / "checkpoint-2"
            elif changes:
                given["resume_from_checkpoint"] = True
            argv = words(models[name], data[command], tmp_path / folder / kind, **given)
            made.append({"command": command, "argv": argv, "states": states})
        return made

    first = cases("first")
    first.append(
        {**first[-1], "die_at": 3, "argv": [*first[-1]["argv"], "--output_dir", str(tmp_path / "again" / "killed")]}
    )
    done = start(tmp_path / "first", first)
    assert done.returncode != 0
    assert not (tmp_path / "again" / "killed" / "checkpoint-4").exists()
    shutil.copytree(tmp_path / "again" / "killed", tmp_path / "alone" / "killed")
    for folder, processes in (("again", 2), ("alone", 1)):
        changes = {"gradient_accumulation_steps": 2 // processes}
        done = start(tmp_path / folder, cases(folder, **changes), processes=processes)
        assert done.returncode == 0, (done.stdout + done.stderr)[-9000:]
        for kind, (_, _, options, _) in RESUMED.items():
            expected, found = (history(tmp_path / each / kind) for each in ("first", folder))
            assert found == (expected if processes == 2 else pytest.approx(expected, abs=CLOSE)), (folder, kind)
            read = adapter if options else weights
            saved = read(tmp_path / "first" / kind)
            for name, weight in read(tmp_path / folder / kind).items():
                bound = 0 if processes == 2 else CLOSE
                torch.testing.assert_close(weight, saved[name], rtol=0, atol=bound, msg=f"{folder} {kind} {name}")

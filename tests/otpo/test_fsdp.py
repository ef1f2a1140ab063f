"""FSDP2 in two processes is one process that takes the rows of both, for each command and Mixture-of-Experts model."""

from importlib import import_module

import pytest
import torch
import transformers
from datasets import Dataset
from fsdp_helpers import STEPS, farthest, history, start, weights, words, worst_gradient
from fsdp_worker import Record
from helpers import make_pairs, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, Qwen3MoeConfig

from moe_backbone import CompassConfig

pytestmark = pytest.mark.lengthy
CLOSE = 1e-5
OPTIONS = {"align": {"ot_reg": 0.1}, "sft": {}, "pretrain": {"sequence_length": 32}}
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


@pytest.fixture(scope="module")
def runs(models, data, tmp_path_factory):
    """The folders of runs in two processes, one after the other in one launch."""
    folder = tmp_path_factory.mktemp("two")
    cases = []
    for command, name in CASES:
        argv = words(models[name], data[command], folder / f"{command}-{name}", **OPTIONS[command])
        cases.append({"command": command, "argv": argv})
    done = start(folder, cases)
    assert done.returncode == 0, (done.stdout + done.stderr)[-9000:]
    assert "engine     FSDP 2, 2 processes" in done.stdout
    return folder


@pytest.mark.usefixtures("own_process")
@pytest.mark.parametrize(("command", "name"), CASES)
def test_two_processes_are_one(runs, models, data, tmp_path, monkeypatch, command, name):
    """Losses, every gradient of five steps by name, routers' biases, and the folder that is saved."""
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*transformers.trainer.DEFAULT_CALLBACKS, Record])
    options = {**OPTIONS[command], "use_cpu": True, "gradient_accumulation_steps": 2}
    main = import_module(f"otpo.cli.{command}").main
    assert main(words(models[name], data[command], tmp_path, **options)) == 0
    two = runs / f"{command}-{name}"
    assert len(history(two)) == STEPS
    assert history(two) == pytest.approx(history(tmp_path), abs=CLOSE)
    for step in range(STEPS):
        error, worst = worst_gradient(two, tmp_path, step)
        assert error < 1e-3, (step, worst)
    assert farthest(two, tmp_path) < CLOSE < farthest(two, models[name])
    biases = [weight for key, weight in weights(two).items() if key.endswith("e_score_correction_bias")]
    assert bool(biases) == (name == "compass")
    assert any(bias.any() for bias in biases) == (command == "pretrain" and name == "compass")

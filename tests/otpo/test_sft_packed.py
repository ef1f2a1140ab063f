"""Packed rows of `otpo sft` on Compass: attention by lengths where a GPU can, and compiled layers where asked for."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_helpers import arguments
from flash_in_float64 import backward, forward
from helpers import make_pairs
from torch._dynamo.utils import counters

from moe_backbone.packed_attention import NAME
from otpo.cli import sft
from otpo.cli.models.compass import attention_of_joined_rows

pytestmark = pytest.mark.usefixtures("own_process")


@pytest.fixture(scope="module")
def completions_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("completions") / "rows.jsonl"
    make_pairs(24).rename_column("chosen", "completion").remove_columns("rejected").to_json(path)
    return str(path)


@pytest.fixture
def kernels(monkeypatch):
    """Stands in for torch's kernels, on any device and in any precision, and notes each call's number of queries."""
    calls = []

    def noted(query: Any, *rest: Any, **options: Any) -> Any:
        calls.append(len(query))
        return forward(query, *rest, **options)

    written_out = SimpleNamespace(_flash_attention_forward=noted, _flash_attention_backward=backward)
    monkeypatch.setattr("otpo_kernels.flash._aten", written_out)
    monkeypatch.setattr("moe_backbone.packed_attention.flash_can_run", lambda *_: True)
    return calls


def trained(model: str, data: str, output: Any, **changes: Any) -> tuple[Any, dict[str, str], list[float]]:
    argv = arguments(model, data, output, packing=True, max_length=128, max_steps=3, logging_steps=1, **changes)
    parsed = sft.make_parser().parse_args_into_dataclasses(argv, look_for_args_file=False)
    trainer = sft.make_trainer(*parsed)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer, parsed[0].notes, losses


def test_lengths_and_a_mask_train_the_same(compass_folder, completions_file, tmp_path, kernels, monkeypatch):
    fast, notes, losses = trained(compass_folder, completions_file, tmp_path / "fast")
    assert fast.model.config._attn_implementation == NAME and notes["attention"].startswith(NAME)
    calls = len(kernels)
    assert calls == 2 * 3 * fast.model.config.num_hidden_layers and min(kernels) > 100  # with checkpointing
    named, notes, expected = trained(compass_folder, completions_file, tmp_path / "named", attn_implementation="sdpa")
    assert named.model.config._attn_implementation == "sdpa" and "attention" not in notes
    assert len(kernels) == calls
    assert losses == pytest.approx(expected, rel=1e-5)


def test_layers_compile_where_asked_for(compass_folder, completions_file, tmp_path, kernels):
    _, notes, expected = trained(compass_folder, completions_file, tmp_path / "plain")
    assert "compiled" not in notes
    torch._dynamo.reset()
    counters.clear()
    trainer, notes, losses = trained(compass_folder, completions_file, tmp_path / "compiled", compile_layers=True)
    assert notes["compiled"].startswith("each layer")
    assert all(layer._compiled_run is not None for layer in trainer.model.model.layers)
    assert not counters["graph_break"] and 0 < counters["stats"]["unique_graphs"] <= 3
    assert losses == pytest.approx(expected, rel=1e-4)


def test_who_chooses(compass_folder, monkeypatch):
    from transformers import AutoConfig, Qwen3Config

    config = AutoConfig.from_pretrained(compass_folder)
    whole = SimpleNamespace(dispatch_batches=None)
    args: Any = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no", accelerator_config=whole)
    assert attention_of_joined_rows(config, args, None, "float32") == (None, None)
    assert attention_of_joined_rows(config, args, "eager", None) == ("eager", None)
    assert attention_of_joined_rows(Qwen3Config(), args, None, None) == (None, None)
    seen = []
    monkeypatch.setattr("moe_backbone.packed_attention.flash_can_run", lambda *what: seen.append(what) or True)
    assert attention_of_joined_rows(config, args, None, torch.bfloat16)[0] == NAME
    args.mixed_precision = "bf16"
    assert attention_of_joined_rows(config, args, None, None)[0] == NAME
    assert [dtype for _, dtype, _ in seen] == [torch.bfloat16, torch.bfloat16]
    assert attention_of_joined_rows(config, args, None, "bf16") == (None, None)  # which TRL refuses
    args.device = torch.device("cuda")
    monkeypatch.setattr("moe_backbone.packed_attention.flash_can_run", lambda *_: False)
    chosen, told = attention_of_joined_rows(config, args, None, None)
    assert chosen is None and told is not None and told.startswith("sdpa, since attention by lengths")


def test_batches_that_one_process_cuts_keep_their_mask(compass_folder, completions_file, tmp_path, kernels):
    """accelerate cuts every tensor of a batch to as many rows as there are, ends of documents too."""
    _, _, expected = trained(compass_folder, completions_file, tmp_path / "whole")
    calls = len(kernels)
    changes = {"accelerator_config": '{"dispatch_batches": true}'}
    trainer, notes, losses = trained(compass_folder, completions_file, tmp_path / "cut", **changes)
    assert trainer.model.config._attn_implementation == "sdpa" and "`dispatch_batches`" in notes["attention"]
    assert len(kernels) == calls and losses == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="`cu_seq_lens_q` has no document"):
        trained(compass_folder, completions_file, tmp_path / "named", attn_implementation=NAME, **changes)

"""What keeps a model's rows padded: attention that the kernels can't do is refused before they run."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flash_in_float64 import backward, forward
from helpers import make_pairs, options, random_batch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from otpo import OTPOTrainer
from otpo.layouts.attention import _rows_attention, attend_as_before, attend_by_lengths, lengths_arguments
from otpo.layouts.choice import obstacle_of
from otpo.layouts.lengths_attention import binding_window, lengths_attention, masked_attention, row_mask
from otpo.layouts.plan import plan_rows

SMALL: dict[str, Any] = {"vocab_size": 330, "hidden_size": 32}


def layer(**config: Any) -> nn.Module:
    module: Any = nn.Module()
    module.config, module.layer_idx = SimpleNamespace(**config), 1
    return module


@pytest.mark.parametrize(
    ("named", "config", "changes"),
    [
        ("dropout", {}, {"dropout": 0.1}),
        ("softcap", {}, {"softcap": 30.0}),
        ("indices", {}, {"indices": torch.zeros(1)}),
        ("is_causal=False", {}, {"is_causal": False}),
        ("a mask of its own", {}, {"attention_mask": torch.ones(1, 1, 13, 13, dtype=torch.bool)}),
        ("a sliding window that its mask", {"layer_types": ["full_attention", "sliding_attention"]}, {}),
        ("a sliding window that its mask", {"sliding_window": 8}, {}),
    ],
)
def test_what_the_kernels_can_not_do_is_refused(named, config, changes):
    """A trial of short rows would not find a window or a choice of keys."""
    plan = plan_rows(**random_batch([3], [2], [3]), share=True)
    part = torch.zeros(1, 2, plan.ids.size(1), 8)
    arguments = {**lengths_arguments(plan), **changes}
    with pytest.raises(NotImplementedError, match=named):
        _rows_attention(print, layer(**config), part, part, part, **arguments)


def test_a_window_that_no_row_reaches_is_none():
    assert [binding_window(*each) for each in [(64, 64), (64, 65), (64, None), (None, 9)]] == [None, 64, 64, None]
    plan = plan_rows(**random_batch([3], [2], [3]), share=True)
    part = torch.zeros(plan.ids.size(1), 2, 8)
    with pytest.raises(ValueError, match="pack without sharing"):
        lengths_attention(part, part, part, lengths_arguments(plan, 65)["row_lengths"], 1.0, 64)
    with pytest.raises(NotImplementedError, match="'CPU' backend"):  # it got as far as the kernel
        lengths_attention(part, part, part, lengths_arguments(plan, 64)["row_lengths"], 1.0, 64)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "packed"])
@pytest.mark.parametrize("alike", [False, True], ids=["", "answers_begin_alike"])
@pytest.mark.parametrize(
    "lengths",
    [
        ([40, 3, 20, 1], [5, 9, 29, 1], [6, 1, 7, 30]),
        ([0, 0, 3], [4, 9, 2], [5, 1, 7]),  # pairs without a prompt
        ([17], [1], [1]),
        ([12, 5], [4, 2], [4, 6]),
    ],
    ids=["four", "no_prompt", "one_token", "two"],
)
def test_two_calls_are_one_attention(lengths, alike, share, monkeypatch):
    """What is made of the kernels' answers, and of their gradients, to float64's rounding; the kernels are written
    out, as they run on a GPU alone."""
    written_out = SimpleNamespace(_flash_attention_forward=forward, _flash_attention_backward=backward)
    monkeypatch.setattr("otpo_kernels.flash._aten", written_out)
    plan = plan_rows(**random_batch(*lengths, answers_begin_alike=alike), share=share)
    torch.manual_seed(0)
    parts = [torch.randn(plan.ids.size(1), heads, 8, dtype=torch.float64) for heads in (6, 2, 2)]
    ours, theirs = ([part.clone().requires_grad_() for part in parts] for _ in range(2))
    found = lengths_attention(*ours, lengths_arguments(plan)["row_lengths"], 0.3)
    expected = masked_attention(*theirs, row_mask(plan.pairs, plan.branches), 0.3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    grad = torch.randn_like(expected)
    found.backward(grad)
    expected.backward(grad)
    for name, one, other in zip(("query", "key", "value"), ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-12, msg=name)


def test_models_that_no_trial_of_short_rows_finds_out():
    neo = GPTNeoConfig(**SMALL, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]])
    assert obstacle_of(GPTNeoForCausalLM(neo)) == "layers of kind local"
    model = GPT2LMHeadModel(GPT2Config(vocab_size=330, n_embd=32, n_layer=1, n_head=4))
    assert obstacle_of(model) == "dropout of 0.1 in attention"
    model.transformer.h[0].attn.attn_dropout.p = 0.0  # as TRL's `disable_dropout` leaves it
    assert obstacle_of(model) is None


def test_recurrent_models_are_padded(tokenizer, tmp_path):
    config = RwkvConfig(vocab_size=len(tokenizer), hidden_size=32, attention_hidden_size=32, num_hidden_layers=2)
    trainer = OTPOTrainer(
        RwkvForCausalLM(config),
        ref_model=RwkvForCausalLM(config),
        args=options(tmp_path),
        train_dataset=make_pairs(4),
        processing_class=tokenizer,
    )
    assert trainer.layout.name == "padded"
    assert trainer.layout.reason == "because of the recurrent layers of RwkvForCausalLM"


def test_the_name_of_the_attention_stays_in_memory(model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    ids, mask = torch.arange(5, 21).view(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    expected = model(input_ids=ids, attention_mask=mask).logits
    attend_by_lengths(model)
    attend_by_lengths(model)
    assert model.config._attn_implementation == "otpo_rows_sdpa"
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, expected, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    assert "otpo" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    attend_as_before(model)
    attend_as_before(model)
    assert model.config._attn_implementation == "sdpa"

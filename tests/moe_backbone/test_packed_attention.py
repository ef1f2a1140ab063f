"""Attention over packed rows by lengths is attention by a mask; the kernel is a stand-in in float64 here."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compass_helpers import assert_gradients_close, compass_model, gradients
from flash_in_float64 import backward, forward
from pretraining_helpers import chain_documents, pretrainer, tiny_compass
from torch._dynamo.utils import counters

from moe_backbone import packed_attention
from moe_backbone.packed_attention import NAME, choose_attention, varlen_attention_forward
from moe_backbone.pretraining.packing import PackedCollator, pack_documents
from otpo.layouts import attention as layouts_attention

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9, 10], "seq_lengths": [3, 1, 2]},
    {"input_ids": [11, 12, 13, 14, 15, 16, 17], "seq_lengths": [7]},
    {"input_ids": [3], "seq_lengths": [1]},
]


@pytest.fixture
def kernel(monkeypatch):
    """Stands in for torch's kernels, in any precision, and notes each call's number of queries."""
    calls = []

    def noted(query, key, value, ends_q, ends_k, longest_q, longest_k, *rest, **options):
        assert ends_q.dtype is torch.int32 and int(ends_q[-1]) == len(query) and query.is_contiguous()
        assert longest_q == longest_k >= int(ends_q.diff().max()) and options.pop("window_size_right") == 0
        calls.append(len(query))
        return forward(query, key, value, ends_q, ends_k, longest_q, longest_k, *rest, **options)

    written_out = SimpleNamespace(_flash_attention_forward=noted, _flash_attention_backward=backward)
    monkeypatch.setattr("otpo_kernels.flash._aten", written_out)
    return calls


@pytest.mark.parametrize("changes", [{}, {"num_mtp_layers": 2}, {"num_key_value_heads": 1}], ids=str)
def test_lengths_and_a_mask_are_the_same(kernel, changes):
    found = []
    for attention, flatten in (("sdpa", False), (NAME, True)):
        # MTP layers pair a document's last places with the next one's tokens, which count for their routers alone.
        model = compass_model(router_aux_loss_coef=0.0, router_z_loss_coef=0.0, **changes).double().train()
        model.set_attn_implementation(attention)
        model.set_experts_implementation("eager")  # grouped products know no float64
        out = model(**PackedCollator(0, 8, flatten=flatten)(ROWS), num_items_in_batch=7)
        out.loss.backward()
        found.append((out, gradients(model)))
    (by_mask, of_mask), (by_lengths, of_lengths) = found
    assert set(kernel) == {24}
    for name in ("loss", "lm_loss", "mtp_loss"):
        if getattr(by_mask, name) is not None:
            torch.testing.assert_close(getattr(by_lengths, name), getattr(by_mask, name), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(by_lengths.logits.view_as(by_mask.logits), by_mask.logits, rtol=1e-9, atol=1e-9)
    assert_gradients_close(of_lengths, of_mask, rtol=1e-8, atol=1e-10)


def test_a_window_and_a_scale(kernel):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 9, 4, dtype=torch.float64) for heads in (4, 2, 2))
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    got, weights = varlen_attention_forward(
        torch.nn.Identity(),
        query,
        key,
        value,
        None,
        scaling=0.3,
        cu_seq_lens_q=ends,
        max_length_q=9,
        sliding_window=2,
    )
    places, document = torch.arange(9), torch.tensor([0] * 4 + [1] * 5)
    distance = places[:, None] - places
    mask = (document[:, None] == document) & (distance >= 0) & (distance < 2)
    want = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), attn_mask=mask, scale=0.3
    )
    torch.testing.assert_close(got, want.transpose(1, 2))
    assert weights is None


def test_nobody_looks_for_documents_whose_ends_are_told(kernel, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a mask was made")

    monkeypatch.setattr("moe_backbone.model.decoder.create_causal_mask", refuse)
    model = tiny_compass().train()
    model.set_attn_implementation(NAME)
    model(**PackedCollator(0, 8, flatten=True)(ROWS))


def test_without_ends_it_is_sdpa():
    rows = torch.randint(3, 60, (2, 9))
    mask = torch.ones_like(rows)
    mask[0, :4] = 0
    answers = []
    for attention in ("sdpa", NAME):
        model = tiny_compass().eval()
        model.set_attn_implementation(attention)
        with torch.no_grad():
            logits = model(input_ids=rows, attention_mask=mask).logits[mask.bool()]
        answers.append((logits, model.generate(rows, attention_mask=mask, max_new_tokens=4, do_sample=False)))
    assert torch.equal(answers[0][0], answers[1][0]) and torch.equal(answers[0][1], answers[1][1])


def test_keys_of_other_lengths(kernel):
    """Lengths are those of another object on a GPU, where a batch's tensors are copied one by one."""
    torch.manual_seed(0)
    query = torch.randn(1, 2, 5, 4, dtype=torch.float64)
    key, value = (torch.randn(1, 2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ends_q, ends_k = (torch.tensor(ends, dtype=torch.int32) for ends in ([0, 2, 5], [0, 5, 9]))
    options = {"cu_seq_lens_q": ends_q, "max_length_q": 5, "cu_seq_lens_k": ends_k, "max_length_k": 5}
    got, _ = varlen_attention_forward(torch.nn.Identity(), query, key, value, None, **options)
    # A query sees the keys of its document up to its own place, both counted from the document's end.
    seen = [(0, 4), (0, 5), (5, 7), (5, 8), (5, 9)]
    mask = torch.tensor([[begin <= place < end for place in range(9)] for begin, end in seen])
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(got, want.transpose(1, 2))
    weights = torch.randn_like(want)
    of_lengths = torch.autograd.grad((got * weights.transpose(1, 2)).sum(), (key, value))
    for mine, other in zip(of_lengths, torch.autograd.grad((want * weights).sum(), (key, value)), strict=True):
        torch.testing.assert_close(mine, other)
    same = {"cu_seq_lens_q": ends_k, "max_length_q": 5, "cu_seq_lens_k": ends_k.clone(), "max_length_k": 5}
    alone = {name: same[name] for name in ("cu_seq_lens_q", "max_length_q")}
    two = [varlen_attention_forward(torch.nn.Identity(), key, key, value, None, **each)[0] for each in (same, alone)]
    assert torch.equal(*two)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"softcap": 30.0}, r"`softcap=30.0`.*`attn_implementation` to eager"),
        ({"s_aux": torch.ones(2)}, r"`s_aux=a tensor of shape \[2\]`.*`attn_implementation` to eager"),
        ({"position_bias": torch.ones(1)}, r"`position_bias=a tensor"),
        ({"is_causal": False}, r"`is_causal=False` of Identity.*`attn_implementation` to sdpa"),
        ({"cu_seq_lens_k": torch.tensor([0, 4])}, r"`cu_seq_lens_k` and `max_length_k` go together"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_known_is_refused(kernel, changes, says):
    part, options = torch.zeros(1, 1, 4, 8), {"cu_seq_lens_q": torch.tensor([0, 4]).int(), "max_length_q": 4}
    with pytest.raises(ValueError, match=says):
        varlen_attention_forward(torch.nn.Identity(), part, part, part, None, **options, **changes)
    assert not kernel


def test_what_a_module_or_its_shapes_say_is_not_left_out(kernel):
    part, options = torch.zeros(1, 1, 4, 8), {"cu_seq_lens_q": torch.tensor([0, 4]).int(), "max_length_q": 4}
    module: Any = torch.nn.Identity()
    module.is_causal = False
    with pytest.raises(ValueError, match="`is_causal=False` of Identity"):
        varlen_attention_forward(module, part, part, part, None, **options)
    varlen_attention_forward(module, part, part, part, None, is_causal=True, **options)
    module.is_causal, module.layer_idx = True, 1
    module.config = SimpleNamespace(layer_types=["full_attention", "chunked_attention"])
    with pytest.raises(ValueError, match="`layer_types` has chunked_attention"):
        varlen_attention_forward(module, part, part, part, None, **options)
    longer = torch.zeros(1, 1, 6, 8)
    with pytest.raises(ValueError, match=r"4 queries, and there are 6 keys.*`cu_seq_lens_k`"):
        varlen_attention_forward(torch.nn.Identity(), part, longer, longer, None, **options)
    with pytest.raises(ValueError, match="without `cu_seq_lens_q`"):
        keys = {"cu_seq_lens_k": options["cu_seq_lens_q"], "max_length_k": 4}
        varlen_attention_forward(torch.nn.Identity(), part, part, part, None, **keys)
    with pytest.raises(ValueError, match="`s_aux="):  # `sdpa` would leave sinks out as well
        varlen_attention_forward(torch.nn.Identity(), part, part, part, None, s_aux=torch.ones(1))
    assert len(kernel) == 1


def test_refusals():
    part = torch.zeros(2, 1, 4, 8)
    ends = torch.tensor([0, 4], dtype=torch.int32)
    options = {"cu_seq_lens_q": ends, "max_length_q": 4}
    with pytest.raises(ValueError, match=r"go together"):
        varlen_attention_forward(torch.nn.Identity(), part[:1], part[:1], part[:1], None, cu_seq_lens_q=ends)
    with pytest.raises(ValueError, match=r"a batch of 2 rows"):
        varlen_attention_forward(torch.nn.Identity(), part, part, part, None, **options)
    with pytest.raises(ValueError, match=r"`attention_dropout=0.1`.*attn_implementation=sdpa"):
        varlen_attention_forward(torch.nn.Identity(), part[:1], part[:1], part[:1], None, dropout=0.1, **options)


def test_what_is_chosen(monkeypatch):
    config = tiny_compass().config
    cpu, gpu, half = torch.device("cpu"), torch.device("cuda", 0), torch.bfloat16
    assert choose_attention(config, cpu, half) == ("sdpa", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert choose_attention(config, gpu, half) == (NAME, None)
    name, why = choose_attention(config, gpu, torch.float32)
    assert name == "sdpa" and "does not take float32 heads" in str(why)
    config.attention_dropout = 0.1
    name, why = choose_attention(config, gpu, half)
    assert name == "sdpa" and "`attention_dropout=0.1`" in str(why)


def test_a_training_by_lengths_repeats_a_training_by_masks(tmp_path, kernel):
    rows = pack_documents(chain_documents(100), 32)
    losses = []
    for attention in ("sdpa", NAME):
        model = tiny_compass(num_mtp_layers=1)
        model.set_attn_implementation(attention)
        trainer = pretrainer(tmp_path / attention, model=model, rows=rows, eval_rows=rows, max_steps=3)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        losses[-1].append(trainer.evaluate()["eval_loss"])
    assert kernel and losses[0] == pytest.approx(losses[1], abs=2e-5)


def test_streams_by_lengths_are_those_by_masks(tmp_path, kernel):
    """A process that reads a stream for the others cuts what it read, which ends of documents can't be."""
    rows = pack_documents(chain_documents(100), 32)
    losses, sizes = [], []
    for name, attention, dispatch in (("sdpa", "sdpa", None), ("alone", NAME, None), ("cut", NAME, True)):
        model = tiny_compass(num_mtp_layers=1)
        model.set_attn_implementation(attention)
        options = {} if dispatch is None else {"accelerator_config": {"dispatch_batches": dispatch}}
        stream = rows.to_iterable_dataset()
        trainer = pretrainer(tmp_path / name, model=model, rows=stream, eval_rows=stream, max_steps=3, **options)
        assert trainer.is_cut(stream) == bool(dispatch)
        kernel.clear()
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        losses[-1].append(trainer.evaluate()["eval_loss"])
        sizes.append(set(kernel))
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)
    assert losses[2][:3] == pytest.approx(losses[0][:3], abs=2e-5)  # a dispatcher fills an evaluation's last batch up
    assert not sizes[0] and 256 in sizes[1] and not sizes[2]


@pytest.mark.parametrize("kinds", [None, ["full_attention"] * 11], ids=["no kinds", "one kind"])
def test_layers_of_one_kind_share_a_graph(kernel, kinds):
    """A graph in which a layer's own number is read serves this layer alone, and torch compiles eight at most."""
    torch._dynamo.reset()
    counters.clear()
    model = compass_model(num_hidden_layers=11, num_mtp_layers=2, implementation="grouped_mm").train()
    model.config.layer_types = kinds
    model.set_attn_implementation(NAME)
    for layer in model.model.layers:
        layer.compile(dynamic=None, backend="aot_eager")
    for rows in (ROWS, ROWS[::-1], [ROWS[1]] * 3):  # other numbers of documents, other longest ones
        model(**PackedCollator(0, 8, flatten=True)(rows), num_items_in_batch=7).loss.backward()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 4  # decoder and MTP layers, as first seen and for any number


def test_a_number_that_tells_nothing_is_not_read():
    """torch 2.11 makes a graph of each number that is looked at, whether or not anything follows from it."""

    class Attention(torch.nn.Module):
        config = SimpleNamespace(layer_types=["full_attention"] * 2)

        @property
        def layer_idx(self) -> int:
            raise AssertionError("the number was read")

    layer = Attention()
    for kinds in (None, ["full_attention"] * 2):
        layer.config.layer_types = kinds
        assert packed_attention._kind(layer) is None and not layouts_attention._slides(layer)

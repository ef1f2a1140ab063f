"""Packed rows hold every token once, and a batch of them says where each document begins."""

import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from pretraining_helpers import chain_documents, tiny_compass

from moe_backbone.pretraining.packing import PackedCollator, pack_documents


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(2, 16))
def test_every_token_stands_in_one_row(lengths, length):
    numbers = iter(range(1, sum(lengths) + 1))
    documents = [[next(numbers) for _ in range(size)] for size in lengths]
    rows = pack_documents(Dataset.from_dict({"input_ids": documents}), length)
    assert sorted(token for row in rows for token in row["input_ids"]) == list(range(1, sum(lengths) + 1))
    for row in rows:
        assert len(row["input_ids"]) == sum(row["seq_lengths"]) <= length
        ends = torch.tensor([0, *row["seq_lengths"]]).cumsum(0).tolist()
        for begin, end in itertools.pairwise(ends):
            part = row["input_ids"][begin:end]
            assert part == list(range(part[0], part[0] + len(part)))  # a document, or a stretch of one


def test_a_batch():
    batch = PackedCollator(0, 6)([{"input_ids": [5, 6, 7, 8], "seq_lengths": [3, 1]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, -100, -100]]
    assert batch["router_mask"].tolist() == [[1, 1, 1, 1, 0, 0]]
    assert "attention_mask" not in batch


def written_out_batch(rows, length):
    """Each name's rows, joined to one, and where their documents begin, in Python's lists."""
    batch = {"input_ids": [], "position_ids": [], "labels": [], "router_mask": []}
    for row in rows:
        ids, padding = row["input_ids"], length - len(row["input_ids"])
        positions = [place for size in [*row["seq_lengths"], padding] for place in range(size)]
        batch["input_ids"] += [*ids, *[7] * padding]
        batch["position_ids"] += positions
        batch["router_mask"] += [1] * len(ids) + [0] * padding
        batch["labels"] += [token if place else -100 for token, place in zip(ids, positions, strict=False)]
        batch["labels"] += [-100] * padding
    return batch, [place for place, position in enumerate(batch["position_ids"]) if position == 0]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(0, 4), max_size=5), min_size=1, max_size=3),
    room=st.integers(0, 3),
    form=st.sampled_from([list, torch.tensor, np.array]),
)
def test_a_batch_is_its_rows_written_out(lengths, room, form):
    """Documents of no token and of one, rows of no document, full rows; lists, tensors and arrays."""
    length = max(2, max(map(sum, lengths)) + room)
    rows = [{"input_ids": [20 + place for place in range(sum(sizes))], "seq_lengths": sizes} for sizes in lengths]
    expected, begins = written_out_batch(rows, length)
    formed = [{name: form(value) for name, value in row.items()} for row in rows]
    batch = PackedCollator(7, length)(formed)
    joined = PackedCollator(7, length, flatten=True)(formed)
    for name, values in expected.items():
        assert batch[name].dtype is torch.int64 and batch[name].shape == (len(rows), length)
        assert batch[name].flatten().tolist() == joined[name][0].tolist() == values, name
    assert set(batch) == set(expected)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert joined[name].dtype is torch.int32 and joined[name].tolist() == [*begins, len(rows) * length]
    assert joined["max_length_q"] == joined["max_length_k"] == length
    assert set(PackedCollator(7, length, flatten=True, tell_ends=False)(formed)) == set(expected)


@pytest.mark.parametrize("lengths", [[2], [2, 2], [7]])
def test_rows_that_contradict_themselves_or_are_too_long_are_refused(lengths):
    tokens = 7 if lengths == [7] else 3
    with pytest.raises(ValueError, match=r"broadcast|add up to"):
        PackedCollator(0, 6)([{"input_ids": [1] * tokens, "seq_lengths": lengths}])


@pytest.mark.parametrize(("tokens", "lengths"), [(6, [1]), (5, []), (5, [0])])
def test_one_length_is_not_spread_over_a_row(tokens, lengths):
    with pytest.raises(ValueError, match=f"add up to {sum(lengths)}, and `input_ids` has {tokens} tokens"):
        PackedCollator(0, 6)([{"input_ids": [5] * tokens, "seq_lengths": lengths}])


def test_streams_are_packed_alike():
    documents = chain_documents(60)
    rows = list(pack_documents(documents, 16))
    assert list(pack_documents(documents.to_iterable_dataset(), 16)) == rows


@pytest.mark.parametrize("num_mtp_layers", [0, 2])
def test_flattened_rows_give_the_same_loss(num_mtp_layers):
    rows = list(pack_documents(chain_documents(12), 32))
    model = tiny_compass(num_mtp_layers=num_mtp_layers, router_aux_loss_coef=0.0).train()
    losses = [model(**PackedCollator(0, 32, flatten=flatten)(rows)).loss.item() for flatten in (False, True)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_padding_counts_neither_for_the_router_nor_for_the_loss():
    rows = [{"input_ids": [5, 6, 7, 8, 9], "seq_lengths": [5]}]
    model = tiny_compass().train()
    outputs = [model(**PackedCollator(0, length)(rows)) for length in (5, 12)]
    for name in ("loss", "lm_loss", "mtp_loss", "aux_loss", "z_loss"):
        short, long = (getattr(output, name).item() for output in outputs)
        assert short == pytest.approx(long, abs=1e-5), name
    assert torch.equal(outputs[0].expert_load, outputs[1].expert_load)

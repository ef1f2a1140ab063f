"""Generation with the cache, and positions."""

import math

import pytest
import torch
from compass_helpers import CLOSE, FULL, IMPLEMENTATIONS, SIZES, YARN, compass_config, compass_model, token_ids
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from moe_backbone import CompassForCausalLM


def greedy(model, ids, **options):
    return model.generate(ids, do_sample=False, max_new_tokens=10, pad_token_id=0, **options)


@pytest.mark.lengthy
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_the_cache_changes_nothing(implementation):
    model, ids = compass_model(implementation=implementation, **FULL).eval(), token_ids(2, 6)
    cached, plain = greedy(model, ids), greedy(model, ids, use_cache=False)
    assert torch.equal(cached, plain) and cached.shape == (2, 16)
    for position in range(6, 16):  # and both are the argmax of a forward over the prefix
        assert torch.equal(model(cached[:, :position]).logits[:, -1].argmax(-1), cached[:, position])


@torch.no_grad()
def test_logits_in_pieces_are_those_of_the_whole():
    model, ids = compass_model(**FULL).eval(), token_ids(2, 12)
    whole, past, pieces = model(ids).logits, None, []
    for start, end in ((0, 5), (5, 6), (6, 10), (10, 12)):
        out = model(ids[:, start:end], past_key_values=past, use_cache=True)
        past = out.past_key_values
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **CLOSE)


def test_a_batch_padded_on_the_left_generates_as_its_rows():
    model = compass_model(**FULL).eval()
    rows = [token_ids(1, length, seed=length) for length in (3, 8, 5)]
    ids, mask = torch.zeros(3, 8, dtype=torch.int64), torch.zeros(3, 8, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, 8 - row.size(1) :], mask[index, 8 - row.size(1) :] = row[0], 1
    batch = greedy(model, ids, attention_mask=mask)
    for index, row in enumerate(rows):
        assert torch.equal(batch[index, 8:], greedy(model, row)[0, row.size(1) :])


def test_the_padding_token_has_an_embedding_of_its_own_use():
    model = compass_model(pad_token_id=0)
    assert model.model.embed_tokens.padding_idx == 0
    assert CompassForCausalLM(compass_config(pad_token_id=0)).model.embed_tokens.weight[0].eq(0).all()


def test_yarn_survives_a_save_and_stretches_slow_frequencies_alone(tmp_path):
    model = compass_model(rope_parameters=YARN, max_position_embeddings=128, head_dim=32).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.rope_parameters == model.config.rope_parameters
    ids = token_ids(1, 100)
    assert torch.equal(loaded(ids).logits, model(ids).logits)

    plain = compass_model(max_position_embeddings=128, head_dim=32).eval()
    ratio = model.model.rotary_emb.inv_freq / plain.model.rotary_emb.inv_freq
    assert ratio[0].item() == pytest.approx(1) and ratio[-1].item() == pytest.approx(1 / 8)
    assert (ratio.diff() <= 1e-6).all() and ratio.unique().numel() > 2
    assert model.model.rotary_emb.attention_scaling == pytest.approx(0.1 * math.log(8) + 1)
    theirs = Qwen3MoeRotaryEmbedding(
        Qwen3MoeConfig(**{**SIZES, "head_dim": 32, "max_position_embeddings": 128}, rope_parameters=dict(YARN))
    )
    positions = torch.arange(100)[None]
    for ours, expected in zip(
        model.model.rotary_emb(torch.zeros(1), positions), theirs(torch.zeros(1), positions), strict=True
    ):
        assert torch.equal(ours, expected)
    assert not torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-2)


def test_order_matters_and_a_common_shift_does_not():
    model, ids = compass_model().eval(), token_ids(1, 8)
    logits = model(ids).logits
    shifted = model(ids, position_ids=torch.arange(8)[None] + 11).logits
    torch.testing.assert_close(shifted, logits, rtol=1e-3, atol=1e-4)  # rotary angles are rounded at other positions
    spread = model(ids, position_ids=torch.arange(8)[None] * 3, attention_mask=torch.ones_like(ids)).logits
    assert (spread - logits)[:, 1:].abs().max() > 0.01

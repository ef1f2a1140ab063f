"""Multi-token prediction in training: labels, what a prediction may see, gradients, layers left out."""

import pytest
import torch
import torch.nn.functional as F
from compass_helpers import ahead, compass_model, gradients, pack, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from moe_backbone import CompassForCausalLM, CompassModel
from moe_backbone.model.mtp import mtp_labels, shift_left

documents = st.lists(st.integers(1, 7), min_size=1, max_size=5)  # lengths


# Labels


@given(lengths=documents, depth=st.integers(1, 4), seed=st.integers(0, 2**30))
@settings(max_examples=60, deadline=None)
def test_labels_are_those_of_a_double_loop(lengths, depth, seed):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    labels = torch.randint(0, 50, (2, total), generator=generator)
    labels[torch.rand(2, total, generator=generator) < 0.2] = -100
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None].expand(2, -1)
    expected = torch.full((2, total), -100)
    for row in range(2):
        start = 0
        for length in lengths:
            for position in range(length):
                if position + depth + 1 < length:
                    expected[row, start + position] = labels[row, start + position + depth + 1]
            start += length
    kept = labels.clone()
    assert torch.equal(mtp_labels(labels, position_ids, depth), expected)
    assert torch.equal(mtp_labels(labels, position_ids[:1], depth), expected)
    assert torch.equal(labels, kept)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 9])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4)])
def test_shift_left_is_a_loop(steps, shape):
    values = torch.randn(shape)
    expected = torch.full(shape, 7.0)
    for place in range(3):
        if place + steps < 3:
            expected[:, place] = values[:, place + steps]
    assert torch.equal(shift_left(values, steps, 7.0), expected)


def test_the_loss_is_the_mean_of_the_layers_and_enters_with_its_coefficient():
    """Each layer's loss written out over the positions that have a token to predict."""
    model = compass_model(num_mtp_layers=2, mtp_loss_coef=0.3, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    ids = token_ids(2, 9)
    out = model(ids, labels=ids)
    losses = []
    for depth, state in enumerate(ahead(model, ids), start=1):
        log_probs = model.lm_head(state).double().log_softmax(-1)
        picked = [
            -log_probs[row, t, ids[row, t + depth + 1]] for row in range(2) for t in range(9) if t + depth + 1 < 9
        ]
        losses.append(torch.stack(picked).mean())
    torch.testing.assert_close(out.mtp_loss.double(), torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.loss, out.lm_loss + 0.3 * out.mtp_loss)
    assert losses[0] != losses[1]


def test_there_is_no_mtp_loss_in_evaluation_or_without_labels():
    model, ids = compass_model(num_mtp_layers=1), token_ids(1, 6)
    assert model(ids).mtp_loss is None
    out = model.eval()(ids, labels=ids)
    assert out.mtp_loss is None and torch.equal(out.loss, out.lm_loss)


def test_documents_too_short_to_predict_ahead_have_a_finite_loss():
    model = compass_model(num_mtp_layers=2)
    row = pack([token_ids(1, length, seed=length)[0] for length in (3, 2, 1)])
    out = model(**row, num_items_in_batch=3, use_cache=False)  # the second layer has no label at all
    state = ahead(model, row["input_ids"], row["position_ids"])[0]
    only = -model.lm_head(state)[0, 0].log_softmax(-1)[row["input_ids"][0, 2]]
    torch.testing.assert_close(out.mtp_loss, only / 3 / 2)
    assert out.loss.isfinite()
    assert model(**row, use_cache=False).loss.isfinite()  # and a mean over no label is not 0 / 0


# What a prediction sees


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_state_sees_its_depth_ahead_and_no_further(attention):
    model, ids = compass_model(num_mtp_layers=3, attention=attention).eval(), token_ids(1, 10)
    with torch.no_grad():
        before = ahead(model, ids)
        for changed in range(10):
            other = ids.clone()
            other[0, changed] = ids[0, changed] % 60 + 1
            for depth, (state, kept) in enumerate(zip(ahead(model, other), before, strict=True), start=1):
                moved = (state - kept).abs().amax(dim=-1)[0] > 1e-4
                same = torch.allclose(
                    state[:, : max(0, changed - depth)], kept[:, : max(0, changed - depth)], atol=1e-5
                )
                assert same, f"layer {depth} saw token {changed} too early"
                if changed >= depth:  # it is the very token that the state is paired with
                    assert moved[changed - depth], f"layer {depth} at {changed - depth} does not see token {changed}"


@given(lengths=st.lists(st.integers(1, 5), min_size=2, max_size=4), seed=st.integers(0, 2**30))
@settings(max_examples=15, deadline=None)
def test_a_labelled_prediction_sees_its_own_document_alone(lengths, seed):
    model = PACKED_MODEL
    row = pack([token_ids(1, length, seed=seed + n)[0] for n, length in enumerate(lengths)])
    ids, position_ids = row["input_ids"], row["position_ids"]
    document = (position_ids[0] == 0).cumsum(0) - 1
    with torch.no_grad():
        before = ahead(model, ids, position_ids)
        for changed in range(len(lengths)):
            other = torch.where(document == changed, ids % 60 + 1, ids)
            for depth, (state, kept) in enumerate(
                zip(ahead(model, other, position_ids), before, strict=True), start=1
            ):
                labelled = mtp_labels(ids, position_ids, depth)[0] != -100
                untouched = labelled & (document != changed)
                torch.testing.assert_close(state[0, untouched], kept[0, untouched], rtol=0, atol=1e-5)
                if (labelled & (document == changed)).any():
                    mine = labelled & (document == changed)
                    assert (state[0, mine] - kept[0, mine]).abs().max() > 1e-3


PACKED_MODEL = compass_model(num_mtp_layers=2).eval()


# Gradients


def from_mtp_alone(**changes):
    model = compass_model(num_mtp_layers=2, num_shared_experts=1, **changes)
    ids = token_ids(2, 24)
    model(ids, labels=ids).mtp_loss.backward()
    return {name for name, value in gradients(model).items() if value.abs().max() > 0}, model


def groups(names, model):
    heads = {name for name in names if name.startswith(("lm_head", "model.embed_tokens"))}
    layers = model.config.num_hidden_layers
    mtp = {name for name in names if any(name.startswith(f"model.layers.{layers + n}.") for n in range(2))}
    return heads, mtp, set(names) - heads - mtp


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("detach_trunk", [False, True])
@pytest.mark.parametrize("detach_head", [False, True])
def test_where_the_gradient_of_the_mtp_loss_goes(detach_trunk, detach_head, tied):
    got, model = from_mtp_alone(mtp_detach_trunk=detach_trunk, mtp_detach_head=detach_head, tie_word_embeddings=tied)
    heads, mtp, trunk = groups(got, model)
    all_heads, all_mtp, all_trunk = groups([name for name, _ in model.named_parameters()], model)
    assert mtp == all_mtp
    assert trunk == (set() if detach_trunk else all_trunk)
    if not detach_head:
        assert heads == all_heads
    elif detach_trunk:
        assert not heads
    else:  # through the trunk the gradient still reaches the embeddings that the trunk reads
        assert heads == {"model.embed_tokens.weight"}


def test_the_first_layer_learns_from_the_second():
    """The states are chained, so that the second layer's loss has a gradient for the first."""
    model, ids = compass_model(num_mtp_layers=2), token_ids(1, 12)
    F.cross_entropy(model.lm_head(ahead(model, ids)[1][0, :-3]), ids[0, 3:]).backward()
    assert model.model.mtp_layers[0].eh_proj.weight.grad.abs().max() > 0


def test_layers_share_embeddings_and_head():
    plain = {name for name, _ in compass_model().named_parameters()}
    extra = {name for name, _ in compass_model(num_mtp_layers=1).named_parameters()} - plain
    assert {name.split(".", 3)[3].split(".")[0] for name in extra} == {
        "enorm", "hnorm", "eh_proj", "post_norm", "self_attn", "mlp", "input_layernorm", "post_attention_layernorm",
    }  # fmt: skip
    assert all(name.startswith("model.layers.2.") for name in extra)


def test_the_layers_change_nothing_of_the_rest():
    """With the same weights, logits and cache length are those of the model without MTP layers."""
    with_mtp, plain = compass_model(num_mtp_layers=2).eval(), compass_model().eval()
    missing, unexpected = plain.load_state_dict(with_mtp.state_dict(), strict=False)
    assert not missing and all(name.startswith(("model.layers.2.", "model.layers.3.")) for name in unexpected)
    ids = token_ids(2, 7)
    out, expected = with_mtp(ids, use_cache=True), plain(ids, use_cache=True)
    assert torch.equal(out.logits, expected.logits)
    assert len(out.past_key_values.layers) == len(expected.past_key_values.layers) == 2


# A coefficient of zero


def mtp_grad_flags(model):
    return {value.requires_grad for layer in model.model.mtp_layers for value in layer.parameters()}


def test_a_coefficient_of_zero_freezes_the_layers(tmp_path):
    model = compass_model(num_mtp_layers=2, mtp_loss_coef=0.0)
    assert mtp_grad_flags(model) == {False}
    ids = token_ids(2, 8)
    out = model(ids, labels=ids)
    out.loss.backward()
    assert out.mtp_loss is None
    others = {name for name, value in model.named_parameters() if value.requires_grad}
    assert others == gradients(model).keys() and len(others) > 10
    model.save_pretrained(tmp_path)
    assert mtp_grad_flags(AutoModelForCausalLM.from_pretrained(tmp_path)) == {False}
    assert mtp_grad_flags(AutoModelForCausalLM.from_pretrained(tmp_path, mtp_loss_coef=0.2)) == {True}
    loaded, info = CompassForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert mtp_grad_flags(loaded) == {False} and not info["missing_keys"] and not info["unexpected_keys"]


def test_a_coefficient_above_zero_trains_the_layers(tmp_path):
    model = compass_model(num_mtp_layers=1)
    assert mtp_grad_flags(model) == {True}
    model.save_pretrained(tmp_path)
    assert mtp_grad_flags(AutoModelForCausalLM.from_pretrained(tmp_path)) == {True}
    assert mtp_grad_flags(AutoModelForCausalLM.from_pretrained(tmp_path, mtp_loss_coef=0.0)) == {False}


def unexpected(folder, model_class=CompassForCausalLM, **changes):
    """Unexpected keys at load, by layer."""
    _, info = model_class.from_pretrained(folder, output_loading_info=True, **changes)
    layers = [key.partition("layers.")[2].partition(".")[0] for key in info["unexpected_keys"]]
    return {int(layer): layers.count(layer) for layer in layers if layer}


def test_decoder_layers_are_not_dropped_quietly(tmp_path):
    compass_model(num_hidden_layers=6).save_pretrained(tmp_path / "six")
    compass_model(num_hidden_layers=6, num_mtp_layers=2).save_pretrained(tmp_path / "mtp")
    left_out = dict.fromkeys(range(2, 6), 11)
    assert unexpected(tmp_path / "six", num_hidden_layers=2) == left_out
    assert unexpected(tmp_path / "six", CompassModel, num_hidden_layers=2) == left_out
    assert unexpected(tmp_path / "mtp", num_hidden_layers=2, num_mtp_layers=0) == left_out
    # a decoder layer stands where the model's MTP layer is to be, so the checkpoint's first one went unread
    assert set(unexpected(tmp_path / "mtp", num_hidden_layers=2, num_mtp_layers=1)) == {3, 4, 5, 6}
    for kept in range(3):
        assert unexpected(tmp_path / "mtp", num_mtp_layers=kept) == {}
    # an MTP layer that a decoder layer is made of is no layer that is left out: the other half of it is named
    for decoder, kept in ((7, 0), (7, 1), (8, 0)):
        found = unexpected(tmp_path / "mtp", num_hidden_layers=decoder, num_mtp_layers=kept)
        assert set(found) == set(range(6, decoder)) and all(found.values())


@pytest.mark.parametrize("kept", [0, 1])
def test_layers_left_out_at_load_are_dropped_quietly(tmp_path, kept, caplog):
    model = compass_model(num_mtp_layers=2).eval()
    model.save_pretrained(tmp_path)
    loaded, info = CompassForCausalLM.from_pretrained(tmp_path, num_mtp_layers=kept, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert len(loaded.model.layers) == 2 + kept
    ids = token_ids(1, 9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_other_weights_that_do_not_belong_are_not_dropped_quietly(tmp_path):
    compass_model(num_hidden_layers=3).save_pretrained(tmp_path)
    model = compass_model(num_hidden_layers=2, num_mtp_layers=1)
    assert not any("norm" in pattern for pattern in model._keys_to_ignore_on_load_unexpected)
    wide = compass_model(num_shared_experts=1)
    wide.save_pretrained(tmp_path)
    _, info = CompassForCausalLM.from_pretrained(tmp_path, num_shared_experts=0, output_loading_info=True)
    assert any("shared_expert" in key for key in info["unexpected_keys"])


@pytest.mark.parametrize("detach", [False, True])
def test_the_head_is_called_for_every_prediction(detach):
    """What is hooked onto the head, as for tensor parallelism, must run for MTP layers too."""
    model, ids = compass_model(num_mtp_layers=2, mtp_detach_head=detach), token_ids(1, 9)
    calls = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: calls.append(1) or 2 * output)
    out = model(ids, labels=ids)
    expected = compass_model(num_mtp_layers=2)
    with torch.no_grad():
        expected.lm_head.weight *= 2
    torch.testing.assert_close(out.mtp_loss, expected(ids, labels=ids).mtp_loss)
    assert len(calls) == 3

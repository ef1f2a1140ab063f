"""A forward: against Qwen3-MoE, its inputs and outputs, and one computation in several ways."""

import pytest
import torch
from compass_helpers import (
    CLOSE,
    FULL,
    IMPLEMENTATIONS,
    YARN,
    assert_gradients_close,
    compass_model,
    gradients,
    qwen,
    token_ids,
)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"rope_parameters": YARN}, {"num_experts": 2}])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_it_is_qwen3_moe_where_both_exist(changes, norm_topk_prob):
    """Logits, language-model loss and gradients, over positions beyond YaRN's original length."""
    model = compass_model(norm_topk_prob=norm_topk_prob, router_aux_loss_coef=0.0, router_z_loss_coef=0.0, **changes)
    twin, ids = qwen(model, **changes), token_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    labels = ids.masked_fill(mask == 0, -100)
    ours, theirs = (m(ids, attention_mask=mask, labels=labels) for m in (model, twin))
    torch.testing.assert_close(ours.logits[mask == 1], theirs.logits[mask == 1], **CLOSE)
    torch.testing.assert_close(ours.loss, theirs.loss)
    ours.loss.backward()
    theirs.loss.backward()
    assert_gradients_close(gradients(model), gradients(twin), **CLOSE)


def test_a_token_beyond_the_vocabulary_fails():
    with pytest.raises(IndexError):
        compass_model()(torch.tensor([[1, 61]]))


@pytest.mark.parametrize("arguments", [{}, {"input_ids": token_ids(1, 3), "inputs_embeds": torch.zeros(1, 3, 32)}])
def test_exactly_one_kind_of_input(arguments):
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        compass_model()(**arguments)


def test_embeddings_in_place_of_tokens():
    model, ids = compass_model(**FULL), token_ids(2, 8)
    embedded = model.get_input_embeddings()(ids)
    from_ids, from_embeds = model(ids, labels=ids), model(inputs_embeds=embedded, labels=ids)
    assert torch.equal(from_ids.logits, from_embeds.logits) and torch.equal(from_ids.loss, from_embeds.loss)


def test_kept_logits_are_the_last():
    model, ids = compass_model().eval(), token_ids(2, 8)
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:], **CLOSE)
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, logits[:, [1, 4]], **CLOSE)


def test_tuples_for_those_who_want_them():
    model, ids = compass_model().eval(), token_ids(2, 8)
    got = model(ids, labels=ids, return_dict=False)
    out = model(ids, labels=ids)
    assert isinstance(got, tuple) and torch.equal(got[0], out.loss) and torch.equal(got[1], out.logits)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_router_logits_by_layer(mode):
    model, ids = compass_model(**FULL).train(mode == "train"), token_ids(2, 7)
    labels = ids if mode == "train" else None
    assert model(ids, labels=labels).router_logits is None
    out = model(ids, labels=labels, output_router_logits=True)
    layers = 3 if mode == "train" else 2  # MTP layers run in training alone
    assert [layer.shape for layer in out.router_logits] == [(14, 5)] * layers
    assert all(layer.dtype is torch.float32 for layer in out.router_logits)
    assert out.expert_load.shape == (layers, 5) and out.expert_load.sum(1).eq(14 * 2).all()
    router = model.model.routers[0]
    layer = model.model.layers[0]
    embedded = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb(embedded, position_ids=torch.arange(7)[None])
    attended, _ = layer.self_attn(layer.input_layernorm(embedded), position_embeddings=rotary, attention_mask=None)
    first = router(layer.post_attention_layernorm(embedded + attended).reshape(14, 32))
    torch.testing.assert_close(out.router_logits[0], first[0], **CLOSE)


def test_the_configuration_can_ask_for_router_logits():
    model, ids = compass_model(output_router_logits=True).eval(), token_ids(2, 7)
    out = model(ids, labels=ids)
    assert len(out.router_logits) == 2
    expected = out.lm_loss + 0.01 * out.aux_loss + 0.001 * out.z_loss
    torch.testing.assert_close(out.loss, expected)
    assert model(ids, output_router_logits=False).aux_loss is None


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_hidden_states_and_attentions_by_layer(mode):
    model, ids = compass_model(attention="eager", **FULL).train(mode == "train"), token_ids(2, 7)
    out = model(ids, labels=ids, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in out.hidden_states] == [(2, 7, 32)] * 3
    assert [attention.shape for attention in out.attentions] == [(2, 4, 7, 7)] * 2
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids))
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    for attention in out.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, 7))
        assert attention.triu(1).eq(0).all()


@pytest.mark.lengthy
@pytest.mark.parametrize("other", IMPLEMENTATIONS)
def test_experts_implementations_agree(other):
    reference = compass_model(implementation="eager", **FULL)
    model = compass_model(implementation=other, **FULL)
    assert model.config._experts_implementation == other
    ids = token_ids(2, 9)
    ours, expected = model(ids, labels=ids), reference(ids, labels=ids)
    torch.testing.assert_close(ours.logits, expected.logits, **CLOSE)
    ours.loss.backward()
    expected.loss.backward()
    assert_gradients_close(gradients(model), gradients(reference), **CLOSE)


def test_grouped_mm_is_the_default_and_reaches_every_layer(monkeypatch):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    model, ids, calls = compass_model(**FULL), token_ids(1, 5), []
    grouped = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    monkeypatch.setitem(
        ALL_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", lambda *a, **k: calls.append(1) or grouped(*a, **k)
    )
    model(ids, labels=ids)
    assert len(calls) == 3
    model.set_experts_implementation("eager")
    model(ids, labels=ids)
    assert len(calls) == 3


@pytest.mark.parametrize("padded", [False, True])
def test_attention_implementations_agree(padded):
    ids = token_ids(2, 9)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 4:6] = -100  # what padding would predict, one token and two ahead
    results = []
    for attention in ("eager", "sdpa"):
        model = compass_model(attention=attention, **FULL)
        assert model.config._attn_implementation == attention
        out = model(ids, attention_mask=mask, labels=labels)
        out.loss.backward()
        results.append((out.logits[mask == 1], gradients(model)))
    torch.testing.assert_close(results[0][0], results[1][0], **CLOSE)
    assert_gradients_close(results[0][1], results[1][1], **CLOSE)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    """Reentrant checkpointing records the routers without a gradient, as in every MoE model of transformers."""
    ids, results = token_ids(2, 9), []
    options = {**FULL, "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0} if reentrant else FULL
    for checkpointing in (False, True):
        model = compass_model(**options)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
            assert all(layer.gradient_checkpointing for layer in model.model.layers)
        out = model(ids, labels=ids, output_router_logits=True, use_cache=False)
        out.loss.backward()
        results.append((out, gradients(model)))
    plain, saving = results[0][0], results[1][0]
    for name in ("loss", "lm_loss", "mtp_loss", "aux_loss", "z_loss", "logits", "expert_load"):
        assert torch.equal(plain[name], saving[name]), name
    assert len(plain.router_logits) == len(saving.router_logits) == 3
    assert_gradients_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-7)

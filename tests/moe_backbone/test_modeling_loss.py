"""The loss: its parts, the load beside it, rows that are packed, padded or split, and precision."""

import pytest
import torch
from compass_helpers import (
    CLOSE,
    FULL,
    IMPLEMENTATIONS,
    assert_gradients_close,
    compass_model,
    gradients,
    pack,
    qwen,
    token_ids,
)


def test_with_one_layer_the_balancing_loss_enters_as_in_qwen3_moe():
    changes = {"num_hidden_layers": 1, "router_aux_loss_coef": 0.3}
    model = compass_model(router_z_loss_coef=0.0, **changes)
    twin, ids = qwen(model, **changes), token_ids(2, 12)
    ours, theirs = model(ids, labels=ids), twin(ids, labels=ids, output_router_logits=True)
    torch.testing.assert_close(ours.aux_loss, theirs.aux_loss)
    torch.testing.assert_close(ours.loss, theirs.loss)


def test_all_labels_masked():
    """As in transformers: 0 / 0 without the number of labels of the step, and nothing at all with it."""
    model, ids = compass_model(**FULL), token_ids(2, 8)
    labels = torch.full_like(ids, -100)
    assert model(ids, labels=labels).lm_loss.isnan()
    out = model(ids, labels=labels, num_items_in_batch=10)
    out.loss.backward()
    assert out.loss.item() == 0 and all(gradient.eq(0).all() for gradient in gradients(model).values())


def test_the_parts_of_the_loss_add_up():
    coefficients = {"mtp_loss_coef": 0.3, "router_aux_loss_coef": 0.2, "router_z_loss_coef": 0.05}
    model, ids = compass_model(**{**FULL, **coefficients}), token_ids(2, 9)
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.loss, out.lm_loss + 0.3 * out.mtp_loss + 0.2 * out.aux_loss + 0.05 * out.z_loss)
    assert min(out.lm_loss, out.mtp_loss, out.aux_loss, out.z_loss) > 1e-3
    shifted = out.logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])
    torch.testing.assert_close(out.lm_loss.double(), -shifted.mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("aux", "z"), [(0.0, 0.05), (0.2, 0.0)])
def test_either_of_the_routers_losses_can_stand_alone(aux, z):
    model, ids = compass_model(router_aux_loss_coef=aux, router_z_loss_coef=z), token_ids(2, 9)
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.loss, out.lm_loss + aux * out.aux_loss + z * out.z_loss)


def test_without_the_routers_losses_the_load_alone_is_recorded():
    model, ids = compass_model(router_aux_loss_coef=0.0, router_z_loss_coef=0.0), token_ids(2, 9)
    out = model(ids, labels=ids)
    assert out.aux_loss is None and out.z_loss is None and torch.equal(out.loss, out.lm_loss)
    assert out.router_logits is None and out.expert_load.shape == (2, 5)


@pytest.mark.parametrize("speed", [0.0, 1e-3])
@pytest.mark.parametrize(("aux", "z"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1), (0.1, 0.1)])
@pytest.mark.parametrize(
    ("changes", "layers"), [({}, 2), ({"num_mtp_layers": 1}, 3), ({"num_mtp_layers": 1, "mtp_loss_coef": 0.0}, 2)]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_load_hangs_on_nothing_else(speed, aux, z, changes, layers, checkpointing):
    model = compass_model(router_bias_update_speed=speed, router_aux_loss_coef=aux, router_z_loss_coef=z, **changes)
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = token_ids(2, 9)
    out = model(ids, labels=ids)
    out.loss.backward()
    assert out.expert_load.shape == (layers, 5) and out.expert_load.sum(1).eq(2 * 9 * 2).all()
    assert torch.equal(out.expert_load, model(ids, labels=ids, output_router_logits=True).expert_load)
    assert model(ids).expert_load is None and model.eval()(ids, labels=ids).expert_load is None
    assert model(ids, output_router_logits=True).expert_load.shape == (2, 5)


def test_every_parameter_learns():
    model, ids = compass_model(**FULL), token_ids(4, 16)
    model(ids, labels=ids).loss.backward()
    without = [name for name, value in model.named_parameters() if value.grad is None or value.grad.eq(0).all()]
    assert not without


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_row_is_its_documents(attention):
    """Logits, both losses and every gradient, and the load of the experts."""
    coefficients = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    parts = [token_ids(1, length, seed=length)[0] for length in (7, 1, 3, 6)]
    row = pack(parts)
    items = (row["labels"] != -100).sum()
    packed = compass_model(attention=attention, **{**FULL, "num_mtp_layers": 2}, **coefficients)
    out = packed(**row, num_items_in_batch=items, use_cache=False, output_router_logits=True)
    out.loss.backward()
    alone = compass_model(attention=attention, **{**FULL, "num_mtp_layers": 2}, **coefficients)
    singles = [
        alone(part[None], labels=part[None], num_items_in_batch=items, output_router_logits=True) for part in parts
    ]
    sum(single.loss for single in singles).backward()
    torch.testing.assert_close(out.logits, torch.cat([single.logits for single in singles], dim=1), **CLOSE)
    for name in ("loss", "lm_loss", "mtp_loss"):
        torch.testing.assert_close(out[name], sum(single[name] for single in singles), **CLOSE)
    # the places at a document's end that pair with the next one are not labelled, yet their tokens are routed
    assert torch.equal(out.expert_load[:2], sum(single.expert_load[:2] for single in singles))
    assert_gradients_close(gradients(packed), gradients(alone), **CLOSE)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_packed_row_with_labels_needs_no_option(mode):
    """A cache, which the configuration asks for, would let documents see each other."""
    model = compass_model(**FULL).train(mode == "train")
    row = pack([token_ids(1, length, seed=length)[0] for length in (4, 5)])
    changed = {**row, "input_ids": row["input_ids"].clone()}
    changed["input_ids"][0, 0] = row["input_ids"][0, 0] % 60 + 1
    before, after = model(**row), model(**changed)
    assert before.past_key_values is None
    torch.testing.assert_close(after.logits[:, 4:], before.logits[:, 4:], **CLOSE)
    assert not torch.allclose(after.logits[:, 1:4], before.logits[:, 1:4], atol=1e-2)


def test_a_mask_for_the_router_alone():
    """The padding of a packed row is one more document, left out of the router's losses and the load."""
    model = compass_model(**FULL).eval()
    row = pack([token_ids(1, length, seed=length)[0] for length in (4, 5)])
    padded = pack([token_ids(1, length, seed=length)[0] for length in (4, 5)] + [torch.zeros(3, dtype=torch.int64)])
    mask = torch.ones(1, 12, dtype=torch.int64)
    mask[0, 9:] = 0
    expected = model(**row, output_router_logits=True)
    out = model(**padded, output_router_logits=True, router_mask=mask)
    torch.testing.assert_close(out.logits[:, :9], expected.logits, **CLOSE)
    assert torch.equal(out.expert_load, expected.expert_load)
    torch.testing.assert_close(out.aux_loss, expected.aux_loss)
    torch.testing.assert_close(out.z_loss, expected.z_loss)
    assert model(**padded, output_router_logits=True).expert_load.sum() > out.expert_load.sum()


def test_a_mask_of_who_sees_whom_trains_too():
    model, ids = compass_model(**FULL), token_ids(2, 9)
    expected = model(ids, labels=ids)
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    outputs = model(ids, labels=ids, attention_mask=mask)
    for name in ("loss", "mtp_loss", "aux_loss", "z_loss", "expert_load"):
        torch.testing.assert_close(outputs[name], expected[name], **CLOSE)


def test_right_padding_is_ignored():
    model, ids = compass_model(**FULL), token_ids(1, 7)
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.int64)], dim=1)
    mask = (torch.arange(11) < 7).long()[None]
    out = model(padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100))
    expected = model(ids, labels=ids)
    torch.testing.assert_close(out.logits[:, :7], expected.logits, **CLOSE)
    torch.testing.assert_close(out.lm_loss, expected.lm_loss)
    torch.testing.assert_close(out.mtp_loss, expected.mtp_loss)


def test_two_half_batches_sum_to_the_whole():
    ids = token_ids(4, 9)
    labels = ids.clone()
    labels[0, :6] = -100
    labels[3, 4:] = -100
    items = (labels[:, 1:] != -100).sum()
    coefficients = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.05}
    whole, halves = compass_model(**coefficients, **FULL), compass_model(**coefficients, **FULL)
    out = whole(ids, labels=labels, num_items_in_batch=items)
    out.loss.backward()
    parts = [halves(ids[part], labels=labels[part], num_items_in_batch=items) for part in (slice(2), slice(2, 4))]
    sum(part.loss for part in parts).backward()
    for name in ("lm_loss", "mtp_loss"):
        torch.testing.assert_close(out[name], sum(part[name] for part in parts))
    # without the number the means of the halves are over their own labels
    torch.testing.assert_close(out.lm_loss, whole(ids, labels=labels).lm_loss)
    shares = [(labels[part][:, 1:] != -100).sum() / items for part in (slice(2), slice(2, 4))]
    z = sum(share * part.z_loss for share, part in zip(shares, parts, strict=True))
    expected = sum(part.lm_loss + 0.1 * part.mtp_loss for part in parts) + 0.05 * z
    torch.testing.assert_close(sum(part.loss for part in parts), expected)


def test_gradients_of_two_half_batches_sum_to_those_of_the_whole():
    ids, coefficients = token_ids(4, 9), {"router_aux_loss_coef": 0.0}
    whole, halves = compass_model(**coefficients, **FULL), compass_model(**coefficients, **FULL)
    whole(ids, labels=ids, num_items_in_batch=32).loss.backward()
    for part in (slice(2), slice(2, 4)):  # with as many labels each, the z-loss splits evenly too
        halves(ids[part], labels=ids[part], num_items_in_batch=torch.tensor(32)).loss.backward()
    assert_gradients_close(gradients(whole), gradients(halves), **CLOSE)


def test_bfloat16_is_near_float32():
    exact, ids = compass_model(initializer_range=0.05, **FULL), token_ids(2, 9)
    model = compass_model(initializer_range=0.05, **FULL).bfloat16()
    out = model(ids, labels=ids)
    assert out.logits.dtype is torch.bfloat16
    out.loss.backward()
    assert all(
        gradient.dtype is torch.bfloat16 and gradient.isfinite().all() for gradient in gradients(model).values()
    )
    assert out.loss.item() == pytest.approx(exact(ids, labels=ids).loss.item(), rel=0.02)


@pytest.mark.lengthy
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_trains_float32_weights(implementation):
    options = {"initializer_range": 0.05, "implementation": implementation, **FULL}
    model, ids = compass_model(**options), token_ids(2, 9)
    seen = set()
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    exact = model(ids, labels=ids).loss.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen.clear()
        out = model(ids, labels=ids, output_router_logits=True)
    out.loss.backward()
    assert seen == {torch.bfloat16}
    assert out.loss.item() == pytest.approx(exact, rel=0.02)
    assert all(layer.dtype is torch.float32 for layer in out.router_logits)
    assert all(gradient.dtype is torch.float32 for gradient in gradients(model).values())

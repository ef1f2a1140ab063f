"""Cross-entropies without float32 logits are those of transformers' loss function, and so are their gradients."""

import pytest
import torch
from compass_helpers import compass_model, gradients, token_ids
from pretraining_helpers import logged, pretrainer, tiny_compass

from moe_backbone.pretraining import token_losses
from moe_backbone.pretraining.token_losses import chunked_loss, find_token_loss, kernel_loss

FUNCTIONS = {"kernel": kernel_loss, "chunked": chunked_loss}


def losses(name: str, labels: torch.Tensor, **changes):
    options = {"num_mtp_layers": 2, **{key: value for key, value in changes.items() if key != "items"}}
    model = compass_model(**options).train()
    model.token_loss = FUNCTIONS.get(name)
    out = model(input_ids=labels.clamp(min=1), labels=labels, num_items_in_batch=changes.get("items"))
    out.loss.backward()
    assert (out.logits is None) == (name != "logits")
    return out, gradients(model)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"items": 40}, {"mtp_detach_head": True}, {"tie_word_embeddings": True}, {"num_mtp_layers": 0}],
    ids=str,
)
def test_losses_and_gradients_are_those_of_logits(name, changes):
    labels = token_ids(2, 11, seed=3)
    labels[0, :4], labels[1, 9:] = -100, -100
    want, of_want = losses("logits", labels, **changes)
    got, of_got = losses(name, labels, **changes)
    for part in ("loss", "lm_loss", "mtp_loss", "aux_loss"):
        if getattr(want, part) is not None:
            torch.testing.assert_close(getattr(got, part), getattr(want, part), rtol=2e-6, atol=1e-7)
    assert of_got.keys() == of_want.keys()
    for parameter, gradient in of_want.items():
        assert (of_got[parameter] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-8, parameter


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_step_of_other_micro_batches_labels(name):
    labels = torch.full((1, 5), -100)
    out, found = losses(name, labels, items=9)
    assert out.lm_loss.item() == 0 == out.mtp_loss.item()
    assert all(gradient.isfinite().all() for gradient in found.values())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_mean_over_no_label_is_not_a_number_as_transformers_has_it(name):
    out, _ = losses(name, torch.full((1, 5), -100), num_mtp_layers=0)
    assert out.lm_loss.isnan()


def test_evaluation_and_inference_keep_their_logits():
    model = tiny_compass().eval()
    model.token_loss = kernel_loss
    ids = token_ids(1, 6)
    assert model(input_ids=ids, labels=ids).logits is not None
    assert model.train()(input_ids=ids).logits is not None


@pytest.mark.parametrize("triton", [True, False])
def test_a_gpu_has_the_kernel_where_triton_is_installed(triton, monkeypatch):
    monkeypatch.setattr(token_losses, "triton_is_installed", lambda: triton)
    assert find_token_loss("auto", tiny_compass(), torch.device("cpu")) is None
    assert find_token_loss("auto", tiny_compass(), torch.device("cuda")) is (kernel_loss if triton else None)
    if triton:
        assert find_token_loss("kernel", tiny_compass(), torch.device("cuda")) is kernel_loss
    else:
        with pytest.raises(ValueError, match=r"`token_loss=kernel` needs Triton.*otpo\[triton\].*token_loss=logits"):
            find_token_loss("kernel", tiny_compass(), torch.device("cuda"))
    assert find_token_loss("kernel", tiny_compass(), torch.device("cpu")) is kernel_loss


def test_a_head_that_is_not_plain_is_refused():
    model = tiny_compass()
    cpu = torch.device("cpu")
    assert find_token_loss("chunked", model, cpu) is chunked_loss
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=r"`token_loss=chunked`.*Sequential.*token_loss=logits"):
        find_token_loss("chunked", model, cpu)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_training_repeats_the_losses_of_logits(tmp_path, name):
    found = []
    for each in ("logits", name):
        trainer = pretrainer(tmp_path / each, token_loss=each, max_steps=3, gradient_accumulation_steps=2)
        trainer.train()
        found.append(logged(trainer, "loss") + logged(trainer, "lm_loss") + logged(trainer, "mtp_loss"))
        assert trainer.model.token_loss is None  # the training leaves nothing behind
    assert found[0] == pytest.approx(found[1], abs=2e-5)


def test_another_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`token_loss` must be auto, logits, kernel, chunked, got 'liger'"):
        pretrainer(tmp_path, token_loss="liger")

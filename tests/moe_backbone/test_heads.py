"""Models with other heads than the language model's."""

import pytest
import torch
from compass_helpers import CLOSE, FULL, compass_model, gradients, token_ids
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from moe_backbone import (
    CompassForCausalLM,
    CompassForQuestionAnswering,
    CompassForSequenceClassification,
    CompassForTokenClassification,
    CompassModel,
)

TOKEN_LABELS = token_ids(4, 8, seed=2) % 3
HEADS = {
    "sequence": (
        CompassForSequenceClassification,
        AutoModelForSequenceClassification,
        {"labels": torch.arange(4) % 3},
    ),
    "token": (CompassForTokenClassification, AutoModelForTokenClassification, {"labels": TOKEN_LABELS}),
    "answer": (
        CompassForQuestionAnswering,
        AutoModelForQuestionAnswering,
        {"start_positions": torch.tensor([0, 1, 2, 3]), "end_positions": torch.tensor([2, 3, 4, 7])},
    ),
}


@pytest.mark.parametrize("head", HEADS)
def test_other_heads_train_and_are_saved(tmp_path, head):
    """MTP layers, which they never run, are frozen: distributed training fails over parameters without a gradient."""
    model_class, auto_class, targets = HEADS[head]
    model = compass_model(model_class=model_class, num_labels=3, pad_token_id=0, **FULL)
    ids, losses = token_ids(4, 8), []
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    for _ in range(20):
        loss = model(ids, **targets).loss
        loss.backward()
        trainable = {name for name, value in model.named_parameters() if value.requires_grad}
        assert gradients(model).keys() == trainable and any("layers.2" not in name for name in trainable)
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is model_class and not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))
    for got, expected in zip(loaded(ids).to_tuple(), model(ids).to_tuple(), strict=True):
        if torch.is_tensor(expected):
            assert torch.equal(got, expected)


def test_scores_of_tokens_are_linear_in_the_decoders_states():
    ids = token_ids(2, 7)
    token, answer = (
        compass_model(model_class=HEADS[name][0], num_labels=3, **FULL).eval() for name in ("token", "answer")
    )
    states = token.model(ids).last_hidden_state
    assert torch.equal(token(ids).logits, token.score(states)) and token(ids).logits.shape == (2, 7, 3)
    starts = answer.qa_outputs(answer.model(ids).last_hidden_state)[..., 0]
    assert torch.equal(answer(ids).start_logits, starts) and answer(ids).end_logits.shape == (2, 7)


@pytest.mark.parametrize("head", [CompassForCausalLM, CompassModel, *(head[0] for head in HEADS.values())])
@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("speed", [0.0, 1e-3])
def test_lists_for_transformers_name_what_there_is(head, layers, speed):
    model = compass_model(model_class=head, num_mtp_layers=layers, router_bias_update_speed=speed)
    classes = {type(module).__name__ for module in model.modules()}
    listed = {"CompassDecoderLayer", "CompassMtpLayer"} & classes
    assert model._no_split_modules == listed and len(listed) == 1 + layers
    assert model._keep_in_fp32_modules_strict == ({"e_score_correction_bias"} if speed else set())


def test_a_classifier_scores_the_last_token_and_trains():
    model = compass_model(model_class=CompassForSequenceClassification, num_labels=1, pad_token_id=0)
    ids = token_ids(4, 8)
    ids[1, 5:] = 0
    scores = model(ids, attention_mask=(ids != 0).long()).logits
    alone = model(ids[1:2, :5]).logits
    torch.testing.assert_close(scores[1:2], alone, **CLOSE)
    target = torch.tensor([1.0, -1, 1, -1])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(ids, attention_mask=(ids != 0).long(), labels=target).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.3 * losses[0]


def test_what_a_classifier_never_runs_is_frozen():
    """Distributed training fails over a trainable parameter without a gradient."""
    model = compass_model(model_class=CompassForSequenceClassification, num_labels=1, pad_token_id=0, **FULL)
    model(token_ids(4, 8), labels=torch.ones(4)).loss.backward()
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    assert gradients(model).keys() == trainable


def test_a_classifier_is_saved_with_its_score(tmp_path):
    model = compass_model(model_class=CompassForSequenceClassification, num_labels=3, pad_token_id=0, **FULL).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ids = token_ids(2, 5)
    assert loaded(ids).logits.shape == (2, 3) and torch.equal(loaded(ids).logits, model(ids).logits)

import math

import pytest
import torch

from otpo.metrics import reward_metrics, weight_metrics
from otpo.token_rows import pack_rows, unpack_rows


def test_uniform_weights_are_neutral_whatever_their_scale():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    got = weight_metrics(torch.full((2, 3), 0.3), mask)
    assert {name: pytest.approx(1.0) for name in got} == {name: value.item() for name, value in got.items()}


def test_known_weights():
    weights = torch.tensor([[3.0, 1.0, 9.0]])
    got = weight_metrics(weights, torch.tensor([[True, True, False]]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert got["weights/entropy"].item() == pytest.approx(entropy)
    assert got["weights/ess"].item() == pytest.approx(16 / (2 * 10))
    assert got["weights/max"].item() == pytest.approx(1.5)


def test_responses_without_tokens_or_weight_are_left_out():
    mask = torch.tensor([[True, True], [False, False], [True, True]])
    got = weight_metrics(torch.tensor([[1.0, 1], [5, 5], [0, 0]]), mask)
    assert got["weights/ess"].item() == pytest.approx(1.0)


def test_reward_metrics():
    got = reward_metrics(torch.tensor([1.0, 2.0, 0.5, 3.0]), "_x")
    assert {name: value.item() for name, value in got.items()} == {
        "rewards/chosen_x": 1.5,
        "rewards/rejected_x": 1.75,
        "rewards/margins_x": -0.25,
        "rewards/accuracies_x": 0.5,
    }


def test_rows_round_trip_between_paddings():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(5, 11, generator=generator) < 0.4
    mask[2] = False
    values = torch.randn(5, 11, generator=generator)
    rows = pack_rows(values, mask, 9)
    assert rows.shape == (5, 9)
    torch.testing.assert_close(unpack_rows(rows, mask), values * mask)
    wider = torch.nn.functional.pad(mask, (3, 2))
    torch.testing.assert_close(unpack_rows(rows, wider)[:, 3:-2], values * mask)


def test_rows_of_another_truncation_are_refused():
    with pytest.raises(ValueError, match=r"has 3 tokens, the precomputed .* have 2 per row"):
        unpack_rows(torch.zeros(1, 2), torch.ones(1, 3, dtype=torch.bool))

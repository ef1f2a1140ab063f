import math

import pytest
import torch

from otpo.training.metrics import averaged_over_pairs, reward_metrics, weight_metrics
from otpo.training.stored_rows import pack_rows, unpack_rows


def mean(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: each.nanmean() for name, each in values.items()}


def test_uniform_weights_are_neutral_whatever_their_scale():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    got = mean(weight_metrics(torch.full((2, 3), 0.3), mask))
    assert {name: pytest.approx(1.0) for name in got} == {name: value.item() for name, value in got.items()}


def test_known_weights():
    weights = torch.tensor([[3.0, 1.0, 9.0]]).repeat(2, 1)
    got = mean(weight_metrics(weights, torch.tensor([[True, True, False]]).repeat(2, 1)))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert got["weights/entropy"].item() == pytest.approx(entropy)
    assert got["weights/ess"].item() == pytest.approx(16 / (2 * 10))
    assert got["weights/max"].item() == pytest.approx(1.5)


def test_responses_without_tokens_or_weight_are_left_out():
    mask = torch.tensor([[True, True], [False, False], [True, True], [False, False]])
    got = weight_metrics(torch.tensor([[1.0, 1], [5, 5], [0, 0], [0, 0]]), mask)
    assert got["weights/ess"][0].item() == pytest.approx(1.0)
    assert all(values[1].isnan() for values in got.values())


def test_reward_metrics():
    got = mean(reward_metrics(torch.tensor([1.0, 2.0, 0.5, 3.0]), "_x"))
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
    rows = pack_rows(values, mask)
    assert rows.shape == (5, int(mask.sum(1).max()))
    torch.testing.assert_close(unpack_rows(rows, mask), values * mask)
    wider = torch.nn.functional.pad(mask, (3, 2))
    torch.testing.assert_close(unpack_rows(rows, wider)[:, 3:-2], values * mask)


@pytest.mark.parametrize(("width", "tokens"), [(2, 3), (3, 2)], ids=["shorter", "longer"])
def test_rows_of_another_truncation_are_refused(width, tokens):
    mask = torch.ones(1, tokens, dtype=torch.bool)
    with pytest.raises(ValueError, match=rf"up to {tokens} tokens, their precomputed .* up to {width}, .*precompute"):
        unpack_rows(torch.ones(1, width), mask)


def test_means_are_over_pairs():
    """Five pairs in batches of four and one; weights that no pair of a batch has are left out."""
    metrics = {"rewards/accuracies": [0.75, 1.0], "weights/ess": [0.5, math.nan], "num_tokens": [7.0]}
    got = averaged_over_pairs(metrics, [4, 1])
    assert got == {"rewards/accuracies": [0.8], "weights/ess": [0.5], "num_tokens": [7.0]}
    values = [0.1, 0.2, 0.7]
    assert averaged_over_pairs({"a": values}, [3, 3, 3])["a"] == [sum(values) / 3]  # as TRL has it, to the last bit

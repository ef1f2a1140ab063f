import math

import pytest
import torch

from otpo.training.metrics import averaged_over_pairs, pair_similarity, reward_metrics, weight_metrics
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


def test_similarity_is_the_ches_score_of_mean_states():
    """By its definition, with the sums and the lengths written out, for odd sizes and in every dtype."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(6, 7, 5, generator=generator, dtype=torch.float64)
    mask = torch.zeros(6, 7, dtype=torch.bool)
    for row, (start, count) in enumerate([(0, 7), (2, 1), (1, 3), (4, 3), (0, 2), (6, 1)]):
        mask[row, start : start + count] = True
    want = []
    for pair in range(3):
        chosen, rejected = (states[row][mask[row]] for row in (pair, pair + 3))
        c, r = chosen.sum(0), rejected.sum(0)
        want.append(float(c @ r) / (len(chosen) * len(rejected)) - float(c @ c) / len(chosen) ** 2)
    outside = states.masked_fill(~mask.unsqueeze(2), torch.nan)
    torch.testing.assert_close(pair_similarity(outside, mask), torch.tensor(want, dtype=torch.float64))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        got = pair_similarity(states.to(dtype), mask)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, torch.tensor(want), rtol=tolerance, atol=tolerance)


def test_similarity_of_equal_and_of_empty_responses():
    states = torch.randn(4, 3, 2)
    mask = torch.tensor([[True, True, True], [False] * 3, [True, True, True], [True] * 3])
    same = torch.cat([states[:2], states[:2]])
    got = pair_similarity(same, mask)
    assert got[0] == 0 and got[1].isnan()
    assert pair_similarity(torch.cat([same[:2], 3 * same[2:]]), mask)[0] > 0  # as far, and further
    assert pair_similarity(torch.cat([same[:2], -same[2:]]), mask)[0] < 0

"""The destroyed mass as a weight: its formula, the dual's price behind it, and where nothing is destroyed."""

import dataclasses
import math

import pytest
import torch
from golden_cases import CASES, golden
from helpers import assert_same_parameters, make_pairs, make_trainer, options, train_and_evaluate
from weighting_helpers import make_batch

from otpo.transport import TransportOptions
from otpo.transport.cost import pairwise_cost
from otpo.transport.sinkhorn import unbalanced_sinkhorn
from otpo.weighting import WEIGHTINGS, PairBatch, TokenWeights, budget, contrast, otpo
from otpo.weighting.methods import within_budget
from otpo.weighting.optimal_transport import LEAST_DESTROYED

SHARP = TransportOptions(reg=0.1, cost="cosine")


def parts(batch: PairBatch, rows: list[int]) -> PairBatch:
    return PairBatch(*(t[rows] for t in (batch.mask, batch.token_ids, batch.logps, batch.hidden_states)))


def in_float64(batch: PairBatch) -> PairBatch:
    return dataclasses.replace(batch, logps=batch.logps.double(), hidden_states=batch.hidden_states.double())


def weights(batch: PairBatch, mix: float = 1.0, transport: TransportOptions = SHARP) -> torch.Tensor:
    answer = contrast(batch, options=transport, mix=mix)
    return answer.values if isinstance(answer, TokenWeights) else answer


BATCH = make_batch([6, 1, 4, 7, 2, 5, 4, 1])  # pairs (6, 2), (1, 5), (4, 4), (7, 1)


@pytest.mark.parametrize("mix", [1.0, 0.5, 0.25])
def test_it_is_one_less_otpos_weights_scaled_to_the_budget(mix):
    batch = in_float64(BATCH)
    got, moved = weights(batch, mix), otpo(batch, reg=0.1, cost="cosine").values
    for row, (mask, shorter) in enumerate(zip(batch.mask, batch.shorter[:, 0].tolist(), strict=True)):
        destroyed = [max(0.0, 1.0 - kept) + LEAST_DESTROYED for kept in moved[row][mask].tolist()]
        of_budget = shorter / len(destroyed)
        want = [mix * each * shorter / sum(destroyed) + (1 - mix) * of_budget for each in destroyed]
        torch.testing.assert_close(got[row][mask], torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=1e-9)
    assert got[~batch.mask].eq(0).all()
    torch.testing.assert_close(got.sum(1), batch.shorter[:, 0].double())


def test_it_is_the_price_of_a_missing_partner():
    """The marginal of each token is exp(-f / reg_m) of the dual potential f, so what is destroyed grows with f."""
    generator = torch.Generator().manual_seed(3)
    chosen, rejected = torch.randn(1, 6, 4, generator=generator), torch.randn(1, 9, 4, generator=generator)
    masks = [torch.ones(1, size, dtype=torch.bool) for size in (6, 9)]
    costs = pairwise_cost(chosen.double(), rejected.double(), *masks, cost="cosine", scale="release")
    solved = unbalanced_sinkhorn(costs, *masks, reg=0.1, reg_m=0.2, tolerance=1e-12)
    f = 0.1 * solved.chosen_potential[0]
    mass = solved.plan(costs, 0.1)[0]
    torch.testing.assert_close(mass.sum(1), (-f / 0.2).exp())
    price = f - 0.2 * math.log(6 / float(mass.sum()))
    destroyed = torch.where(price > 0, 1 - (-price / 0.2).exp(), 0.0)
    want = (destroyed + LEAST_DESTROYED) * 6 / (destroyed + LEAST_DESTROYED).sum()

    states = torch.zeros(2, 9, 4, dtype=torch.float64)
    states[0, :6], states[1] = chosen[0], rejected[0]
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:] = False
    batch = PairBatch(mask, mask.long(), torch.zeros(2, 9, dtype=torch.float64), states)
    torch.testing.assert_close(weights(batch)[0, :6], want, rtol=1e-5, atol=1e-7)
    assert 0 < (destroyed > 0).sum() < 6


def test_the_golden_weights_become_their_contrast():
    """What the release computes, turned over; OTPO's own weights are what they were."""
    for case in CASES:
        (chosen, rejected, *masks), regs, wanted = golden(case, torch.float64)
        mask, states = torch.cat(masks), torch.cat([chosen, rejected])
        batch = PairBatch(mask, mask.long(), torch.zeros(mask.shape, dtype=torch.float64), states)
        moved = torch.cat(wanted)
        torch.testing.assert_close(otpo(batch, **regs).values, moved, rtol=1e-5, atol=1e-6)
        want = within_budget((1 - moved).clamp(min=0) + LEAST_DESTROYED, batch)
        torch.testing.assert_close(weights(batch, transport=TransportOptions(**regs)), want, rtol=2e-2, atol=1e-3)
    assert len(CASES) == 25


def test_no_mix_is_budget_to_the_last_bit_and_solves_nothing(monkeypatch):
    monkeypatch.setattr("otpo.weighting.optimal_transport.solve", None)
    assert torch.equal(weights(BATCH, mix=0.0), budget(BATCH))


def test_where_nothing_is_destroyed_the_weights_are_those_of_budget():
    """Between answers of the same states, in another order too, and between states that are all alike."""
    batch = make_batch([5, 5, 5, 5])
    states = torch.zeros_like(batch.hidden_states)
    for row, order in enumerate(([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [3, 1, 4, 0, 2])):
        states[row][batch.mask[row]] = 3 * torch.eye(5)[order]
    for equal in (states, torch.ones_like(states)):
        answer = contrast(dataclasses.replace(batch, hidden_states=equal), options=TransportOptions(reg=0.02))
        assert isinstance(answer, TokenWeights)
        torch.testing.assert_close(answer.values, budget(batch) * batch.mask, rtol=1e-2, atol=0)
        assert float(answer.metrics["contrast/destroyed"]) < 1e-6


def test_empty_and_one_token_answers():
    batch = make_batch([3, 0, 1, 0, 2, 1])  # pairs (3, 0), (0, 2), (1, 1)
    got = weights(batch)
    assert got[:2].eq(0).all() and got[3:5].eq(0).all()
    assert got[2][batch.mask[2]].item() == pytest.approx(1.0) and got[5][batch.mask[5]].item() == pytest.approx(1.0)
    nothing = make_batch([0, 0])
    answer = contrast(nothing, options=SHARP)
    assert isinstance(answer, TokenWeights) and float(answer.metrics["contrast/destroyed"]) == 0


def test_a_batch_is_its_pairs():
    together = weights(BATCH)
    for pair in range(4):
        torch.testing.assert_close(weights(parts(BATCH, [pair, pair + 4])), together[[pair, pair + 4]])


def test_it_counts_the_token_without_a_partner():
    batch = make_batch([4, 4])
    states = torch.eye(6).repeat(2, 1)[: batch.hidden_states.size(1)].expand(2, -1, -1).clone()
    for row, odd in enumerate((4, 5)):
        states[row][batch.mask[row]] = torch.eye(6)[[0, 1, 2, odd]]
    got = weights(dataclasses.replace(batch, hidden_states=states))
    moved = otpo(dataclasses.replace(batch, hidden_states=states), reg=0.1, cost="cosine").values
    for row in range(2):
        own = batch.mask[row]
        assert got[row][own].argmax() == 3 and moved[row][own].argmin() == 3
        assert got[row][own][3] == pytest.approx(4.0, abs=0.02)


def test_the_config_sets_it_and_the_log_says_what_was_destroyed(model_folder, tmp_path):
    args = options(tmp_path, weighting="contrast", ot_reg=0.1, ot_cost="cosine", contrast_mix=0.5)
    assert (
        args.describe_weighting()
        == "contrast, contrast_mix 0.5, ot_reg 0.1, ot_reg_m 0.2, ot_cost cosine, hidden_layer 0.8"
    )
    torch.testing.assert_close(WEIGHTINGS["contrast"](args)(BATCH).values, weights(BATCH, 0.5))
    trainer = make_trainer(model_folder, tmp_path, make_pairs(), weighting="contrast", ot_reg=0.1, max_steps=1)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert 0 < logged["contrast/destroyed"] < 1 and logged["transport/residual"] < 1e-5
    with pytest.raises(ValueError, match=r"`contrast_mix` must be within \[0, 1\], got 1.5"):
        options(tmp_path, contrast_mix=1.5)


def test_training_without_a_mix_is_training_by_budget(model_folder, other_model_folder, tmp_path):
    runs = [
        train_and_evaluate(
            make_trainer(model_folder, tmp_path, make_pairs(), ref_model=other_model_folder, weighting=name, **changes)
        )
        for name, changes in (("budget", {}), ("contrast", {"contrast_mix": 0.0}))
    ]
    assert_same_parameters(runs[1].after, runs[0].after)
    assert runs[1].losses == runs[0].losses

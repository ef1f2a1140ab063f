"""Which pairs make a micro-batch by a number of tokens: the arithmetic, without a model."""

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.dpo_trainer import DataCollatorForPreference

from otpo.data.token_budget import EpochPlan, TokenBudget, cut_by_budget, pair_tokens, split_to, window_order

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=120).map(lambda values: np.array(values))


def batches(plan: EpochPlan) -> list[list[tuple[list[int], int, int]]]:
    """By micro-step and process: pairs, those that count, and those of all processes."""
    return [[plan.batch(step, process) for process in range(plan.rows.shape[1])] for step in range(len(plan.order))]


def lognormal_tokens(count: int, seed: int = 0) -> np.ndarray:
    """Prompts of 32 to 512 tokens, answers log-normal around 180, rows of at most 1024."""
    draw = np.random.default_rng(seed)
    chosen, rejected = draw.lognormal(np.log(180), 0.6, (2, count)).astype(np.int64) + 1
    return pair_tokens(draw.integers(32, 513, count), chosen, rejected, 1024)


@settings(deadline=None, max_examples=200)
@given(LENGTHS, st.integers(1, 200), st.integers(1, 5), st.integers(0, 2**70), st.integers(0, 3), st.booleans())
def test_an_epoch_has_every_pair_once_within_the_budget(tokens, budget, processes, seed, epoch, drop_last):
    left = len(tokens) % processes
    if drop_last and len(tokens) < processes:
        with pytest.raises(ValueError, match="`dataloader_drop_last=True` leaves none of"):
            TokenBudget(tokens, budget, processes, seed, drop_last)
        return
    planned = TokenBudget(tokens, budget, processes, seed, drop_last)
    steps = batches(planned.epoch(epoch))
    assert len(steps) == len(planned)
    own = []
    for step in steps:
        assert len({len(pairs) for pairs, _, _ in step}) == 1, "TRL gathers metrics of as many pairs from each process"
        assert {of_all for _, _, of_all in step} == {sum(count for _, count, _ in step)}
        # The processes whose pairs count are the first.
        counted = [count > 0 for _, count, _ in step]
        assert counted == sorted(counted, reverse=True)
        for pairs, count, _ in step:
            assert count in (0, len(pairs))
            assert len(pairs) == 1 or tokens[pairs].sum() <= budget
            own += pairs if count else []
    expected = len(tokens) - (left if drop_last else 0)
    assert len(own) == len(set(own)) == expected
    assert planned.pairs_per_batch == pytest.approx(expected / len(steps) / processes)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 200), st.integers(1, 5), st.integers(0, 9))
def test_an_epoch_is_the_same_wherever_it_is_planned(tokens, budget, processes, epoch):
    one, other = (TokenBudget(tokens.copy(), budget, processes, 3) for _ in range(2))
    other.epoch(epoch + 1)
    assert batches(one.epoch(epoch)) == batches(other.epoch(epoch))


def test_epochs_and_seeds_differ_and_pairs_meet_others():
    tokens = lognormal_tokens(2000)
    met = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        steps = batches(TokenBudget(tokens, 8192, 1, seed).epoch(epoch))
        met.append({frozenset(two) for ((pairs, _, _),) in steps for two in pairwise(pairs)})
    assert min(map(len, met)) > 1500
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert len(met[first] & met[second]) < 0.12 * len(met[first])


def test_micro_steps_of_one_length_are_shuffled():
    tokens = lognormal_tokens(2000)
    plan = TokenBudget(tokens, 8192, 2, 0).epoch(0)
    means = np.array([tokens[pairs].mean() for (pairs, _, _), _ in batches(plan)])
    within = np.array([np.ptp(tokens[pairs]) for (pairs, _, _), _ in batches(plan)])
    assert within.mean() < 0.15 * np.ptp(tokens)
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.2


@pytest.mark.parametrize(("processes", "worst", "mean"), [(2, 0.01, 0.001), (8, 0.025, 0.002)])
def test_processes_have_even_tokens(processes, worst, mean):
    """Of log-normal lengths, some 16 pairs a batch: what a process waits for in each micro-step, the last one too."""
    tokens = lognormal_tokens(20_003)
    planned = TokenBudget(tokens, 16_384, processes, 0)
    sums = np.array([[tokens[pairs].sum() for pairs, _, _ in step] for step in batches(planned.epoch(1))])
    excess = sums.max(1) / sums.mean(1) - 1
    assert excess.max() < worst and excess.mean() < mean
    assert sums.mean() > 0.94 * planned.budget


def test_a_pair_above_the_budget_is_alone():
    tokens = np.array([10] * 30 + [500] + [10] * 30)
    steps = batches(TokenBudget(tokens, 100, 1, 0).epoch(0))
    assert [pairs for ((pairs, _, _),) in steps if 30 in pairs] == [[30]]
    assert sum(len(pairs) == 10 for ((pairs, _, _),) in steps) >= 4


def test_fewer_pairs_than_processes_repeat_some_that_do_not_count():
    [step] = batches(TokenBudget(np.array([5, 7]), 100, 3, 0).epoch(0))
    assert sorted(pairs[0] for pairs, count, _ in step if count) == [0, 1]
    assert [(count, of_all) for _, count, of_all in step] == [(1, 2), (1, 2), (0, 2)]


def test_tokens_are_what_trl_keeps_of_a_pair():
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 30, (40, 3))
    for limit, mode in ((None, "keep_start"), (20, "keep_start"), (20, "keep_end")):
        collator = DataCollatorForPreference(pad_token_id=0, max_length=limit, truncation_mode=mode)
        rows = [
            {name: [1] * n for name, n in zip(("prompt_ids", "chosen_ids", "rejected_ids"), row, strict=True)}
            for row in lengths.tolist()
        ]
        chosen, rejected = collator(rows)["attention_mask"].sum(1).numpy().reshape(2, -1)
        assert (pair_tokens(lengths[:, 0], lengths[:, 1], lengths[:, 2], limit) == chosen + rejected).all()


def test_windows_go_up_and_down_in_turn():
    order = window_order(np.array([3, 1, 2, 9, 8, 7, 5, 6]), 3)
    assert order.tolist() == [0, 2, 1, 5, 4, 3, 7, 6]
    assert window_order(np.array([3, 1, 2]), 1).tolist() == [0, 2, 1]


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 100))
def test_groups_are_as_long_as_the_budget_allows(costs, budget):
    expected, spent = [], 0
    for place, cost in enumerate(costs):
        if not expected or spent + cost > budget:
            expected.append(place)
            spent = 0
        spent += cost
    assert cut_by_budget(np.array(costs, dtype=np.int64), budget).tolist() == expected


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.data())
def test_more_groups_are_halves_of_the_largest(sizes, data):
    count = data.draw(st.integers(len(sizes), sum(sizes)))
    found = split_to(np.cumsum([0, *sizes]), count)
    assert len(found) == count + 1 and found[0] == 0 and found[-1] == sum(sizes)
    assert (np.diff(found) > 0).all() and np.diff(found).max() <= max(sizes)


def test_a_million_pairs_are_planned_in_a_second():
    tokens = lognormal_tokens(1_000_000)
    best = np.inf
    for _ in range(3):
        begin = time.process_time()
        TokenBudget(tokens, 16_384, 8, 0).epoch(1)
        best = min(best, time.process_time() - begin)
    assert best < 2.0

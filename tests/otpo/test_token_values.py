"""Numbers of tokens that are made of the data: an alignment, and all ways of them to the step."""

import contextlib
import importlib
import math
import shutil
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_dataset
from helpers import (
    history,
    make_pairs,
    make_trainer,
    options,
    train_and_evaluate,
)
from weighting_helpers import with_weights

from otpo import OTPOTrainer, trl_seam
from otpo.data.given_weights import given_weights
from otpo.data.preferences import PairRule
from otpo.data.token_values import code_of, unmatched, unmatched_sides, unmatched_tokens, with_token_values
from otpo.explain import explain_rows
from otpo.weighting.token_values import TokenValues

WHOLE = PairRule(None, "keep_start", False)


def scored(trainer: OTPOTrainer, rows: list[int] | None = None) -> Any:
    rows = list(range(len(trainer.train_dataset))) if rows is None else rows
    with torch.no_grad():
        return trainer.score_batch(trainer.model, trainer.collate([trainer.train_dataset[row] for row in rows]))


# The alignment


def test_an_alignment_matches_as_much_of_one_side_as_of_the_other():
    generator = np.random.default_rng(0)
    for _ in range(50):
        sides = [generator.integers(0, 6, generator.integers(0, 12)).tolist() for _ in range(2)]
        chosen, rejected = unmatched_sides(*sides)
        assert len(chosen) == len(sides[0]) and len(rejected) == len(sides[1])
        matched = [[token for token, odd in zip(side, mark, strict=True) if not odd]
                   for side, mark in zip(sides, (chosen, rejected), strict=True)]  # fmt: skip
        assert matched[0] == matched[1]  # a common subsequence
    assert unmatched([1, 2, 3], [1, 2, 3]).sum() == 0 and unmatched([], [1]).shape == (0,)


def test_a_partner_that_is_cut_off_is_no_partner():
    row = {"prompt_ids": [7, 8], "chosen_ids": [1, 2, 3, 4], "rejected_ids": [9, 9, 9, 4]}
    assert [side.tolist() for side in unmatched_tokens(row, WHOLE, None)] == [[1, 1, 1, 0], [1, 1, 1, 0]]
    assert [side.tolist() for side in unmatched_tokens(row, PairRule(5, "keep_start", False), None)] == [[1] * 3] * 2
    # The last four tokens of each, the first of which nothing predicts.
    assert [side.tolist() for side in unmatched_tokens(row, PairRule(4, "keep_end", False), None)] == [[1, 1, 0]] * 2
    assert [side.tolist() for side in unmatched_tokens(row, PairRule(2, "keep_start", False), None)] == [[], []]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_length": 18, "truncation_mode": "keep_start"},
        {"max_length": 9, "truncation_mode": "keep_end"},
        {"row_layout": "packed", "max_length": 18},
        {"row_layout": "shared_prompt"},
    ],
    ids=["whole", "keep_start", "keep_end", "packed", "shared_prompt"],
)
def test_values_stand_at_their_tokens(changes, model_folder, tmp_path):
    trainer = make_trainer(
        model_folder, tmp_path, make_pairs(7), weighting="diff", drop_identical_pairs=True, **changes
    )
    found = scored(trainer)
    batch, pairs = found.batch, found.pairs
    values = batch.token_values["unmatched"]
    assert values.shape == batch.mask.shape and values[~batch.mask].eq(0).all()
    for pair in range(pairs):
        rows = (pair, pair + pairs)
        ids = [batch.token_ids[row][batch.mask[row]].tolist() for row in rows]
        for row, want in zip(rows, unmatched_sides(*ids), strict=True):
            assert values[row][batch.mask[row]].tolist() == want.tolist()
    assert 0 < values.sum() < batch.mask.sum()


# Ways of the data to the step


@pytest.mark.parametrize("weighting", ["diff", "columns"])
def test_every_way_of_the_data_trains_the_same(weighting, model_folder, other_model_folder, tmp_path):
    """Rows, a stream, a precomputed reference, workers' processes, a collator of the user's."""
    pairs = with_weights(make_pairs())

    def losses(data: Any = pairs, **changes: Any) -> list[tuple[float, ...]]:
        trainer = make_trainer(
            model_folder, tmp_path, data, ref_model=other_model_folder, weighting=weighting, **changes
        )
        if isinstance(data, type(pairs)):  # a stream is not shuffled, so rows are not here
            trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
        trainer.train()
        return history(trainer, "loss", "rewards/margins", "weights/ess")

    want = losses()
    assert len(want) == 4
    for got in (
        losses(pairs.to_iterable_dataset()),
        losses(precompute_ref_log_probs=True),
        losses(dataset_num_proc=2),
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_batches_of_a_number_of_tokens_and_evaluations_have_them(model_folder, tmp_path):
    data = with_weights(make_pairs())
    changes = {"weighting": "diff*columns", "max_steps": 2, "eval_strategy": "no"}
    trainer = OTPOTrainer(
        model_folder,
        args=options(tmp_path, tokens_per_batch=120, **changes),
        train_dataset=data,
        eval_dataset={"one": with_weights(make_pairs(5, 1)), "two": with_weights(make_pairs(3, 2))},
    )
    run = train_and_evaluate(trainer)
    assert all(math.isfinite(loss) for loss in run.losses)
    passed = trainer.evaluate(with_weights(make_pairs(5, 1)))
    # Of the same rows, under the name of a dataset that is passed.
    assert passed["eval_loss"] == pytest.approx(run.evaluation["eval_one_loss"], rel=1e-6)


def test_a_collator_of_the_users_gets_its_own_columns_alone(model_folder, tmp_path):
    first = make_trainer(model_folder, tmp_path, make_pairs(), weighting="diff")
    seen = []

    def collator(examples: list[dict[str, Any]]) -> Any:
        seen.append(set(examples[0]))
        return first.data_collator.collator(examples)

    trainer = OTPOTrainer(
        model_folder, args=options(tmp_path, weighting="diff", max_steps=1), data_collator=collator,
        train_dataset=make_pairs(),
    )  # fmt: skip
    trainer.train()
    assert seen and all(columns == {"prompt_ids", "chosen_ids", "rejected_ids"} for columns in seen)


def test_a_subclass_weighs_them_and_explain_shows_them(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, make_pairs(), weighting="diff", diff_base=0.0)
    (pair,) = explain_rows(trainer, [3])
    ids = [trainer.train_dataset[3][f"{side}_ids"] for side in ("chosen", "rejected")]
    for side, marks in zip((pair.chosen, pair.rejected), unmatched_sides(*ids), strict=True):
        assert (side.weights > 0).tolist() == (marks > 0).tolist()
    assert pair.weighting == "diff, diff_base 0"


@pytest.mark.parametrize("kind", ["by name", "function", "partial"])
def test_what_is_stored_is_made_anew_when_its_function_changes(kind, model_folder, tmp_path, monkeypatch):
    """`datasets` finds what it has stored by a hash of the map's function, in which an importable one is a name."""
    monkeypatch.syspath_prepend(tmp_path)
    make_pairs(4).to_json(tmp_path / "pairs.jsonl")  # stored on the disk, unlike rows in memory
    text = (
        "CONSTANT = {}\n\ndef values(row, rule, tokenizer):\n"
        "    return [CONSTANT] * len(row['chosen_ids']), [CONSTANT] * len(row['rejected_ids'])\n"
    )
    made = []
    for constant in (5, 5, 7):
        (tmp_path / "own_values.py").write_text(text.format(constant))
        sys.modules.pop("own_values", None)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        importlib.invalidate_caches()
        module = importlib.import_module("own_values")
        function = {"by name": "own_values:values", "function": module.values, "partial": partial(module.values)}[kind]
        rows = load_dataset("json", data_files=str(tmp_path / "pairs.jsonl"), split="train", cache_dir=str(tmp_path))
        rows = rows.map(lambda row: {"prompt_ids": [1, 2], "chosen_ids": [3] * 4, "rejected_ids": [5] * 3})
        found = with_token_values(
            rows, [TokenValues("own", function)], WHOLE, None, "train", first=contextlib.nullcontext()
        )
        assert set(found[0]["chosen_own"]) == {constant}
        made.append(found._fingerprint)
    assert made[0] == made[1] != made[2]


def test_code_without_a_file_of_its_own_has_no_hash():
    assert code_of(eval("lambda row: row", {"__name__": "nowhere"})) is None
    assert code_of(partial(unmatched_tokens)) == code_of(unmatched) != code_of(given_weights)


def test_images_have_no_prepared_rows():
    trl_seam.require_rows_of_tokens(SimpleNamespace(), "diff")
    with pytest.raises(ValueError, match=r"`weighting='diff'` looks at the tokens of prepared rows, and pairs"):
        trl_seam.require_rows_of_tokens(SimpleNamespace(_is_vision_dataset=True), "diff")

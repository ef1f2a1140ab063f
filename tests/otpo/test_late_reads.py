"""What is read one step late: in order, never after it is needed, and a bad step still leaves nothing on disk."""

import json
import math
from typing import Any

import pytest
import torch
from cli_helpers import python, two_processes
from helpers import (
    ODD,
    At,
    folder_bytes,
    hashed_weights,
    make_pairs,
    options,
    pairs_with_one_odd,
    poison,
)
from transformers import AutoModelForCausalLM

from otpo import OTPOTrainer
from otpo.training.late_numbers import LateGathered, LocalNumbers
from otpo.training.late_reads import LateReads
from otpo.training.stored_rows import unpack_rows


def test_a_step_is_read_when_the_next_one_ends():
    reads, seen = LateReads(), []
    for step in range(3):
        with reads.step():
            assert reads.in_step
            reads.add(torch.tensor([step]), lambda values: seen.append(values.item()))
            reads.add(torch.tensor([10 * step]), lambda values: seen.append(values.item()))
            assert seen == [n for past in range(step - 1) for n in (past, 10 * past)]
        assert seen == [n for past in range(step) for n in (past, 10 * past)]
    reads.read()
    assert seen == [0, 0, 1, 10, 2, 20]
    reads.read()
    assert len(seen) == 6


def test_outside_of_a_step_everything_is_read_at_once():
    reads, seen = LateReads(), []
    reads.add(torch.tensor(1), lambda values: seen.append(values.item()))
    with reads.step(late=False):
        assert not reads.in_step
        reads.add(torch.tensor(2), lambda values: seen.append(values.item()))
        assert seen == [1, 2]


def refuse(values: torch.Tensor) -> None:
    raise ValueError(f"found {values.item()}")


def test_what_is_found_is_said_once():
    reads, seen = LateReads(), []
    with reads.step():
        reads.add(torch.tensor(1), refuse)
        reads.add(torch.tensor(2), seen.append)
    with pytest.raises(ValueError, match="found 1"):
        reads.read()
    reads.read()
    assert not seen
    with reads.step():
        reads.add(torch.tensor(1), refuse)
    reads.forget()
    reads.read()


@pytest.mark.parametrize("step", [0, 1], ids=["of_the_same_step", "of_the_step_before"])
def test_what_is_found_comes_before_an_error_that_it_led_to(step):
    reads = LateReads()
    if step:
        with reads.step():
            reads.add(torch.tensor(1), refuse)
    with pytest.raises(ValueError, match="found 1") as error, reads.step():
        if not step:
            reads.add(torch.tensor(1), refuse)
        raise RuntimeError("who knows why")
    assert isinstance(error.value.__context__, RuntimeError)
    with pytest.raises(RuntimeError, match="who knows why"), reads.step():
        raise RuntimeError("who knows why")


def test_who_looks_between_two_steps_learns_first_what_the_last_one_found():
    reads, seen = LateReads(), []
    with reads.step():
        reads.add(torch.tensor(1), seen.append)
    reads.add(torch.tensor(2), seen.append)
    assert seen == [1, 2]
    with reads.step():
        reads.add(torch.tensor(3), refuse)
    with pytest.raises(ValueError, match="found 3"):
        reads.add(torch.tensor(4), seen.append)
    assert len(seen) == 2


def test_who_interrupts_does_not_wait():
    reads = LateReads()
    with pytest.raises(KeyboardInterrupt), reads.step():
        reads.add(torch.tensor(1), refuse)
        raise KeyboardInterrupt
    assert not reads.in_step


def test_late_numbers_are_those_of_gathered_tensors():
    """Two processes with different numbers of elements, and a divisor of zero."""
    shares = [torch.tensor([1.0, 2.0, 6.0]), torch.tensor([4.0])]
    rows, numbers = [], {}
    for share in shares:
        local = LocalNumbers()
        total, mean = LateGathered(local, share, None).sum(), LateGathered(local, share, None).mean()
        count = LateGathered(local, torch.tensor(len(share)), None).sum()
        first = LateGathered(local, torch.tensor(len(share)), 1).sum()
        nothing = LateGathered(local, torch.zeros((), dtype=torch.long), None).sum()
        assert count > 0 and nothing > 0, "settled where it divides"
        with pytest.raises(TypeError, match="compared with 3"):
            _ = count > 3
        numbers = {
            "total": total,
            "mean": mean.item(),
            "ratio": (total / count).item(),
            "nothing": (total / nothing).item(),
            "python": total.item() / nothing.item(),
            "first": first.item(),
            "floor": 10 + count.item() // 3,
        }
        rows.append(local.row())
    got = {name: number.of(torch.stack(rows)) for name, number in numbers.items()}
    assert got == {"total": 13, "mean": 3.25, "ratio": 3.25, "nothing": 0, "python": 0, "first": 3, "floor": 11}
    assert isinstance(got["floor"], int) and got["total"].dtype == torch.float32


@pytest.mark.parametrize(("width", "tokens"), [(2, 3), (3, 2)], ids=["shorter", "longer"])
def test_rows_of_another_truncation_are_refused_late(width, tokens):
    """Rows that are too short must not be looked up beyond their end before that: on a GPU it ends the process."""
    reads = LateReads()
    with reads.step():
        unpack_rows(torch.ones(1, width), torch.ones(1, tokens, dtype=torch.bool), reads.add)
    with pytest.raises(ValueError, match=rf"up to {tokens} tokens, their precomputed .* up to {width}, "):
        reads.read()


# Training


IN_FIRST_MICRO_BATCH, IN_SECOND_MICRO_BATCH = 7, 0
"""Seeds of an order of the data, by where the third step of six pairs has the odd one."""


def late_trainer(model: Any, folder: Any, **changes: Any) -> OTPOTrainer:
    """Steps of all six pairs that can be trained on, in two micro-batches."""
    settings = {"max_length": 40, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    settings |= {"logging_steps": 100, "max_steps": 6}
    pairs = pairs_with_one_odd("chosen")
    trainer = OTPOTrainer(
        model,
        args=options(folder, **{**settings, **changes}),
        train_dataset=pairs,
        eval_dataset=pairs.filter(lambda row: ODD not in row["chosen"]),
    )
    trainer._reads_late = True
    return trainer


WHAT_LOOKS: dict[str, dict[str, Any]] = {
    "nobody": {},
    "save": {"save_strategy": "steps", "save_steps": 1},
    "log": {"logging_steps": 1},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1},
    "end": {"max_steps": 3},
}


@pytest.mark.parametrize("seed", [IN_FIRST_MICRO_BATCH, IN_SECOND_MICRO_BATCH], ids=["first", "second"])
@pytest.mark.parametrize("looks", WHAT_LOOKS)
def test_a_bad_step_is_found_by_the_next_and_before_anything_is_kept(looks, seed, model_folder, tmp_path, tokenizer):
    """Of the two micro-batches of the third step, the first is found bad by the second."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    trainer = late_trainer(model, tmp_path / "out", seed=seed, **WHAT_LOOKS[looks])
    kept: dict[str, Any] = {}

    def files() -> dict[str, bytes]:
        return {name: data for name, data in folder_bytes(tmp_path).items() if name != "out/README.md"}

    def spoil() -> None:
        poison(model, tokenizer.convert_tokens_to_ids(ODD))
        kept["files"], kept["log"] = files(), list(trainer.state.log_history)

    trainer.add_callback(At("on_step_begin", 2, spoil))
    found = r"Hidden states.* of pair\(s\) \[\d\] of the micro-batch \(row\(s\) 5 of the training dataset\)"
    with pytest.raises(FloatingPointError, match=rf"{found} are not finite after 2 optimizer step\(s\)\. Nothing was"):
        trainer.train()
    assert trainer.state.global_step == (2 if seed == IN_FIRST_MICRO_BATCH else 3)
    assert files() == kept["files"] and trainer.state.log_history == kept["log"]
    assert any(name.startswith("out/checkpoint-2/") for name in kept["files"]) == (looks == "save")


def nan_later(batch: Any) -> torch.Tensor:
    weights = hashed_weights(batch)
    if batch.step == 1:
        weights[0] = math.nan
    return weights


def test_weights_that_are_not_finite_are_found_late(model_folder, tmp_path):
    trainer = OTPOTrainer(
        model_folder, args=options(tmp_path, logging_steps=4), train_dataset=make_pairs(), weighting=nan_later
    )
    trainer._reads_late = True
    with pytest.raises(FloatingPointError, match=r"Weights.*pair\(s\) \[0\].* after 1 optimizer step"):
        trainer.train()
    assert trainer.state.global_step == 2
    with pytest.raises(FloatingPointError, match="parameters that are not finite"):
        trainer.save_model()


def test_a_weighting_that_fails_on_numbers_that_are_not_finite(model_folder, tmp_path, tokenizer):
    """The pair is named, not the weighting blamed."""

    def careful(batch: Any) -> torch.Tensor:
        if not batch.hidden_states.isfinite().all():
            raise ValueError("such states can't be weighted")
        return hashed_weights(batch)

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    trainer = late_trainer(model, tmp_path, per_device_train_batch_size=6, gradient_accumulation_steps=1)
    trainer.weighting = careful
    trainer.add_callback(At("on_step_begin", 1, lambda: poison(model, tokenizer.convert_tokens_to_ids(ODD))))
    with pytest.raises(FloatingPointError, match=r"row\(s\) 5 .* after 1 optimizer step") as error:
        trainer.train()
    assert "such states" in str(error.value.__context__)


def fail(_: OTPOTrainer) -> None:
    raise RuntimeError("who knows why")


def look_at_another_pair(trainer: OTPOTrainer) -> None:
    with torch.no_grad():
        trainer.score_batch(trainer.model, trainer.collate([trainer.train_dataset[0]]))


@pytest.mark.parametrize("then", [fail, look_at_another_pair])
def test_the_bad_pair_is_named_whatever_comes_after_its_step(then, model_folder, tmp_path, tokenizer):
    """An optimizer may fail on what it is given, and a callback sees a model that is bad for every pair."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    trainer = late_trainer(model, tmp_path, per_device_train_batch_size=6, gradient_accumulation_steps=1)
    trainer.add_callback(At("on_step_begin", 2, lambda: poison(model, tokenizer.convert_tokens_to_ids(ODD))))
    trainer.add_callback(At("on_step_end", 3, lambda: then(trainer)))
    with pytest.raises(FloatingPointError, match=r"row\(s\) 5 .* after 2 optimizer step") as error:
        trainer.train()
    assert trainer.state.global_step == 3
    assert (then is fail) == ("who knows why" in str(error.value.__context__))


def test_a_training_that_was_broken_off_leaves_nothing_to_the_next(model_folder, tmp_path, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    trainer = late_trainer(model, tmp_path, max_steps=2)

    def interrupt() -> None:
        raise KeyboardInterrupt

    trainer.add_callback(At("on_step_end", 1, interrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.pop_callback(At)
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0


@pytest.mark.lengthy
def test_processes_stop_together_and_none_blames_a_pair_of_its_own(model_folder, tmp_path):
    """The bad pair is one process's; the other one logs nothing of it, and says where to look."""
    ended = python(*two_processes("bad_pair_worker.py"), model_folder, str(tmp_path))
    assert ended.returncode == 0, ended.stderr[-2000:]
    for name, losses in (("log", 2), ("nobody", 0)):
        found = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
        assert [step for _, step, _ in found] == [3, 3]
        assert [len(logged) for _, _, logged in found] == [losses, losses]
        named = [rank for rank, (said, _, _) in enumerate(found) if "row(s) 5 of the training dataset" in said]
        assert len(named) == 1
        assert f"Numbers of process(es) {named} are not finite after 2 optimizer step(s)" in found[1 - named[0]][0]


@pytest.mark.lengthy
def test_two_processes_log_the_same_late(model_folder, other_model_folder, tmp_path):
    """Nine pairs in batches of two: the last step of an epoch is filled up, where TRL's counts leave a process out."""
    ended = python(*two_processes("late_worker.py"), model_folder, other_model_folder, str(tmp_path))
    assert ended.returncode == 0, ended.stderr[-2000:]
    logs = {late: json.loads((tmp_path / f"{late}.json").read_text()) for late in ("False", "True")}
    assert len(logs["True"]) == len(logs["False"]) == 5
    for got, want in zip(logs["True"], logs["False"], strict=True):
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert got[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name

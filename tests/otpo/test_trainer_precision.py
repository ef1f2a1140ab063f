"""Half precision, autocast and compiled models, and how many hidden states are kept."""

import gc
import math

import pytest
import torch
from helpers import (
    collate,
    make_pairs,
    moved,
    options,
    train_and_evaluate,
)
from torch import Tensor
from written_loss import SGD, load, uneven_pairs

from otpo import OTPOTrainer, PairBatch, TokenWeights


@pytest.mark.parametrize("precision", [{"bf16": True}, {"fp16": True}], ids=["bf16", "fp16"])
def test_weights_are_solved_outside_autocast(precision, model_folder, tmp_path):
    seen: list[tuple[torch.dtype, torch.dtype, torch.dtype]] = []

    class Looking(OTPOTrainer):
        def token_weights(self, batch: PairBatch) -> Tensor | TokenWeights:
            product = torch.ones(2, 2) @ torch.ones(2, 2)
            answer = super().token_weights(batch)
            seen.append((batch.logps.dtype, answer.values.dtype, product.dtype))
            return answer

    trainer = Looking(model_folder, args=options(tmp_path, ot_reg=0.05, **precision), train_dataset=make_pairs())
    batch = collate(trainer, [0, 1, 2, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):  # of the caller's own, around the whole loss
        trainer.compute_loss(trainer.model, batch)
    run = train_and_evaluate(trainer)
    assert set(seen) == {(torch.float32,) * 3}
    assert len(run.losses) == 4 and all(math.isfinite(loss) for loss in run.losses)
    assert run.losses[-1] < run.losses[0]
    assert all(entry["transport/residual"] <= 1e-6 for entry in run.log if "loss" in entry)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_models(dtype, model_folder, tmp_path):
    trainer = OTPOTrainer(
        load(model_folder, dtype=dtype),
        args=options(tmp_path, **SGD, ot_reg=0.05),
        train_dataset=uneven_pairs(),
    )
    run = train_and_evaluate(trainer)
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-3)
    assert all(math.isfinite(loss) for loss in run.losses) and moved(run)


def count_states(rows: int, length: int, width: int) -> int:
    """Distinct storages of live tensors that are a layer's hidden states, or all but their last position."""
    gc.collect()
    storages = set()
    for thing in gc.get_objects():
        # Stand-ins that a compiler traced with, which outlive the tests that compile, are of another class.
        if type(thing) is Tensor and thing.dim() == 3 and thing.size(0) == rows and thing.size(2) == width:  # noqa: SIM102
            if thing.size(1) in (length - 1, length):
                storages.add(thing.untyped_storage().data_ptr())
    return len(storages)


def test_one_layer_of_hidden_states_is_kept(model_folder, tmp_path):
    counts: list[int] = []
    sizes: list[tuple[int, int, int]] = []

    class Counting(OTPOTrainer):
        def token_weights(self, batch: PairBatch) -> Tensor | TokenWeights:
            rows, length, width = batch.hidden_states.shape
            sizes.append((rows, length + 1, width))
            counts.append(count_states(*sizes[-1]))
            return super().token_weights(batch)

    trainer = Counting(model_folder, args=options(tmp_path), train_dataset=make_pairs(), eval_dataset=make_pairs(4))
    trainer.evaluate()
    assert counts == [1]
    assert count_states(*sizes[-1]) == 0

    trainer.train()
    assert count_states(*sizes[-1]) == 0

    batch = collate(trainer, [0, 1, 2, 3])  # the count counts: two layers, the embeddings and the last norm
    with torch.no_grad():
        outputs = trainer.model(batch["input_ids"], output_hidden_states=True)
    assert count_states(8, batch["input_ids"].size(1), 32) == len(outputs.hidden_states) == 3


@pytest.mark.lengthy
def test_compiled_models(model_folder, tmp_path):
    """Compiled graphs must still hand out each step's own hidden states, of the policy and not of the reference."""
    torch._dynamo.reset()
    runs = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = OTPOTrainer(
            model_folder,
            args=options(tmp_path, ot_reg=0.05, max_steps=2, pad_to_multiple_of=64, **compiled),
            train_dataset=make_pairs(),
            eval_dataset=make_pairs(4, seed=3),
        )
        runs.append(train_and_evaluate(trainer))
    torch._dynamo.reset()
    torch.testing.assert_close(runs[1].losses, runs[0].losses, rtol=1e-5, atol=1e-6)
    assert runs[1].evaluation["eval_weights/ess"] == pytest.approx(runs[0].evaluation["eval_weights/ess"], rel=1e-4)

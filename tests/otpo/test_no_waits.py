"""A training step reads nothing off the device but what the step before has left; the same numbers come out.

On the CPU a trainer reads at once. Here it is told to read late, as it does on a GPU, and every operator that would
wait for a GPU raises.
"""

from typing import Any

import pytest
from helpers import (
    assert_same_parameters,
    hashed_weights,
    make_pairs,
    make_trainer,
    moved,
    options,
    train_and_evaluate,
)
from no_waits import NoWaits, Waited
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback
from weighting_helpers import with_weights
from written_loss import LORA

from otpo import OTPOConfig, OTPOTrainer, TokenWeights
from otpo.training.late_reads import LateReads
from otpo.weighting import optimal_transport

LOSS_TYPES = [
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
]
SMOOTHED = ("exo_pair", "robust", "aot")
CASES: dict[str, dict[str, Any]] = {
    **{f"loss-{name}": {"loss_type": [name], "label_smoothing": 0.1 * (name in SMOOTHED)} for name in LOSS_TYPES},
    "otpo": {"weighting": "otpo", "ot_reg": 0.05},
    "ld": {"weighting": "ld", "ld_alpha": 0.3},
    "sampo": {"weighting": "sampo"},
    "d2po": {"weighting": "d2po"},
    "length": {"weighting": "length"},
    "budget": {"weighting": "budget"},
    "contrast": {"weighting": "contrast", "ot_reg": 0.1, "contrast_mix": 0.7},
    "confpo": {"weighting": "confpo"},
    "surprisal": {"weighting": "surprisal"},
    "diff": {"weighting": "diff"},
    "columns": {"weighting": "columns"},
    "product": {"weighting": "otpo*diff"},
    "three_losses": {"weighting": "sampo", "loss_type": ["sigmoid", "ipo", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "ld_alpha": {"ld_alpha": 0.5},
    "wpo": {"use_weighting": True},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "precomputed": {"precompute_ref_log_probs": True},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "moe": {"folder": "moe"},
    "moe-three_losses": {"folder": "moe", "loss_type": ["sigmoid", "ipo", "sft"]},
    "own_weighting": {"own": True},
    "lora": {"lora": True},
}


@pytest.fixture(scope="module")
def folders(model_folder, moe_folder):
    return {"qwen3": model_folder, "moe": moe_folder}


def own_weighting(batch: Any) -> TokenWeights:
    """With a number of the host and one of the device."""
    return TokenWeights(hashed_weights(batch), {"mine/rows": len(batch.mask), "mine/tokens": batch.mask.sum()})


def made(case: dict[str, Any], folders: dict[str, str], tmp_path, trainer_class: type = OTPOTrainer, **changes: Any):
    settings = {"weighting": "uniform", **case, **changes}
    arguments: dict[str, Any] = {"weighting": own_weighting} if settings.pop("own", False) else {}
    if settings.pop("lora", False):
        arguments["peft_config"] = LoraConfig(**LORA)
    folder = folders[settings.pop("folder", "qwen3")]
    return trainer_class(
        folder,
        args=options(tmp_path, **settings),
        train_dataset=with_weights(make_pairs()),
        eval_dataset=with_weights(make_pairs(6, 3)),
        **arguments,
    )


class ReadsOfTheHost(LateReads):
    """Its copies are on the host: what reads them waits for an event at most."""

    def __init__(self, watch: NoWaits) -> None:
        super().__init__()
        self._watch = watch

    def _read_all_but(self, steps: int) -> None:
        with self._watch.pause():
            super()._read_all_but(steps)


class WatchedSteps(TrainerCallback):
    """Watches from the start of the second step to the end of the last, where the log is written.

    The first step compares the reference with the policy and TRL's loss with a known one, once, and reads for that.
    """

    def __init__(self, watch: NoWaits) -> None:
        self._watch = watch

    def on_step_begin(self, args, state, control, **kwargs):
        self._watch.on = state.global_step > 0

    def on_step_end(self, args, state, control, **kwargs):
        self._watch.on = 0 < state.global_step < state.max_steps


def watched(trainer: OTPOTrainer, watch: NoWaits) -> None:
    """Leaves out what runs otherwise on a GPU: a solver, and the models' own forward passes."""
    trainer._reads = ReadsOfTheHost(watch)
    trainer.add_callback(WatchedSteps(watch))
    weigh = trainer.token_weights

    def paused(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with watch.pause():
                return function(*args, **kwargs)

        return call

    if trainer.args.weighting == "otpo":  # the solver in plain torch looks at its residual; the kernels never do
        trainer.token_weights = paused(weigh)
    elif trainer.args.weighting in ("contrast", "otpo*diff"):  # what they make of its result is looked at
        trainer.token_weights = weigh_with(paused(optimal_transport.solve), weigh)
    for model in {trainer.model, trainer.ref_model} - {None}:
        model.forward = paused(model.forward)


def weigh_with(solver: Any, weigh: Any) -> Any:
    def call(batch: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optimal_transport, "solve", solver)
            return weigh(batch)

    return call


@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_for_nothing_and_logs_the_same(name, folders, tmp_path):
    now = train_and_evaluate(made(CASES[name], folders, tmp_path, logging_steps=2))

    watch = NoWaits()
    trainer = made(CASES[name], folders, tmp_path, logging_steps=4)
    trainer._reads_late = True
    watched(trainer, watch)
    with watch:
        trainer.train()
    assert trainer.state.global_step == 4 and {"masked_fill", "stack"} <= watch.looked_at

    trainer = made(CASES[name], folders, tmp_path, logging_steps=2)
    trainer._reads_late = True
    late = train_and_evaluate(trainer)
    assert moved(late)
    assert_same_parameters(late.after, now.after)
    assert late.evaluation == now.evaluation
    # Sums over what a mask selects are sums with zeros here, in another order.
    rounded = {"logits/chosen", "logits/rejected", *(["loss", "train_loss"] if "sft" in trainer.loss_types else [])}
    for got, want in zip(late.log, now.log, strict=True):
        assert got.keys() == want.keys()
        for key, value in want.items():
            assert got[key] == (pytest.approx(value, rel=1e-6, abs=1e-7) if key in rounded else value), key


@pytest.mark.parametrize("streamed", [False, True])
def test_rows_without_padding_are_planned_before_a_step(streamed, model_folder, tmp_path):
    """By the loader, on the host, of a stream too: TRL has each process read its own rows of one."""
    watch, pairs = NoWaits(), make_pairs(32)
    args = options(tmp_path, weighting="uniform", row_layout="shared_prompt", logging_steps=4)
    trainer = OTPOTrainer(model_folder, args=args, train_dataset=pairs.to_iterable_dataset() if streamed else pairs)
    trainer._reads_late = True
    watched(trainer, watch)
    with watch:
        trainer.train()
    assert trainer.state.global_step == 4 and "index_copy" in watch.looked_at


def test_the_watch_sees_a_wait(folders, tmp_path):
    """Of a trainer that reads at once, and of a weighting."""
    watch = NoWaits()
    trainer = made({}, folders, tmp_path, logging_steps=4)
    watched(trainer, watch)
    with watch, pytest.raises(Waited, match="cpu"):
        trainer.train()

    class Asking(OTPOTrainer):
        def token_weights(self, batch):
            return batch.mask.float() * batch.logps[batch.mask].mean().sign().abs()

    watch = NoWaits()
    trainer = made({}, folders, tmp_path, Asking, logging_steps=4)
    trainer._reads_late = True
    watched(trainer, watch)
    with watch, pytest.raises(Waited, match=r"aten\.index"):
        trainer.train()


def copies_without_waiting(folder: Any, said: Any = None, **changes: Any) -> bool:
    config: Any = OTPOConfig(str(folder), bf16=False, accelerator_config=said, **changes).accelerator_config
    return config.non_blocking


def test_the_options_that_wait_are_off(tmp_path):
    assert not OTPOConfig(str(tmp_path), bf16=False).logging_nan_inf_filter
    for said in (None, {"split_batches": True}, {}, '{"split_batches": true}'):
        assert copies_without_waiting(tmp_path, said)


def test_the_options_that_wait_are_the_users(tmp_path):
    assert OTPOConfig(str(tmp_path), bf16=False, logging_nan_inf_filter=True).logging_nan_inf_filter
    assert not copies_without_waiting(tmp_path, dataloader_pin_memory=False)
    (tmp_path / "accelerator.json").write_text("{}")
    for said in ({"non_blocking": False}, '{"non_blocking": false}', str(tmp_path / "accelerator.json")):
        assert not copies_without_waiting(tmp_path, said)


@pytest.mark.parametrize("wait", [False, True])
def test_a_resumed_epoch_copies_as_any_other(wait, model_folder, tmp_path):
    """accelerate makes its loader anew, and would wait for each of its batches."""
    saving = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    args = options(tmp_path, weighting="uniform", accelerator_config={"non_blocking": not wait}, **saving)
    found: list[bool] = []

    class Loaders(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            loader: Any = trainer.accelerator.gradient_state.active_dataloader
            found.append(loader._non_blocking)

    for checkpoint in (None, tmp_path / "checkpoint-1"):
        trainer = OTPOTrainer(model_folder, args=args, train_dataset=make_pairs(), callbacks=[Loaders()])
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    assert found == [not wait] * 5


def test_evaluation_in_the_middle_of_a_logging_interval(model_folder, tmp_path):
    """What an evaluation counts, such as the tokens so far, is known before it."""
    logs = []
    for late in (False, True):
        trainer = OTPOTrainer(
            model_folder,
            args=options(tmp_path, weighting="uniform", logging_steps=4, eval_strategy="steps", eval_steps=3),
            train_dataset=make_pairs(),
            eval_dataset=make_pairs(6, seed=3),
        )
        trainer._reads_late = late
        logs.append(train_and_evaluate(trainer).log)
    assert logs[1][0]["eval_num_tokens"] == logs[0][0]["eval_num_tokens"] > 0
    rounded = {"logits/chosen", "logits/rejected"}
    for got, want in zip(logs[1], logs[0], strict=True):
        assert {key: got[key] for key in want if key not in rounded} == {
            key: value for key, value in want.items() if key not in rounded
        }


def test_a_name_that_is_taken_is_refused_before_it_is_logged(model_folder, tmp_path):
    for taken in ("logps/chosen", "weights/ess", "loss"):
        trainer = make_trainer(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path, make_pairs())
        trainer.weighting = lambda batch, name=taken: TokenWeights(hashed_weights(batch), {name: 1.0})
        trainer._reads_late = True
        with pytest.raises(ValueError, match=f"logs a number as '{taken}'"):
            trainer.train()
        assert not trainer.state.log_history

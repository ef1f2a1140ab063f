"""Pretraining: what is logged is true, and the trajectory is the same whichever way it is run.

`trajectory.json` holds the losses of 200 steps; `python tests/moe_backbone/test_pretraining.py` writes it anew.
"""

import json
import math
from pathlib import Path
from statistics import mean

import pytest
import torch
from datasets import Dataset
from pretraining_helpers import SUCCESSORS, VOCABULARY, chain_documents, logged, pretrainer, tiny_compass
from transformers import Trainer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from moe_backbone import CompassForCausalLM, preset
from moe_backbone.pretraining.packing import PackedCollator, pack_documents
from moe_backbone.pretraining.trainer import PretrainingTrainer

TRAJECTORY = Path(__file__).with_name("trajectory.json")
STEPS = 200
# Another machine's sums differ in their last bits, and what that makes of a loss grows over the steps; the
# load-balancing loss is one of micro-batches, so accumulation changes it a little. Their mean shows a drift.
LARGEST, MEAN = 0.06, 0.01


def trajectory_run(folder: Path, **changes):
    trainer = pretrainer(folder, max_steps=STEPS, rows=pack_documents(chain_documents(2000), 32), **changes)
    return trainer


def assert_same_trajectory(losses: list[float], expected: list[float]) -> None:
    differences = [left - right for left, right in zip(losses, expected, strict=True)]
    assert max(map(abs, differences)) < LARGEST
    assert abs(mean(differences)) < MEAN


@pytest.mark.lengthy
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_committed_trajectory(tmp_path, accumulation):
    trainer = trajectory_run(
        tmp_path, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation
    )
    trainer.train()
    expected = json.loads(TRAJECTORY.read_text())
    for name in ("lm_loss", "mtp_loss", "aux_loss", "z_loss"):
        if accumulation == 1 or name in ("lm_loss", "mtp_loss"):
            assert_same_trajectory(logged(trainer, name), expected[name])
    last = logged(trainer, "lm_loss")[-20:]
    assert math.log(SUCCESSORS) < mean(last) < math.log(SUCCESSORS) + 0.4  # it has learnt the chain


@pytest.mark.lengthy
def test_resume_in_the_middle_is_exact(tmp_path):
    whole = trajectory_run(tmp_path / "whole", save_strategy="steps", save_steps=100)
    whole.train()
    resumed = trajectory_run(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-100"))
    for name in ("loss", "lm_loss", "aux_loss", "grad_norm"):
        assert logged(resumed, name) == logged(whole, name)
    for (name, left), right in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


@pytest.mark.parametrize("bias", [0.0, 0.01])
def test_a_stream_resumes_at_its_place(tmp_path, bias):
    def trainer(folder):
        rows = pack_documents(chain_documents(400).to_iterable_dataset(), 32)
        return pretrainer(
            folder, model=tiny_compass(router_bias_update_speed=bias), rows=rows, save_strategy="steps", save_steps=4
        )

    whole, resumed = trainer(tmp_path / "whole"), trainer(tmp_path / "resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))
    assert logged(resumed, "lm_loss") == logged(whole, "lm_loss")
    for (name, left), right in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


def test_without_router_terms_accumulation_changes_nothing(tmp_path):
    losses = []
    for accumulation in (1, 2, 4):
        trainer = pretrainer(
            tmp_path,
            model=tiny_compass(router_aux_loss_coef=0.0, router_z_loss_coef=0.0),
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        losses.append(logged(trainer, "lm_loss"))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0] == pytest.approx(losses[2], abs=1e-4)


def test_weights_that_could_not_be_trained_are_evaluated(tmp_path):
    rows = pack_documents(chain_documents(8), 32)
    args = pretrainer(tmp_path, per_device_eval_batch_size=2, bf16=False).args
    trainer = PretrainingTrainer(tiny_compass().half(), args, eval_dataset=rows)
    assert trainer.told_optimizer == "none, since there is nothing to train on"
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    with pytest.raises(ValueError, match="`dtype=float16`"):
        PretrainingTrainer(tiny_compass().half(), args, rows)


def test_what_is_logged_is_what_the_model_computes(tmp_path):
    """With a learning rate of zero every step sees the same model, so each entry can be computed again."""
    rows = pack_documents(chain_documents(40), 32)
    trainer = pretrainer(
        tmp_path, rows=rows, learning_rate=0.0, max_steps=1, gradient_accumulation_steps=2,
        per_device_train_batch_size=4, peak_tflops=1.0,
    )  # fmt: skip
    order = list(trainer.get_train_dataloader())[:2]
    trainer.train()
    entry = trainer.state.log_history[0]
    model = tiny_compass().train()
    outputs = [model(**batch) for batch in order]
    counts = [int((batch["labels"] != -100).sum()) for batch in order]
    losses = [output.lm_loss.item() for output in outputs]
    assert entry["lm_loss"] == pytest.approx(sum(l * c for l, c in zip(losses, counts, strict=True)) / sum(counts))
    for name in ("aux_loss", "z_loss"):
        assert entry[name] == pytest.approx(mean(getattr(output, name).item() for output in outputs), rel=1e-5)
    parts = ("lm_loss", 1.0), ("mtp_loss", 0.1)
    total = sum(weight * entry[name] for name, weight in parts)
    shares = [count / sum(counts) for count in counts]
    total += sum(
        share * (0.01 * o.aux_loss.item() + 0.001 * o.z_loss.item()) for share, o in zip(shares, outputs, strict=True)
    )
    assert entry["loss"] == pytest.approx(total, rel=1e-5)
    load = sum(output.expert_load for output in outputs)
    assert entry["router/max_load"] == pytest.approx(float((load / load.sum(1, keepdim=True)).max() * 16))
    assert entry["router/dead_experts"] == int((load == 0).sum())
    assert entry["router/dropped"] == 0
    assert entry["mfu"] > 0
    assert entry["tokens_per_second"] > 0


def test_evaluation_is_of_the_next_token_alone(tmp_path):
    rows = pack_documents(chain_documents(30, seed=5), 32)
    trainer = pretrainer(tmp_path, eval_rows=rows, per_device_eval_batch_size=64)
    model = tiny_compass().eval()
    with torch.no_grad():
        expected = model(**PackedCollator(0, 32)(list(rows))).lm_loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("length", [2, 8])
def test_a_step_with_nothing_to_predict_changes_nothing(tmp_path, accumulation, length):
    """Rows of one-token documents alone, also shorter than what the MTP layers look ahead."""
    rows = Dataset.from_list([{"input_ids": list(range(1, length + 1)), "seq_lengths": [1] * length}] * 8)
    model = tiny_compass(num_mtp_layers=2, router_bias_update_speed=0.01)
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer = pretrainer(
        tmp_path, model=model, rows=rows, eval_rows=rows, sequence_length=length, max_steps=2, weight_decay=0.0,
        per_device_train_batch_size=2, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    trainer.train()
    for name in ("loss", "lm_loss", "mtp_loss", "grad_norm"):
        assert logged(trainer, name) == [0.0, 0.0], name
    assert logged(trainer, "router/dropped") == [0.0, 0.0]
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert trainer.evaluate()["eval_loss"] == 0.0


def test_a_micro_batch_with_nothing_to_predict_leaves_the_step_to_the_others(tmp_path):
    documents = list(pack_documents(chain_documents(12), 32))[:1]
    empty = {"input_ids": list(range(1, 33)), "seq_lengths": [1] * 32}
    found = []
    for rows in (documents, [*documents, empty]):
        trainer = pretrainer(
            tmp_path, model=tiny_compass(router_aux_loss_coef=0.0), rows=Dataset.from_list(rows), max_steps=1,
            per_device_train_batch_size=1, gradient_accumulation_steps=len(rows), warmup_steps=0,
        )  # fmt: skip
        trainer.train()
        found.append([logged(trainer, name)[0] for name in ("loss", "lm_loss", "mtp_loss", "grad_norm")])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_the_end_token_learns_where_it_pads_too(tmp_path):
    rows = Dataset.from_list([{"input_ids": [5, 0, 7, 0, 9], "seq_lengths": [5]}] * 8)
    for ends in (0, [3, 0]):
        torch.manual_seed(0)
        sizes = {"vocab_size": VOCABULARY, "tie_word_embeddings": False}
        model = CompassForCausalLM(preset("compass-tiny", **sizes, pad_token_id=0, eos_token_id=ends))
        before = model.model.embed_tokens.weight.detach().clone()
        assert before[0].abs().max() > 0
        pretrainer(tmp_path, model=model, rows=rows, max_steps=2, warmup_steps=0, weight_decay=0.0).train()
        changed = (model.model.embed_tokens.weight.detach() != before).any(dim=1)
        assert changed[[0, 5, 7]].all()


@pytest.mark.lengthy
def test_biases_even_the_load_without_a_loss(tmp_path):
    def final_load(speed):
        model = tiny_compass(router_bias_update_speed=speed, router_aux_loss_coef=0.0)
        trainer = pretrainer(tmp_path, model=model, max_steps=60)
        trainer.train()
        return mean(logged(trainer, "router/load_entropy")[-10:])

    assert final_load(0.01) > final_load(0.0) + 0.02


@pytest.mark.parametrize("changes", [{}, {"num_mtp_layers": 0}, {"mtp_loss_coef": 0.0}], ids=["mtp", "none", "idle"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_biases_need_no_loss_to_move(tmp_path, changes, checkpointing):
    weights = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    model = tiny_compass(router_bias_update_speed=0.01, **weights, **changes)
    if checkpointing:
        model.gradient_checkpointing_enable()
    rows = pack_documents(chain_documents(30, seed=5), 32)
    trainer = pretrainer(tmp_path, model=model, eval_rows=rows, max_steps=3)
    trainer.train()
    assert len(logged(trainer, "router/load_entropy")) == 3 and not logged(trainer, "aux_loss")
    moved = [float(router.e_score_correction_bias.abs().max()) for router in model.model.routers]
    trained = 2 if changes else 3
    assert moved[:trained] == pytest.approx([0.03] * trained, abs=0.021) and min(moved[:trained]) > 0
    assert not any(moved[trained:])
    before = [router.e_score_correction_bias.clone() for router in model.model.routers]
    trainer.evaluate()
    assert trainer.take_load_of_step() is None
    assert all(map(torch.equal, before, (router.e_score_correction_bias for router in model.model.routers)))


def test_a_gradient_that_is_not_finite_stops_before_the_update(tmp_path):
    model = tiny_compass()
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[0, 0, 0] = torch.inf
    trainer = pretrainer(tmp_path, model=model, save_strategy="steps", save_steps=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="No update was made from it and nothing was saved"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not list(tmp_path.glob("checkpoint-*"))


def test_an_mtp_layer_without_a_gradient_is_refused(tmp_path):
    model = tiny_compass(num_mtp_layers=1, mtp_detach_trunk=True, mtp_detach_head=True)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match=r"`use_reentrant`, with .* Set it to false"):
        pretrainer(tmp_path, model=model, **options)
    idle = tiny_compass(num_mtp_layers=1, mtp_loss_coef=0.0, mtp_detach_trunk=True, mtp_detach_head=True)
    pretrainer(tmp_path, model=idle, max_steps=1, **options).train()  # whose MTP layers want none
    options["gradient_checkpointing_kwargs"]["use_reentrant"] = False
    pretrainer(tmp_path, model=model, max_steps=1, **options).train()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_second_training_begins_with_nothing_of_the_first(tmp_path, monkeypatch):
    """One that ended between two entries of the log, and one that was interrupted within a step."""
    changes = {"max_steps": 3, "logging_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = pretrainer(tmp_path, model=tiny_compass(router_bias_update_speed=0.01), **changes)
    trainer.train()
    losses, steps = len(logged(trainer, "loss")), trainer.compute_loss

    def interrupt(*args, **kwargs):
        computed = steps(*args, **kwargs)
        raise KeyboardInterrupt if trainer.state.global_step == 0 else AssertionError(computed)

    assert losses == 1 and trainer._window.micro_batches == 2
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(trainer, "compute_loss", interrupt)
        trainer.train()
    assert trainer._load_of_step is not None
    taken, take = [], trainer.take_load_of_step
    monkeypatch.setattr(trainer, "take_load_of_step", lambda: taken.append(take()) or taken[-1])
    trainer.train()
    assert [float(load.sum(1)[0]) for load in taken] == pytest.approx([float(taken[-1].sum(1)[0])] * 3, rel=0.2)
    # Each part has the share of a step's mean, so they add up to the loss, but for the routers' terms.
    (loss,), (of_next,) = logged(trainer, "loss"), logged(trainer, "lm_loss")
    assert of_next < loss < 1.5 * of_next


def test_biases_stand_still_where_a_step_was_left_out(tmp_path, monkeypatch):
    model = tiny_compass(router_bias_update_speed=0.01)
    trainer = pretrainer(tmp_path, model=model, max_steps=2)
    skipped = property(lambda accelerator: trainer.state.global_step == 0)
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", skipped)
    trainer.train()
    largest = max(float(router.e_score_correction_bias.abs().max()) for router in model.model.routers)
    assert largest == pytest.approx(0.01, rel=0.5) and trainer.take_load_of_step() is None


def test_operations_are_counted_as_transformers_counts_them(tmp_path):
    trainer = pretrainer(tmp_path, model=tiny_compass(num_mtp_layers=1))
    for rows in (1, 3):
        batch = {"input_ids": torch.ones(rows, 32, dtype=torch.long)}
        assert trainer.floating_point_ops(batch) == Trainer.floating_point_ops(trainer, batch) > 0


def test_bfloat16_runs_the_experts_in_bfloat16(tmp_path, monkeypatch):
    trainer = pretrainer(tmp_path, max_steps=2, bf16=True)
    seen = []

    def spy(experts, hidden_states, index, weights):
        seen.append({t.dtype for t in (hidden_states, weights, experts.gate_up_proj, experts.down_proj)})
        return grouped_mm_experts_forward(experts, hidden_states, index, weights)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "spy", spy)
    trainer.model.set_experts_implementation("spy")
    trainer.train()
    assert len(seen) == 2 * 3  # two steps, two layers and an MTP layer
    assert all(dtypes == {torch.bfloat16} for dtypes in seen)
    experts = trainer.model.model.layers[0].mlp.experts
    assert experts.gate_up_proj.dtype == experts.down_proj.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 1}, "`sequence_length` must be at least 2, got 1"),
        ({"peak_tflops": 0.0}, "`peak_tflops` must be above 0"),
        ({"remove_unused_columns": True}, "`remove_unused_columns` must stay false"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor=0.1`: the Trainer would compute a loss of its own"),
        ({"use_liger_kernel": True}, "`use_liger_kernel`: Liger has no kernels for Compass"),
    ],
)
def test_options_out_of_range(tmp_path, options, message):
    rows = pack_documents(chain_documents(8), 32)
    with pytest.raises(ValueError, match=message):
        pretrainer(tmp_path, rows=rows, **options)


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    run = trajectory_run(Path(tempfile.mkdtemp()))
    run.train()
    names = ("lm_loss", "mtp_loss", "aux_loss", "z_loss")
    TRAJECTORY.write_text(json.dumps({name: [round(x, 4) for x in logged(run, name)] for name in names}) + "\n")

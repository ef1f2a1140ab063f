"""Each kind of checkpoint of spread experts resumes to the trajectory of the run that was not interrupted.

The runs evaluate and save at each step, keep two checkpoints and load the best one at the end. The evaluation's loss
is greatest after the first step, so the first checkpoint is the best of a run that is told that greater is better.
"""

import shutil
from types import SimpleNamespace

import pytest
import torch
from cli_helpers import arguments, launched, python
from compass_helpers import compass_model
from expert_parallel_helpers import ENVIRONMENT, FIRST, LAST, by_step, result, start
from transformers import AutoModelForCausalLM

from moe_backbone.expert_parallel.resume import follow_schedule
from otpo.cli.running.checkpoints import find_checkpoint

pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its operator for the CPU"),
    pytest.mark.lengthy,
]
NATIVE = "moe_backbone.expert_parallel.native_trainer"  # which transformers before 5.21 has nothing for
IDLE = r"layers\.2\..*experts"  # those of the MTP layer, which stands after the two others


@pytest.fixture(scope="module")
def compass(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sizes = {"num_experts": 4, "num_mtp_layers": 1, "router_aux_loss_coef": 0.1, "router_bias_update_speed": 1e-3}
    compass_model(**sizes).save_pretrained(folder)
    return str(folder)


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def assert_same(one, other):
    one, other = weights(one), weights(other)
    assert any(name.endswith("e_score_correction_bias") for name in one)
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def run(name, folder, model, **options):
    """A whole run; of its four checkpoints it keeps the best and the last one."""
    found = result(name, folder, model=model, changes=FIRST, **options)
    assert found["best"] == "checkpoint-1"
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-4"]
    assert_same(folder / "checkpoint-1", folder / "final")
    return found


def resumed(name, folder, of, changes=FIRST, **options):
    """A run that goes on from the first checkpoint of another one, with a model that is elsewhere in each weight."""
    return result(name, folder, resume=str(of / "checkpoint-1"), changes=changes, disturb=0.5, **options)


def assert_best_is_its_own(folder, found):
    """Where smaller is better, the best of the resumed run's own checkpoints is loaded at its end."""
    best = min(("2", "3", "4"), key=found["evaluated"].__getitem__)
    assert found["best"] == f"checkpoint-{best}"
    assert_same(folder / f"checkpoint-{best}", folder / "final")


@pytest.mark.parametrize("stage", [2, 3])
def test_frozen_experts_resume(stage, compass, tmp_path):
    """Frozen weights come back too, and those of each process to it."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    expected = run("train", whole, compass, stage=stage, freeze=IDLE)
    found = resumed("train", again, whole, model=compass, stage=stage, freeze=IDLE)
    assert by_step(found) == by_step(expected)
    assert found["evaluated"] == expected["evaluated"]
    assert_same(whole / "checkpoint-4", again / "checkpoint-4")
    assert_same(whole / "checkpoint-1", again / "final")
    first = weights(compass)
    for name, weight in weights(again / "checkpoint-4").items():
        stands_still = "layers.2.mlp.experts" in name or name.endswith("e_score_correction_bias")
        assert torch.equal(weight, first[name]) == stands_still, name


def test_the_best_model_of_a_run_that_resumed_in_another_size(compass, tmp_path):
    """The first run's checkpoint is converted, and those of the second are of its own size."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    expected = run("train", whole, compass)
    found = resumed("train", again, whole, model=compass, ep_size=1, changes=LAST)
    assert by_step(found) == pytest.approx(by_step(expected), abs=1e-4)
    assert_best_is_its_own(again, found)


def test_transformers_own_expert_parallelism_resumes(compass, tmp_path):
    """And in another size: the optimizer's states are spread anew."""
    pytest.importorskip(NATIVE)
    whole, again, other = (tmp_path / name for name in ("whole", "again", "other"))
    expected = run("native", whole, compass)
    found = resumed("native", again, whole, model=compass)
    assert by_step(found) == by_step(expected)
    assert found["evaluated"] == expected["evaluated"]
    assert_same(whole / "checkpoint-4", again / "checkpoint-4")
    assert_same(whole / "checkpoint-1", again / "final")
    found = resumed("native", other, whole, model=compass, ep_size=1, changes=LAST)
    assert by_step(found) == pytest.approx(by_step(expected), abs=1e-4)
    assert_best_is_its_own(other, found)


def test_a_checkpoint_that_a_process_did_not_finish_does_not_count(compass, tmp_path):
    pytest.importorskip(NATIVE)
    found, done = start("native", tmp_path, model=compass, die_saving=True)
    assert found is None and done.returncode
    assert (tmp_path / "checkpoint-4" / "optimizer" / ".metadata").is_file()
    assert find_checkpoint("true", str(tmp_path)) == str(tmp_path / "checkpoint-2")


def test_a_schedule_fits_another_number_of_groups_if_they_have_one_learning_rate():
    _of_groups = pytest.importorskip(NATIVE)._of_groups
    state = {
        "base_lrs": [0.1, 0.1],
        "last_epoch": 3,
        "lr_lambdas": [None, None],
        "_last_lr": [0.05, 0.05],
        "steps": [1],
    }
    assert _of_groups(state, 2) is state
    wider = {**state, "base_lrs": [0.1] * 4, "lr_lambdas": [None] * 4, "_last_lr": [0.05] * 4}
    assert _of_groups(state, 4) == wider and _of_groups(wider, 2) == state
    with pytest.raises(ValueError, match=r"2 groups of weights have learning rates of their own, and this run has 1"):
        _of_groups({**state, "base_lrs": [0.1, 0.2]}, 1)


def test_rates_of_a_schedule_are_those_of_all_groups_or_of_each():
    groups = [{"lr": 0.1, "params": []}, {"lr": 0.1, "params": []}]
    optimizer = SimpleNamespace(param_groups=groups)
    for rates, want in (([0.05], [0.05] * 2), ([0.04] * 3, [0.04] * 2), ([0.03, 0.02], [0.03, 0.02])):
        follow_schedule(optimizer, SimpleNamespace(get_last_lr=lambda rates=rates: rates))
        assert [group["lr"] for group in groups] == want
    with pytest.raises(ValueError, match=r"shorter|longer"):
        follow_schedule(optimizer, SimpleNamespace(get_last_lr=lambda: [0.1, 0.2, 0.3]))


def test_the_rate_of_a_deepspeed_schedule_is_that_of_its_step():
    """It keeps its step alone when it is loaded."""
    schedules = pytest.importorskip("deepspeed.runtime.lr_schedules")
    weights = [torch.nn.Parameter(torch.ones(1))]

    def make():
        optimizer = torch.optim.SGD(weights, lr=1.0)
        return optimizer, schedules.WarmupLR(optimizer, 0.0, 0.1, 10, warmup_type="linear")

    (optimizer, schedule), (resumed, other) = make(), make()
    for _ in range(4):
        schedule.step()
    other.load_state_dict(schedule.state_dict())
    follow_schedule(resumed, SimpleNamespace(scheduler=other))
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] > 0


def test_checkpoints_of_other_runs_are_refused_by_transformers_own(tmp_path):
    trainer = pytest.importorskip(NATIVE).NativeExpertParallelMixin
    (tmp_path / "optimizer.pt").touch()
    with pytest.raises(ValueError, match=r"has no optimizer's states of experts that transformers spread.*Run as the"):
        trainer.check_checkpoint(SimpleNamespace(model=None), tmp_path)


@pytest.mark.parametrize("backend", ["transformers", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_alignment_resumes_from_the_command_line(compass_folder, pairs_file, tmp_path, backend):
    """With a reference and an MTP layer, which alignment freezes; under ZeRO-3 where DeepSpeed runs."""
    stage = '{"zero_optimization": {"stage": 3}}' if backend == "deepspeed" else None
    found = {}
    for name, checkpoint in (("whole", None), ("again", tmp_path / "whole" / "checkpoint-1")):
        changes = {"expert_parallel_size": 2, "expert_parallel_backend": backend, "deepspeed": stage}
        changes |= {"save_strategy": "steps", "save_steps": 1, "resume_from_checkpoint": checkpoint}
        words = arguments(compass_folder, pairs_file, tmp_path / name, **changes)
        done = python(*launched("otpo.cli.align", *words), **ENVIRONMENT)
        assert done.returncode == 0, done.stderr[-4000:]
        found[name] = weights(tmp_path / name)
        assert ("resuming   from" in done.stdout) == (checkpoint is not None)
    assert all(torch.equal(weight, found["again"][name]) for name, weight in found["whole"].items())
    assert not torch.equal(
        found["whole"]["lm_head.weight"], weights(tmp_path / "whole" / "checkpoint-1")["lm_head.weight"]
    )

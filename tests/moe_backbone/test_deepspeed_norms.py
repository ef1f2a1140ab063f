"""DeepSpeed's ZeRO 1 and 2 in pretraining: no step waits for the device, and norms and clipping are DeepSpeed's."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_backbone.expert_parallel import deepspeed_norms

WORKER = Path(__file__).parents[1] / "deepspeed_norms_worker.py"


@pytest.mark.lengthy
@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its operator for the CPU")
@pytest.mark.parametrize("stage", [1, 2])
def test_no_step_waits_and_numbers_are_those_of_deepspeed(tmp_path, stage):
    pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*start, str(WORKER), str(tmp_path), str(stage)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["steps"] == found["wanted"] and found["looked_at"] > 50
    assert found["spared"] is True and found["clip"] == 0.1
    for name, (ours, theirs) in found["norms"].items():
        assert ours == pytest.approx(theirs, rel=1e-6), name
    assert found["norms"]["inf, torch.bfloat16"] == found["norms"]["nan, torch.float32"] == [-1.0, -1.0]
    assert found["norms"]["plain, torch.float32"][0] > 1
    for name, (ours, theirs) in found["clipped"].items():
        assert ours == pytest.approx(theirs, nan_ok=True), name
    assert found["clipped"]["1.0, 4.0, 1.0"][0] == pytest.approx([0.75, -0.25, 0.0625, 0.5], rel=1e-5)
    assert all(math.isfinite(each) for each in found["clipped"]["1.0, 0.5, 1.0"][0])


def test_other_optimizers_are_left_alone(monkeypatch):
    pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    class Subclass(DeepSpeedZeroOptimizer):
        """May compute norms in a way of its own."""

    def make(kind, offload=False):
        made = object.__new__(kind)
        vars(made)["cpu_offload"] = offload
        return made

    assert deepspeed_norms.spare_waits(make(DeepSpeedZeroOptimizer))
    left = [make(Subclass), make(DeepSpeedZeroOptimizer, offload=True), SimpleNamespace(), None]
    assert not any(deepspeed_norms.spare_waits(each) for each in left)
    assert "get_grad_norm_direct" not in vars(left[0]) | vars(left[1])
    monkeypatch.setattr(deepspeed_norms, "is_known", lambda: False)
    assert not deepspeed_norms.spare_waits(make(DeepSpeedZeroOptimizer))

"""A gradient that is not finite under DeepSpeed stops pretraining, and the message says whether it was made use of."""

import json
import math
import shutil
import subprocess
import sys
from contextlib import nullcontext
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from pretraining_helpers import pretrainer

from moe_backbone import CompassForCausalLM, preset
from moe_backbone.expert_parallel.deepspeed_trainer import ExpertParallelMixin
from moe_backbone.expert_parallel.native_trainer import NativeExpertParallelMixin
from moe_backbone.pretraining.norm_check import NormCheck, spare_looks

BF16 = {"bf16": {"enabled": True}}


@pytest.mark.parametrize(
    ("engine", "config", "looks"),
    [
        (DistributedType.DEEPSPEED, {"bf16": {"enabled": True}}, False),
        (DistributedType.DEEPSPEED, {"bf16": {"enabled": True, "check_grad_overflow": True}}, True),
        (DistributedType.DEEPSPEED, {**BF16, "zero_optimization": {"stage": 1}}, False),
        (DistributedType.DEEPSPEED, {**BF16, "zero_optimization": {"compute_grad_norm": False}}, None),
        (DistributedType.DEEPSPEED, {"fp16": {"enabled": True}}, None),
        (DistributedType.MULTI_GPU, {"bf16": {"enabled": True}}, None),
    ],
)
def test_who_looks_at_each_gradient(engine, config, looks):
    config = deepcopy(config)
    plugin = SimpleNamespace(deepspeed_config=config)
    accelerator: Any = SimpleNamespace(distributed_type=engine, state=SimpleNamespace(deepspeed_plugin=plugin))
    spare_looks(accelerator)
    assert config.get("bf16", {}).get("check_grad_overflow") is looks
    timed = config.get("timers", {}).get("throughput", {}).get("synchronized")
    assert timed is (False if engine == DistributedType.DEEPSPEED else None)


def test_who_asks_for_exact_times_has_them():
    config: dict[str, Any] = {"timers": {"throughput": {"synchronized": True}}}
    plugin = SimpleNamespace(deepspeed_config=config)
    accelerator: Any = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED, state=SimpleNamespace(deepspeed_plugin=plugin)
    )
    spare_looks(accelerator)
    assert config == {"timers": {"throughput": {"synchronized": True}}}


@pytest.mark.parametrize("mixin", [None, ExpertParallelMixin, NativeExpertParallelMixin])
def test_a_checkpoint_waits_for_the_norm_of_its_step(tmp_path, monkeypatch, mixin):
    """Also where a subclass writes models in a way of its own, as those with spread experts do."""
    trainer = pretrainer(tmp_path)
    if mixin is not None:
        trainer.__class__ = type("Spread", (mixin, type(trainer)), {"ep_size": 1, "exchange": "auto"})
        monkeypatch.setattr("moe_backbone.expert_parallel.deepspeed_layer.parallel_experts", lambda _: iter([1]))
        monkeypatch.setattr("moe_backbone.expert_parallel.native_trainer.has_adapter", lambda _: True)
    event = SimpleNamespace(synchronize=lambda: None)
    trainer._norms._copied = (torch.tensor(math.inf), event, 3, False)
    with pytest.raises(FloatingPointError, match="inf after 3 step"):
        trainer._save_checkpoint(trainer.model, trial=None)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.lengthy
@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its operator for the CPU")
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "The weights in memory have been updated from it"),
        ({"bf16": {"enabled": True, "check_grad_overflow": True}}, "No update was made from it"),
        ({"zero_optimization": {"stage": 3}}, "No update was made from it"),
        ({"zero_optimization": {"compute_grad_norm": False}}, "No update was made from it"),
    ],
    ids=["by the norm", "each gradient", "stage 3", "no norm"],
)
def test_a_gradient_that_is_not_finite_stops_deepspeed(tokenizer, tmp_path, changes, says):
    pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
    model = CompassForCausalLM(preset("compass-tiny", vocab_size=len(tokenizer)))
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[0, 0, 0] = torch.inf
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"input_ids": [3 + (7 * row + place) % 50 for place in range(12)]} for row in range(40)]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model_name_or_path", f"{tmp_path}/model", "--dataset_name", f"{tmp_path}/documents.jsonl"]
    words += ["--sequence_length", "16", "--per_device_train_batch_size", "2", "--max_steps", "3"]
    words += ["--output_dir", f"{tmp_path}/out", "--use_cpu", "true", "--bf16", "true", "--num_processes", "2"]
    words += ["--expert_parallel_size", "2", "--save_strategy", "steps", "--save_steps", "1"]
    words += ["--report_to", "none"]
    if changes:
        words += ["--deepspeed", json.dumps(changes)]
    if "compute_grad_norm" in changes.get("zero_optimization", {}):
        words += ["--max_grad_norm", "0"]  # without a norm nothing can be clipped
    done = subprocess.run([sys.executable, "-m", "otpo", "pretrain", *words], capture_output=True, text=True)
    assert done.returncode and "FloatingPointError" in done.stderr
    assert says in " ".join(done.stderr.split()), done.stderr[-3000:]
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("fp16", "overflow", "norm", "says"),
    [
        (True, True, math.inf, None),  # its scale is lowered, and the next step is made
        (False, True, 0.5, "No update was made from it"),  # stage 3 keeps the norm of the step before
        (False, False, math.inf, "The weights in memory have been updated from it"),
        (False, False, 0.5, None),
    ],
)
def test_deepspeeds_word_on_a_step(tmp_path, monkeypatch, fp16, overflow, norm, says):
    trainer = pretrainer(tmp_path)
    engine = SimpleNamespace(fp16_enabled=lambda: fp16, optimizer=SimpleNamespace(overflow=overflow))
    told = SimpleNamespace(scaler=None, distributed_type=DistributedType.DEEPSPEED)
    monkeypatch.setattr(trainer, "accelerator", told)
    monkeypatch.setattr(trainer, "model_wrapped", engine)
    with nullcontext() if says is None else pytest.raises(FloatingPointError, match=says):
        assert trainer._get_grad_norm(trainer.model, grad_norm=norm) == norm


def test_an_engine_that_nobody_looks_at_is_refused():
    """As float32 weights are where norms are switched off, or where there is no ZeRO."""
    engine = SimpleNamespace(fp16_enabled=lambda: False, optimizer=SimpleNamespace(overflow=False))
    with pytest.raises(ValueError, match=r"no norm of the gradient.*`zero_optimization.compute_grad_norm` out"):
        NormCheck().add_of_deepspeed(engine, None, 0)
    engine.optimizer.check_grad_overflow = True
    NormCheck().add_of_deepspeed(engine, None, 0)
    engine.optimizer.overflow = True
    with pytest.raises(FloatingPointError, match="No update was made"):
        NormCheck().add_of_deepspeed(engine, None, 0)

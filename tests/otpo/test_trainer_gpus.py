"""The trainer on several CUDA devices: whole models on one each, split ones, and sharded ones. Run with `-m gpu`."""

import json

import pytest
import torch
from cli_helpers import arguments, python
from helpers import history, make_pairs, option_dict
from transformers import AutoModelForCausalLM

from otpo import OTPOConfig, OTPOTrainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

SAME = 0.693147  # the loss of a policy that is its reference


def align(model_folder, pairs_file, folder, *launcher, **changes):
    """The losses of two steps of `otpo align` under FSDP2 on two devices."""
    argv = arguments(model_folder, pairs_file, folder / "out", use_cpu=False, bf16=True, **changes)
    argv += [
        "--accelerate_config",
        "fsdp2",
        "--num_processes",
        "2",
        "--report",
        str(folder / "report.json"),
        *launcher,
    ]
    done = python("-m", "otpo.cli.main", "align", *argv, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "report.json").read_text())["metrics"]


@pytest.mark.parametrize("efficient", ["true", "false"])
def test_fsdp_loads_each_process_s_model_on_its_own_device(efficient, model_folder, pairs_file, tmp_path):
    launcher = ("--fsdp_cpu_ram_efficient_loading", efficient)
    metrics = align(model_folder, pairs_file, tmp_path, *launcher, max_steps=1)
    assert metrics["train"]["loss"] == pytest.approx(SAME, abs=5e-3)


def test_fsdp_keeps_log_probabilities_in_float32(model_folder, pairs_file, tmp_path):
    metrics = align(model_folder, pairs_file, tmp_path, max_steps=1)
    assert metrics["train"]["loss"] == pytest.approx(SAME, abs=1e-4)


def places(model, split: bool) -> dict[str, int]:
    """A device map of a two-layer model: its first half on device 0, its second and MTP layers on 1 if it is split."""
    last = 1 if split else 0
    found = {f"model.{name}": last for name, _ in model.model.named_children()} | {"lm_head": last}
    del found["model.layers"]
    found |= {f"model.layers.{place}": last if place else 0 for place in range(len(model.model.layers))}
    return found | {"model.embed_tokens": 0, "model.rotary_emb": 0}


@pytest.mark.parametrize("kind", ["model_folder", "moe_folder", "compass_folder"])
@pytest.mark.parametrize("loss", [["sigmoid"], ["sigmoid", "sft"]], ids="+".join)
def test_a_model_that_is_split_over_devices_trains_as_a_whole_one(kind, loss, tmp_path, request):
    folder = request.getfixturevalue(kind)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    idle = {"mtp_loss_coef": 0.0} if kind == "compass_folder" else {}
    losses = []
    for split in (False, True):
        changes = {"loss_type": loss, "ot_reg": 0.05, "use_cpu": False}
        args = OTPOConfig(**option_dict(tmp_path, **changes))
        args.model_init_kwargs = {"device_map": places(whole, split), **idle}
        args._n_gpu = 1  # not one replica on each device
        trainer = OTPOTrainer(folder, args=args, train_dataset=make_pairs(), eval_dataset=make_pairs(6, seed=3))
        assert len({parameter.device for parameter in trainer.model.parameters()}) == 1 + split
        trainer.train()
        losses.append([loss for (loss,) in history(trainer, "loss")] + [trainer.evaluate()["eval_loss"]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3, abs=1e-5)


def test_one_process_that_sees_several_devices(moe_folder, tmp_path):
    """transformers spreads the model over them, and the routers' loss is not where the log-probabilities are."""
    args = OTPOConfig(**option_dict(tmp_path, max_steps=2, use_cpu=False))
    trainer = OTPOTrainer(moe_folder, args=args, train_dataset=make_pairs())
    trainer.train()
    assert torch.tensor(history(trainer, "loss")).isfinite().all()

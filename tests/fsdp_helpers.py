"""Starts the processes of `fsdp_worker`, runs the same commands in one process, and compares what both saved."""

import json
from pathlib import Path
from typing import Any

import torch
from cli_helpers import ROOT, arguments, python
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

CONFIG = ROOT / "otpo" / "cli" / "accelerate_configs" / "fsdp2.yaml"
STEPS = 5


def words(model: str, data: str, folder: Path, **changes: Any) -> list[str]:
    """Options of five steps in float32 with a checkpoint after the last one."""
    # Adam divides a gradient of rounding errors by its own size, unless its epsilon is above that.
    options: dict[str, Any] = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": STEPS, "adam_epsilon": 1e-4}
    options |= {"max_grad_norm": 1e9, "use_cpu": None, "dataloader_pin_memory": False, "seed": 7, **changes}
    return arguments(model, data, folder, **options)


FSDP2 = ("--config_file", str(CONFIG), "--mixed_precision", "no")
PLAIN = ("--multi_gpu", "--num_machines", "1", "--mixed_precision", "no")
"""Options of accelerate's launcher: with FSDP2, and with nothing, for experts that transformers spreads."""


def start(
    folder: Path, cases: list[dict[str, Any]], launcher: Any = FSDP2, processes: int = 2, **variables: str
) -> Any:
    """Runs commands one after the other in the same processes; `variables` are of their environment."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    launch = ["-m", "accelerate.commands.launch", *launcher, "--num_processes", str(processes)]
    launch += ["--main_process_port", "0", "--dynamo_backend", "no"]
    worker = [str(ROOT / "tests" / "fsdp_worker.py"), str(folder / "cases.json")]
    return python(*launch, *worker, timeout=300 * processes, TRITON_INTERPRET="0", **variables)


def history(folder: Path, name: str = "loss", step: int = STEPS) -> list[float]:
    """What a checkpoint's log has of a name."""
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [entry[name] for entry in state["log_history"] if name in entry]


def worst_gradient(one: Path, other: Path, step: int) -> tuple[float, str]:
    """The largest difference of a parameter's gradients, relative to the largest of its numbers, and its name."""
    got, want = (torch.load(folder / f"gradients-{step}.pt") for folder in (one, other))
    assert got.keys() == want.keys()
    errors = {
        name: float((got[name] - value).abs().max() / value.abs().max().clamp(1e-3)) for name, value in want.items()
    }
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    """A saved model's weights and buffers, as any model is loaded."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    """A saved adapter's weights."""
    return load_file(folder / "adapter_model.safetensors")


def farthest(one: Path | str, other: Path | str) -> float:
    """The largest difference of two saved models' weights."""
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)

"""Starts the processes of `expert_parallel_worker` and reads what they found."""

import json
from pathlib import Path
from typing import Any

import torch
from cli_helpers import ROOT, python
from expert_parallel_worker import rows
from transformers import AutoModelForCausalLM

CLOSE = 1e-4
"""Bound of the difference of losses between two processes and one."""
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "0"}
LAST: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_total_limit": 2}
LAST |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
FIRST = {**LAST, "greater_is_better": True}
"""Options of a run that saves each step and loads the best checkpoint: the one of the least or the greatest loss."""


def start(name: str, folder: Path, processes: int = 2, **options: Any) -> tuple[Any, Any]:
    """Runs a function of the worker in several processes; what it found (None where it failed), and the processes."""
    folder.mkdir(parents=True, exist_ok=True)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0"]
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    launch += [str(ROOT / "tests" / "expert_parallel_worker.py")]
    # The limit guards against a hang alone, on a machine under load too.
    done = python(*launch, name, str(folder), json.dumps(options), timeout=300 * processes, **ENVIRONMENT)
    path = folder / "result.json"
    return (json.loads(path.read_text()) if done.returncode == 0 else None), done


def result(*args: Any, **options: Any) -> Any:
    """What a function of the worker found."""
    found, done = start(*args, **options)
    assert found is not None, (done.stdout + done.stderr)[-6000:]
    return found


def by_step(found: dict[str, Any]) -> dict[int, float]:
    """The losses of a training, by step."""
    return {int(step): loss for step, loss in found["losses"].items()}


def assert_saved(folder: Path, found: dict[str, Any]) -> None:
    """What was saved loads as any model and is the one that was trained."""
    model = AutoModelForCausalLM.from_pretrained(folder / "final").eval()
    with torch.no_grad():
        logits = model(torch.stack([row["input_ids"] for row in rows()[:2]])).logits
    torch.testing.assert_close(logits.flatten()[:50], torch.tensor(found["logits"]), rtol=1e-4, atol=1e-5)

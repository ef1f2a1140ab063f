"""Command lines of the training commands, run in this process or in one of their own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HANG = 600
"""Seconds after which a process is taken to hang: over ten times what the longest one needs on two idle cores."""


def python(*arguments: str, timeout: float = HANG, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def arguments(model: str, data: str, output: Path, **changes: object) -> list[str]:
    """Options of two deterministic steps on the CPU; a list gives an option several values, None leaves it out."""
    options: dict[str, Any] = {
        "model_name_or_path": model,
        "dataset_name": data,
        "output_dir": output,
        "use_cpu": True,
        "bf16": False,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **changes,
    }
    words = []
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


# Adapters of attention and of experts, as options of a command.
LORA = {
    "use_peft": True,
    "lora_r": 4,
    "lora_dropout": 0,
    "lora_target_modules": ["q_proj", "v_proj"],
    "lora_target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


def launched(*arguments: str) -> list[str]:
    """The words after `python` that start a module in two processes of accelerate's."""
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", "0", "-m", *arguments]
    return ["-m", "accelerate.commands.launch", *launch]


def two_processes(worker: str) -> list[str]:
    """The words after `python` that start a script of the tests' folder in two processes of torch's."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    return [*launch, "--rdzv_endpoint", "localhost:0", str(ROOT / "tests" / worker)]


def refusal(main: Callable[[list[str]], int], capsys: Any, argv: list[str]) -> str:
    """The one message of a command line that is refused."""
    capsys.readouterr()
    try:
        code: Any = main(argv)
    except SystemExit as error:
        code = error.code
    message = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in message
    assert message.count("error:") == 1
    return message

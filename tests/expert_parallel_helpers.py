"""What the tests of expert parallelism share: the start of their worker and what it reports."""

import json

from cli_helpers import ROOT, python

CLOSE = 1e-4
"""Bound of the difference of losses between two processes and one."""
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "0"}


def start(name, folder, processes=2, **options):
    """Runs a function of the worker in several processes and returns what it found."""
    folder.mkdir(parents=True, exist_ok=True)
    launch = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(processes),
        "--master_port",
        "0",
        "--rdzv_backend",
    ]
    launch += ["c10d", "--rdzv_endpoint", "localhost:0", str(ROOT / "tests" / "expert_parallel_worker.py")]
    # The limit guards against a hang alone, on a machine under load too.
    done = python(*launch, name, str(folder), json.dumps(options), timeout=300 * processes, **ENVIRONMENT)
    path = folder / "result.json"
    return (json.loads(path.read_text()) if done.returncode == 0 else None), done


def result(*args, **options):
    found, done = start(*args, **options)
    assert found is not None, (done.stdout + done.stderr)[-6000:]
    return found


def by_step(found):
    return {int(step): loss for step, loss in found["losses"].items()}

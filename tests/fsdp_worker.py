"""One of several processes that run commands under FSDP2 on the CPU, as `accelerate launch` starts them.

accelerate leaves FSDP out on the CPU. Where its configuration asks for FSDP, the state here says that there are
several GPUs, whose device is the CPU. All else is accelerate's own: its launcher, the bundled configuration, its
plugin and its checkpoints. Experts that transformers spreads, beside an FSDP2 of its own, need nothing. Context
parallelism gets an operator of its ring from `ring_on_cpu`. DeepSpeed runs where the environment asks for it.

accelerate launch --config_file fsdp2.yaml fsdp_worker.py CASES.json
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ring_on_cpu
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, trainer

CONFIGURED = ["--accelerator_config", '{"use_configured_state": true}']


class Record(TrainerCallback):
    """Writes each step's gradients, whole and by name, and ends the process after the step that it is told.

    Also how many numbers of each weight the first process holds, and over which dimensions of which mesh it is spread.
    """

    die_at: int | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        found = {name: whole(each.grad) for name, each in model.named_parameters() if each.grad is not None}
        if args.process_index == 0:
            torch.save(found, Path(args.output_dir) / f"gradients-{state.global_step}.pt")
            parts = {name: part_of(each) for name, each in model.named_parameters() if isinstance(each, DTensor)}
            (Path(args.output_dir) / "parts.json").write_text(json.dumps(parts))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.die_at:
            os._exit(17)


def part_of(weight: DTensor) -> dict[str, Any]:
    local = weight.to_local()
    mesh = weight.device_mesh
    return {
        "mesh": dict(zip(mesh.mesh_dim_names or range(mesh.ndim), mesh.shape, strict=True)),
        "held": local.numel() / weight.numel(),
    }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def main(cases: list[dict[str, Any]]) -> None:
    deepspeed = bool(os.environ.get("ACCELERATE_USE_DEEPSPEED"))
    state = PartialState(cpu=not deepspeed, backend="gloo")
    ring = ring_on_cpu.install() if "PARALLELISM_CONFIG_CP_SIZE" in os.environ else None
    end = state.destroy_process_group
    PartialState.destroy_process_group = lambda *_, **__: None  # at the end of a command, where the next one goes on
    for case in cases:
        AcceleratorState._reset_state()
        kind = DistributedType.MULTI_GPU if os.environ.get("ACCELERATE_USE_FSDP") else DistributedType.MULTI_CPU
        PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED if deepspeed else kind
        Record.die_at = case.get("die_at")
        os.environ["FSDP_STATE_DICT_TYPE"] = case.get("states", "FULL_STATE_DICT")
        code = import_module(f"otpo.cli.{case['command']}").main([*case["argv"], *CONFIGURED])
        assert code == case.get("code", 0), (code, case)
        state.wait_for_everyone()
    end()
    del ring


if __name__ == "__main__":
    trainer.DEFAULT_CALLBACKS.append(Record)
    main(json.loads(Path(sys.argv[1]).read_text()))

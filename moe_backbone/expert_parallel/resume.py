"""What tells checkpoints of spread experts; resuming one of DeepSpeed's in another size, on more or fewer processes.

DeepSpeed loads a checkpoint of another layout without an error, and gives experts the optimizer's states of others. So
`write_layout` leaves a file in each checkpoint that says how it was made, and `fit_checkpoint` converts one of another
layout to DeepSpeed's universal format. That one leaves out what no optimizer holds, and of a ZeRO-3 checkpoint how
many steps the optimizer has taken (DeepSpeed 0.19.8). So `restore_untrained` loads the first and `restore_steps` sets
the steps.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open

LAYOUT_FILE = "expert_parallel.json"
"""In a checkpoint of experts that DeepSpeed spread, or of an adapter on spread experts."""

OPTIMIZER_FOLDER = "optimizer"
"""In a checkpoint of experts that transformers spread: torch's distributed checkpoint of the optimizer's states."""

ADAPTER_STATES_FILE = "adapter_states.safetensors"
"""Float32 values and optimizer's states of a checkpoint's adapter, whatever spread the experts."""

_LATEST, _LATEST_UNIVERSAL = "latest", "latest_universal"


class Layout(NamedTuple):
    """How a run divides a model: processes that share experts, all processes, and ZeRO's stage."""

    ep_size: int
    world_size: int
    zero_stage: int


class StateLast:
    """A trainer whose checkpoints get their `trainer_state.json`, by which they count, when all processes are done."""

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # pyright: ignore[reportAttributeAccessIssue]
        dist.barrier()  # it is the last thing that a process other than the first writes

    def check_before_saving(self) -> None:
        """What the trainer looks at before it saves, where it has a method of this name: numbers that are not finite.

        A `save_model` that writes the model itself calls it; all processes do so together.
        """
        check = getattr(super(), "check_before_saving", None)
        if check is not None:
            check()


def has_adapter(model: Any) -> bool:
    """Whether PEFT is around a model, whose checkpoints are then those of its adapter."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def write_layout(folder: Path, layout: Layout) -> None:
    """Writes a run's layout into a checkpoint's folder, beside the weights."""
    (folder / LAYOUT_FILE).write_text(json.dumps(layout._asdict()) + "\n", encoding="utf-8")


def read_layout(checkpoint: Path) -> Layout | None:
    """Reads the layout of the run that saved a checkpoint; None where that run did not spread experts."""
    path = checkpoint / LAYOUT_FILE
    return Layout(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def has_native_states(checkpoint: str | Path) -> bool:
    """Whether a checkpoint has the optimizer's states of experts that transformers spread."""
    return (Path(checkpoint) / OPTIMIZER_FOLDER / ".metadata").is_file()


def find_adapter_states(checkpoint: str | Path) -> Path | None:
    """The folder in a checkpoint of the Trainer's that has an adapter's states; None where there is none."""
    found = [path.parent for path in Path(checkpoint).glob(f"global_step*/{ADAPTER_STATES_FILE}")]
    return max(found, key=lambda folder: int(folder.name.removeprefix("global_step")), default=None)


def check_adapter_checkpoint(checkpoint: str | Path) -> None:
    """Raises a `ValueError` where a run with an adapter could not resume a checkpoint; any layout will do."""
    if find_adapter_states(checkpoint) is None:
        raise ValueError(
            f"`resume_from_checkpoint={checkpoint}` has no {ADAPTER_STATES_FILE}: it was not saved by a run with an "
            "adapter and expert parallelism. Leave the options of the adapter as they were, or start from its weights "
            "(`model_name_or_path`)."
        )


def check_layout(checkpoint: str | Path, layout: Layout, frozen: bool) -> bool:
    """Whether a checkpoint has to be converted before it loads in this layout.

    Args:
        checkpoint: A folder of the Trainer's.
        layout: This run's.
        frozen: Whether some of the run's experts are frozen, as those of MTP layers in SFT and alignment.

    Raises:
        ValueError: The checkpoint does not say how it was made, or cannot be brought into this layout exactly.
    """
    saved = read_layout(Path(checkpoint))
    if saved is None:
        raise ValueError(
            f"`resume_from_checkpoint={checkpoint}` has no {LAYOUT_FILE}: it was not saved by a run with expert "
            "parallelism. Start from its weights (`model_name_or_path`) in place of resuming it."
        )
    if find_adapter_states(checkpoint) is not None:
        raise ValueError(
            f"`resume_from_checkpoint={checkpoint}` has the states of an adapter, and this run trains the whole "
            "model. Set the options of the adapter (`use_peft`, `lora_*`) as they were, or start from its weights "
            "(`model_name_or_path`)."
        )
    if saved == layout:
        return False
    if saved.zero_stage != layout.zero_stage:
        raise ValueError(
            f"`resume_from_checkpoint={checkpoint}` was saved as {saved} and can't be resumed as {layout}: another "
            "`ep_size` or `world_size` can, another ZeRO stage can't. Set the stage as it was, or start from its "
            "weights (`model_name_or_path`)."
        )
    if frozen:
        raise ValueError(
            f"`resume_from_checkpoint={checkpoint}` was saved as {saved} and can't be resumed as {layout}: DeepSpeed "
            "converts no checkpoint with frozen experts, those of MTP layers in SFT and alignment. Resume it "
            f"with `expert_parallel_size={saved.ep_size}` on {saved.world_size} process(es), or start from its "
            "weights (`model_name_or_path`)."
        )
    return True


def fit_checkpoint(
    checkpoint: str | Path, layout: Layout, deepspeed_config: dict[str, Any], frozen: bool = False
) -> bool:
    """Converts a checkpoint where this run's layout needs it; all processes call it, before the engine is made.

    Args:
        checkpoint: A folder of the Trainer's.
        layout: This run's.
        deepspeed_config: This run's; where a checkpoint was converted, it is changed to load the universal format.
        frozen: See [`check_layout`].

    Returns:
        Whether the checkpoint was of another layout.

    Raises:
        ValueError: See [`check_layout`].
        RuntimeError: DeepSpeed could not convert it.
    """
    checkpoint = Path(checkpoint)
    if not check_layout(checkpoint, layout, frozen):
        return False
    failure = [_convert(checkpoint) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(failure, src=0)
    if failure[0]:
        raise RuntimeError(f"DeepSpeed could not convert {checkpoint} to its universal format: {failure[0]}")
    deepspeed_config["checkpoint"] = {**deepspeed_config.get("checkpoint", {}), "load_universal": True}
    return True


def follow_schedule(optimizer: Any, schedule: Any) -> None:
    """Sets the learning rates of an optimizer's groups to those of a schedule that was loaded.

    A schedule of torch's gives its rate to the optimizer as it steps, not as it is loaded, since an optimizer's own
    state has the rates too. Where that state is another (of adapters), the first resumed step would take the rate of a
    new run. A schedule of DeepSpeed's keeps its step alone, of which `get_lr` makes the rates.

    Args:
        optimizer: With `param_groups`.
        schedule: With `get_last_lr`, perhaps in accelerate's wrapper; where all its rates are the same, its groups may
            be more or fewer.
    """
    inner, groups = getattr(schedule, "scheduler", schedule), optimizer.param_groups
    rates = inner.get_lr() if hasattr(inner, "last_batch_iteration") else inner.get_last_lr()
    if len(set(rates)) == 1:
        rates = rates[:1] * len(groups)
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate


def restore_steps(optimizer: Any, steps: int) -> None:
    """Sets the number of steps that an optimizer under DeepSpeed has taken, which Adam's bias correction follows."""
    for state in optimizer.optimizer.state.values():
        if "step" in state:
            state["step"] = torch.full_like(torch.as_tensor(state["step"], dtype=torch.float32), steps)


@torch.no_grad()
def restore_untrained(model: Any, checkpoint: Path) -> None:
    """Loads what no optimizer holds, buffers and frozen weights, from the plain files of a converted checkpoint.

    The universal format restores what the optimizer holds, and nothing else (DeepSpeed 0.19.8): without this, a router
    would go on with the biases that the run started from. Frozen experts are not converted at all, see
    [`check_layout`].

    Raises:
        RuntimeError: The files lack one of them.
    """
    import deepspeed

    wanted = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    tensors = model.state_dict(keep_vars=True)
    wanted |= tensors.keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(wanted & set(file.keys())):
                tensor = tensors[name]
                with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0, enabled=hasattr(tensor, "ds_id")):
                    tensor.copy_(file.get_tensor(name))
                wanted.remove(name)
    if wanted:
        raise RuntimeError(f"The checkpoint {checkpoint} lacks {', '.join(sorted(wanted)[:5])} of the model.")


def _convert(checkpoint: Path) -> str | None:
    """Writes the universal format beside the checkpoint's own, unless it is there; returns what went wrong."""
    if (checkpoint / _LATEST_UNIVERSAL).is_file():  # written last
        return None
    tag = (checkpoint / _LATEST).read_text(encoding="utf-8").strip()
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(checkpoint / tag), "--output_folder", str(checkpoint / f"{tag}_universal")]
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run(command, env=kept, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no output"])[-1]

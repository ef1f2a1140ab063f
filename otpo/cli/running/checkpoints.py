"""The checkpoints of a run's folder: the one to resume from, and whether it is whole."""

import json
from pathlib import Path
from zipfile import is_zipfile

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

# A model or an adapter, whole or in shards, or what DeepSpeed and FSDP write.
_WEIGHTS = ("*.safetensors", "*.bin", "global_step*", "pytorch_model_fsdp*", "adapter_model*")
# What torch writes, each of them a zip whose directory comes last.
_OF_TORCH = ("*.pt", "*.pth", "optimizer*.bin", "pytorch_model*.bin", "adapter_model*.bin")


def find_checkpoint(value: str | bool | None, output_dir: str | None) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means: a path, or the last whole one of `output_dir` for true.

    Raises:
        ValueError: There is no such checkpoint.
    """
    word = str(value).lower()
    if word in {"none", "false", "no", "0", ""}:
        return None
    if word in {"true", "yes", "1"}:
        last = newest_checkpoint(output_dir)
        if last is None:
            raise ValueError(
                f"`resume_from_checkpoint=true`: there is no checkpoint in `output_dir={output_dir}`. Name the folder "
                "of one, or leave the option out to start anew."
            )
        return last
    folder = Path(str(value))
    if not folder.is_dir():
        raise ValueError(f"`resume_from_checkpoint={value}`: there is no such folder.")
    fault = _fault(folder)
    if fault is not None:
        inside = newest_checkpoint(str(value))
        remedy = "a folder that the training saved" if inside is None else f"the last one in it, {inside}"
        raise ValueError(f"`resume_from_checkpoint={value}` is no checkpoint: {fault}. Name {remedy}.")
    return str(value)


def newest_checkpoint(output_dir: str | None, since: float | None = None) -> str | None:
    """The last checkpoint that was written to its end, which a run killed while saving leaves behind it.

    Args:
        output_dir: Where the checkpoints are.
        since: Of those saved at that time or later, in seconds; None for all.
    """
    steps = {
        int(path.name.rpartition("-")[2]): str(path)
        for path in Path(output_dir or ".").glob(f"{PREFIX_CHECKPOINT_DIR}-[0-9]*")
        if path.name.rpartition("-")[2].isdecimal()
        and _fault(path) is None
        and (since is None or (path / TRAINER_STATE_NAME).stat().st_mtime >= since)
    }
    return steps[max(steps)] if output_dir and steps else None


def _fault(folder: Path) -> str | None:
    """Why a folder is no checkpoint; None if it is one."""
    state = folder / TRAINER_STATE_NAME
    if not state.is_file():  # the Trainer writes it last
        return f"it has no {TRAINER_STATE_NAME}"
    try:
        json.loads(state.read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"its {TRAINER_STATE_NAME} can't be read ({error})"
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        return "it has no weights"
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"its {file.name} can't be read ({error})"
    for file in (file for pattern in _OF_TORCH for file in folder.glob(pattern)):
        if not is_zipfile(file):  # a machine that stopped leaves files that are empty or cut off
            return f"its {file.name} is no whole file of torch's"
    return None

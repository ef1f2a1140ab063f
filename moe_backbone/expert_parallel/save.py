"""Weights of an expert-parallel model as plain safetensors that load anywhere, written layer by layer.

The processes that share the experts send one layer's after the other to the first process. It converts them to the
layout of files, a key for each expert, and writes them, so that it never holds more than one layer's experts beside
its own.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .deepspeed_layer import WEIGHTS, ParallelExperts, parallel_experts

_DENSE_BYTES = 5 << 30  # of a shard of weights that are not experts'


def save_plain_model(model: Any, folder: str | Path) -> None:
    """Writes configuration and weights as `save_pretrained` writes them for the model with its experts unspread.

    All processes call it. An index is written last, over files that are whole: a run that is killed leaves the files
    of an earlier save as they were, with new ones of other names beside them.

    Args:
        model: A transformers model, some of whose experts modules are [`ParallelExperts`].
        folder: Where to write.
    """
    folder = Path(folder)
    first = dist.get_rank() == 0
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    total = 0
    weight_map: dict[str, int] = {}
    for number, shard in enumerate(_shards(model)):
        if not first:
            continue
        shard = revert_weight_conversion(model, shard)
        shard = {name: tensor.contiguous() for name, tensor in shard.items()}
        path = folder / f".writing-{number}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        written.append(path)
        weight_map |= dict.fromkeys(shard, number)
        total += sum(tensor.nbytes for tensor in shard.values())
    if first:
        _publish(folder, written, weight_map, total)
        model.config.architectures = [type(model).__name__]
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    dist.barrier()


def _publish(folder: Path, written: list[Path], weight_map: dict[str, int], total: int) -> None:
    """Gives the files their names, then writes the index, then removes what no longer belongs to it."""
    names = [f"model-{number + 1:05d}-of-{len(written):05d}.safetensors" for number in range(len(written))]
    for path, name in zip(written, names, strict=True):
        os.replace(path, folder / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: names[number] for name, number in sorted(weight_map.items())},
    }
    unfinished = folder / f".{SAFE_WEIGHTS_INDEX_NAME}"
    unfinished.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / SAFE_WEIGHTS_INDEX_NAME)
    stale = [folder / SAFE_WEIGHTS_NAME, *folder.glob("model-*-of-*.safetensors"), *folder.glob(".writing-*")]
    for path in stale:
        if path.name not in names:
            path.unlink(missing_ok=True)


def _shards(model: Any) -> Iterator[dict[str, Tensor]]:
    """State dicts under the names that the model has unspread, whole in the first process and empty elsewhere."""
    layers = dict(parallel_experts(model))
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in _dense(model, layers):
        if size > _DENSE_BYTES:
            yield shard
            shard, size = {}, 0
        whole = _whole(tensor)
        if whole is not None:
            shard[name] = whole
            size += whole.nbytes
    yield shard
    for name, layer in layers.items():
        yield _gather_experts(name, layer)


def _dense(model: Any, layers: dict[str, ParallelExperts]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of all that is not an expert's, tied weights once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in tied and not any(name.startswith(f"{layer}.") for layer in layers):
            yield name, tensor


def _whole(tensor: Tensor) -> Tensor | None:
    """A tensor, gathered if ZeRO-3 has divided it: on the CPU in the first process, None elsewhere."""
    with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
        return tensor.detach().cpu().clone() if dist.get_rank() == 0 else None


def _gather_experts(name: str, layer: ParallelExperts) -> dict[str, Tensor]:
    """A layer's experts as transformers holds them: whole in the first process, no tensors elsewhere."""
    parameters = [getattr(layer.experts, weight) for weight in WEIGHTS]
    with deepspeed.zero.GatheredParameters(parameters, enabled=hasattr(parameters[0], "ds_id")):
        whole = [_gather(parameter.detach(), layer) for parameter in parameters]
    if dist.get_rank() != 0:
        return {}
    gate, down, up = (torch.cat(parts) for parts in whole)
    return {f"{name}.gate_up_proj": torch.cat([gate, up], dim=1), f"{name}.down_proj": down}


def _gather(local: Tensor, layer: ParallelExperts) -> list[Tensor]:
    """The parts of a tensor that the processes of the first group hold, on the CPU in its first process."""
    group: Any = layer.ep_group
    ranks = dist.get_process_group_ranks(group)
    if ranks[0] != 0:
        return []
    parts = [torch.empty_like(local) for _ in ranks] if dist.get_rank() == 0 else None
    dist.gather(local.contiguous(), parts, dst=0, group=group)
    return [part.cpu() for part in parts or []]

"""Writes a model's folder: shards of weights, a configuration for old and new readers, and the files beside them."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from .tensors import Tensors
from .unfinished import unfinished_folder

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)
_DRAFTING = ("use_mtp",)  # options of generation that only a model with MTP layers takes


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder that gets its name when it is whole; one that is left unfinished is removed.

    Where the process is killed, the next call with the same name removes it.

    Args:
        out: A path where nothing is, or an empty folder, or a link to one.

    Raises:
        ValueError: There is something at `out`.
    """
    out = require_new_folder(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with unfinished_folder(out) as parent:
        unfinished = parent / "folder"  # in the temporary one, whose mode would keep others from reading it
        unfinished.mkdir()
        yield unfinished
        if out.is_dir():
            out.rmdir()
        os.replace(unfinished, out)


def require_new_folder(out: str | Path) -> Path:
    """Where a new folder can be made: `out`, or the empty folder that it is a link to.

    Args:
        out: A path.

    Raises:
        ValueError: There is something else at `out`.
    """
    out = Path(out)
    if out.is_symlink():
        if not out.exists():
            raise ValueError(f"{out} is a link to {os.readlink(out)}, which is not there. Name a new folder.")
        out = out.resolve()
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} is there already. Name a new folder, or remove this one.")
    return out


def write_weights(
    tensors: Tensors, folder: Path, max_shard_size: int | str, progress: Callable[[int, int], None] | None = None
) -> int:
    """Writes tensors as safetensors, one shard in memory at a time, with an index where there are several.

    Args:
        tensors: In the order of the shards.
        folder: Where to write.
        max_shard_size: Bytes, or a text such as "5GB"; a larger tensor has a shard of its own.
        progress: Called after each shard with the number of shards written and of all shards.

    Returns:
        The number of shards.
    """
    empty = {name: torch.empty(it.shape, dtype=it.dtype, device="meta") for name, it in tensors.items()}
    plan = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)
    for number, (file, names) in enumerate(plan.filename_to_tensors.items(), start=1):
        shard = {name: _alone(tensors[name].whole()) for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        del shard
        if progress is not None:
            progress(number, len(plan.filename_to_tensors))
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
    return len(plan.filename_to_tensors)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in memory of its own, as safetensors wants it; parts of a larger one are copied."""
    own = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if own else tensor.clone(memory_format=torch.contiguous_format)


def write_config(config: PreTrainedConfig, folder: Path, architecture: str, dtype: torch.dtype) -> None:
    """Writes `config.json` so that transformers 4 and what builds on it read it as transformers 5 does.

    transformers 5 has other names for some options: it saves `num_local_experts`, `rope_parameters` and `dtype` where
    earlier versions, and llama.cpp, read `num_experts`, `rope_theta` with `rope_scaling`, and `torch_dtype`. A reader
    that misses one takes its default without a word, so both names are written.

    Args:
        config: Of the model.
        folder: Where to write.
        architecture: The class's name.
        dtype: Of the weights.
    """
    config.architectures, config.dtype = [architecture], str(dtype).removeprefix("torch.")
    options = json.loads(config.to_json_string())
    rope = dict(options["rope_parameters"])
    older = {"torch_dtype": options["dtype"], "rope_theta": rope.pop("rope_theta")}
    partial = rope.pop("partial_rotary_factor", None)
    if partial is not None:
        older["partial_rotary_factor"] = partial
    older["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if hasattr(config, "num_experts"):
        older["num_experts"] = older["num_local_experts"] = config.num_experts
    (folder / CONFIG_NAME).write_text(json.dumps({**options, **older}, indent=2) + "\n", encoding="utf-8")


def copy_side_files(folders: Sequence[Path], out: Path, drafts: bool) -> list[str]:
    """Copies tokenizer, chat template and generation configuration, from the first folder that has a tokenizer.

    Args:
        folders: Where to look, first things first.
        out: Where to write.
        drafts: Whether the model that is written has MTP layers, so that `generate` may draft with them.

    Returns:
        Sentences on what is left out or not there.
    """
    notes = []
    with_tokenizer = [folder for folder in folders if (folder / "tokenizer_config.json").is_file()]
    for name in _TOKENIZER_FILES if with_tokenizer else ():
        source = with_tokenizer[0] / name
        if source.is_dir():
            shutil.copytree(source, out / name)
        elif source.is_file():
            shutil.copyfile(source, out / name)
    if not with_tokenizer:
        notes.append("there is no tokenizer beside the weights, so none is written")
    for folder in folders:
        path = folder / GENERATION_CONFIG_NAME
        if path.is_file():
            options = json.loads(path.read_text(encoding="utf-8"))
            dropped = [name for name in _DRAFTING if not drafts and options.pop(name, None)]
            notes += [f"{GENERATION_CONFIG_NAME}'s `{name}` is left out: there are no MTP layers" for name in dropped]
            text = json.dumps(options, indent=2, sort_keys=True) + "\n"
            (out / GENERATION_CONFIG_NAME).write_text(text, encoding="utf-8")
            break
    return notes


def require_complete(tensors: Tensors, model_class: type[PreTrainedModel], config: Any, origin: str) -> Tensors:
    """The tensors in the model's own order, if they are exactly those that a model of the class saves.

    Args:
        tensors: By the names of files.
        model_class: Of transformers.
        config: Its configuration.
        origin: Where the tensors are from, for the message.

    Raises:
        ValueError: One is missing, left over, or of another shape.
    """
    wanted = saved_shapes(model_class, config)
    if "lm_head.weight" in tensors and "lm_head.weight" not in wanted:  # tied, and saved all the same
        tensors = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    for problem, names in (
        ("lacks", [name for name in wanted if name not in tensors]),
        ("has, beside what the model has,", [name for name in tensors if name not in wanted]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{origin} {problem} {names[0]}{more}: its config.json describes another model.")
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{origin}: {name} has the shape {list(tensors[name].shape)}, its config.json describes {list(shape)}."
            )
    return {name: tensors[name] for name in wanted}


def saved_shapes(model_class: type[PreTrainedModel], config: Any) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of what `save_pretrained` writes for such a model, without making it."""
    with torch.device("meta"):
        model = model_class(config)
    tied = set(model.all_tied_weights_keys)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}

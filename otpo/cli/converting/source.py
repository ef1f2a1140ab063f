"""The model that is converted: a folder, a name on the Hub, or an adapter, which is merged into its model."""

from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM

from moe_backbone.conversion.tensors import Tensors, read_tensors, state_tensors
from moe_backbone.model.config_checks import one_line_refusals
from otpo.cli.models.loading import Origin, find_origin

_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.bin")


class Source(NamedTuple):
    """A model to convert.

    Attributes:
        config: Its configuration.
        tensors: Its tensors by the names of files or of state dicts.
        folders: Where its tokenizer and generation configuration may be, first things first.
        model: The model itself, where an adapter was merged into it.
    """

    config: Any
    tensors: Tensors
    folders: list[Path]
    model: Any


def open_source(name: str, revision: str | None) -> Source:
    """Finds a model; its weights are read later, unless an adapter has to be merged into them.

    Args:
        name: A folder or a name on the Hub, of a model or of an adapter.
        revision: Branch, tag or commit.

    Raises:
        ValueError: It can't be read.
    """
    origin = find_origin("MODEL", name, revision)
    folder = _folder(origin.base, origin.revision)
    if not (folder / "config.json").is_file():
        raise ValueError(f"`MODEL={name}`: there is no config.json. Name the folder of a model or adapter.")
    if origin.adapted:
        return _merged(origin, folder)
    return Source(_config(name, folder), read_tensors(folder), [folder], None)


def _folder(name: str, revision: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    return Path(snapshot_download(name, revision=revision, allow_patterns=list(_FILES)))


def _config(name: str, folder: Path) -> Any:
    try:
        with one_line_refusals():
            return AutoConfig.from_pretrained(folder)
    except ValueError as error:
        raise ValueError(f"`MODEL={name}`: config.json can't be read: {error}") from error


def _merged(origin: Origin, folder: Path) -> Source:
    """The model with the adapter in its weights: in memory once, since each layer is merged in place."""
    from peft import PeftModel

    _config(origin.base, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cpu")
    merged: Any = PeftModel.from_pretrained(model, origin.name).merge_and_unload()
    merged.config.architectures = [type(merged).__name__]
    tied = set(merged.all_tied_weights_keys) if merged.config.tie_word_embeddings else set()
    state = {name: tensor for name, tensor in merged.state_dict().items() if name not in tied}
    return Source(merged.config, state_tensors(state), [Path(origin.name), folder], merged)

"""The model that is converted: a folder, a name on the Hub, or an adapter's folder, which is merged into its model."""

from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM

from moe_backbone.conversion.exporting import cast
from moe_backbone.conversion.tensors import Tensors, read_tensors, state_tensors
from moe_backbone.conversion.verifying import answers, require_equal
from moe_backbone.model.config_checks import one_line_refusals
from otpo.cli.models.loading import Origin, find_origin
from otpo.cli.models.merging import load_adapter, merge_adapter

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


def open_source(name: str, revision: str | None, *, keep_dtype: bool = True, verify: bool = False) -> Source:
    """Finds a model; its weights are read later, unless an adapter has to be merged into them.

    Args:
        name: A folder or a name on the Hub of a model, or an adapter's folder.
        revision: Branch, tag or commit.
        keep_dtype: Whether a merged model's weights have the dtypes of the model under the adapter. They are merged in
            float32, and stay so otherwise.
        verify: Whether a merged model's logits are compared with those of model and adapter.

    Raises:
        ValueError: It can't be read, or the merged model answers otherwise.
    """
    origin = find_origin("MODEL", name, revision)
    folder = _folder(origin.base, origin.revision)
    if not (folder / "config.json").is_file():
        raise ValueError(f"`MODEL={name}`: there is no config.json. Name the folder of a model or adapter.")
    if origin.adapted:
        return _merged(origin, folder, keep_dtype, verify)
    return Source(_config(name, folder), read_tensors(folder), [folder], None)


def _folder(name: str, revision: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    return Path(snapshot_download(name, revision=revision, allow_patterns=list(_FILES)))


def _config(name: str, folder: Path) -> Any:
    try:
        with one_line_refusals():
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(f"`MODEL={name}`: config.json can't be read: {error}") from error


def _merged(origin: Origin, folder: Path, keep_dtype: bool, verify: bool) -> Source:
    """The model with the adapter in its weights: in memory once, in float32, since each layer is merged in place."""
    _config(origin.base, folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cpu", trust_remote_code=False)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    adapted = load_adapter(model.float(), origin.name)
    before = answers(adapted) if verify else None
    merged = merge_adapter(adapted)
    if before is not None:
        require_equal(before, answers(merged), "merged")
    merged.config.architectures = [type(merged).__name__]
    tied = set(merged.all_tied_weights_keys) if merged.config.tie_word_embeddings else set()
    tensors = state_tensors({name: tensor for name, tensor in merged.state_dict().items() if name not in tied})
    if keep_dtype:
        tensors = {name: cast(tensor, dtypes[name]) for name, tensor in tensors.items()}
    return Source(merged.config, tensors, [Path(origin.name), folder], merged)

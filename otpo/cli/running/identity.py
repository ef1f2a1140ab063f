"""Which run a checkpoint is of: the options that make it, written beside it and compared when it is resumed."""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from inspect import get_annotations
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from otpo.cli.options.redact import without_secrets
from otpo.cli.options.run_options import RunArguments
from otpo.weighting.registry import says_nothing, with_defaults

RUN_FILE = "otpo_run.json"
# Other numbers may come out of these by rounding alone, they say where and how fast a run is made, or they are of the
# evaluation.
_MAY_CHANGE = {"attn_implementation", "experts_implementation", "ot_solver", "precompute_ref_log_probs"}
_MAY_CHANGE |= {"precompute_ref_batch_size", "dataset_num_proc", "dataset_test_split", "peak_tflops"}
_MAY_CHANGE |= {"max_eval_pairs", "max_eval_rows", "ignore_bias_buffers", "trust_remote_code", "model_init_kwargs"}
_MAY_CHANGE |= {"pad_to_multiple_of", "activation_offloading", "use_liger_kernel", "padding_free", "eval_packing"}
_MAY_CHANGE |= {"row_layout", "compile_layers", "token_loss", "verbose"}
_MAY_CHANGE |= {"ot_tolerance", "ot_max_iterations"}
_ALSO = ("seed", "data_seed")
# Options that say nothing where another one is off.
_ONLY_WITH = {"lora": "use_peft", "use_dora": "use_peft", "use_rslora": "use_peft", "bnb": "load_in_4bit"}
_ONLY_WITH |= {"use_bnb": "load_in_4bit", "ref_model_mixup": "sync_ref_model", "ref_model_sync": "sync_ref_model"}
_PLACES = ("dataset_name", "mixture")
_OLDER_NAMES = {"max_train_pairs": "max_train_rows"}  # that of `max_eval_rows` may change


def run_identity(dataclasses: Iterable[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that make a run what it is, as JSON values: model, adapter, data, weighting and loss.

    Those of `TrainingArguments` are not among them (steps, batches, logging, saving, precision), seeds apart, nor what
    is not set and is in `FROM_CHECKPOINT` of its class: a resumed run takes what its checkpoint had.

    Args:
        dataclasses: Of the command.
        values: Value of each option.
    """
    values = with_defaults(_by_newer_names(values))
    of_training = {entry.name for entry in fields(TrainingArguments)}
    kinds = tuple(dataclasses)
    names = {name for kind in kinds for base in kind.__mro__ for name in get_annotations(base)}
    names -= of_training | _MAY_CHANGE | set(get_annotations(RunArguments))
    names -= {name for kind in kinds for name in getattr(kind, "FROM_CHECKPOINT", ()) if values.get(name) is None}
    names = {name for name in (names | set(_ALSO)) & set(values) if _says_something(name, values)}
    return {name: _plain(name, without_secrets(values[name])) for name in sorted(names)}


def require_same_run(identity: Mapping[str, Any], checkpoint: str) -> bool:
    """Whether a checkpoint tells which run it is of; one of another run is refused.

    Raises:
        ValueError: It is of a run with other options; the message names each with both values.
    """
    found = _read(checkpoint)
    if found is None:
        return False
    file, options = found[0], with_defaults(_by_newer_names(found[1]))
    other = [name for name in identity if name in options and options[name] != identity[name]]
    if other:
        listed = "; ".join(f"`{name}` was {_shown(options[name])} and is {_shown(identity[name])}" for name in other)
        raise ValueError(
            f"`resume_from_checkpoint`: {checkpoint} is of another run: {listed}. Set what it was, name another "
            f"`output_dir`, or remove {file} to resume all the same."
        )
    return True


def read_identity(checkpoint: str) -> dict[str, Any]:
    """What the run of a checkpoint was, by option; nothing where no file tells it.

    Raises:
        ValueError: The file can't be read.
    """
    found = _read(checkpoint)
    return {} if found is None else with_defaults(_by_newer_names(found[1]))


class RunFile(TrainerCallback):
    """Writes the run's identity into the output folder when training begins, and into each checkpoint."""

    def __init__(self, identity: Mapping[str, Any]) -> None:
        self.identity = identity

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes it beside the checkpoints."""
        self._write(state, Path(args.output_dir))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes it into the checkpoint that was just saved."""
        self._write(state, Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def _write(self, state: Any, folder: Path) -> None:
        if state.is_world_process_zero:
            folder.mkdir(parents=True, exist_ok=True)
            part = folder / f"{RUN_FILE}.part"
            part.write_text(json.dumps({"options": self.identity}, indent=2) + "\n", encoding="utf-8")
            part.replace(folder / RUN_FILE)  # a run that is killed leaves the whole file or none


def _read(checkpoint: str) -> tuple[Path, dict[str, Any]] | None:
    own, beside = (folder / RUN_FILE for folder in (Path(checkpoint), Path(checkpoint).parent))
    saved = (Path(checkpoint) / TRAINER_STATE_NAME).stat().st_mtime
    for file in (own, beside):
        # One beside the checkpoint that is newer is of a run that was started after it.
        if file.is_file() and (file == own or file.stat().st_mtime <= saved):
            try:
                return file, json.loads(file.read_text(encoding="utf-8"))["options"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"`resume_from_checkpoint`: {file}, which tells the run's options, can't be read. Remove it to "
                    "resume all the same."
                ) from error
    return None


def _by_newer_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with one entry for each that has two names, since either may have been given."""
    folded = dict(options)
    for older, newer in _OLDER_NAMES.items():
        if older in folded:
            value = folded.pop(older)
            folded[newer] = value if folded.get(newer) is None else folded[newer]
    return folded


def _says_something(name: str, values: Mapping[str, Any]) -> bool:
    """Whether an option makes a difference to a run with these others."""
    # The mixture's stages before say what a stage starts from.
    if name == "previous_stage" or (values.get("stage") and name in ("preset", "model_name_or_path")):
        return False
    if any(name.startswith(start) and not values.get(switch, True) for start, switch in _ONLY_WITH.items()):
        return False
    return not says_nothing(name, values.get("weighting"))


def _plain(name: str, value: Any) -> Any:
    """A value as JSON gives it back: local paths whole, mappings in text as mappings."""
    if isinstance(value, str) and value.startswith("{"):
        with suppress(ValueError):  # text that only begins so
            return json.loads(value)
    if isinstance(value, str) and (name.endswith("_path") or name in _PLACES) and os.path.exists(value):
        return os.path.realpath(value)
    return json.loads(json.dumps(value, default=str))


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."

"""The help of the training commands that is there at once: our options and the common ones of the libraries below.

What `otpo align --help` shows is written down beside the commands (`otpo/cli/help`), since their parsers need torch,
transformers and TRL, whose import takes seconds. `--help-all` asks the parser itself. After an option has changed:

    python -m otpo.cli.options.short_help
"""

import argparse
import re
import sys
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "help"
WHOLE = ("token weights (otpo)", "pretraining (otpo)", "model")
"""Groups of a command's help that are shown whole."""
COMMON = {
    "data and run": "dataset_name dataset_config dataset_train_split dataset_test_split dataset_streaming "
    "max_train_rows max_eval_rows report compile_layers experts_implementation expert_parallel_size "
    "expert_parallel_backend expert_exchange save_code verbose",
    "model and adapters": "model_name_or_path ref_model_name_or_path ref_model_revision dtype attn_implementation "
    "trust_remote_code load_in_4bit use_peft lora_r lora_alpha lora_dropout lora_target_modules",
    "preference loss (TRL)": "beta loss_type max_length truncation_mode precompute_ref_log_probs "
    "label_smoothing sync_ref_model",
    "instructions and loss (TRL)": "max_length packing padding_free assistant_only_loss completion_only_loss",
    "training (transformers)": "output_dir per_device_train_batch_size gradient_accumulation_steps learning_rate "
    "num_train_epochs max_steps lr_scheduler_type warmup_steps max_grad_norm optim bf16 fp16 activation_checkpointing "
    "torch_compile deepspeed fsdp eval_strategy eval_steps per_device_eval_batch_size logging_steps save_strategy "
    "save_steps save_total_limit resume_from_checkpoint report_to run_name "
    "seed use_cpu dataloader_num_workers",
}
"""What is shown of the other groups."""
_BETTER = {
    "resume_from_checkpoint": "A checkpoint to go on from, or `true` for the newest in `output_dir`.",
}
"""What options of transformers say here, where they say something else there."""
_HIDDEN = {"logging_nan_inf_filter", "remove_unused_columns", "prediction_loss_only"}  # nobody needs to set them
_WIDTH, _NAMES, _CHOICES, _LENGTH = 110, 34, 70, 150


def read(command: str) -> str | None:
    """The short help of a command; None for one that has none."""
    path = FOLDER / f"{command}.txt"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def render(parser: Any) -> str:
    """The short help by a command's parser.

    Args:
        parser: A `GroupedParser`.
    """
    actions = {action.dest: action for action in parser._actions}
    parts = [f"usage: {parser.usage}", parser.description.strip()]
    for title in parser.titles:
        names = [name for name in actions if parser.title_of(name) == title]
        ours = title in WHOLE
        if not ours:
            names = [name for name in COMMON.get(title, "").split() if name in names]
        names = [name for name in names if name not in _HIDDEN and _help(actions[name])]
        shown = [_entry(actions[name], whole=ours) for name in names]
        if shown:
            parts.append("\n".join([f"{title}:", *shown]))
    parts.append("`--help-all` lists all options: those of TRL's and transformers' configurations too.")
    return "\n\n".join(parts) + "\n"


def _help(action: argparse.Action) -> str:
    """What an option's help says, without what `argparse` hides."""
    if action.dest in _BETTER:
        return _BETTER[action.dest]
    return "" if action.help in (None, argparse.SUPPRESS) else " ".join(action.help.replace("%%", "%").split())


def _entry(action: argparse.Action, *, whole: bool) -> str:
    value = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else str(action.metavar or "")
    value = value if len(value) < _CHOICES else "NAME"
    name = f"  --{action.dest} {value}".rstrip()
    default = "" if action.default in (None, argparse.SUPPRESS) else f" (default: {action.default})"
    text = _help(action) if whole else _beginning(_help(action))
    lines = textwrap.wrap(f"{text}{default}", _WIDTH - _NAMES)
    if len(name) < _NAMES:
        lines[0] = name.ljust(_NAMES) + lines[0]
        return "\n".join([lines[0], *(" " * _NAMES + line for line in lines[1:])])
    return "\n".join([name, *(" " * _NAMES + line for line in lines)])


def _beginning(text: str) -> str:
    """A help's first sentence, and those after it that fit."""
    sentences = re.split(r"(?<=[.)]) (?=[A-Z`'])", text)
    kept = sentences[0]
    for sentence in sentences[1:]:
        if len(kept) + len(sentence) > _LENGTH:
            break
        kept += f" {sentence}"
    return kept


def make(command: str) -> str:
    """The short help of a command as its parser has it now."""
    return render(import_module(f"otpo.cli.{command}").make_parser())


def main() -> int:
    """Writes the help of every training command anew."""
    FOLDER.mkdir(exist_ok=True)
    for command in ("align", "pretrain", "sft"):
        (FOLDER / f"{command}.txt").write_text(make(command), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

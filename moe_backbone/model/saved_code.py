"""Copies the models' code into a checkpoint, so that the checkpoint loads where this package is not installed.

Users load such a checkpoint with `trust_remote_code=True`. transformers can copy code too, by
`register_for_auto_class`, but its `config.json` names only the Auto class of the model that was saved. `save_code`
names all Auto classes, and works on a folder, whatever wraps the model while it trains.
"""

import json
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import CONFIG_NAME

from . import modeling_compass
from .configuration_compass import CompassConfig

AUTO_MAP = {
    "AutoConfig": "configuration_compass.CompassConfig",
    "AutoModel": "modeling_compass.CompassModel",
    "AutoModelForCausalLM": "modeling_compass.CompassForCausalLM",
    "AutoModelForSequenceClassification": "modeling_compass.CompassForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_compass.CompassForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_compass.CompassForQuestionAnswering",
}
"""Class of the saved code that each Auto class loads."""


def save_code(folder: str | Path) -> None:
    """Copies the models' code beside a Compass checkpoint and names it in `config.json`.

    The code imports torch and transformers alone, so transformers' own implementations run the experts.

    Args:
        folder: The folder that `save_pretrained` wrote.

    Raises:
        ValueError: The folder holds no Compass model.
    """
    path = Path(folder) / CONFIG_NAME
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.get("model_type") != CompassConfig.model_type:
        raise ValueError(
            f"`save_code` puts the code of Compass beside a Compass model, and {folder} holds "
            f"{config.get('model_type', f'no {CONFIG_NAME}')}. Name the folder of a whole model of Compass."
        )
    source = str(modeling_compass.__file__)
    for file in (source, *get_relative_import_files(source)):
        shutil.copyfile(file, path.parent / Path(file).name)
    unfinished = path.with_name(f".{CONFIG_NAME}")
    unfinished.write_text(json.dumps({**config, "auto_map": AUTO_MAP}, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


@cache
def with_saved_code(trainer_class: type) -> type:
    """Makes a subclass of a trainer that saves the code with every model that it saves, checkpoints included.

    Args:
        trainer_class: transformers' Trainer or a subclass.
    """
    return type(trainer_class.__name__, (_SavesCode, trainer_class), {})


class _SavesCode:
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        trainer: Any = self
        parent: Any = super()
        parent.save_model(output_dir, _internal_call)
        if trainer.args.should_save:
            save_code(output_dir or trainer.args.output_dir)

"""An SFT checkpoint where no other is given: a Compass model, pretrained and fine-tuned on bundled data."""

from pathlib import Path
from typing import Any

import yaml

from examples.demo import COMMON, make_data, run, write_data
from examples.demo import SCALES as DEMO

SCALES = {"tiny": Path(__file__).parent / "start_tiny.yaml", "small": DEMO / "small.yaml"}
"""Settings of the bundled data's task, in the form of the demo's."""

DOCUMENTS = {"tiny": 60, "small": 140}
"""Documents for each step of pretraining: somewhat more than it reads."""
INSTRUCTIONS = {"tiny": 30, "small": 120}
"""For each step of SFT."""


def make_start(
    folder: Path, languages: tuple[str, ...], steps: tuple[int, int] = (120, 120), scale: str = "tiny"
) -> Path:
    """Makes a Compass model by the demo's first two commands, unless the folder has it already.

    Args:
        folder: Where data, tokenizer and both models go; the answer is its `sft`, written last.
        languages: Of the data.
        steps: Of pretraining and of SFT, >= 1. A hundred of the tiny model are a minute on two CPU cores.
        scale: `"tiny"`, or `"small"`, which has 1B parameters and needs a GPU.
    """
    sft = folder / "sft"
    if (sft / "model.safetensors").is_file():
        return sft
    settings: dict[str, Any] = {
        **yaml.safe_load(SCALES[scale].read_text(encoding="utf-8")),
        "documents": DOCUMENTS[scale] * steps[0],
        "instructions": INSTRUCTIONS[scale] * steps[1],
        "prompts": 1,
        "held_out": 1,
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = write_data(folder, make_data(settings, languages, seed=0)[0], settings["vocabulary"])
    sources = {
        "pretrain": {"tokenizer_name_or_path": paths["tokenizer"], "dataset_name": paths["corpus"]},
        "sft": {"model_name_or_path": folder / "pretrain", "dataset_name": paths["instructions"]},
    }
    for count, (step, options) in zip(steps, sources.items(), strict=True):
        warmup = min(settings[step]["warmup_steps"], count // 4)
        shared = {**COMMON, **settings["common"], **settings["training"], **settings[step]}
        shared |= {"max_steps": count, "warmup_steps": warmup}
        run(step, {**options, **shared, "output_dir": folder / step})
    return sft

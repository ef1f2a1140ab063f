"""A small SFT checkpoint to start from, where no other is given: pretrained and fine-tuned on bundled data."""

from pathlib import Path
from typing import Any

from examples.demo import COMMON, SCALES, run, write_data


def make_start(folder: Path, languages: tuple[str, ...], steps: int = 120) -> Path:
    """Makes a Compass model of two layers by the demo's first steps, unless the folder has it already.

    Args:
        folder: Where data, tokenizer and both models go; the answer is its `sft`, written last.
        languages: Of the data.
        steps: Of pretraining, and of SFT, >= 1. A hundred are a minute on two CPU cores.
    """
    sft = folder / "sft"
    if (sft / "model.safetensors").is_file():
        return sft
    scale: dict[str, Any] = {**SCALES["tiny"], "documents": 60 * steps, "instructions": 30 * steps, "pairs": 1}
    folder.mkdir(parents=True, exist_ok=True)
    paths = write_data(folder, scale, languages)
    sources = {
        "pretrain": {"tokenizer_name_or_path": paths["tokenizer"], "dataset_name": paths["corpus"]},
        "sft": {"model_name_or_path": folder / "pretrain", "dataset_name": paths["instructions"]},
    }
    for step, options in sources.items():
        warmup = min(scale[step]["warmup_steps"], steps // 4)
        shared = {**COMMON, **scale["common"], **scale[step], "max_steps": steps, "warmup_steps": warmup}
        run(step, {**options, **shared, "output_dir": folder / step})
    return sft

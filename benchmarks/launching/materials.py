"""What the launched commands train: tiny random models in folders, pairs, instructions and tokens in files."""

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedConfig, PreTrainedTokenizerFast

from benchmarks.preference_step.cases import TINY, TINY_MOE, TINY_WORDS, make_config, make_pairs, make_tokenizer
from moe_backbone import CompassConfig

MODELS = ("compass", "mixtral", "qwen3_moe", "qwen3")
LENGTH = 16
"""Tokens of a row in pretraining."""
_ENDS = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None, "use_cache": False}


def make_materials(folder: Path, rows: int = 64) -> Path:
    """Writes models, tokenizers and data into a folder, unless they are there; returns it.

    Args:
        folder: Becomes `MODEL/` for each of [`MODELS`], `pairs.jsonl`, `completions.jsonl` and `tokens.parquet`.
        rows: Of each file.
    """
    done = folder / "done"
    if done.is_file():
        return folder
    tokenizer = make_tokenizer(tiny=True)
    # One of its own, since conversations are no matter here: rows are text.
    for name in MODELS:
        _write_model(config_of(name), folder / name, tokenizer)
    pairs = make_pairs("ragged", rows, tiny=True)
    pairs.to_json(folder / "pairs.jsonl")
    instructions = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in _dicts(pairs)]
    Dataset.from_list(instructions).to_json(folder / "completions.jsonl")
    draw = random.Random(0)
    documents = [[draw.randrange(2, TINY_WORDS) for _ in range(LENGTH)] for _ in range(rows)]
    Dataset.from_dict({"input_ids": documents}).to_parquet(folder / "tokens.parquet")
    done.touch()
    return folder


def config_of(name: str) -> PreTrainedConfig:
    """The configuration of a tiny model: four experts where there are some, two of them active."""
    if name == "compass":
        return CompassConfig(**TINY_MOE, **_ENDS, num_mtp_layers=1, max_position_embeddings=128)
    if name == "mixtral":
        sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16, "sliding_window": None}
        return MixtralConfig(**TINY, **_ENDS, **sizes, tie_word_embeddings=False)
    return make_config({"qwen3": "qwen3-1.7b", "qwen3_moe": "qwen3-30b-a3b-4-layers"}[name], tiny=True)


def _write_model(config: PreTrainedConfig, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _dicts(dataset: Dataset) -> list[dict[str, Any]]:
    return [dict(row) for row in dataset]  # pyright: ignore[reportCallIssue, reportArgumentType]

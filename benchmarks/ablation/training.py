"""One cell: training from the SFT checkpoint, and what the trained model does with held-out prompts."""

import resource
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)

from examples.demo import log_probabilities
from otpo import OTPOConfig
from otpo.cli.models.experts import set_answering_experts
from otpo.data import load_demo_preferences
from otpo.data.demo import KINDS, SPLITS
from otpo.data.ecommerce.answers import check_answer
from otpo.pairs.any_length import attend_at_any_length

from .cells import BUNDLED, METHODS, Cell, Matrix
from .methods import TRAINERS

_BATCH = 8
Rows = list[dict[str, Any]]


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begin = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._begin)


def training_pairs(name: str, matrix: Matrix, seed: int) -> Dataset:
    """The pairs of one of the matrix's data; bundled ones beyond the stored are drawn from the cell's seed.

    Raises:
        ValueError: None is left.
    """
    if name not in BUNDLED:
        pairs = load_dataset("json", data_files=name, split="train")
        return pairs if matrix.pairs is None else pairs.take(min(matrix.pairs, len(pairs)))
    kind = name.removeprefix("demo-")
    kinds = (kind,) if kind in KINDS else None
    # A quarter of all pairs or more have a longer chosen answer.
    drawn = 6 * matrix.pairs if matrix.pairs and name == "demo-longer" else matrix.pairs
    pairs = load_demo_preferences("train", matrix.languages, kinds, count=drawn, seed=seed)
    if name == "demo-longer":
        pairs = pairs.filter(lambda row: len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"]))
        pairs = pairs if matrix.pairs is None else pairs.take(min(matrix.pairs, len(pairs)))
    return pairs.select_columns(["prompt", "chosen", "rejected"])


def held_out(matrix: Matrix) -> dict[str, Rows]:
    """The same held-out pairs for every cell, by split; kinds and languages mixed.

    Raises:
        ValueError: A file's pairs are not conversations; the message names the file and the row.
    """
    return {name: _bundled(name, matrix) if name in SPLITS else _of_file(name, matrix) for name in matrix.held_out}


def _bundled(split: str, matrix: Matrix) -> Rows:
    pairs = load_demo_preferences(split, matrix.languages)
    if len(pairs) < matrix.prompts:
        pairs = load_demo_preferences(split, matrix.languages, count=matrix.prompts)
    return list(pairs.shuffle(seed=0))[: matrix.prompts]


def _of_file(path: str, matrix: Matrix) -> Rows:
    pairs: Any = load_dataset("json", data_files=path, split="train")
    rows = list(pairs.select(range(min(matrix.prompts, len(pairs)))))
    for place, row in enumerate(rows):
        if not all(isinstance(row.get(side), list) and row[side] for side in ("prompt", "chosen", "rejected")):
            raise ValueError(
                f"`held_out`: row {place} of {path} needs `prompt`, `chosen` and `rejected` as lists of messages "
                "with `role` and `content`."
            )
    return rows


def start_model(checkpoint: Path) -> PreTrainedModel:
    """The SFT model in float32: small steps would be lost in 16 bits."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def train(cell: Cell, matrix: Matrix, checkpoint: Path, folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Trains a cell's model from the checkpoint, its weights in float32.

    Returns:
        The model, and `order` (a digest of the batches in their order), `dropped` pairs by reason, `margins` (of the
        log, step by step), `step_seconds` (median, the first step apart), `peak_mib` (of the GPU's allocator, or
        of the process) and `steps`.
    """
    set_seed(cell.seed)
    _reset_peak_memory()
    defaults = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    options = {**defaults, **matrix.training, **cell.options}
    method = options.pop("method", METHODS[0])
    args = OTPOConfig(**options, output_dir=str(folder), seed=cell.seed, data_seed=cell.seed)
    times = StepTimes()
    trainer = TRAINERS[method](
        start_model(checkpoint),
        args=args,
        train_dataset=training_pairs(cell.data, matrix, cell.seed),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )
    trainer.add_callback(times)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    return trainer.model.eval(), {
        "order": trainer.order.hexdigest(),
        "dropped": dict(trainer.dropped_pairs["train"]),
        "margins": [entry["rewards/margins"] for entry in log],
        "step_seconds": statistics.median(times.seconds[1:] or times.seconds),
        "peak_mib": _peak_memory_mib(),
        "steps": trainer.state.global_step,
    }


def evaluate(model: Any, tokenizer: Any, rows: Mapping[str, Rows], matrix: Matrix) -> dict[str, Any]:
    """What a model prefers and answers on held-out rows: by split, lists with one value a prompt.

    Returns:
        For each split `chosen` and `rejected` (log-probabilities of the answers, nats), `answers` (greedy), `tokens`
        (of each answer) and, where the rows are bundled ones, `right` (whether each is right in everything).
    """
    results = {}
    model.generation_config.max_length = None  # or `generate` warns of two limits
    set_answering_experts(model)
    for split, pairs in rows.items():
        found: dict[str, list[Any]] = {"chosen": [], "rejected": [], "answers": []}
        for begin in range(0, len(pairs), _BATCH):
            batch = pairs[begin : begin + _BATCH]
            for side in ("chosen", "rejected"):
                found[side] += log_probabilities(model, tokenizer, batch, side).tolist()
        for begin in range(0, len(pairs), matrix.answer_batch):
            batch = pairs[begin : begin + matrix.answer_batch]
            found["answers"] += _answers(model, tokenizer, batch, matrix.answer_tokens)
        if split in SPLITS:
            found["right"] = [
                check_answer(row, answer)["all"] for row, answer in zip(pairs, found["answers"], strict=True)
            ]
        found["tokens"] = [len(tokenizer(answer)["input_ids"]) for answer in found["answers"]]
        results[split] = found
    return results


@torch.no_grad()
def _answers(model: Any, tokenizer: Any, rows: Rows, tokens: int) -> list[str]:
    prompts = tokenizer.apply_chat_template(
        [row["prompt"] for row in rows],
        add_generation_prompt=True,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        return_dict=True,
    ).to(model.device)
    with attend_at_any_length():
        output = model.generate(**prompts, max_new_tokens=tokens, do_sample=False, use_cache=True)
    return tokenizer.batch_decode(output[:, prompts["input_ids"].size(1) :], skip_special_tokens=True)


def _reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts again from what is resident


def _peak_memory_mib() -> float:
    """Since the reset; where the process's peak can't be reset (macOS), of the process so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

"""The whole road on one machine: pretrain a Compass model, fine-tune it, align it with OTPO, and check every step.

The file is over 350 lines because it is read from top to bottom, like the road.

The data is a shopping assistant's, in several languages, bundled or generated; nothing is downloaded. Each step is a
command of `otpo` that is printed before it runs. After each, the model is asked about products that no step has seen.

    python examples/demo.py                  # compass-tiny, two CPU cores, a few minutes
    python examples/demo.py --scale small    # compass-small, 1B parameters, one GPU with 80 GB
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import matplotlib.pyplot as plt
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

import moe_backbone  # noqa: F401 - makes Compass known to transformers
from otpo.cli.main import main as otpo
from otpo.data import load_demo_corpus, load_demo_instructions, load_demo_preferences
from otpo.data.ecommerce.answers import check_answer
from otpo.transport.solve import transport_weights

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
KINDS = ("attribute", "price", "language", "format")
STEPS = {"pretrain": "pretrained", "sft": "fine-tuned", "align": "aligned"}
ALL_LANGUAGES = ("en", "id", "th", "vi", "ms", "fil", "pt")

COMMON: dict[str, Any] = {
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 20,
    "lr_scheduler_type": "cosine",
}
SCALES: dict[str, dict[str, Any]] = {
    "tiny": {
        "languages": ("en", "id", "pt"),
        "vocabulary": 1024,
        "documents": 10_000,
        "instructions": 4_000,
        "pairs": 3_000,
        "held_out": 600,
        "free_answers": 48,
        "common": {"use_cpu": True, "bf16": False},
        "pretrain": {
            "preset": "compass-tiny",
            "sequence_length": 256,
            "per_device_train_batch_size": 8,
            "max_steps": 100,
            "learning_rate": 5e-3,
            "warmup_steps": 20,
        },
        "sft": {
            "packing": True,
            "max_length": 512,
            "per_device_train_batch_size": 4,
            "max_steps": 100,
            "learning_rate": 2e-3,
            "warmup_steps": 10,
            "gradient_checkpointing": False,
        },
        "align": {
            "per_device_train_batch_size": 16,
            "max_steps": 60,
            "learning_rate": 1e-3,
            "warmup_steps": 5,
            "gradient_checkpointing": False,
        },
    },
    "small": {
        "languages": ALL_LANGUAGES,
        "vocabulary": 16_000,
        "documents": 150_000,
        "instructions": 30_000,
        "pairs": 4_000,
        "held_out": 1_000,
        "free_answers": 252,
        "common": {"bf16": True},
        "pretrain": {
            "preset": "compass-small",
            "sequence_length": 1024,
            "per_device_train_batch_size": 16,
            "max_steps": 600,
            "learning_rate": 6e-4,
            "warmup_steps": 60,
        },
        "sft": {
            "packing": True,
            "max_length": 1024,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "max_steps": 60,
            "learning_rate": 1e-4,
            "warmup_steps": 10,
            "gradient_checkpointing": False,
            "dtype": "float32",
        },
        "align": {
            "per_device_train_batch_size": 16,
            "max_steps": 120,
            "learning_rate": 5e-6,
            "warmup_steps": 10,
            "gradient_checkpointing": False,
            "dtype": "float32",
        },
    },
}
console = Console()


def train_tokenizer(corpus: Dataset, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the documents, so that any language can be written."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((row["text"] for row in corpus), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>", padding_side="left"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_data(folder: Path, scale: dict[str, Any], languages: tuple[str, ...]) -> dict[str, str]:
    """Tokenizer and training data of all steps as files, by what they are."""
    corpus = load_demo_corpus("train", scale["documents"], languages)
    instructions = load_demo_instructions("train", languages, count=scale["instructions"])
    pairs = load_demo_preferences("train", languages, count=scale["pairs"])
    data = {"corpus": corpus, "instructions": instructions, "pairs": pairs}
    paths = {name: str(folder / f"{name}.jsonl") for name in data}
    for name, rows in data.items():
        rows.to_json(paths[name])
    tokenizer = train_tokenizer(corpus.take(min(len(corpus), 5_000)), scale["vocabulary"])
    tokenizer.save_pretrained(folder / "tokenizer")
    return {**paths, "tokenizer": str(folder / "tokenizer")}


def run(command: str, options: dict[str, Any]) -> None:
    """Runs a command of `otpo` in this process, after printing it."""
    words = [command, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
    console.print(f"otpo {shlex.join(words)}", style="bold", highlight=False)
    if otpo(words):
        sys.exit(1)


def batches(rows: Dataset, size: int) -> list[list[dict[str, Any]]]:
    return [list(rows.select(range(begin, min(begin + size, len(rows))))) for begin in range(0, len(rows), size)]


@torch.no_grad()
def log_probabilities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], side: str
) -> torch.Tensor:
    """Log-probability of the answers of one side of some pairs."""
    prompts = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"] for row in rows]
    texts = [tokenizer.apply_chat_template(row["prompt"] + row[side])["input_ids"] for row in rows]
    longest = max(map(len, texts))
    input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    answer = torch.zeros(len(rows), longest, dtype=torch.bool)
    for place, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        input_ids[place, : len(text)] = torch.tensor(text)
        answer[place, len(prompt) : len(text)] = True
    input_ids, answer = input_ids.to(model.device), answer.to(model.device)
    logits = model(input_ids, use_cache=False).logits[:, :-1].float()
    of_tokens = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return (of_tokens * answer[:, 1:]).sum(1)


@torch.no_grad()
def free_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Dataset, size: int
) -> list[tuple[str, bool]]:
    """The model's own answers, greedily, and whether each is right in everything that was asked."""
    answers = []
    for batch in batches(rows, size):
        prompts = tokenizer.apply_chat_template(
            [row["prompt"] for row in batch],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        ).to(model.device)
        output = model.generate(**prompts, max_new_tokens=160, do_sample=False)
        texts = tokenizer.batch_decode(output[:, prompts["input_ids"].size(1) :], skip_special_tokens=True)
        answers += [(text, check_answer(row, text)["all"]) for row, text in zip(batch, texts, strict=True)]
    return answers


def check(folder: Path, pairs: Dataset, scale: dict[str, Any], device: str) -> dict[str, Any]:
    """What a model knows of products that it has not seen: percentages, and an answer of its own."""
    model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    margins: list[float] = []
    for batch in batches(pairs, 32):
        chosen, rejected = (log_probabilities(model, tokenizer, batch, side) for side in ("chosen", "rejected"))
        margins += (chosen - rejected).tolist()
    kinds = pairs["kind"][:]
    rates: dict[str, Any] = {}
    for kind in KINDS:
        of_kind = [margin for margin, of in zip(margins, kinds, strict=True) if of == kind]
        rates[kind] = _percentage(margin > 0 for margin in of_kind)
    rates["preferred"] = _percentage(margin > 0 for margin in margins)
    asked = pairs.shuffle(seed=0).take(min(len(pairs), scale["free_answers"]))
    answers = free_answers(model, tokenizer, asked, 64)
    rates["free answers right"] = _percentage(right for _, right in answers)
    rates["example"] = answers[0][0]
    return rates


@torch.no_grad()
def token_weights(folder: Path, row: dict[str, Any]) -> dict[str, tuple[list[str], list[float]]]:
    """Tokens of both answers of a pair with their OTPO weights."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    states, texts = [], []
    for side in ("chosen", "rejected"):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        full = tokenizer.apply_chat_template(row["prompt"] + row[side])["input_ids"]
        hidden = model.model(input_ids=torch.tensor([full]), use_cache=False).last_hidden_state
        states.append(hidden[:, len(prompt) - 1 : -1])
        texts.append([tokenizer.decode([token]) for token in full[len(prompt) :]])
    masks = [torch.ones(state.shape[:2], dtype=torch.bool) for state in states]
    solved = transport_weights(*states, *masks, reg=0.05)
    return {"chosen": (texts[0], solved.chosen[0].tolist()), "rejected": (texts[1], solved.rejected[0].tolist())}


def draw(results: dict[str, dict[str, Any]], weights: dict[str, tuple], path: Path) -> None:
    figure, (bars, *tokens) = plt.subplots(3, 1, figsize=(9, 10), height_ratios=[3, 2, 2])
    names = [*KINDS, "preferred", "free answers right"]
    for place, (step, rates) in enumerate(results.items()):
        color = ("#c9d1d9", "#7fa8b8", "#1f6f8b")[place]
        at = [x + 0.27 * (place - 1) for x in range(len(names))]
        bars.bar(at, [rates[name] for name in names], 0.27, label=STEPS[step], color=color)
    bars.axhline(50, color="#555555", linewidth=0.8, linestyle=":")
    bars.set_xticks(range(len(names)), names)
    bars.set_ylabel("%")
    bars.set_title("Held-out products: the right answer is the likelier one; the model's own answer is right")
    bars.legend()
    for axis, (side, (texts, values)) in zip(tokens, weights.items(), strict=True):
        axis.bar(range(len(texts)), values, color="#1f6f8b" if side == "chosen" else "#b5483a")
        axis.set_xticks(range(len(texts)), texts, rotation=70, fontsize=7)
        axis.set_ylabel("weight")
        axis.set_title(f"Token weights, {side}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def show(results: dict[str, dict[str, Any]], pairs: Dataset) -> None:
    table = Table(title="Products that no step has seen")
    table.add_column("")
    for step in results:
        table.add_column(STEPS[step], justify="right")
    kinds = pairs["kind"][:]
    labels = {kind: f"right answer preferred, {kind} ({kinds.count(kind)} pairs)" for kind in KINDS}
    labels |= {"preferred": f"right answer preferred, all ({len(kinds)} pairs)"}
    labels |= {"free answers right": "its own answers right in everything"}
    for name, label in labels.items():
        table.add_row(label, *(f"{rates[name]:.0f}%" for rates in results.values()))
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="tiny")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--weighting", default="otpo", help="any name that OTPOConfig takes (default: otpo)")
    parser.add_argument("--languages", nargs="+", choices=ALL_LANGUAGES, help="default: en id pt when tiny, else all")
    parser.add_argument("--report", type=Path, help="JSON file to write: results, options, seconds of each step")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    begin = time.monotonic()
    scale, folder = SCALES[args.scale], args.output
    languages = tuple(args.languages or scale["languages"])
    device = "cpu" if scale["common"].get("use_cpu") else "cuda"
    folder.mkdir(parents=True, exist_ok=True)

    console.rule("Data and tokenizer")
    paths = write_data(folder, scale, languages)
    pairs = load_demo_preferences("test", languages, count=scale["held_out"])
    steps: dict[str, dict[str, Any]] = {
        "pretrain": {"tokenizer_name_or_path": paths["tokenizer"], "dataset_name": paths["corpus"]},
        "sft": {"model_name_or_path": folder / "pretrain", "dataset_name": paths["instructions"]},
        "align": {
            "model_name_or_path": folder / "sft",
            "dataset_name": paths["pairs"],
            "weighting": args.weighting,
            "ot_reg": 0.1,
        },
    }
    results, seconds = {}, {"data": time.monotonic() - begin}
    for step, options in steps.items():
        console.rule(step)
        started = time.monotonic()
        run(step, {**options, **COMMON, **scale["common"], **scale[step], "output_dir": folder / step})
        seconds[step] = time.monotonic() - started
        results[step] = check(folder / step, pairs, scale, device)
        seconds[f"{step}, checks"] = time.monotonic() - started - seconds[step]

    console.rule("What each step was worth")
    show(results, pairs)
    picture = folder / "demo.png"
    row = pairs.filter(lambda r: r["kind"] == "format" and r["length"] == "short")[0]
    draw(results, token_weights(folder / "align", row), picture)
    seconds["all"] = time.monotonic() - begin
    if args.report:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        report = {"scale": scale, "languages": languages, "weighting": args.weighting, "device": _device_name(device)}
        report |= {"torch": torch.__version__, "results": results, "seconds": seconds}
        args.report.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(f"checkpoint  {folder / 'align'}\npicture     {picture}\ntime        {seconds['all']:.0f} s")

    levels = [results[step]["preferred"] for step in steps]
    if not 50 < levels[0] < levels[1] < levels[2]:
        console.print(f"Not every step was better than the one before in this run: {levels}", style="red")
    return 0


def _percentage(flags: Iterable[bool]) -> float:
    values = list(flags)
    return 100 * sum(values) / len(values)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


if __name__ == "__main__":
    sys.exit(main())

"""The whole road on one machine: pretrain a Compass model, fine-tune it, align it with OTPO, and check every step.

The data is a shopping assistant's, in several languages, bundled or generated; nothing is downloaded. Each step is a
command of `otpo` that is printed before it runs. After each, the model is asked about products that no step has seen.
A model is aligned on its own answers: it answers new questions several times, checkers judge, and `otpo pairs`
makes pairs of the best and the worst. At the end a page of `otpo explain` shows which tokens of such pairs counted.

    python examples/demo.py                  # compass-tiny, two CPU cores, a few minutes
    python examples/demo.py --scale small    # compass-small, 1B parameters, one GPU with 80 GB
    python examples/demo.py --scale small --until sft       # pretrained and fine-tuned alone: what others start from
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded

import matplotlib.pyplot as plt
import torch
import yaml
from datasets import Dataset
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from otpo.cli.iterating.steps import batches, console, greedy_answers, load_for_answers, run
from otpo.data import load_demo_corpus, load_demo_instructions, load_demo_preferences, load_demo_questions
from otpo.data.demo import LANGUAGES
from otpo.data.ecommerce.answers import check_answer
from otpo.data.ecommerce.new_questions import MISREAD
from otpo.pairs.any_length import attend_at_any_length

SCALES = Path(__file__).parent / "scales"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STEPS = {"pretrain": "pretrained", "sft": "fine-tuned", "align": "aligned"}
COLORS = ("#c9d1d9", "#7fa8b8", "#1f6f8b")
COMMON: dict[str, Any] = {
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 20,
    "lr_scheduler_type": "cosine",
}


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


def make_data(scale: Mapping[str, Any], languages: Sequence[str], seed: int) -> tuple[dict[str, Dataset], Dataset]:
    """The training data of all steps by what they are, and the held-out rows."""
    if scale["task"] == "bundled":
        asked = scale["instructions"]
        rows = load_demo_instructions("train", languages, asked + scale["prompts"], seed)
        data = {
            "corpus": load_demo_corpus("train", scale["documents"], languages, seed),
            "instructions": rows.select(range(asked)),
            # The checkers know the right answers to these. None is among the instructions.
            "prompts": rows.select(range(asked, len(rows))),
        }
        return data, load_demo_preferences("test", languages, count=scale["held_out"])
    asked, misread = scale["instructions"], scale["misread"]
    questions = load_demo_questions("train", languages, asked + scale["prompts"], seed, misread=misread)
    data = {
        "corpus": load_demo_corpus("train", scale["documents"], languages, seed, short_questions=True),
        "instructions": questions.select(range(asked)).select_columns(["prompt", "completion"]),
        # The checkers know the right answers to these; nothing is learnt from what sellers wrote.
        "prompts": questions.select(range(asked, len(questions))).remove_columns("completion"),
    }
    return data, load_demo_questions("test", languages, scale["held_out"])


def write_data(folder: Path, data: Mapping[str, Dataset], vocabulary: int) -> dict[str, Path]:
    """Training data as files by what they are, and the tokenizer beside them."""
    paths = {name: folder / f"{name}.jsonl" for name in data}
    for name, rows in data.items():
        rows.to_json(paths[name])
    corpus = data["corpus"]
    train_tokenizer(corpus.take(min(len(corpus), 5_000)), vocabulary).save_pretrained(folder / "tokenizer")
    return {**paths, "tokenizer": folder / "tokenizer"}


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
    with attend_at_any_length():
        logits = model(input_ids, use_cache=False).logits[:, :-1].float()
    of_tokens = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return (of_tokens * answer[:, 1:]).sum(1)


def group_of(row: Mapping[str, Any]) -> str:
    """What a held-out row is counted with: the wording of a short question, the kind of a bundled one."""
    if row["kind"] != "question":
        return row["kind"]
    return "misread wording" if row["template_id"].endswith(f"-{MISREAD}") else "other wordings"


def preferred(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: list[dict[str, Any]]) -> float:
    """In how many percent of the pairs the right answer is the likelier one."""
    margins: list[float] = []
    for batch in batches(pairs, 32):
        chosen, rejected = (log_probabilities(model, tokenizer, batch, side) for side in ("chosen", "rejected"))
        margins += (chosen - rejected).tolist()
    return _percentage(margin > 0 for margin in margins)


def check(folder: Path, held_out: Dataset, scale: Mapping[str, Any], device: str) -> dict[str, Any]:
    """How often a model's own answers about products that it has not seen are right in everything, by group."""
    rows = list(held_out)
    asked = list(held_out.shuffle(seed=0).take(min(len(rows), scale.get("free_answers", len(rows)))))
    model, tokenizer = load_for_answers(folder, device)
    prompts = [row["prompt"] for row in asked]
    answers = greedy_answers(model, tokenizer, prompts, scale["answer_tokens"], scale["check_batch"])
    right = [check_answer(row, answer)["all"] for row, answer in zip(asked, answers, strict=True)]
    groups = sorted({group_of(row) for row in asked})
    rates: dict[str, Any] = {
        f"right, {group}": _percentage(fine for row, fine in zip(asked, right, strict=True) if group_of(row) == group)
        for group in groups
    }
    rates["right, all"] = _percentage(right)
    if "chosen" in held_out.column_names:
        rates["right answer preferred"] = preferred(model, tokenizer, rows)
    rates["example"] = answers[0]
    return rates


def draw(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    figure, bars = plt.subplots(figsize=(9, 4))
    names = [name for name in next(iter(results.values())) if name != "example"]
    for place, (step, rates) in enumerate(results.items()):
        at = [x + 0.27 * (place - 1) for x in range(len(names))]
        drawn = bars.bar(at, [rates[name] for name in names], 0.27, label=STEPS[step], color=COLORS[place])
        bars.bar_label(drawn, fmt="%.0f", fontsize=8)
    bars.set_xticks(range(len(names)), names)
    bars.set_ylabel("%")
    bars.set_title("Held-out products: the model's own answer is right in everything")
    bars.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def show(results: Mapping[str, Mapping[str, Any]], count: int) -> None:
    table = Table(title=f"{count} questions about products that no step has seen")
    table.add_column("its own answers")
    for step in results:
        table.add_column(STEPS[step], justify="right")
    for name in next(iter(results.values())):
        if name != "example":
            table.add_row(name, *(f"{rates[name]:.0f}%" for rates in results.values()))
    console.print(table)
    for step, rates in results.items():
        console.print(f"{STEPS[step]:<12} {rates['example']!r:.100}", highlight=False, markup=False)


def explain(folder: Path, pairs: Path, weighting: str, scale: Mapping[str, Any]) -> Path:
    """A page of `otpo explain`: the first pairs with the weights of the alignment, and with others beside them."""
    page = folder / "explain.html"
    options = {"model_name_or_path": folder / "align", "reference": folder / "sft", "dataset_name": pairs}
    options |= {"weighting": weighting, "ot_reg": scale["align"]["ot_reg"], "rows": [0, 1, 2], "output": page}
    run("explain", options | scale["common"])
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=sorted(path.stem for path in SCALES.glob("*.yaml")), default="tiny")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--weighting", default="otpo", help="any name that OTPOConfig takes (default: otpo)")
    parser.add_argument("--languages", nargs="+", choices=LANGUAGES, help="default: en id pt when tiny, else all")
    parser.add_argument("--until", choices=list(STEPS), default="align", help="the last step (default: align)")
    parser.add_argument("--seed", type=int, default=0, help="of data, models and answers (default: 0)")
    parser.add_argument("--report", type=Path, help="JSON file to write: results, options, seconds of each step")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    begin = time.monotonic()
    scale, folder = yaml.safe_load((SCALES / f"{args.scale}.yaml").read_text(encoding="utf-8")), args.output
    languages = tuple(args.languages or scale["languages"])
    device = "cpu" if scale["common"].get("use_cpu") else "cuda"
    folder.mkdir(parents=True, exist_ok=True)

    console.rule("Data and tokenizer")
    data, held_out = make_data(scale, languages, args.seed)
    paths = write_data(folder, data, scale["vocabulary"])
    held_out.to_json(folder / "held_out.jsonl")
    pairs = folder / "pairs.jsonl"
    steps: dict[str, dict[str, Any]] = {
        "pretrain": {"tokenizer_name_or_path": paths["tokenizer"], "dataset_name": paths["corpus"]},
        "sft": {"model_name_or_path": folder / "pretrain", "dataset_name": paths["instructions"]},
        "align": {"model_name_or_path": folder / "sft", "dataset_name": pairs, "weighting": args.weighting},
    }
    results, seconds = {}, {"data": time.monotonic() - begin}
    for step, options in steps.items():
        console.rule(step)
        started = time.monotonic()
        if step == "align":
            # An older run's ledger is of another model, though its folder has the same name.
            for stale in (pairs, Path(f"{pairs}.ledger")):
                stale.unlink(missing_ok=True)
            answering = {"model_name_or_path": folder / "sft", "dataset_name": paths["prompts"], "output": pairs}
            run("pairs", {**answering, "seed": args.seed, **scale["common"], **scale["pairs"]})
            seconds["pairs"] = time.monotonic() - started
            started = time.monotonic()
        shared = {**COMMON, **scale["common"], **scale["training"], "seed": 42 + args.seed}
        run(step, {**options, **shared, **scale[step], "output_dir": folder / step})
        seconds[step] = time.monotonic() - started
        results[step] = check(folder / step, held_out, scale, device)
        seconds[f"{step}, checks"] = time.monotonic() - started - seconds[step]
        if step == args.until:
            break

    console.rule("What each step was worth")
    picture = folder / "demo.png"
    draw(results, picture)
    shown = [folder / args.until, picture]
    if "align" in results:
        shown.append(explain(folder, pairs, args.weighting, scale))
    show(results, len(held_out))
    seconds["all"] = time.monotonic() - begin
    if args.report:
        report = {"scale": scale, "languages": languages, "weighting": args.weighting, "device": _device_name(device)}
        report |= {"seed": args.seed, "torch": torch.__version__, "results": results, "seconds": seconds}
        args.report.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, path in zip(("checkpoint", "picture", "explained"), shown, strict=False):
        console.print(f"{name:<12}{path}")
    console.print(f"time        {seconds['all']:.0f} s")

    levels = [rates["right, all"] for rates in results.values()]
    if not all(before < after for before, after in pairwise(levels)):
        console.print(f"Not every step was better than the one before in this run: {levels}", style="red")
    return 0


def _percentage(flags: Iterable[bool]) -> float:
    values = list(flags)
    return 100 * sum(values) / len(values)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


if __name__ == "__main__":
    sys.exit(main())

"""A real alignment from nothing, in a few minutes on two CPU cores.

Trains a tokenizer and a small language model on the bundled shopping assistant's answers, aligns it with OTPO on
the bundled preference pairs, and shows what changed on products that it has not seen.

    python examples/demo.py [--output runs/demo] [--weighting otpo]
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import matplotlib.pyplot as plt
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from otpo import OTPOConfig, OTPOTrainer
from otpo.data import load_demo_preferences
from otpo.transport import transport_weights

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
KINDS = ("attribute", "price", "language", "format")
CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none"}
console = Console()


def train_tokenizer(pairs: Dataset) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the texts of the pairs, so that any language can be written."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((row[side][0]["content"] for row in pairs for side in ("prompt", "chosen")), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def small_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def fit_chosen(pairs: Dataset, tokenizer: PreTrainedTokenizerFast, output: Path, steps: int) -> Path:
    """Fits the chosen answers briefly, which is what preference optimisation starts from."""
    answers = pairs.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")
    args = SFTConfig(
        output_dir=str(output / "sft"),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        **CPU,
    )
    trainer = SFTTrainer(small_model(tokenizer), args=args, train_dataset=answers, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return Path(args.output_dir)


def preferred(trainer: OTPOTrainer) -> list[bool]:
    """For each held-out pair, whether the model finds the chosen answer more likely than the rejected one."""
    trainer.model.eval()
    wins = []
    for batch in trainer.get_eval_dataloader():
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
        with torch.no_grad():
            chosen, rejected = trainer.model(**inputs, fused_lm_head=True).log_probs.sum(1).chunk(2)
        wins += (chosen > rejected).tolist()
    return wins


def rates(flags: list[bool], kinds: list[str]) -> dict[str, float]:
    """Percent of true flags, by kind and over all."""
    by_kind = {kind: [flag for flag, k in zip(flags, kinds, strict=True) if k == kind] for kind in KINDS}
    return {kind: 100 * sum(f) / len(f) for kind, f in {**by_kind, "all": flags}.items()}


def token_weights(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, row: dict) -> dict[str, tuple]:
    """Tokens of both answers of a pair with their OTPO weights."""
    states, texts = [], []
    for side in ("chosen", "rejected"):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        full = tokenizer.apply_chat_template(row["prompt"] + row[side])["input_ids"]
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([full])).last_hidden_state
        states.append(hidden[:, len(prompt) - 1 : -1])
        texts.append([tokenizer.decode([token]) for token in full[len(prompt) :]])
    masks = [torch.ones(state.shape[:2], dtype=torch.bool) for state in states]
    solved = transport_weights(*states, *masks, reg=0.05)
    return {"chosen": (texts[0], solved.chosen[0].tolist()), "rejected": (texts[1], solved.rejected[0].tolist())}


def draw(before: dict, after: dict, history: list[dict], weights: dict[str, tuple], path: Path) -> None:
    figure, (bars, curve, *tokens) = plt.subplots(4, 1, figsize=(9, 12), height_ratios=[3, 3, 2, 2])
    places = range(len(before))
    bars.bar([x - 0.2 for x in places], before.values(), 0.4, label="before", color="#9aa5b1")
    bars.bar([x + 0.2 for x in places], after.values(), 0.4, label="after", color="#1f6f8b")
    bars.set_xticks(places, before.keys())
    bars.set_ylabel("right answer preferred (%)")
    bars.set_title("Held-out products, by kind of error")
    bars.legend()
    steps = [entry["step"] for entry in history]
    for name, label in (("rewards/margins", "weighted"), ("rewards/margins_unweighted", "unweighted")):
        curve.plot(steps, [entry[name] for entry in history], label=label)
    curve.set_xlabel("step")
    curve.set_ylabel("reward margin")
    curve.legend()
    for axis, (side, (texts, values)) in zip(tokens, weights.items(), strict=True):
        axis.bar(range(len(texts)), values, color="#1f6f8b" if side == "chosen" else "#b5483a")
        axis.set_xticks(range(len(texts)), texts, rotation=70, fontsize=7)
        axis.set_ylabel("weight")
        axis.set_title(f"Token weights, {side}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--weighting", default="otpo", help="any name that OTPOConfig takes (default: otpo)")
    parser.add_argument(
        "--languages", nargs="+", default=["en", "id", "pt"], help="of en id th vi ms fil pt (default: en id pt)"
    )
    parser.add_argument("--fit-steps", type=int, default=100)
    parser.add_argument("--align-steps", type=int, default=100)
    args = parser.parse_args()
    begin = time.monotonic()
    set_seed(0)

    train, test = (load_demo_preferences(split, args.languages) for split in ("train", "test"))
    console.rule("1. A tokenizer and a small model, fitted to the chosen answers")
    tokenizer = train_tokenizer(train)
    fitted = fit_chosen(train, tokenizer, args.output, args.fit_steps)

    console.rule("2. Alignment on the preference pairs")
    options = OTPOConfig(
        output_dir=str(args.output / args.weighting),
        weighting=args.weighting,
        ot_reg=0.1,
        max_steps=args.align_steps,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=32,
        learning_rate=2e-4,
        warmup_steps=5,
        logging_steps=5,
        **CPU,
    )
    trainer = OTPOTrainer(str(fitted), args=options, train_dataset=train, eval_dataset=test)
    kinds = test["kind"][:]
    before = rates(preferred(trainer), kinds)
    trainer.train()
    after = rates(preferred(trainer), kinds)
    trainer.save_model()

    table = Table(title=f"Held-out products: the right answer is the likelier one, before and after {args.weighting}")
    for heading in ("what is wrong with the other", "pairs", "before", "after"):
        table.add_column(heading, justify="left" if heading.startswith("what") else "right")
    for kind in before:
        count = len(kinds) if kind == "all" else kinds.count(kind)
        table.add_row(kind, str(count), f"{before[kind]:.0f}%", f"{after[kind]:.0f}%")
    console.print(table)

    picture = args.output / "demo.png"
    row = test.filter(lambda r: r["language"] == "en" and r["kind"] == "format" and r["length"] == "short")[0]
    history = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    draw(before, after, history, token_weights(trainer.model, tokenizer, row), picture)
    console.print(
        f"checkpoint  {options.output_dir}\npicture     {picture}\ntime        {time.monotonic() - begin:.0f} s"
    )


if __name__ == "__main__":
    main()

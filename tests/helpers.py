"""Tiny real models, tokenizers and datasets, made on the spot; nothing is downloaded."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from otpo import OTPOConfig

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = "the red blue shirt cotton costs ten twenty dollars and ships today from Jakarta to Manila in a small box"


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_pairs(count: int = 16, seed: int = 0) -> Dataset:
    """Conversational pairs of random words, of uneven lengths; chosen never equals rejected."""
    generator = torch.Generator().manual_seed(seed)
    words = WORDS.split()

    def text(low: int, high: int) -> str:
        size = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(words[i] for i in torch.randint(len(words), (size,), generator=generator).tolist())

    rows: dict[str, list[Any]] = {"prompt": [], "chosen": [], "rejected": []}
    for index in range(count):
        shared = text(1, 4)
        rows["prompt"].append([{"role": "user", "content": text(2, 8)}])
        rows["chosen"].append([{"role": "assistant", "content": f"{shared} {text(1, 12)} yes {index}"}])
        rows["rejected"].append([{"role": "assistant", "content": f"{shared} {text(1, 12)} no"}])
    return Dataset.from_dict(rows)


def save_model(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def options(folder: Path, **changes: Any) -> OTPOConfig:
    """Few, large, deterministic float32 steps on the CPU."""
    return OTPOConfig(**option_dict(folder, **changes))


def option_dict(folder: Path, **changes: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 7,
        "max_length": 128,
    }
    return {**defaults, **changes}


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_same_parameters(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"parameters differ: {different}"


def history(trainer: Any, *names: str) -> list[tuple[float, ...]]:
    """The logged values of `names` at each step that has all of them."""
    return [tuple(entry[name] for name in names) for entry in trainer.state.log_history if set(names) <= set(entry)]

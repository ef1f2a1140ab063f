"""Tiny real models, tokenizers and datasets, made on the spot; nothing is downloaded."""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List
from datasets import Image as ImageFeature
from peft import LoraConfig
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from otpo import OTPOConfig, OTPOTrainer

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""`CHAT_TEMPLATE` that also tells which tokens are the assistant's."""
WORDS = "the red blue shirt cotton costs ten twenty dollars and ships today from Jakarta to Manila in a small box"
LONG = "red " * 100
"""A prompt that fills every `max_length` of these tests."""


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


def make_trainer(model: Any, folder: Path, data: Any, **changes: Any) -> OTPOTrainer:
    """A trainer of the data with a few of `options` changed."""
    ref_folder = changes.pop("ref_model", None)
    ref_model = None if ref_folder is None else AutoModelForCausalLM.from_pretrained(ref_folder)
    return OTPOTrainer(model, ref_model, options(folder, **changes), train_dataset=data)


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


def bits(values: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """Bytes of parameters, which compare NaN with NaN."""
    return {name: value.numpy().tobytes() for name, value in values.items()}


def assert_same_parameters(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"parameters differ: {different}"


def history(trainer: Any, *names: str) -> list[tuple[float, ...]]:
    """The logged values of `names` at each step that has all of them."""
    return [tuple(entry[name] for name in names) for entry in trainer.state.log_history if set(names) <= set(entry)]


TIMING = ("runtime", "per_second", "transport/ms")


def without_timing(entry: dict[str, Any]) -> dict[str, Any]:
    """A log entry without what depends on the clock."""
    return {name: value for name, value in entry.items() if not any(part in name for part in TIMING)}


@dataclass
class Run:
    """What a short training left behind."""

    trainer: Any
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    log: list[dict[str, Any]]
    evaluation: dict[str, float]

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.log if "loss" in entry]


def train_and_evaluate(trainer: Any, **train: Any) -> Run:
    """Trains for the steps of the trainer's options, then evaluates where there is an evaluation dataset."""
    before = parameters(trainer.model)
    trainer.train(**train)
    after = parameters(trainer.model)
    log = [without_timing(entry) for entry in trainer.state.log_history]
    evaluation = {} if trainer.eval_dataset is None else without_timing(trainer.evaluate())
    return Run(trainer, before, after, log, evaluation)


def moved(run: Run) -> list[str]:
    """Names of the parameters that training changed."""
    return [name for name, value in run.after.items() if not torch.equal(value, run.before[name])]


def hashed_weights(batch: Any) -> torch.Tensor:
    """Weights in [0.125, 1.625] that look random and depend on a token and its position alone."""
    return ((batch.token_ids * 31 + batch.positions * 17) % 7 + 0.5) / 4


def collate(trainer: Any, rows: list[int], split: str = "train") -> dict[str, torch.Tensor]:
    """A batch of the trainer's own, of the given rows of one of its datasets."""
    dataset = trainer.train_dataset if split == "train" else trainer.eval_dataset
    return trainer.data_collator([dataset[row] for row in rows])


IMAGE_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_plain_pairs(rows: list[tuple[str, str, str]]) -> Dataset:
    """Plain-text pairs from (prompt, chosen, rejected); TRL ends each completion with the end-of-sequence token."""
    return Dataset.from_dict(
        dict(zip(("prompt", "chosen", "rejected"), map(list, zip(*rows, strict=True)), strict=True))
    )


def with_images(pairs: Dataset) -> Dataset:
    """Adds one small random image to each pair, of uneven sizes."""
    noise = np.random.default_rng(0)
    images = [[Image.fromarray(noise.integers(0, 255, (20 + i, 30, 3), np.uint8))] for i in range(len(pairs))]
    features = Features({**pairs.features, "images": List(ImageFeature())})
    return Dataset.from_dict({**pairs.to_dict(), "images": images}, features=features)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def poison(model: torch.nn.Module, token_id: int) -> None:
    """Makes the embedding of one token NaN, so that only texts with the token are hit."""
    with torch.no_grad():
        model.get_input_embeddings().weight[token_id] = torch.nan


ODD = "~"  # in no other text


def pairs_with_one_odd(side: str) -> Dataset:
    """Row 0 is empty within forty tokens; row 5 alone has the odd token, on one side; row 2 shares the other."""
    rows = [(f"cotton {i} costs", f" ten {i}", f" twenty {i}") for i in range(7)]
    rows[0] = (LONG, "yes", "no")
    odd = f" a{ODD}box"
    rows[5] = ("the box", odd, " blue") if side == "chosen" else ("the box", " blue", odd)
    rows[2] = ("the box", " red", " blue") if side == "chosen" else ("the box", " blue", " red")
    return make_plain_pairs(rows)


class At(TrainerCallback):
    """Calls a function at the start or the end of the step after `done` steps."""

    def __init__(self, event: str, done: int, function: Any) -> None:
        def call(args, state, control, **kwargs):
            if state.global_step == done:
                function()

        setattr(self, event, call)


class Collected(ModuleType):
    """A tracker's module that keeps what is logged; `Html` and `Image` are there unless `plain`."""

    def __init__(self, name: str, plain: bool = False) -> None:
        super().__init__(name)
        self.entries: list[dict] = []
        self.log = self.entries.append
        if not plain:
            self.Html = lambda data, **_: ("html", data if isinstance(data, str) else data.read())
            self.Image = lambda image: ("image", image.size)


LOSS_TYPES = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 1e-3},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {},
    "aot_unpaired": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sft": {},
    "sigmoid_norm": {},
}
"""TRL's loss types, each with the options that it needs."""


def lora(**changes: Any) -> LoraConfig:
    settings = {
        "r": 4,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj", "gate_proj"],
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**{**settings, **changes})


def random_batch(
    prompts: list[int],
    chosen: list[int],
    rejected: list[int],
    *,
    seed: int = 0,
    side: str = "right",
    vocab: int = 300,
    answers_begin_alike: bool = False,
) -> dict[str, torch.Tensor]:
    """A padded batch of random tokens: a pair for each length of a prompt and of its two answers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(1, vocab, (count,), generator=generator).tolist()

    rows: list[tuple[list[int], list[int]]] = []
    texts = [tuple(map(draw, lengths)) for lengths in zip(prompts, chosen, rejected, strict=True)]
    if answers_begin_alike:
        texts = [(prompt, one, (one + other)[: len(other)]) for prompt, one, other in texts]
    rows += [(prompt, one) for prompt, one, _ in texts] + [(prompt, other) for prompt, _, other in texts]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    found: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "completion_mask": []}
    for prompt, answer in rows:
        fill = [0] * (width - len(prompt) - len(answer))
        is_token = [1] * (len(prompt) + len(answer))
        is_scored = [0] * len(prompt) + [1] * len(answer)
        for name, row in zip(found, (prompt + answer, is_token, is_scored), strict=True):
            found[name].append(row + fill if side == "right" else fill + row)
    return {name: torch.tensor(rows) for name, rows in found.items()}

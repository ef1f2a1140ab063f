"""What `benchmarks.preference_step` trains: models by shape, pairs by length, contenders by option."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

from benchmarks.words import word_tokenizer
from moe_backbone.model.presets import preset

SPECIAL = ("<pad>", "<eos>")
WORDS = 4096
TINY_WORDS = 100
DENSE = "qwen3-1.7b"


class Case(NamedTuple):
    """One comparison: every contender trains the same model on the same pairs."""

    shape: str
    lengths: str
    adapter: str  # "full" or "lora"
    checkpointing: bool
    engine: str  # "single", "ddp" or "zero3"
    gpus: int
    pairs: int  # of a step of one GPU
    tiny: bool = False

    @property
    def columns(self) -> dict[str, Any]:
        """As rows of the CSV name it."""
        named = {name: value for name, value in self._asdict().items() if name != "tiny"}
        return named | {"checkpointing": "yes" if self.checkpointing else "no"}


# Models


QWEN = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151_936}
SHAPES: dict[str, Callable[..., PreTrainedConfig]] = {
    DENSE: lambda **changes: Qwen3Config(
        **{
            **QWEN,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "tie_word_embeddings": True,
            **changes,
        }
    ),
    # The MTP layer has no part in a preference loss, and would be frozen.
    "compass-small": lambda **changes: preset("compass-small", num_mtp_layers=0, **changes),
    "qwen3-30b-a3b-4-layers": lambda **changes: Qwen3MoeConfig(
        **{
            **QWEN,
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
            **changes,
        }
    ),
}
TINY = {
    "vocab_size": TINY_WORDS + len(SPECIAL),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}
TINY_MOE = TINY | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def make_config(shape: str, *, tiny: bool) -> PreTrainedConfig:
    """The configuration of a shape, small enough for tests on the CPU if `tiny`."""
    small = ({**TINY, "intermediate_size": 64} if shape == DENSE else TINY_MOE) if tiny else {}
    return SHAPES[shape](eos_token_id=1, pad_token_id=0, bos_token_id=None, use_cache=False, **small)


def make_model(config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    """Seeded random weights, in bfloat16 on a GPU and in float32 on the CPU."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def active_parameters(model: PreTrainedModel) -> int:
    """Parameters that a token is multiplied with: those of k of E experts, the head, and no input embeddings.

    Tied embeddings count once, as the head; adapters do not count.
    """
    config = model.config.get_text_config()
    sides: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    embeddings, head = (side.weight for side in sides)
    count = 0.0
    for name, parameter in model.named_parameters():
        if (parameter is embeddings and embeddings is not head) or ".lora_" in name:
            continue
        is_routed = ".experts." in name
        count += parameter.numel() * (config.num_experts_per_tok / config.num_experts if is_routed else 1)
    return round(count)


def adapted_layers(shape: str) -> list[str]:
    """Linear layers that get an adapter: attention's, and the dense model's others; routers and experts get none."""
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return [*attention, "gate_proj", "up_proj", "down_proj"] if shape == DENSE else attention


# Pairs


def _full(_draw: random.Random) -> tuple[int, int, int]:
    return 242, 769, 769


def _ragged(draw: random.Random) -> tuple[int, int, int]:
    chosen, rejected = (min(511, int(draw.lognormvariate(5.2, 0.7)) + 8) for _ in range(2))
    return draw.randint(32, 512), chosen, rejected


def _tiny_full(_draw: random.Random) -> tuple[int, int, int]:
    return 8, 16, 16


def _tiny_ragged(draw: random.Random) -> tuple[int, int, int]:
    return draw.randint(3, 12), draw.randint(4, 20), draw.randint(4, 20)


LENGTHS = {"full": (_full, _tiny_full), "ragged": (_ragged, _tiny_ragged)}
"""Tokens of a prompt, a chosen and a rejected response. Full rows have 1011; those of `ragged` differ in every pair,
prompts uniform from 32 to 512, responses log-normal around 180."""
MAX_LENGTH = 1024


def make_pairs(lengths: str, count: int, *, tiny: bool) -> Dataset:
    """Seeded random words of those lengths, which TRL's own tokenization makes a token each, and one of the end."""
    draw = random.Random(0)
    words = TINY_WORDS if tiny else WORDS

    def text(tokens: int) -> str:
        return " ".join(f"w{draw.randrange(words)}" for _ in range(tokens))

    rows: list[dict[str, str]] = []
    for _ in range(count):
        prompt, chosen, rejected = LENGTHS[lengths][tiny](draw)
        # The space keeps the last word of the prompt apart from the first of the response.
        rows.append({"prompt": text(prompt) + " ", "chosen": text(chosen - 1), "rejected": text(rejected - 1)})
    return Dataset.from_list(rows)


def real_tokens(dataset: Dataset, pairs_a_step: int) -> list[int]:
    """Real tokens of each step of a tokenized dataset in its order: both rows of a pair, so prompts count twice."""
    sizes = {name: [len(ids) for ids in dataset[name]] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    of_pairs = [2 * prompt + chosen + rejected for prompt, chosen, rejected in zip(*sizes.values(), strict=True)]
    return [sum(of_pairs[first : first + pairs_a_step]) for first in range(0, len(of_pairs), pairs_a_step)]


def make_tokenizer(*, tiny: bool) -> PreTrainedTokenizerFast:
    """A token for each word of `make_pairs`."""
    return word_tokenizer(TINY_WORDS if tiny else WORDS, SPECIAL, pad_token=SPECIAL[0], eos_token=SPECIAL[1])


# Contenders


class Contender(NamedTuple):
    """A trainer, TRL's or ours, and its options."""

    is_trl: bool = False
    options: dict[str, Any] = {}  # noqa: RUF012 - nobody writes into it


TRL, AGAIN, PADDED = "trl", "trl-again", "otpo-padded"
LAYOUTS = ("padded", "packed", "shared_prompt", "auto")
CONTENDERS = {TRL: Contender(is_trl=True), "otpo": Contender()}
"""`otpo` sets neither option, as a user who knows of none."""
for _layout in LAYOUTS:
    for _compiled in (False, True):
        _name = f"otpo-{_layout.replace('_', '-')}{'-compiled' if _compiled else ''}"
        CONTENDERS[_name] = Contender(options={"row_layout": _layout, "compile_layers": _compiled})
CONTENDERS[AGAIN] = Contender(is_trl=True)  # after all others: what differs from the first time is noise

"""Which layout of rows a run takes: the fastest that model, attention and options allow, and why not more.

Three ways tell rows without padding apart. By lengths, in flash kernels: for what is shared too, in half
precision on a GPU. By lengths in transformers' flash attention, where a model was loaded with it: nothing is shared.
By a mask over all tokens, for any attention that takes one: its cost grows with the square of the batch's tokens, so
it is taken only where it is asked for.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from otpo.plain_model import has_adapter, without_adapter
from otpo.trl_seam import implementations
from otpo_kernels.flash import FLASH_DTYPES, flash_can_run, flash_kernels

from .attention import plain_implementation
from .lengths_attention import binding_window
from .names import RowLayout

_KNOWN_LAYERS = {"full_attention", "sliding_attention", "global"}


@dataclass(frozen=True)
class Layout:
    """How the rows of a run are laid out.

    Attributes:
        name: The layout.
        way: How attention tells rows without padding apart; None for padded ones.
        reason: Why it is this one, for the run's header.
        kernels: Whose kernels compute attention where `way` is lengths, for the header too.
    """

    name: Literal["padded", "packed", "shared_prompt"]
    way: Literal["lengths", "flash", "mask"] | None = None
    reason: str = ""
    kernels: str = ""

    @property
    def shares(self) -> bool:
        """Whether tokens that both rows of a pair begin with are run once."""
        return self.name == "shared_prompt"

    def describe(self) -> str:
        """In one line."""
        ways = {
            "lengths": f"flash attention by lengths, {self.kernels}",
            "flash": "transformers' flash attention by lengths",
            "mask": "attention by a mask over all tokens of a batch",
        }
        parts = [ways[self.way]] if self.way else []
        return f"{self.name} ({'; '.join([*parts, *([self.reason] if self.reason else [])])})"


def choose_layout(
    asked: RowLayout,
    causal_lm: Any,
    *,
    device: torch.device,
    autocast: torch.dtype | None,
    max_length: int | None,
    obstacle: str | None = None,
) -> Layout:
    """The layout of a run's rows, before the model was tried with it.

    Args:
        asked: The option `row_layout`.
        causal_lm: The policy, or a PEFT model around it.
        device: Where it runs.
        autocast: The dtype of mixed precision, if there is one.
        max_length: The longest row.
        obstacle: What else keeps rows padded.

    Raises:
        ValueError: The layout that is asked for can't be had; the message says what to set.
    """
    if asked == "padded":
        return Layout("padded", reason="row_layout=padded")
    obstacle = obstacle or obstacle_of(causal_lm)
    way = None if obstacle else _way(causal_lm, device, autocast)
    kernels = flash_kernels(device, _head_dim(causal_lm)) if way == "lengths" else ""
    windowed = _window_binds(causal_lm, max_length)
    if obstacle is None and way is None:
        obstacle = f"attention {plain_implementation(implementations(causal_lm.config)[0])!r} takes no rows by lengths"
    if obstacle is None and windowed and way == "mask":
        obstacle = f"a sliding window of {_window(causal_lm)} tokens, which one mask for all layers can't say"

    # What is asked for by name is had, or refused.
    if asked != "auto":
        if obstacle is None and asked == "shared_prompt" and windowed:
            obstacle = f"a sliding window of {_window(causal_lm)} tokens: set `row_layout='packed'`"
        if obstacle is None and asked == "shared_prompt" and way == "flash":
            obstacle = "transformers' flash attention: load the model with `attn_implementation='sdpa'`"
        if obstacle is not None:
            raise ValueError(f"`row_layout={asked!r}` is not possible with {obstacle}. Set `row_layout='auto'`.")
        return Layout(asked, way, f"row_layout={asked}", kernels)

    # Else the fastest that is possible.
    if obstacle is not None:
        return Layout("padded", reason=f"because of {obstacle}")
    if way == "mask":
        where = device.type
        if device.type == "cuda":
            is_half = (autocast or causal_lm.dtype) in FLASH_DTYPES
            where = "this GPU, or this size of heads," if is_half else "float32 without autocast"
        return Layout("padded", reason=f"{where} has no attention by lengths; a mask would cost more than padding")
    if way == "flash":
        return Layout("packed", way, "transformers' flash attention shares no prompts; 'sdpa' does")
    if windowed:
        return Layout("packed", way, f"a sliding window of {_window(causal_lm)} tokens shares no prompts", kernels)
    return Layout("shared_prompt", way, kernels=kernels)


def obstacle_of(causal_lm: Any) -> str | None:
    """What keeps a model's rows padded, whatever the device; None if nothing is known."""
    if has_adapter(causal_lm) and any(each.is_prompt_learning for each in causal_lm.peft_config.values()):
        return "a prompt-learning adapter, which prepends tokens to each row"
    config = causal_lm.config.get_text_config()
    if config is not causal_lm.config:
        return "a model of text and something else"
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or ()
    unknown = sorted(set(kinds) - _KNOWN_LAYERS)
    if unknown:
        return f"layers of kind {', '.join(unknown)}"
    plain = without_adapter(causal_lm)
    if getattr(plain, "_is_stateful", False):  # transformers' word for recurrent layers
        return f"the recurrent layers of {type(plain).__name__}"
    dropout = _attention_dropout(plain, config)
    return f"dropout of {dropout} in attention" if dropout else None


def _attention_dropout(plain: Any, config: Any) -> float:
    """Of attention probabilities: a number of the configuration, or a module, which `disable_dropout` reaches."""
    numbers = [getattr(config, name, None) or 0.0 for name in ("attention_dropout", "attention_probs_dropout_prob")]
    modules = [getattr(module, "p", 0.0) for name, module in plain.named_modules() if name.endswith("attn_dropout")]
    return max(*numbers, *modules)


def _way(
    causal_lm: Any, device: torch.device, autocast: torch.dtype | None
) -> Literal["lengths", "flash", "mask"] | None:
    attention = plain_implementation(implementations(causal_lm.config)[0])
    if attention == "sdpa" and flash_can_run(device, autocast or causal_lm.dtype, _head_dim(causal_lm)):
        return "lengths"
    if attention in ("flash_attention_2", "flash_attention_3", "flash_attention_4"):
        return "flash"
    return "mask" if attention in ("sdpa", "eager") else None


def _head_dim(causal_lm: Any) -> int:
    config = causal_lm.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _window(causal_lm: Any) -> int | None:
    """The sliding window of any layer."""
    config = causal_lm.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if slides else None


def _window_binds(causal_lm: Any, max_length: int | None) -> bool:
    return binding_window(_window(causal_lm), max_length) is not None

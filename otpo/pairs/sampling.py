"""Answers by transformers' `generate`: in batches padded on the left, each drawn by random numbers of its own.

`generate` draws all rows of a batch from one generator, so that an answer would depend on its neighbours. Here each
answer has a table of uniform numbers, made from seed, row and number of the answer: with the same probabilities it is
the same answer in any batch, on any device. What is left is rounding: another batch size, device or attention rounds
logits differently, which turns a draw where a number falls that close to the border of two tokens.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from .any_length import attend_at_any_length
from .pairing import Answer


@dataclass(frozen=True)
class SamplingOptions:
    """How answers are drawn.

    Attributes:
        num_samples: Answers to each prompt, >= 2.
        temperature: Divides the logits, > 0.
        top_p: Mass of the likeliest tokens that are drawn from, in (0, 1].
        max_new_tokens: Tokens of an answer, >= 1.
        seed: Of all of them.
    """

    num_samples: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int = 42

    def __post_init__(self) -> None:
        if self.num_samples < 2:
            raise ValueError(
                f"`num_samples` must be at least 2, since a pair has two answers, got {self.num_samples}."
            )
        if not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"`temperature` must be above 0, got {self.temperature}: without chance all answers are the same. Set "
                "1 for the model's own probabilities."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be within (0, 1], got {self.top_p}. Set 1 for all tokens.")
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, got {self.max_new_tokens}.")


class Sampler(Protocol):
    """What answers prompts, `num_samples` times each."""

    def __call__(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> list[list[Answer]]:
        """The answers to each prompt.

        Args:
            prompts: Tokens of each.
            rows: Number of each prompt, from which its random numbers are made.
        """
        ...


def answer_seed(seed: int, row: int, number: int) -> int:
    """The seed of one answer, in [0, 2^63): of the run's seed, the prompt's row and the answer's number."""
    digest = hashlib.sha256(f"otpo pairs, {seed}, {row}, {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def uniform_table(seeds: Sequence[int], length: int) -> Tensor:
    """Uniform numbers in [0, 1), `(len(seeds), length)` float64, row by row from the seeds; a longer one begins alike.

    They are multiples of 2^-24, so that none rounds to 1 where it is multiplied.
    """
    table = [torch.rand(length, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(table).double()


class SeededDraw(LogitsProcessor):
    """Draws each row's next token by the row's own random numbers, and leaves that token alone to choose from.

    The token is the first whose cumulated probability exceeds the number, so one number a token is all it takes.

    Args:
        uniforms: `(rows, tokens)` of [`uniform_table`].
        prompt_length: Width of the prompts.
    """

    def __init__(self, uniforms: Tensor, prompt_length: int) -> None:
        self.uniforms, self.prompt_length = uniforms, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` `(rows, vocabulary)` with 0 for the drawn token and minus infinity for all others."""
        exact = torch.float32 if scores.device.type == "mps" else torch.float64
        cumulated = scores.to(exact).softmax(-1).cumsum(-1)
        if not bool(cumulated[:, -1].isfinite().all()):
            raise ValueError(
                "The model's logits are not finite, so nothing can be drawn from them. Set `dtype` to bfloat16 or "
                "float32, or `attn_implementation` to eager."
            )
        numbers = self.uniforms[:, input_ids.size(1) - self.prompt_length, None].to(cumulated)
        drawn = torch.searchsorted(cumulated, numbers * cumulated[:, -1:], right=True)
        drawn = drawn.clamp(max=scores.size(-1) - 1)
        return torch.full_like(scores, float("-inf")).scatter(1, drawn, 0.0)


class TransformersSampler:
    """A [`Sampler`] by transformers' `generate`.

    Of the model's own generation options its end and padding tokens alone are kept; temperature and `top_p` are those
    of the options, and there is no penalty of any kind. The model's `generation_config` is replaced.

    Args:
        model: A causal language model, on its device, in evaluation mode.
        tokenizer: Its tokenizer.
        options: How answers are drawn.

    Raises:
        ValueError: No token ends an answer, so that each would run to the limit.
    """

    def __init__(self, model: Any, tokenizer: Any, options: SamplingOptions) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.ends = end_tokens(model, tokenizer)
        if not self.ends:
            raise ValueError(
                "Neither the model nor its tokenizer names a token that ends an answer. Set `eos_token` of the "
                "tokenizer and save it."
            )
        own = model.generation_config
        pads = (tokenizer.pad_token_id, own.pad_token_id, self.ends[0])
        self.pad = next(token for token in pads if token is not None)
        model.generation_config = GenerationConfig(
            bos_token_id=own.bos_token_id, eos_token_id=self.ends, pad_token_id=self.pad
        )

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> list[list[Answer]]:
        """See [`Sampler`]."""
        # Every prompt once for each of its answers, padded on the left.
        options = self.options
        repeated = [prompt for prompt in prompts for _ in range(options.num_samples)]
        width = max(map(len, repeated))
        input_ids = torch.tensor([[self.pad] * (width - len(prompt)) + list(prompt) for prompt in repeated])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in repeated])

        # transformers' own filters, then the draw, after which the likeliest token is the only one.
        processors = LogitsProcessorList()
        if options.temperature != 1:
            processors.append(TemperatureLogitsWarper(options.temperature))
        if options.top_p < 1:
            processors.append(TopPLogitsWarper(options.top_p))
        seeds = [answer_seed(options.seed, row, number) for row in rows for number in range(options.num_samples)]
        device = self.model.device
        processors.append(SeededDraw(uniform_table(seeds, options.max_new_tokens).to(device), width))
        with attend_at_any_length():
            written = self.model.generate(
                input_ids=input_ids.to(device),
                attention_mask=mask.to(device),
                logits_processor=processors,
                do_sample=False,
                max_new_tokens=options.max_new_tokens,
            )

        answers = [self._read(tokens) for tokens in written[:, width:].tolist()]
        return [answers[begin : begin + options.num_samples] for begin in range(0, len(answers), options.num_samples)]

    def _read(self, tokens: list[int]) -> Answer:
        end = next((place for place, token in enumerate(tokens) if token in self.ends), None)
        return Answer(self.tokenizer.decode(tokens[:end], skip_special_tokens=True), end is not None)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the model's and the tokenizer's, sorted."""
    own = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return sorted(token for token in found if token is not None)


def longest_prompt(config: Any, max_new_tokens: int) -> int | None:
    """Tokens that a prompt may have beside its answer; None where the model's configuration sets no limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if positions is None else positions - max_new_tokens

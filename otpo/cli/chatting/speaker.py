"""A model that answers in its own conversation, its text streamed by transformers' `TextIteratorStreamer`."""

import threading
from collections.abc import Iterator
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from otpo.cli.models import compass  # noqa: F401 - makes its models known to the Auto classes
from otpo.cli.models.loading import find_origin, load_config, load_tokenizer
from otpo.pairs.any_length import attend_at_any_length

THREAD = "answer"
"""Name of the thread that a model answers in."""


class _Stopped(StoppingCriteria):
    """Ends an answer when the user has stopped it."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # pyright: ignore
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class Speaker:
    """A model and its conversation.

    Args:
        name: How the screen calls it.
        model: Of transformers or PEFT.
        tokenizer: Its own, with a chat template.
        system: The system's message, or None.
        options: Of `generate`, `max_new_tokens` among them.

    Raises:
        ValueError: The tokenizer has no chat template.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, system: str | None, options: dict[str, Any]):
        if not tokenizer.chat_template:
            raise ValueError(
                f"The tokenizer of {name} has no chat template, so the model was not taught to chat. Name an instruct "
                "model, or one trained by `otpo sft`."
            )
        self.name, self.model, self.tokenizer, self.options = name, model, tokenizer, options
        self.start = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self.start)
        self._stop = threading.Event()

    def forget(self) -> None:
        """Begins a new conversation."""
        self.messages = list(self.start)

    def stop(self) -> None:
        """Has the answer under way end at its next token."""
        self._stop.set()

    def answer(self, text: str) -> Iterator[str]:
        """Yields the answer piece by piece; the conversation gets both messages when it is finished or stopped.

        Args:
            text: What the user says.

        Raises:
            ValueError: The conversation is longer than the model can read.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        length, limit = inputs["input_ids"].size(1), self._limit()
        if length >= limit:
            raise ValueError(
                f"The conversation has {length} tokens, and {self.name} reads {limit}. Begin a new one: /new"
            )
        options = {**self.options, "max_new_tokens": min(self.options["max_new_tokens"], limit - length)}

        # The model runs in a thread of its own, whose error must not leave the reader waiting.
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failed: list[BaseException] = []
        written: list[torch.Tensor] = []
        self._stop.clear()
        criteria = StoppingCriteriaList([_Stopped(self._stop)])

        def generate() -> None:
            try:
                with attend_at_any_length():
                    out = self.model.generate(**inputs, streamer=streamer, stopping_criteria=criteria, **options)
                written.append(out[0, length:])
            except BaseException as error:
                failed.append(error)
                streamer.end()

        thread = threading.Thread(target=generate, name=THREAD, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:  # also where the reader goes away
            self._stop.set()
            thread.join()
            for tokens in written:
                content = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
                self.messages = [*messages, {"role": "assistant", "content": content}]
        if failed:
            raise failed[0]

    def _limit(self) -> int:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return limit or 2**31


def load_speaker(
    option: str, name: str, system: str | None, device: str, dtype: str, options: dict[str, Any]
) -> Speaker:
    """Loads a model, or an adapter on its model.

    Args:
        option: The option that names it.
        name: A folder or a name on the Hub.
        system: The system's message, or None.
        device: Where it runs.
        dtype: Of its weights, or "auto".
        options: Of `generate`.

    Raises:
        ValueError: It can't be found, needs code of its own, or its tokenizer has no chat template.
    """
    origin = find_origin(option, name)
    # Code of a model's own is refused: transformers would ask for it on the standard input, where the user talks.
    load_config(origin, trust_remote_code=False)
    tokenizer = load_tokenizer(origin, trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_pretrained(
        origin.base, revision=origin.revision, dtype=dtype, trust_remote_code=False
    )
    if origin.adapted:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, name)
    if tokenizer.pad_token_id is not None:
        options = {"pad_token_id": tokenizer.pad_token_id, **options}
    return Speaker(name, model.to(device).eval(), tokenizer, system, options)

"""Token weights in the trackers while a model trains."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging

from .training.watching import TrainerWatcher

logger = logging.get_logger(__name__)

PREFIX = "token_weights"
"""What the names of everything that is logged here start with."""


class LogTokenWeightsCallback(TrainerWatcher):
    """Logs heat maps of the token weights of a few pairs, always the same, to wandb, tensorboard and trackio.

        trainer = OTPOTrainer(..., callbacks=[LogTokenWeightsCallback(rows=[0, 7], every=50)])

    `report_to` says where to. Logged every `every` steps and after the last one: `token_weights/page`, the page that
    `otpo explain` writes (wandb, trackio); `token_weights/picture`, the same as a picture (all three; needs
    matplotlib); and for each row `token_weights/row_{row}/` with `ess`, `entropy` and `max` as in
    `otpo.training.metrics`, `similarity`, and `margin` and `margin_unweighted`, the reward margins of OTPO and of DPO.
    Of another split than "train" the names begin `token_weights/{split}/`.

    A look costs a forward pass of policy and reference for each row, a second or two for the picture, and leaves the
    training as it was to the last bit. A tracker that can't take pages or pictures gets the numbers, with one warning.
    Other trackers get nothing.

    Args:
        rows: Numbers of rows in the dataset that the trainer was given, from 0, at least one.
        every: Steps between two looks, >= 1.
        split: `"train"`, `"eval"`, or a name of an `eval_dataset` that is a dictionary (`"eval_train"` for its
            "train").

    Raises:
        ValueError: An argument is outside its range. Rows are looked for when training starts.
    """

    def __init__(self, rows: Sequence[int] = (0,), every: int = 100, split: str = "train") -> None:
        if every < 1:
            raise ValueError(f"`every` must be at least 1, got {every}.")
        if not rows:
            raise ValueError("`rows` is empty: name at least one row of the dataset, such as [0].")
        self.rows, self.every, self.split = list(rows), every, split
        self._prefix = PREFIX if split == "train" else f"{PREFIX}/{split}"
        self._trainer: Any = None
        self._warned: set[str] = set()

    def attach(self, trainer: Any) -> None:
        """Gives the callback the trainer that it looks at; [`OTPOTrainer.train`] does this.

        Raises:
            ValueError: The trainer's dataset lacks one of the rows.
        """
        from .explain import find_row

        for row in self.rows:
            find_row(trainer, row, self.split)
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuses trainers that have no token weights."""
        if self._trainer is None:
            raise TypeError(
                "`LogTokenWeightsCallback` looks at an `OTPOTrainer`; other trainers have no token weights."
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looks and logs when it is time, in every process: a sharded model needs them all."""
        trackers = [name for name in _SENDERS if name in (args.report_to or ())]
        if not trackers or (state.global_step % self.every and state.global_step < state.max_steps):
            return
        from .explain import explain_rows, render_page

        assert self._trainer is not None
        pairs = explain_rows(self._trainer, self.rows, split=self.split)
        if not state.is_world_process_zero:
            return
        numbers = {
            f"{self._prefix}/row_{row}/{name}": value
            for row, pair in zip(self.rows, pairs, strict=True)
            for name, value in pair.numbers().items()
        }
        facts = {"step": str(state.global_step), "data": self.split}
        page, picture = render_page(pairs, facts=facts), self._picture(pairs)
        for name in trackers:
            self._send(name, state.global_step, numbers, page, picture)

    def _picture(self, pairs: Sequence[Any]) -> bytes | None:
        from .explain import draw_picture

        try:
            return draw_picture(pairs)
        except Exception as error:  # whatever ails matplotlib or its fonts, the run goes on
            self._warn("picture", f"The picture of the token weights is left out: {error}")
            return None

    def _send(self, name: str, step: int, numbers: dict[str, float], page: str, picture: bytes | None) -> None:
        """Sends everything, or the numbers alone where that fails; a tracker's fault must not end a run."""
        assert self._trainer is not None
        callbacks = self._trainer.callback_handler.callbacks
        for content in ((page, picture), (None, None)):
            try:
                _SENDERS[name](callbacks, step, numbers, self._prefix, *content)
            except Exception as error:  # trackers raise what they like
                self._warn(name, f"{name} did not take all of the token weights: {type(error).__name__}: {error}")
            else:
                return

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning(message)


def _to_wandb(
    _: Sequence[Any], step: int, numbers: dict[str, float], prefix: str, page: str | None, picture: bytes | None
) -> None:
    import wandb  # pyright: ignore[reportMissingImports]

    entries: dict[str, Any] = {**numbers, "train/global_step": step}
    if page is not None:
        entries[f"{prefix}/page"] = wandb.Html(page, inject=False, data_is_not_path=True)
    if picture is not None:
        entries[f"{prefix}/picture"] = wandb.Image(_image(picture))
    wandb.log(entries)


def _to_trackio(
    _: Sequence[Any], step: int, numbers: dict[str, float], prefix: str, page: str | None, picture: bytes | None
) -> None:
    import trackio  # pyright: ignore[reportMissingImports]

    entries: dict[str, Any] = {**numbers, "train/global_step": step}
    if page is not None:
        entries[f"{prefix}/page"] = trackio.Html(io.StringIO(page))
    if picture is not None:
        entries[f"{prefix}/picture"] = trackio.Image(_image(picture))
    trackio.log(entries)


def _to_tensorboard(
    callbacks: Sequence[Any],
    step: int,
    numbers: dict[str, float],
    prefix: str,
    page: str | None,
    picture: bytes | None,
) -> None:
    import numpy as np

    for callback in callbacks:
        if not isinstance(callback, TensorBoardCallback) or callback.tb_writer is None:
            continue
        writer = callback.tb_writer
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        if picture is not None:
            writer.add_image(f"{prefix}/picture", np.asarray(_image(picture)), step, dataformats="HWC")
        writer.flush()


def _image(picture: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(picture)).convert("RGB")


_SENDERS: Mapping[str, Callable[..., None]] = {
    "wandb": _to_wandb,
    "tensorboard": _to_tensorboard,
    "trackio": _to_trackio,
}

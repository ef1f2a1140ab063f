"""The architecture of transformers that a Compass is without its extras, by transformers' own class and Trainer.

It gets the weights, the rows, their order and the options of `otpo pretrain`, so that its losses are to be the same
where no loss of the routers is added: the class has no z-loss, and weighs the load in another way. Its experts and
attention are what transformers takes by default.
"""

import gc
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Trainer

from moe_backbone.conversion.exporting import export_model
from moe_backbone.conversion.tensors import state_tensors
from moe_backbone.planning.counting import flops_per_token
from moe_backbone.planning.hardware import recognise_gpu
from moe_backbone.pretraining.packing import PackedCollator
from otpo.cli.pretrain import COMMAND, make_trainer
from otpo.cli.running.command import run


def train(words: Sequence[str]) -> int:
    """What `otpo pretrain` does with these words, by transformers' class; returns the exit code."""
    return run(replace(COMMAND, make_trainer=make_rival, describe=describe), words)


def make_rival(data: Any, args: Any, model: Any) -> "Rival":
    """Our trainer's weights and rows in transformers' hands."""
    ours = make_trainer(data, args, model)
    compass: Any = ours.model
    config, rows, tokenizer = compass.config, ours.train_dataset, ours.processing_class
    with tempfile.TemporaryDirectory() as folder:
        export_model(config, state_tensors(compass.state_dict()), Path(folder) / "model")
        del ours, compass
        gc.collect()
        torch.cuda.empty_cache()
        rival = AutoModelForCausalLM.from_pretrained(
            Path(folder) / "model", dtype=torch.float32, output_router_logits=bool(config.router_aux_loss_coef)
        )
    collator = PackedCollator(config.pad_token_id or 0, args.sequence_length)
    trainer = Rival(
        rival,
        args,
        data_collator=lambda batch: {name: collator(batch)[name] for name in ("input_ids", "labels")},
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.flops_per_token = flops_per_token(config, args.sequence_length)
    return trainer


def describe(trainer: Any, parsed: tuple[Any, ...]) -> dict[str, str]:
    """What really runs."""
    config = trainer.model.config
    experts = config._experts_implementation
    return {
        "model": f"{type(trainer.model).__name__}, experts by {experts}, attention by {config._attn_implementation}",
        "device": str(trainer.args.device),
    }


class Rival(Trainer):
    """transformers' Trainer, which logs the loss of the next token alone, too, and the speed."""

    flops_per_token = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lm: Any = 0.0
        self._tokens = self._steps = 0
        self._began = 0.0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Adds the loss less its part for the experts' load to a sum on the device."""
        self._began = self._began or time.perf_counter()
        computed: Any = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        loss, outputs = computed
        load = (
            0.0 if outputs.aux_loss is None else model.config.router_aux_loss_coef * outputs.aux_loss.to(loss.device)
        )
        self._lm = self._lm + (loss - load).detach()
        self._tokens += inputs["input_ids"].numel()
        self._steps += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what `otpo pretrain` logs and the benchmark reads."""
        if "loss" in logs and self._steps:
            logs = {**logs, "lm_loss": float(self._lm) / self._steps}  # waits for the device, before the clock
            logs["tokens_per_second"] = self._tokens / (time.perf_counter() - self._began)
            gpu = recognise_gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
            if gpu is not None:
                logs["mfu"] = logs["tokens_per_second"] * self.flops_per_token / (gpu.tflops * 1e12)
            self._lm, self._tokens, self._steps, self._began = 0.0, 0, 0, 0.0
        super().log(logs, start_time)

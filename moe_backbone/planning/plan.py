"""The plan of a training run: whether it fits the GPUs, what they send each other, and how long a step takes.

`otpo plan` prints these plans. Tests compare the memory with PyTorch's own count; the time is an estimate.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_backbone.model.config_checks import check_config, describe_longer_rows, one_line_refusals
from moe_backbone.model.configuration_compass import CompassConfig
from moe_backbone.model.presets import PRESETS, preset

from .counting import ParameterCounts, count_parameters, flops_per_token
from .hardware import GPU
from .memory import MemoryPlan, plan_memory
from .setup import TrainingSetup
from .step_time import Exchange, Rates, StepTime, estimate_step, exchange

TIGHT = 0.9
"""Share of a GPU's memory above which a plan is tight: the allocator's gaps and uneven loads need memory too."""

_DIVIDE = "set `strategy` to a higher stage of ZeRO, or `expert_parallel_size` to more GPUs, or take more nodes"
_SHRINK = "set `micro_batch_size` or `sequence_length` to less"
REMEDIES = {
    "weights": _DIVIDE,
    "gradients": _DIVIDE,
    "optimizer": _DIVIDE,
    "activations": f"set `gradient_checkpointing`, or {_SHRINK.removeprefix('set ')}",
    "loss": _SHRINK,
    "temporary": _SHRINK,
}
"""Options that make each part of the memory smaller."""


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Attributes:
        config: The model.
        setup: The options of the run.
        gpu: The GPUs that it runs on.
        rates: Shares of the GPU's rates that the plan assumes.
        parameters: Number of parameters by part.
        memory: Bytes on one GPU at the peak of a step.
        exchange: Bytes that one GPU sends for one layer and micro-batch to reach the experts of others.
        time: Seconds of a step by part.
        flops: Model FLOPs for a token.
    """

    config: CompassConfig = field(repr=False)
    setup: TrainingSetup
    gpu: GPU
    rates: Rates
    parameters: ParameterCounts
    memory: MemoryPlan
    exchange: Exchange
    time: StepTime
    flops: float

    @property
    def fit(self) -> str:
        """`fits`, `tight` or `does not fit`."""
        share = self.memory.total / self.gpu.memory
        return "does not fit" if share > 1 else "tight" if share > TIGHT else "fits"

    @property
    def remedy(self) -> str | None:
        """Sentence on the largest part of the memory and the options that make it smaller; None if the plan fits."""
        if self.fit != "does not fit":
            return None
        parts = {name: value for name, value in self.memory.parts.items() if name in REMEDIES}
        largest = max(parts, key=lambda name: parts[name])
        return f"It does not fit. Most is {largest}: {REMEDIES[largest]}."

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second over all GPUs."""
        return self.setup.tokens_per_step / self.time.total

    @property
    def mfu(self) -> float:
        """Model FLOPs a second, divided by the GPUs' dense bfloat16 rate, 0 to 1."""
        return self.flops * self.tokens_per_second / (self.setup.world * self.gpu.tflops * 1e12)

    def days(self, tokens: float) -> float:
        """Days that training on so many tokens takes."""
        return tokens / self.tokens_per_second / 86_400

    @property
    def told_layers(self) -> str:
        """Whether layers are compiled, and why not where that is the default's doing."""
        if self.setup.compiles(self.config):
            return "compiled"
        reason = self.setup.why_not_compile(self.config) if self.setup.compile_layers is None else None
        return f"not compiled ({reason})" if reason else "not compiled"

    @property
    def assumptions(self) -> list[str]:
        """Sentences on what the numbers assume."""
        rates, lines = self.rates, []
        lines.append(
            f"Time is an estimate. Rates are shares of the data sheet's: {rates.matmul:.0%} in matrix products "
            f"(an H100 reaches 72% in large grouped ones, smaller ones less), {rates.attention:.0%} in attention, "
            f"{rates.links:.0%} of the links (not measured), {rates.bandwidth:.0%} of memory bandwidth (measured for "
            f"copies on an H100), {rates.elementwise:.0%} in layers that are not compiled."
        )
        lines.append("Nothing overlaps: communication that hides behind computation makes a step shorter.")
        lines.append(
            f"Layers that are {self.told_layers}; Python takes {1e6 * rates.launch:.0f} us to launch an operation, "
            "which another machine's host may not."
        )
        lines.append(
            "Experts get an even load; row moves are at their floor. The logits of a micro-batch are whole, with a "
            "copy in float32, as `token_loss=logits` has them; other losses have none."
        )
        lines.append(
            "Measured on one H100 and on two H200: with nothing compiled or packed, peak memory within 2.3% of the "
            "plan on one and 13% on two; steps within 1.3 times the estimate, with transformers 5.23, but for one "
            "of a slower host (benchmarks/results)."
        )
        lines.append("MFU counts the model's operations, not a checkpointed layer's second forward.")
        longer = describe_longer_rows(self.config, self.setup.sequence_length)
        if longer:
            lines.append(f"As in pretraining, {longer}.")
        lines.append(f"The GPU: {self.gpu.source}.")
        if self.setup.precision == "float32":
            lines.append("Float32 is without TF32. With grouped queries sdpa keeps score matrices, not counted here.")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """The whole plan as JSON values, in bytes, seconds and FLOPs."""
        counts = self.parameters
        return {
            "setup": {**asdict(self.setup), "world": self.setup.world, "tokens_per_step": self.setup.tokens_per_step},
            "gpu": asdict(self.gpu),
            "rates": asdict(self.rates),
            "parameters": {
                "total": counts.total,
                "active": counts.active,
                "trained": counts.trained,
                **asdict(counts),
            },
            "memory": {
                **self.memory.parts,
                "total": self.memory.total,
                "allocated": self.memory.allocated,
                "moment": self.memory.moment,
                "fit": self.fit,
                "remedy": self.remedy,
            },
            "exchange": asdict(self.exchange),
            "time": {**asdict(self.time), "total": self.time.total},
            "flops_per_token": self.flops,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "assumptions": self.assumptions,
        }


def make_plan(config: CompassConfig, gpu: GPU, setup: TrainingSetup, rates: Rates | None = None) -> Plan:
    """Makes the plan of a run.

    Args:
        config: The model.
        gpu: The GPUs that it runs on; see [`find_gpu`].
        setup: The options of the run.
        rates: Shares of the GPU's rates that the run reaches; None for the defaults of [`Rates`].

    Raises:
        ValueError: This setup cannot train the model; the message names the option and what to set.
    """
    rates, reason = rates or Rates(), setup.why_not_compile(config)
    if setup.compile_layers and reason:
        raise ValueError(f"`compile_layers=true` can't be here: {reason}, or leave `compile_layers` out.")
    return Plan(
        config=config,
        setup=setup,
        gpu=gpu,
        rates=rates,
        parameters=count_parameters(config),
        memory=plan_memory(config, setup),
        exchange=exchange(config, setup),
        time=estimate_step(config, setup, gpu, rates),
        flops=flops_per_token(config, setup.sequence_length),
    )


def load_config(model: str) -> CompassConfig:
    """Loads a configuration.

    Args:
        model: A preset's name, a folder with a `config.json`, or such a file.

    Raises:
        ValueError: `model` is none of these, or the file is not of a Compass model, or a value in it is invalid.
    """
    # A preset's name comes first, so that a folder of the same name cannot change what a recipe means.
    if model in PRESETS:
        return preset(model)
    path = Path(model).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"`model={model}` is neither a preset ({', '.join(PRESETS)}) nor a folder with a `config.json` nor such "
            "a file. Name one of them."
        )

    # The file has to be JSON and a Compass model's, before its values mean anything.
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"`model={model}`: {path} is not JSON ({error}). Name a `config.json`.") from None
    found = values.get("model_type") if isinstance(values, dict) else None
    if found != CompassConfig.model_type:
        raise ValueError(
            f"`model={model}`: its `model_type` is {found!r}; plans are made for {CompassConfig.model_type!r} alone."
        )

    # transformers raises errors of many lines, `otpo plan` prints one.
    try:
        with one_line_refusals():
            config = CompassConfig.from_dict(values)
            check_config(config)
            return config
    except ValueError as error:
        raise ValueError(f"`model={model}`: {error}") from None

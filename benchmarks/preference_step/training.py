"""A contender's training: the trainer, its first step for comparison, its timed steps, its profile."""

import contextlib
import gc
import os
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer

from benchmarks import harness
from benchmarks.kernel_trace import largest_groups
from benchmarks.preference_step.agreement import GradientKeeper, Step
from benchmarks.preference_step.cases import (
    MAX_LENGTH,
    Case,
    Contender,
    active_parameters,
    adapted_layers,
    make_config,
    make_model,
    make_pairs,
    make_tokenizer,
    real_tokens,
)
from benchmarks.step_clock import Clock, Span
from moe_backbone.planning.hardware import recognise_gpu
from otpo import OTPOConfig, OTPOTrainer

STRETCH = 17 / 16
"""Where losses are compared, the reference's final norm is the policy's times this: a reference that is the policy
gives log 2, whatever both compute of a batch. An adapter's reference is the policy itself, and its gradients tell."""
FLOPS_A_PARAMETER = {"full": 8, "lora": 6}
"""Of a real token and a parameter that it is multiplied with: 2 for the policy's forward, 2 for the reference's, 2 for
the gradient of the activations, and 2 for that of the weights, which adapters leave out. Attention and what
checkpointing computes again are not counted, nor are the adapters' own products."""
COLUMNS = ("real_tokens", "ms", "host_ms", "window_ms", "tokens_per_s", "mfu", "idle_share", "peak_mib")
COLUMNS += ("before_mib", "first_step_s", "again_s", "step_ms")
GROUPS = 12


def first_step(case: Case, contender: Contender, device: torch.device, *, keeps: bool, exact: bool = False) -> Step:
    """The first batch's step with `uniform` weights; its seconds include all that is compiled for it.

    Args:
        case: Model and pairs.
        contender: Trainer and options.
        device: This process's.
        keeps: Whether this process keeps gradients.
        exact: Whether everything is computed in float32, with the same weights.
    """
    keeper, clock = GradientKeeper(keeps=keeps), Clock(Span(1, 1, 1), device)
    own = {} if contender.is_trl else {"weighting": "uniform"}
    if exact:
        own["bf16"] = False
        case = case._replace(checkpointing=True)  # twice the memory, and the same gradients
    with (
        launched_in_float32() if exact else contextlib.nullcontext(),
        running(case, contender, device, 1, [keeper, clock], STRETCH, logging_steps=1, **own) as trainer,
    ):
        keeper.trainer = trainer
        loss = trainer.train().training_loss
    return Step(loss, keeper.gradients, clock.first_step_s - keeper.seconds)


@contextlib.contextmanager
def launched_in_float32() -> Iterator[None]:
    """As if accelerate's launcher had been told of no mixed precision, inside the block."""
    name = "ACCELERATE_MIXED_PRECISION"
    told = os.environ.pop(name, None)
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if told is not None:
            os.environ[name] = told


def timed_steps(
    case: Case, contender: Contender, device: torch.device, span: Span
) -> tuple[dict[str, Any], torch.profiler.profile]:
    """Trains as a user would, and what `COLUMNS` name of it, with the profile of the last steps.

    Args:
        case: Model and pairs.
        contender: Trainer and options; the weighting is the default.
        device: This process's.
        span: How many steps.
    """
    on_gpu = device.type == "cuda"
    row: dict[str, Any] = {"before_mib": round(torch.cuda.memory_allocated() / harness.MIB) if on_gpu else ""}
    clock = Clock(span, device)
    with running(case, contender, device, span.total, [clock]) as trainer:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        base = trainer.model.get_base_model() if case.adapter == "lora" else trainer.model
        flops = FLOPS_A_PARAMETER[case.adapter] * active_parameters(base)
        tokens = real_tokens(trainer.train_dataset, case.pairs * case.gpus)[span.warmup : span.warmup + span.steps]
        trainer.train()
    rate = sum(tokens) / clock.window_s
    row |= {
        "real_tokens": round(statistics.fmean(tokens)),
        "ms": round(statistics.median(clock.step_ms()), 2),
        "host_ms": round(statistics.median(clock.host_ms()), 2),
        "window_ms": round(1e3 * clock.window_s / span.steps, 2),
        "tokens_per_s": round(rate),
        "idle_share": round(clock.idle_share, 4),
        "again_s": round(clock.first_step_s, 2),
        "step_ms": " ".join(f"{ms:.1f}" for ms in clock.step_ms()),
    }
    gpu = recognise_gpu(torch.cuda.get_device_name()) if on_gpu else None
    row["mfu"] = round(rate * flops / (case.gpus * gpu.tflops * 1e12), 4) if gpu else ""
    # What an engine before left behind is not this trainer's.
    row["peak_mib"] = round(clock.peak / harness.MIB) - row["before_mib"] if on_gpu else ""
    return row, clock.profile


def profile_text(profile: torch.profiler.profile, device: torch.device) -> str:
    """The kernels that took longest in the profiled steps, a line each."""
    return largest_groups(profile, GROUPS, on_gpu=device.type == "cuda")


@contextlib.contextmanager
def running(
    case: Case,
    contender: Contender,
    device: torch.device,
    steps: int,
    callbacks: list[Any],
    stretch: float = 1.0,
    **options: Any,
) -> Iterator[Any]:
    """A trainer for so many steps, whose engine is taken down afterwards.

    Its data is in order, so that step i has the same pairs in every trainer.

    Args:
        case: Model and pairs.
        contender: Trainer and options.
        device: This process's.
        steps: As many as there are pairs for.
        callbacks: The trainer's.
        stretch: What the final norm of a reference of its own is multiplied by.
        **options: More of the trainer's options, which win over the contender's.
    """
    on_gpu = device.type == "cuda"
    # Models made under ZeRO-3 would be cut into shards at once, and differ from rank to rank.
    unset_hf_deepspeed_config()
    config = make_config(case.shape, tiny=case.tiny)
    model = make_model(config, device)
    if options.get("bf16") is False:
        model = model.float()
    extra: dict[str, Any] = {}
    if case.adapter == "lora":
        from peft import LoraConfig

        extra["peft_config"] = LoraConfig(
            r=16, lora_alpha=32, target_modules=adapted_layers(case.shape), task_type="CAUSAL_LM"
        )
    else:
        reference: Any = make_model(config, device).to(model.dtype)
        extra["ref_model"] = reference
        with torch.no_grad():
            reference.base_model.norm.weight.mul_(stretch)
    classes: tuple[Any, Any] = (DPOTrainer, DPOConfig) if contender.is_trl else (OTPOTrainer, OTPOConfig)
    trainer_class, config_class = classes
    with tempfile.TemporaryDirectory() as folder:
        args = config_class(
            **{
                "output_dir": folder,
                "beta": 0.1,
                "per_device_train_batch_size": case.pairs,
                "max_steps": steps,
                "max_length": MAX_LENGTH,
                "learning_rate": 1e-6,
                "max_grad_norm": 1e9,  # the norm is taken, as it is by default, and no gradient is scaled by it
                "gradient_checkpointing": case.checkpointing,
                "gradient_checkpointing_kwargs": {"use_reentrant": False},
                "train_sampling_strategy": "sequential",
                "optim": "adamw_torch_fused" if on_gpu else "adamw_torch",
                "bf16": on_gpu,
                "use_cpu": not on_gpu,
                "report_to": "none",
                "save_strategy": "no",
                "disable_tqdm": True,
                "log_level": "error",
                **contender.options,
                **options,
            }
        )
        trainer = trainer_class(
            model,
            args=args,
            train_dataset=make_pairs(case.lengths, steps * case.pairs * case.gpus, tiny=case.tiny),
            processing_class=make_tokenizer(tiny=case.tiny),
            callbacks=callbacks,
            **extra,
        )
        trainer.remove_callback(PrinterCallback)
        try:
            yield trainer
        finally:
            for engine in (getattr(trainer, "deepspeed", None), trainer.ref_model):
                if hasattr(engine, "destroy"):
                    engine.destroy()
            trainer.accelerator.free_memory()


def clear(device: torch.device) -> None:
    """Frees what a contender leaves behind, after the last name of its trainer is gone."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()

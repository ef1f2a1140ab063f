"""One training of `benchmarks.alignment_at_size`, in each of its processes."""

import json
import math
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import AutoModelForCausalLM, PrinterCallback, set_seed

from benchmarks import harness
from benchmarks.expert_parallel_steps import shares_of
from benchmarks.preference_step.cases import TINY_WORDS, WORDS, make_tokenizer
from benchmarks.step_clock import Clock, Span
from moe_backbone.expert_parallel.deepspeed_config import expert_parallel_config
from moe_backbone.expert_parallel.deepspeed_trainer import with_expert_parallelism
from otpo import OTPOConfig, OTPOTrainer

from .sizes import LORA_RANK, Case, config_of

FIRST_LOSS = math.log(2)
"""Of a policy that is its own reference."""
TOLERANCE = 5e-3
STAGE = 2


def main(told: str) -> None:
    """Trains a case and has the first process write what was found; `told` is JSON of case, span and file."""
    values = json.loads(told)
    case, span = Case(*values["case"]), Span(*values["span"])
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        device = torch.device("cpu")
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        from accelerate import PartialState

        PartialState(backend="gloo")
    found = measure(case, span, device)
    if dist.get_rank() == 0:
        Path(values["result"]).write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def measure(case: Case, span: Span, device: torch.device) -> dict[str, Any]:
    """What a row of the CSV says of a training; times are those of the first process, memory is the largest."""
    begin = time.perf_counter()
    on_gpu = device.type == "cuda"
    clock = Clock(span, device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(case, span, device, folder, clock)
        setup = time.perf_counter() - begin
        made = torch.cuda.max_memory_allocated() if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    peaks = torch.tensor([float(made), float(clock.peak)], device=device)
    dist.all_reduce(peaks, dist.ReduceOp.MAX)
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    seconds = clock.window_s / span.steps
    found: dict[str, Any] = {
        "first_loss": float(f"{losses[0]:.6g}"),
        "last_loss": float(f"{losses[-1]:.6g}"),
        "trained_here": trainable,
        "setup_s": round(setup, 1),
        "first_step_s": round(clock.first_step_s, 2),
        "s_per_step": float(f"{seconds:.4g}"),
        "tokens_per_s": round(case.tokens / seconds),
        "step_ms": " ".join(f"{ms:.0f}" for ms in clock.step_ms()),
        "rows": trainer.layout.describe(),
    }
    if on_gpu:
        found |= {"made_gib": round(float(peaks[0]) / 2**30, 2), "peak_gib": round(float(peaks[1]) / 2**30, 2)}
    found |= shares_of(clock.kernels, span.profiled, seconds)
    wrong = not abs(losses[0] - FIRST_LOSS) < TOLERANCE or not all(map(math.isfinite, losses))
    return {**found, "status": f"wrong: the first loss is {losses[0]:.4f}, not 0.6931" if wrong else "ok"}


def make_trainer(case: Case, span: Span, device: torch.device, folder: str, clock: Clock) -> Any:
    """An `OTPOTrainer` of random weights whose experts DeepSpeed spreads over all processes.

    Each process makes the whole model in bfloat16 on its device, from one seed, and keeps its part of the experts.
    """
    on_gpu = device.type == "cuda"
    deepspeed = expert_parallel_config("qwen3_moe", case.gpus, STAGE)
    more: dict[str, Any] = {} if on_gpu else {"accelerator_config": {"use_configured_state": True}}
    args = OTPOConfig(
        output_dir=folder,
        deepspeed=deepspeed,
        beta=0.1,
        per_device_train_batch_size=case.pairs,
        max_steps=span.total,
        max_length=case.prompt + case.response,
        # Of LoRA's size; a step is as long at any rate.
        learning_rate=1e-5,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        train_sampling_strategy="sequential",
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        bf16=on_gpu,
        use_cpu=not on_gpu,
        # One log of the first step, and one of all others: each log waits for the device.
        logging_steps=span.total,
        logging_first_step=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        log_level="error",
        **more,
    )
    extra: dict[str, Any] = {}
    if case.adapter == "lora":
        from peft import LoraConfig

        extra["peft_config"] = LoraConfig(
            r=LORA_RANK,
            lora_alpha=2 * LORA_RANK,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )
    else:
        extra["ref_model"] = make_model(case, device)
    trainer = with_expert_parallelism(OTPOTrainer, case.gpus)(
        make_model(case, device),
        args=args,
        train_dataset=make_pairs(case, span.total),
        processing_class=make_tokenizer(tiny=case.tiny),
        callbacks=[clock],
        **extra,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def make_model(case: Case, device: torch.device) -> Any:
    """Random weights, the same in each process; experts are run by memcpy, as their rows are once they are spread."""
    set_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = config_of(case.layers, case.tiny)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def make_pairs(case: Case, steps: int) -> Dataset:
    """Seeded random words, each a token: a prompt, and two responses of one length, which end with a token."""
    draw = random.Random(0)
    words = TINY_WORDS if case.tiny else WORDS

    def text(tokens: int) -> str:
        return " ".join(f"w{draw.randrange(words)}" for _ in range(tokens))

    size = case.response - 1
    rows = [
        {"prompt": f"{text(case.prompt)} ", "chosen": text(size), "rejected": text(size)}
        for _ in range(steps * case.pairs * case.gpus)
    ]
    return Dataset.from_list(rows)


def memory_of_gpu() -> float:
    """Bytes of a GPU; those of an H100 of 80 GB where there is none."""
    return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else 79 * 2**30


MACHINE = ("transformers", "trl", "deepspeed", "peft")


def describe_machine() -> dict[str, str]:
    """For every line of the CSV."""
    return harness.describe_machine(*MACHINE)

"""`otpo plan`: parameters, memory, communication and time of a Compass training run, before it is started."""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time it is imported when options have been read, since it brings torch
    from moe_backbone.planning.plan import Plan

_DESCRIPTION = """\
Plan the training of a Compass model: parameters, memory of a GPU by part and whether it fits, all-to-all bytes,
estimated time of a step, MFU and tokens a second. Nothing is downloaded and no GPU is needed.

  otpo plan compass-small --gpus_per_node 1 --micro_batch_size 4
  otpo plan compass-v3 --gpu h100 --nodes 64 --strategy zero3 --expert_parallel_size 8 --precision bf16 \\
      --gradient_checkpointing --gradient_accumulation_steps 8 --tokens 12e12
  otpo plan runs/my-model/config.json --json
"""
_GIB = 2**30
_MIB = 2**20


def make_parser() -> argparse.ArgumentParser:
    """The parser; what names stand for is checked later, by what knows them."""
    parser = argparse.ArgumentParser(
        prog="otpo plan",
        usage="otpo plan MODEL [options]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="compass-v3, compass-v2, compass-small, compass-tiny, or a folder with a config.json, or such a file",
    )
    parser.add_argument("--json", action="store_true", help="print JSON: bytes, seconds, FLOPs")

    # The machines decide what fits and how fast it is.
    machine = parser.add_argument_group("machines")
    add = machine.add_argument
    add("--gpu", default="h100", metavar="NAME", help="h100, h100-pcie, h200, b200, a100, a100-40gb, l40s (h100)")
    add("--nodes", type=int, default=1, metavar="N", help="machines (1)")
    add("--gpus_per_node", type=int, default=8, metavar="N", help="GPUs of each (8)")
    add(
        "--efficiency",
        type=float,
        metavar="X",
        help="share of the GPU's dense bfloat16 rate that matrix products reach, half of it in attention (0.72: "
        "grouped_mm of 65536 x 4096 x 14336 ran at 713 of 989 TFLOP/s on an H100; smaller ones reach less)",
    )

    # The training decides what has to fit.
    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--strategy", default="ddp", metavar="NAME", help="ddp, zero1, zero2, zero3 (ddp)")
    add(
        "--expert_parallel_size",
        type=int,
        default=1,
        metavar="N",
        help="GPUs of a node that share the experts; divides the experts and the GPUs of a node (1)",
    )
    add(
        "--expert_exchange",
        default="auto",
        metavar="NAME",
        help="gather (all tokens to all GPUs that share experts), all_to_all (each row to its expert), or auto, which "
        "gathers where that moves no more bytes, as in pretraining (auto)",
    )
    add(
        "--compile_layers",
        choices=("auto", "true", "false"),
        default="auto",
        help="whether layers are compiled; auto compiles where pretraining can, not under zero3 nor with all_to_all. "
        "Memory is that of layers that are not (auto)",
    )
    add("--experts_implementation", default="memcpy", metavar="NAME", help="memcpy, grouped_mm (memcpy)")
    add(
        "--attention_kernels",
        default="auto",
        metavar="NAME",
        help="torch, flash4 (FlashAttention-4), or auto: flash4 for a Hopper GPU where it is installed here (auto)",
    )
    add("--micro_batch_size", type=int, default=1, metavar="N", help="rows on a GPU at a time (1)")
    add(
        "--sequence_length",
        type=int,
        metavar="N",
        help="tokens of a row (4096, or the limit if less); beyond the limit, that is raised as in pretraining",
    )
    add("--packed", action="store_true", help="rows hold several documents; memory is that of a mask")
    add("--gradient_accumulation_steps", type=int, default=1, metavar="N", help="micro-batches of a step (1)")
    add("--gradient_checkpointing", action="store_true", help="layers keep their inputs alone and run twice")
    add(
        "--precision",
        default="auto",
        metavar="NAME",
        help="bf16-mixed: autocast over float32 weights, as the Trainer's bf16 option does. bf16: bfloat16 weights "
        "and gradients beside float32 master weights and moments, as DeepSpeed does. bf16-masters: bfloat16 weights, "
        "and the other halves of their float32 masters in the optimizer. bf16-pure: all in bfloat16. float32. auto: "
        "what pretrain takes, bf16-masters on one GPU by adamw, bf16 under ZeRO, else bf16-mixed (auto)",
    )
    add("--optimizer", default="adamw", metavar="NAME", help="adamw (fused), adamw_foreach, adamw_8bit (adamw)")
    add("--tokens", type=float, metavar="X", help="also print how many days so many tokens take, as in 12e12")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the plan, and returns 0; an option that cannot be ends the process with code 2."""
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.tokens is not None and not options.tokens > 0:
        parser.error(f"`tokens` must be above 0, got {options.tokens:g}.")
    if options.efficiency is not None and not 0 < options.efficiency <= 1:
        parser.error(
            f"`efficiency` is a share of the GPU's rate: set it above 0 and to at most 1, got {options.efficiency:g}."
        )
    try:
        plan = _make_plan(options)
    except ValueError as error:
        parser.error(str(error))
    if options.json:
        report = plan.as_dict()
        if options.tokens:
            report["days"] = plan.days(options.tokens)
        _print_json(report)
    else:
        _show(plan, options.model, options.tokens)
    return 0


def _print_json(report: dict[str, Any]) -> None:
    from rich.console import Console

    Console(soft_wrap=True).print(json.dumps(report, indent=2), highlight=False, markup=False)


def _make_plan(options: argparse.Namespace) -> "Plan":
    from moe_backbone.planning.hardware import find_gpu
    from moe_backbone.planning.plan import load_config, make_plan
    from moe_backbone.planning.setup import TrainingSetup
    from moe_backbone.planning.step_time import Rates

    config = load_config(options.model)
    named = {name: getattr(options, name) for name in TrainingSetup.__dataclass_fields__}
    if options.sequence_length is None:
        named["sequence_length"] = min(TrainingSetup.sequence_length, config.max_position_embeddings)
    named["compile_layers"] = {"auto": None, "true": True, "false": False}[options.compile_layers]
    if options.attention_kernels == "auto":
        named["attention_kernels"] = "flash4" if _fourth_would_run(options.gpu, config.head_dim) else "torch"
    if options.precision == "auto":
        named["precision"] = _precision(options, config)
    share = options.efficiency
    rates = Rates() if share is None else Rates(matmul=share, attention=share / 2)
    return make_plan(config, find_gpu(options.gpu), TrainingSetup(**named), rates)


def _precision(options: argparse.Namespace, config: Any) -> str:
    """What training takes where nothing is said: DeepSpeed its own, one GPU masters unless weights are float32."""
    from moe_backbone.planning.activations import MASTERS

    if options.strategy != "ddp":
        return "bf16"
    alone = options.nodes == options.gpus_per_node == 1 and options.optimizer != "adamw_8bit"
    return MASTERS if alone and str(config.dtype).removeprefix("torch.") in ("None", "bfloat16") else "bf16-mixed"


def _fourth_would_run(gpu: str, head_dim: int) -> bool:
    """Whether training would take FlashAttention-4 on such a GPU, were it started in this environment."""
    import importlib.metadata
    import os

    try:
        installed = bool(importlib.metadata.version("flash-attn-4"))
    except importlib.metadata.PackageNotFoundError:
        installed = False
    wanted = os.environ.get("OTPO_FLASH_ATTENTION", "auto") == "auto"
    return installed and wanted and gpu.lower().startswith(("h100", "h200")) and 64 <= head_dim <= 128


def _show(plan: "Plan", model: str, tokens: float | None) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    setup = plan.setup
    gpus = f"{setup.nodes} x {setup.gpus_per_node}" if setup.nodes > 1 else f"{setup.gpus_per_node}"
    console.print(f"{model} on {gpus} {plan.gpu.title}", style="bold", markup=False)
    way = f" ({plan.exchange.kind})" if setup.expert_parallel_size > 1 else ""
    twice = "with" if setup.gradient_checkpointing else "no"
    layers = "compiled" if setup.compiles(plan.config) else "uncompiled"
    console.print(
        f"{setup.strategy}, expert parallelism {setup.expert_parallel_size}{way}, {setup.precision}, "
        f"{setup.optimizer}, {setup.experts_implementation}, "
        f"{setup.micro_batch_size} x {setup.sequence_length:,} tokens a GPU and micro-batch, "
        f"{setup.tokens_per_step:,} a step, {twice} gradient checkpointing, "
        f"{layers} layers, attention by {setup.attention_kernels}\n",
        markup=False,
    )
    for table in (_parameters(plan), _memory(plan), _traffic(plan), _time(plan, tokens)):
        console.print(table)
        console.print()
    if plan.remedy:
        console.print(f"{plan.remedy}\n", style="bold", markup=False)
    for line in plan.assumptions:
        console.print(f"- {line}", style="dim", markup=False)


def _table(title: str, rows: Sequence[tuple[str, str]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.HORIZONTALS, show_header=False)
    table.add_column(min_width=28)
    table.add_column(justify="right", min_width=16)
    for name, value in rows:
        table.add_row(name, value)
    return table


def _parameters(plan: "Plan") -> Any:
    counts = plan.parameters
    names = ("embeddings", "head", "attention", "routers", "experts", "shared_experts", "norms")
    rows = [(name.replace("_", " "), f"{getattr(counts, name):,}") for name in names if getattr(counts, name)]
    rows += [("total", f"{counts.total:,}"), ("active", f"{counts.active:,}")]
    if counts.mtp:
        rows.append(("MTP layers, beside the total", f"{counts.mtp:,}"))
    return _table("Parameters", rows)


def _memory(plan: "Plan") -> Any:
    memory = plan.memory
    rows = [(name, f"{value / _GIB:,.2f} GiB") for name, value in memory.parts.items()]
    share = memory.total / plan.gpu.memory
    verdict = f"{share:.0%} of {plan.gpu.memory / _GIB:.0f} GiB: {plan.fit}"
    rows.append((f"[bold]total[/bold], {verdict}", f"[bold]{memory.total / _GIB:,.2f} GiB[/bold]"))
    return _table(f"Memory of a GPU at its peak: {memory.moment}", rows)


def _traffic(plan: "Plan") -> Any:
    forward, backward = (f"{value / _MIB:,.1f} MiB" for value in (plan.exchange.forward, plan.exchange.backward))
    rows = [("forward, dispatch and combine", forward), ("backward, their gradients", backward)]
    way = "Tokens gathered" if plan.exchange.kind == "gather" else "All-to-all"
    return _table(f"{way} of a layer, GPU and micro-batch", rows)


def _time(plan: "Plan", tokens: float | None) -> Any:
    rows = [(name.replace("_", " "), f"{1e3 * value:,.1f} ms") for name, value in vars(plan.time).items()]
    rows.append(("[bold]step[/bold]", f"[bold]{1e3 * plan.time.total:,.1f} ms[/bold]"))
    rows.append(("model FLOPs for a token", f"{plan.flops / 1e9:,.2f} GFLOP"))
    rows.append(("tokens a second", f"{plan.tokens_per_second:,.0f}"))
    rows.append(("MFU", f"{plan.mfu:.1%}"))
    if tokens:
        rows.append((f"{tokens:,.0f} tokens", f"{plan.days(tokens):,.1f} days"))
    return _table("Time of a step, estimated", rows)

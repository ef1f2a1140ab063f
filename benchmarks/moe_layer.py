"""Whole experts modules of transformers: memcpy beside transformers' own implementations, Liger-Kernel and SonicMoE.

Forward, and forward with the gradients of input, router's weights and experts' weights, in bfloat16. A time is
reported only if, in the same run, output and gradients of that very contender match float32 eager; otherwise `status`
says which does not, or what was raised. `errors` are the worst row's of each tensor, relative to the row.

Times are the device's: calls queue behind a sleep; `host_ms`, at decoding sizes, is with the launches in the way.
`tflops` takes a forward as 6 T K H I and its backward as twice that. `peak_mib` is what the step allocates over
weights and inputs, gradients included. The version of transformers stands in each row: `grouped_mm` is its own. With
5.17, which masks rows of absent experts in three passes more, `grouped_mm unmasked` is what 5.18 and later run.

    python -m benchmarks.moe_layer              all shapes, writes CSV and figure, prints a verdict
    python -m benchmarks.moe_layer --shapes qwen3-30b-a3b --contenders memcpy grouped_mm liger --tune_liger
    python -m benchmarks.moe_layer --figure benchmarks/results/moe_layer_h100.csv
"""

import argparse
import contextlib
import copy
import gc
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks import harness
from benchmarks.figures import close_empty, grouped_bars, legend, machine_line, number, save
from benchmarks.harness import name_of_gpu
from benchmarks.moe_cases import random_routing, row_error
from benchmarks.moe_contenders import (
    BASE,
    BATCHED,
    CONTENDERS,
    DECODING,
    ONE_BY_ONE,
    OURS,
    TRAINING,
    UNMASKED,
    by_name,
)
from moe_backbone import CompassConfig
from moe_backbone.model.moe_block import CompassExperts


class Layer(NamedTuple):
    """An experts module: T, H, I, E, K, and how its router deals."""

    name: str
    family: str
    tokens: int
    hidden: int
    width: int
    experts: int
    slots: int
    skewed: bool = False
    backward: bool = True

    @property
    def columns(self) -> dict[str, Any]:
        """As in the CSV."""
        routing = "skewed" if self.skewed else "even"
        return {"shape": self.name, **dict(zip(self._fields[2:7], self[2:7], strict=True)), "routing": routing}

    @property
    def contenders(self) -> tuple[str, ...]:
        return (*TRAINING, *ONE_BY_ONE) if self.backward else DECODING

    @property
    def gathered_bytes(self) -> int:
        """What `batched_mm` takes for weights: those of an expert for every slot."""
        return 2 * 3 * self.tokens * self.slots * self.hidden * self.width


QWEN = (2048, 768, 128, 8)
DECODED = (1, 2, 4, 8, 64, 256)
LAYERS = (
    Layer("qwen3-30b-a3b", "qwen3", 16384, *QWEN),
    Layer("qwen3-30b-a3b, skewed", "qwen3", 16384, *QWEN, skewed=True),
    *(Layer(f"qwen3-30b-a3b, {tokens} tokens", "qwen3", tokens, *QWEN, backward=False) for tokens in DECODED),
    Layer("compass", "compass", 16384, 4096, 6144, 16, 4),
    Layer("mixtral-8x7b", "mixtral", 16384, 4096, 14336, 8, 2),
)
FINE = LAYERS[:2]
ROUTER_DTYPES = {"qwen3": torch.bfloat16, "compass": torch.bfloat16, "mixtral": torch.float32}  # as they return them
GATE = 0.1  # bfloat16 leaves 0.02, its atomic sums 0.06, and a wrong row is off by about 1
OVER_GROUPED, NOISE = 1.25, 0.01
KINDS = {"forward": 1, "forward_backward": 3}  # and their products, in those of a forward
COLUMNS = ("shape", *Layer._fields[2:7], "routing", "contender", "status", "errors", "forward_ms", "host_ms")
COLUMNS += ("forward_backward_ms", "forward_tflops", "forward_backward_tflops", "forward_peak_mib")
COLUMNS += ("forward_backward_peak_mib", "forward_speedup", "forward_backward_speedup")


class Inputs(NamedTuple):
    """`(T, H)`, the router's choice `(T, K)` and its weights, and the output's gradient `(T, H)`."""

    x: Tensor
    index: Tensor
    weights: Tensor
    grad: Tensor


def make_experts(layer: Layer, device: str = "cuda") -> Any:
    """The family's own module in bfloat16, weights scaled so that activations stay near one."""
    sizes: dict[str, Any] = {"hidden_size": layer.hidden, "num_experts_per_tok": layer.slots}
    with torch.device(device):
        if layer.family == "mixtral":
            sizes |= {"num_local_experts": layer.experts, "intermediate_size": layer.width}
            experts: Any = MixtralExperts(MixtralConfig(**sizes))
        else:
            sizes |= {"num_experts": layer.experts, "moe_intermediate_size": layer.width}
            qwen = layer.family == "qwen3"
            experts = Qwen3MoeExperts(Qwen3MoeConfig(**sizes)) if qwen else CompassExperts(CompassConfig(**sizes))
    experts = experts.bfloat16()
    generator = torch.Generator(device).manual_seed(2)
    for weight in experts.parameters():
        weight.data.normal_(std=weight.size(-1) ** -0.5, generator=generator)
    return experts


def make_inputs(layer: Layer, device: str = "cuda") -> Inputs:
    sizes, dtype = (layer.tokens, layer.experts, layer.slots), ROUTER_DTYPES[layer.family]
    routing = random_routing(*sizes, device, skewed=layer.skewed, dtype=dtype)
    generator = torch.Generator(device).manual_seed(1)
    both = torch.randn(2, layer.tokens, layer.hidden, device=device, generator=generator, dtype=torch.bfloat16)
    return Inputs(both[0], *routing, both[1])


def step(
    forward: Callable[..., Tensor], experts: nn.Module, inputs: Inputs, backward: bool
) -> Callable[[], dict[str, Tensor]]:
    """A call that gives the output, and with `backward` the gradients, by name."""
    leaves = {"x": inputs.x, "router": inputs.weights}
    leaves = {name: leaf.detach().requires_grad_(backward) for name, leaf in leaves.items()}

    def call() -> dict[str, Tensor]:
        with contextlib.nullcontext() if backward else torch.no_grad():
            output = forward(experts, leaves["x"], inputs.index, leaves["router"])
        if not backward:
            return {"output": output}
        wanted = leaves | dict(experts.named_parameters())
        gradients = torch.autograd.grad(output, tuple(wanted.values()), inputs.grad)
        return {"output": output.detach(), **dict(zip(wanted, gradients, strict=True))}

    return call


def reference(layer: Layer, experts: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Output and gradients of the same weights and inputs in float32, by the family's own eager forward."""
    exact = Inputs(inputs.x.float(), inputs.index, inputs.weights.float(), inputs.grad.float())
    return step(by_name("eager"), copy.deepcopy(experts).float(), exact, layer.backward)()


def run_one(name: str, layer: Layer, experts: nn.Module, inputs: Inputs, want: dict[str, Tensor]) -> dict[str, Any]:
    """Status and errors of a contender, and its times if they allow it."""
    if name == BATCHED and layer.gathered_bytes > torch.cuda.mem_get_info()[0]:
        return {"status": f"not run: it gathers {layer.gathered_bytes / 2**30:.0f} GiB of weights"}
    try:
        kinds = tuple(KINDS)[: 1 + layer.backward]
        calls = {kind: step(CONTENDERS[name], experts, inputs, kind != "forward") for kind in kinds}
        errors: dict[str, float] = {}
        for call in calls.values():
            for tensor, value in call().items():
                errors[tensor] = max(errors.get(tensor, 0.0), row_error(value, want[tensor]))
        row: dict[str, Any] = {"errors": " ".join(f"{tensor} {error:.1e}" for tensor, error in errors.items())}
        wrong = [tensor for tensor, error in errors.items() if error > GATE]
        if wrong:
            return row | {"status": f"wrong: {', '.join(wrong)}"}
        for kind, call in calls.items():
            measured = harness.measure_device(call, cold=not layer.backward, calls=3 if layer.backward else 5)
            flops = KINDS[kind] * 6 * layer.tokens * layer.slots * layer.hidden * layer.width
            row |= {f"{kind}_ms": round(measured.ms, 4), f"{kind}_tflops": round(flops / measured.ms / 1e9, 1)}
            row[f"{kind}_peak_mib"] = round(measured.peak_mib, 1)
        if not layer.backward:
            row["host_ms"] = round(harness.measure(calls["forward"])[0], 4)
    except Exception as error:  # a rival may raise anything
        return {"status": harness.reason(error)}
    return {"status": "ok"} | row


def run_layer(layer: Layer, names: list[str], deadline: harness.Deadline) -> list[dict[str, Any]]:
    """A row for each contender, those over `grouped_mm` filled in."""
    empty: dict[str, Any] = dict.fromkeys(COLUMNS, "") | layer.columns | {"status": "not reached in time"}
    rows = [empty | {"contender": name} for name in layer.contenders if name in names]
    if deadline.passed:
        return rows
    experts, inputs = make_experts(layer), make_inputs(layer)
    want = reference(layer, experts, inputs)
    for row in rows:
        if not deadline.passed:
            row |= run_one(row["contender"], layer, experts, inputs, want)
        gc.collect()
        torch.cuda.empty_cache()
    base = next((row for row in rows if row["contender"] == BASE), empty)
    for row, kind in itertools.product(rows, KINDS):
        if base[f"{kind}_ms"] and row[f"{kind}_ms"]:
            row[f"{kind}_speedup"] = round(float(base[f"{kind}_ms"]) / float(row[f"{kind}_ms"]), 3)
    return rows


def run(layers: list[Layer], names: list[str], minutes: float, output: Path, console: Console) -> list[dict]:
    """Measures every layer and writes what there is after each, so that a killed run keeps its rows."""
    tiles = {"liger_tiles": "fixed" if os.environ.get("LIGER_FUSED_MOE_AUTOTUNE") == "0" else "tuned"}
    machine = harness.describe_machine("transformers", "liger-kernel", "sonic-moe", "quack-kernels") | tiles
    rows: list[dict] = []
    deadline = harness.Deadline(minutes)
    for layer in layers:
        for row in run_layer(layer, names, deadline):
            console.print(*(f"{row[key]}" for key in COLUMNS), f"transformers {machine['transformers']}")
            rows.append(row | machine)
        harness.write_rows(output, rows)
    return rows


def verdict(rows: list[dict], console: Console) -> None:
    """What was measured beside what was to be reached, ours against batched products, and who has no time."""
    table = Table("target", "measured", "met", title="Verdict")
    found = {(row["shape"], row["contender"]): row for row in rows}
    ours = [row for row in rows if row["contender"] == OURS]

    def line(target: str, ratio: float, least: float) -> None:
        table.add_row(target, f"{ratio:.3f}" if ratio else "not measured", "yes" if ratio >= least else "NO")

    def ratio(row: dict, rival: str, column: str) -> float:
        other = found.get((row["shape"], rival), {}).get(column)
        return float(other) / float(row[column]) if other and row[column] else 0.0

    for row in ours:
        training = row["shape"] in {layer.name for layer in LAYERS if layer.backward}
        for kind in tuple(KINDS)[: 1 + training]:
            for rival in (BASE, *((UNMASKED,) if (row["shape"], UNMASKED) in found else ())):
                line(f"{row['shape']}: {kind}, speed over {rival} >= 1", ratio(row, rival, f"{kind}_ms"), 1 - NOISE)
            line(f"{row['shape']}: {kind}, {BASE}'s peak over ours >= 1", ratio(row, BASE, f"{kind}_peak_mib"), 1)
        if row["shape"] in {layer.name for layer in FINE}:
            gain = ratio(row, BASE, "forward_backward_ms")
            line(f"{row['shape']}: forward_backward, speed over {BASE} >= {OVER_GROUPED}", gain, OVER_GROUPED)
    console.print(table)
    harness.print_missing(rows, ("shape", "contender", "status"), console)


def draw(path: Path) -> Path:
    """Speed over grouped_mm and peak memory of training steps, and forwards of few tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = harness.read_rows(path)
    figure, panels = plt.subplots(1, 3, figsize=(16, 4.8), layout="constrained")
    shapes = [layer.name for layer in LAYERS if layer.backward and any(row["shape"] == layer.name for row in rows)]
    names = [name for name in CONTENDERS if any(row["contender"] == name and row["forward_ms"] for row in rows)]
    bars = [name for name in names if name != BATCHED]
    found = {(row["contender"], row["shape"]): row for row in rows}
    for panel, column, scale in (
        (panels[0], "forward_backward_speedup", 1),
        (panels[1], "forward_backward_peak_mib", 1 / 1024),
    ):
        heights = {
            name: [scale * number(found.get((name, shape), {}).get(column)) for shape in shapes] for name in bars
        }
        grouped_bars(panel, shapes, heights, [f"C{names.index(name)}" for name in bars])
    for i, name in enumerate(names):
        here = [row for row in rows if row["contender"] == name and row["host_ms"]]
        points = sorted((int(row["tokens"]), float(row["forward_ms"])) for row in here)
        if points:
            panels[2].plot(*zip(*points, strict=True), marker="o", color=f"C{i}", label=name)
    panels[0].set(title="forward and backward", ylabel=f"times as fast as {BASE}")
    panels[1].set(title="forward and backward", ylabel="GiB over weights")
    panels[2].set(title="forward of qwen3-30b-a3b", xlabel="tokens", ylabel="ms", xscale="log", yscale="log")
    for panel in panels:
        panel.grid(alpha=0.3, axis="y")
    legend(figure, panels)
    close_empty(panels)
    figure.suptitle(machine_line(rows, "torch", "triton", "transformers", "liger-kernel"))
    return save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [layer.name for layer in LAYERS]
    parser.add_argument("--shapes", nargs="+", default=names, choices=names, metavar="NAME")
    everyone = (*TRAINING, *ONE_BY_ONE)
    parser.add_argument("--contenders", nargs="+", default=TRAINING, choices=everyone, metavar="NAME")
    parser.add_argument("--tune_liger", action="store_true", help="let Liger-Kernel try all its tiles; takes minutes")
    parser.add_argument("--minutes", type=float, default=4.0, help="start no further contender after this time")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder")
    parser.add_argument("--figure", type=Path, metavar="CSV", help="only print the verdict on this CSV and draw it")
    args = parser.parse_args()
    console = Console(width=200, highlight=False)
    if args.figure:
        verdict(harness.read_rows(args.figure), console)
        console.print(f"{draw(args.figure)}")
        return
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a GPU; on the CPU, see tests/moe_backbone")
    os.environ["LIGER_FUSED_MOE_AUTOTUNE"] = str(int(args.tune_liger))  # read when it is imported
    path = args.output / f"moe_layer_{name_of_gpu()}.csv"
    layers = [layer for layer in LAYERS if layer.name in args.shapes]
    if not any(name in layer.contenders for layer in layers for name in args.contenders):
        parser.error(f"none of {args.contenders} runs {args.shapes}: few tokens are run by {list(DECODING)} alone")
    rows = run(layers, args.contenders, args.minutes, path, console)
    verdict(rows, console)
    console.print(f"{path} {draw(path)}")


if __name__ == "__main__":
    main()

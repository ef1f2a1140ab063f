"""Each product of a layer of experts alone: our kernels for Hopper, tile by tile, beside what they would replace.

What they replace is torch's grouped product, the memcpy operator's gather before it and our elementwise kernel after
it, each with its own time; `ratio` is their sum over our kernel's time, so a fusion pays above 1. The gather of the
output's gradient counts to `down_gradient`; it is saved only if `down` is fused too, without which `ratio` is `alone`.
An answer that is further than 1% from theirs, as a norm, has no time. TFLOP/s count the product alone.

Predicted for Qwen3-30B-A3B's shape at 3 TB/s and 600 TFLOP/s, in ms: `up` 0.20 + 1.37 + 0.20, so ours pays above 465
TFLOP/s; `down_gradient` 0.20 + 0.69 + 0.40, above 320 (410 where `down` is not fused); `gate_up` 0.20 + 1.37, above
525; `down` 0.69, above 600. A forward and backward of the layer: memcpy 8.7 (measured), without fused products 8.1,
with all four at the rate of torch's 7.2.

    python -m benchmarks.grouped_product            all shapes of benchmarks/moe_layer.py that train
    python -m benchmarks.grouped_product --shapes qwen3-30b-a3b --products up
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import harness
from benchmarks.moe_layer import LAYERS, Layer, make_experts, make_inputs
from otpo_kernels.grouped_product import Fusions, sources_of_rows
from otpo_kernels.memcpy import permute, route, unpermute

GATE = 0.01
SHAPES = [layer for layer in LAYERS if layer.backward]
COLUMNS = ("shape", "product", "contender", "status", "ms", "tflops", "ratio", "alone", "parts")


class Product(NamedTuple):
    """One product: what it multiplies, our kernel by tile, and what it replaces by name, the product as `product`."""

    flops: int
    ours: Callable[..., Any]
    tiles: tuple[Any, ...]
    replaced: dict[str, Callable[[], Any]]
    answer: Callable[[], Any]


def products(layer: Layer) -> tuple[dict[str, Product], dict[str, Callable[[], Any]]]:
    """The four products with a fused kernel, and the calls of a layer that stay as they are, by name."""
    from otpo_kernels import grouped_gradient_kernels as gradients
    from otpo_kernels import grouped_product_kernels as kernels
    from otpo_kernels import swiglu_kernels

    grouped_mm = torch.nn.functional.grouped_mm
    experts, inputs = make_experts(layer), make_inputs(layer)
    gate_up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
    x, grad, weights = inputs.x, inputs.grad, inputs.weights.contiguous()
    routing = route(inputs.index, layer.experts)
    ends, slots = routing.offsets, layer.slots
    sources = sources_of_rows(routing.destinations, routing.rows)
    x_rows, grad_rows = permute(x, routing), permute(grad, routing)
    h = grouped_mm(x_rows, gate_up.transpose(1, 2), offs=ends)
    a = swiglu_kernels.swiglu(h, ends)
    grad_a = grouped_mm(grad_rows, down, offs=ends)
    grad_h, weighted, _ = swiglu_kernels.swiglu_backward(grad_a, h, weights, sources, ends)
    y = grouped_mm(a, down.transpose(1, 2), offs=ends)
    flops = 2 * routing.rows * layer.hidden * layer.width
    found = {
        "up": Product(
            2 * flops,
            lambda tile: kernels.up(x, sources, slots, gate_up, ends, tile),
            kernels.UP_TILES,
            {
                "gather": lambda: permute(x, routing),
                "product": lambda: grouped_mm(x_rows, gate_up.transpose(1, 2), offs=ends),
                "swiglu": lambda: swiglu_kernels.swiglu(h, ends),
            },
            lambda: (h, a),
        ),
        "down_gradient": Product(
            flops,
            lambda tile: gradients.down_gradient(grad, sources, slots, down, h, weights, ends, tile),
            gradients.DOWN_GRADIENT_TILES,
            {
                "gather": lambda: permute(grad, routing),
                "product": lambda: grouped_mm(grad_rows, down, offs=ends),
                "swiglu": lambda: swiglu_kernels.swiglu_backward(grad_a, h, weights, sources, ends),
            },
            lambda: swiglu_kernels.swiglu_backward(grad_a, h, weights, sources, ends),
        ),
        "gate_up": Product(
            2 * flops,
            lambda tile: gradients.weight_gradient(x, grad_h, sources, slots, ends, gathered_left=False, tile=tile),
            gradients.WEIGHT_GRADIENT_TILES,
            {
                "gather": lambda: permute(x, routing),
                "product": lambda: grouped_mm(grad_h.t(), x_rows, offs=ends),
            },
            lambda: grouped_mm(grad_h.t(), x_rows, offs=ends),
        ),
        "down": Product(
            flops,
            lambda tile: gradients.weight_gradient(
                grad, weighted, sources, slots, ends, gathered_left=True, tile=tile
            ),
            gradients.WEIGHT_GRADIENT_TILES,
            {"product": lambda: grouped_mm(grad_rows.t(), weighted, offs=ends)},
            lambda: grouped_mm(grad_rows.t(), weighted, offs=ends),
        ),
    }
    stay = {
        "down product": lambda: grouped_mm(a, down.transpose(1, 2), offs=ends),
        "input gradient product": lambda: grouped_mm(grad_h, gate_up, offs=ends),
        "unpermute weighted": lambda: unpermute(y, routing, weights),
        "unpermute": lambda: unpermute(y, routing),
        "route": lambda: route(inputs.index, layer.experts),
        "sources": lambda: sources_of_rows(routing.destinations, routing.rows),
    }
    return found, stay


def distance(got: Any, want: Any) -> float:
    """The largest distance of a tensor from its like, over that one's norm."""
    pairs = [(got, want)] if isinstance(got, Tensor) else list(zip(got, want, strict=True))
    return max(float((g.float() - w.float()).norm() / w.float().norm()) for g, w in pairs)


def run_product(product: Product) -> list[dict[str, Any]]:
    """A row for what is replaced and one for each tile."""
    parts = {name: harness.measure_device(call).ms for name, call in product.replaced.items()}
    total, want = sum(parts.values()), product.answer()
    shown = " + ".join(f"{name} {ms:.3f}" for name, ms in parts.items())
    row = {"contender": "torch", "status": "ok", "ms": round(total, 4), "ratio": 1.0, "alone": "", "parts": shown}
    rows: list[dict[str, Any]] = [row | {"tflops": round(product.flops / parts["product"] / 1e9, 1)}]
    for tile in product.tiles:
        row = dict.fromkeys(COLUMNS, "") | {"contender": " ".join(map(str, tile))}
        rows.append(row)
        try:
            error = distance(product.ours(tile), want)
            if not error <= GATE:
                row["status"] = f"wrong: {error:.2e}"
                continue
            ms = harness.measure_device(lambda tile=tile: product.ours(tile)).ms
        except Exception as error:  # a tile may not fit
            row["status"] = harness.reason(error)
            continue
        row |= {"status": "ok", "ms": round(ms, 4), "tflops": round(product.flops / ms / 1e9, 1)}
        row |= {"ratio": round(total / ms, 3), "alone": round((total - parts.get("gather", 0.0)) / ms, 3)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [layer.name for layer in SHAPES]
    parser.add_argument("--shapes", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--products", nargs="+", default=Fusions._fields, choices=Fusions._fields, metavar="NAME")
    parser.add_argument("--minutes", type=float, default=6.0, help="start no further product after this time")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a GPU; on the CPU, see tests/otpo_kernels/test_grouped_product.py")
    console, deadline = Console(width=160, highlight=False), harness.Deadline(args.minutes)
    rows: list[dict[str, Any]] = []
    for layer in SHAPES:
        if layer.name not in args.shapes or deadline.passed:
            continue
        found, stay = products(layer)
        lines = [
            {"product": name, "contender": "torch", "status": "ok", "ms": round(harness.measure_device(call).ms, 4)}
            for name, call in stay.items()
        ]
        for name in args.products:
            if not deadline.passed:
                lines += [row | {"product": name} for row in run_product(found[name])]
        for line in lines:
            row = dict.fromkeys(COLUMNS, "") | line | {"shape": layer.name}
            console.print(*(f"{row[name]}" for name in COLUMNS), sep=" | ")
            rows.append(row)
        del found, stay
        torch.cuda.empty_cache()
    machine = harness.describe_machine()
    path = args.output / f"grouped_product_{harness.name_of_gpu()}.csv"
    harness.write_rows(path, [row | machine for row in rows])
    console.print(f"{path}")


if __name__ == "__main__":
    main()

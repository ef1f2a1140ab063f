"""The tables of docs/performance.md about a layer of experts, and its words that hold numbers."""

from benchmarks.committed import Row, read, table

LAYERS = {
    "qwen3-30b-a3b": "Qwen3-30B-A3B: 128 experts of 768, top-8",
    "compass": "like Compass: 16 experts of 6144, top-4",
    "mixtral-8x7b": "Mixtral 8x7B: 8 experts of 14336, top-2",
}
PRODUCTS = {
    "up": ("up, gathers tokens, stores SwiGLU", 465),
    "down_gradient": ("gradient of SwiGLU's output, gathers, stores SwiGLU's gradient", 320),
    "gate_up": ("gradient of the up weights, gathers", 525),
    "down": ("gradient of the down weights, gathers", 600),
}
"""Products that were tried in Triton, and the TFLOP/s above which each was to pay, by bytes at 3 TB/s."""


def _rows_of(file: str) -> dict[tuple[str, str], Row]:
    """By shape and contender."""
    return {(row["shape"], row["contender"]): row for row in read(file)}


def expert_layers() -> str:
    """A layer of experts, forward and backward."""
    found = {
        (row["shape"], row["contender"]): row["forward_backward_ms"]
        for row in read("moe_layer_h100.csv")
        if row["status"] == "ok"
    }
    rows = []
    for shape, name in LAYERS.items():
        times = [float(found[shape, contender]) for contender in ("memcpy", "grouped_mm", "eager")]
        rows.append((name, *(f"{time:.1f} ms" for time in times), f"{times[1] / times[0]:.2f}"))
    return table(("layer", "memcpy in separate passes", "`grouped_mm`", "eager", "times `grouped_mm`"), rows)


def gated_layers() -> str:
    """SwiGLU experts as one operator, beside separate passes, each as rate, time and peak."""
    found = _rows_of("moe_layer_h200.csv")
    contenders = ("memcpy, separate passes", "memcpy", "memcpy compiled")
    rows = []
    for shape, name in LAYERS.items():
        cells = [found[shape, contender] for contender in contenders]
        texts = [
            f"{float(row['forward_backward_tflops']):.1f} TFLOP/s, {float(row['forward_backward_ms']):.1f} ms, "
            f"{float(row['forward_backward_peak_mib']) / 1024:.1f} GiB"
            for row in cells
        ]
        times = [float(row["forward_backward_ms"]) for row in cells]
        rows.append((name, *texts, f"{times[0] / times[1]:.2f}"))
    head = ("layer", "separate passes", "one operator: memcpy", "compiled: memcpy", "times separate passes")
    return table(head, rows)


def sonic_layers() -> str:
    """memcpy beside SonicMoE and `grouped_mm`: forward, and forward with backward, and what the latter allocates."""
    found = _rows_of("moe_layer_sonic_h200.csv")
    contenders = {"memcpy": "memcpy", "sonic": "SonicMoE", "grouped_mm": "`grouped_mm`"}
    rows = []
    for shape, name in LAYERS.items():
        for contender, title in contenders.items():
            if row := found.get((shape, contender)):
                times = (f"{float(row['forward_ms']):.2f} ms", f"{float(row['forward_backward_ms']):.2f} ms")
                rate = f"{float(row['forward_backward_tflops']):.1f} TFLOP/s"
                peak = f"{float(row['forward_backward_peak_mib']) / 1024:.1f} GiB"
                rows.append((name if contender == "memcpy" else "", title, *times, rate, peak))
    return table(("layer", "experts", "forward", "and backward", "both", "peak"), rows)


def gathering_products() -> str:
    """Products in Triton that gather as they load, each at its best tile, beside what they would replace."""
    found = [row for row in read("grouped_product_h200.csv") if row["shape"] == "qwen3-30b-a3b" and row["tflops"]]
    rows = []
    for product, (name, least) in PRODUCTS.items():
        here = [row for row in found if row["product"] == product]
        torchs = next(row for row in here if row["contender"] == "torch")
        tiles = [row for row in here if row is not torchs]
        best = max(tiles, key=lambda row: float(row["ratio"]))
        tile = " x ".join(best["contender"].split()[:3])
        numbers = (f"{float(row['tflops']):.0f}" for row in (best, torchs))
        rows.append((name, least, *numbers, f"{float(best['ratio']):.2f}", f"{tile}, of {len(tiles)}"))
    return table(("product", "pays above", "reached", "torch's product", "times as fast as torch", "tile"), rows)


def layer_sentences() -> dict[str, str]:
    """Of layers of experts: SonicMoE, where products that gather led to, and peaks of memory."""
    layers = _rows_of("moe_layer_h200_gathering_products.csv")

    def gain(contender: str, column: str = "forward_backward_ms", base: str = "fused") -> list[float]:
        return [float(layers[shape, base][column]) / float(layers[shape, contender][column]) - 1 for shape in LAYERS]

    peak = "forward_backward_peak_mib"
    up, every, held = gain("fused up"), gain("fused all"), gain("memcpy compiled", peak)
    more = gain("memcpy", peak)
    return {
        "SonicMoE": _beside_sonic(),
        "gathering layers": f"gained {max(up):.1%} at most and lost up to {-min(up):.1%}; all four lost "
        f"{-max(every):.0%} to {-min(every):.0%}",
        "compiled layers": f"takes {min(held):.0%} to {max(held):.0%} more memory",
        "eager peaks": f"{-min(more):.1%} less to {max(more):.1%} more",
    }


def _beside_sonic() -> str:
    """How far SonicMoE is ahead of memcpy, with the backward pass and in the forward pass alone."""
    rows = _rows_of("moe_layer_sonic_h200.csv")

    def over(shape: str, column: str) -> float:
        return float(rows[shape, "memcpy"][column]) / float(rows[shape, "sonic"][column]) - 1

    time, peak = "forward_backward_ms", "forward_backward_peak_mib"
    small, large = "qwen3-30b-a3b", "compass"
    return (
        f"is {over(small, time):.1%} faster on fine-grained experts, by a forward pass that is "
        f"{over(small, 'forward_ms'):.1%} faster, and {over(large, time):.1%} on large ones; memcpy's peak is "
        f"{over(small, peak):.0%} and {over(large, peak):.0%} higher"
    )

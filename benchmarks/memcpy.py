"""The memcpy operator beside torch, transformers and DeepSpeed: rows between the order of tokens and that of experts.

A time is reported only if, in the same run, the results of that very contender and operation, gradients included,
match float64 torch; otherwise `status` says how far they are, or what was raised. Times are the device's: calls queue
behind a sleep. Where the rows of an operation are less than 512 MB, each call finds the L2 cache full of other things.

`gb_per_s` counts the bytes that no method can save, in rows of H: permute T + N, unpermute N + T, their backwards
N + T and T + 2 N, `whole` the sum of the four. `share_of_roof` is that against a `copy_` of the same bytes, read and
written, or of 512 MB where they are fewer. `whole` is forward and backward of both through autograd, without `route`.

    python -m benchmarks.memcpy                 all shapes, writes CSV and figure, prints a verdict
    python -m benchmarks.memcpy --shapes anchor --contenders memcpy "torch gather"
    python -m benchmarks.memcpy --figure benchmarks/results/memcpy_h100.csv
"""

import argparse
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.figures import close_empty, grouped_bars, legend, machine_line, number, save
from benchmarks.harness import (
    Deadline,
    Measured,
    describe_machine,
    measure_device,
    name_of_gpu,
    print_missing,
    read_rows,
    reason,
    write_rows,
)
from benchmarks.moe_cases import MOVES, OPERATIONS, Memcpy, Problem, Shape, make_problem, prepare

SHAPES = (
    Shape("anchor", 16384, 4096, 16, 4),
    Shape("mixtral-8x7b", 16384, 4096, 8, 2),
    Shape("qwen3-30b-a3b", 16384, 2048, 128, 8),
    Shape("compass", 16384, 8192, 16, 4),
    Shape("gpt-oss, odd", 1000, 2880, 32, 4),
)
GATE = 0.05  # sums of K rows in bfloat16 reach 0.03, a row out of place is off by about 1
COPY, WAITS = "copy_", "no wait for the host"
ROOF_BYTES = 512 * 10**6
ROOF, ROUTE_MS, OVER_TORCH = 0.85, 0.040, 4.0
COLUMNS = ("shape", *Shape._fields[1:], "operation", "contender", "status", "error", "ms", "gb_per_s", "share_of_roof")
COLUMNS += ("temporaries_mib", "speedup_over_torch")
NAMES = tuple(moves.name for moves in MOVES)
TORCH = tuple(name for name in NAMES if name.startswith("torch"))


def floor_bytes(operation: str, shape: Shape) -> int:
    """Bytes that cannot be saved; 0 for `route`, of which they say nothing."""
    tokens, slots = shape.tokens, shape.tokens * shape.slots
    once = {"route": 0, "unpermute backward": tokens + 2 * slots, "whole": 4 * tokens + 5 * slots}
    return 2 * shape.hidden * once.get(operation, tokens + slots)


def waits_for_host(problem: Problem) -> str:
    """Runs each operation of ours once with waits forbidden; what was raised, or "ok"."""
    for operation in OPERATIONS:
        try:
            prepared = prepare(operation, Memcpy(), problem)
            prepared.run()  # what is compiled and tuned at the first call may wait
            torch.cuda.set_sync_debug_mode("error")
            prepared.run()
        except Exception as error:
            return f"{operation}: {reason(error)}"
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return "ok"


def run_one(operation: str, make: Callable[[], Any], problem: Problem, cold: bool) -> dict[str, Any]:
    """Status and error of a contender, and its time if they allow it."""
    try:
        prepared = prepare(operation, make(), problem)
        got = prepared.run()
        error = prepared.error(got)
        del got
        if error > GATE:
            return {"status": f"wrong: max error {error:.1e}", "error": f"{error:.1e}"}
        calls = 20 if operation == "route" else 5
        measured = measure_device(prepared.run, cold=cold, calls=calls)
    except Exception as error:  # a rival may raise anything
        return {"status": reason(error)}
    return {"status": "ok", "error": f"{error:.1e}"} | figures(measured)


def figures(measured: Measured) -> dict[str, Any]:
    return {"ms": round(measured.ms, 4), "temporaries_mib": round(measured.temporaries_mib, 1)}


def copy_ms(bytes_moved: int, cold: bool) -> Measured:
    """A plain copy that reads and writes so many bytes in all."""
    source = torch.randint(0, 127, (bytes_moved // 2,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return measure_device(lambda: target.copy_(source), cold=cold)


def run_operation(shape: Shape, operation: str, problem: Problem, contenders: list[Any], roofs: dict) -> list[dict]:
    """A row for each contender, those over the roof and over torch filled in."""
    floor = floor_bytes(operation, shape)
    cold = 0 < floor < ROOF_BYTES
    base = dict.fromkeys(COLUMNS, "") | shape.columns | {"operation": operation}
    rows = []
    if floor:
        roof_bytes = max(floor, ROOF_BYTES)
        if roof_bytes not in roofs:
            roofs[roof_bytes] = roof_bytes / copy_ms(roof_bytes, False).ms / 1e6
        rows.append(base | {"contender": COPY, "status": "ok"} | figures(copy_ms(floor, cold)))
    for make in contenders:
        rows.append(base | {"contender": make.name} | run_one(operation, make, problem, cold))
        gc.collect()
        torch.cuda.empty_cache()
    of_torch = [row["ms"] for row in rows if row["contender"] in TORCH and row["ms"] != ""]
    for row in rows:
        if row["ms"] != "" and floor:
            row["gb_per_s"] = round(floor / row["ms"] / 1e6)
            row["share_of_roof"] = round(floor / row["ms"] / 1e6 / roofs[max(floor, ROOF_BYTES)], 3)
        if row["ms"] != "" and of_torch:
            row["speedup_over_torch"] = round(min(of_torch) / row["ms"], 2)
    return rows


def run(shapes: list[Shape], contenders: list[Any], deadline: Deadline, output: Path, console: Console) -> list[dict]:
    """Measures every shape and writes what there is after each, so that a killed run keeps its rows."""
    machine = describe_machine("transformers", "deepspeed")
    rows: list[dict] = []
    roofs: dict[int, float] = {}
    for shape in shapes:
        base = dict.fromkeys(COLUMNS, "") | shape.columns
        problem = make_problem(shape)
        for operation in OPERATIONS:
            if deadline.passed:
                new = [
                    base | {"operation": operation, "contender": c.name, "status": "not reached in time"}
                    for c in contenders
                ]
            else:
                new = run_operation(shape, operation, problem, contenders, roofs)
            for row in new:
                console.print(*(f"{row[key]}" for key in COLUMNS))
            rows += [row | machine for row in new]
        if not deadline.passed:
            status = waits_for_host(problem)
            rows.append(base | {"operation": WAITS, "contender": Memcpy.name, "status": status} | machine)
        write_rows(output, rows)
        del problem
        torch.cuda.empty_cache()
    return rows


def verdict(rows: list[dict], console: Console) -> None:
    """What was measured beside what was to be reached, and why some contenders have no time."""
    table = Table("target", "measured", "met", title="Verdict")

    def look(shape: str, operation: str, column: str) -> dict[str, float]:
        here = [row for row in rows if (row["shape"], row["operation"]) == (shape, operation)]
        return {row["contender"]: float(row[column]) for row in here if row[column] != ""}

    def line(target: str, measured: float | None, words: str, met: Callable[[float], bool]) -> None:
        if measured is None:
            table.add_row(target, "not measured", "NO")
        else:
            table.add_row(target, words.format(measured), "yes" if met(measured) else "NO")

    anchor = SHAPES[0].name
    for operation in OPERATIONS[1:5]:
        share = look(anchor, operation, "share_of_roof").get(Memcpy.name)
        line(f"{anchor}: {operation} at {ROOF:.0%} of the roof or more", share, "{:.1%}", lambda x: x >= ROOF)
    ms = look(anchor, "route", "ms").get(Memcpy.name)
    line(f"{anchor}: route in {ROUTE_MS:.3f} ms or less", ms, "{:.4f} ms", lambda x: x <= ROUTE_MS)
    gain = look(anchor, "whole", "speedup_over_torch").get(Memcpy.name)
    line(f"{anchor}: whole {OVER_TORCH:g} times as fast as torch", gain, "{:.2f} times", lambda x: x >= OVER_TORCH)
    for shape in dict.fromkeys(row["shape"] for row in rows):
        times = look(shape, "whole", "ms")
        ours = times.pop(Memcpy.name, None)
        times.pop(COPY, None)
        best = min(times, key=times.__getitem__, default="")
        gain = times[best] / ours if ours and best else None
        line(f"{shape}: whole no slower than the best rival", gain, f"{{:.2f}} times ({best})", lambda x: x >= 1)
    for row in rows:
        if row["operation"] == WAITS:
            table.add_row(f"{row['shape']}: {WAITS}", row["status"], "yes" if row["status"] == "ok" else "NO")
    console.print(table)
    print_missing(rows, ("contender", "status"), console)


def draw(path: Path) -> Path:
    """Of the roof at the anchor for each operation, and whole passes against the faster torch for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_rows(path)
    figure, panels = plt.subplots(1, 2, figsize=(13, 4.6), layout="constrained")
    anchor = SHAPES[0]
    names = [name for name in (*NAMES, COPY) if any(row["contender"] == name for row in rows)]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    found = {(row["contender"], row["shape"], row["operation"]): row for row in rows}
    operations = OPERATIONS[1:]
    for panel, groups, labels, column in (
        (panels[0], [(anchor.name, name) for name in operations], operations, "share_of_roof"),
        (panels[1], [(shape, "whole") for shape in shapes], shapes, "speedup_over_torch"),
    ):
        shown = [name for name in names if name != COPY or panel is panels[0]]
        heights = {name: [number(found.get((name, *group), {}).get(column)) for group in groups] for name in shown}
        colors = ["gray" if name == COPY else f"C{names.index(name)}" for name in shown]
        grouped_bars(panel, labels, heights, colors)
        panel.grid(alpha=0.3, axis="y")
    panels[0].axhline(ROOF, color="black", linestyle=":", linewidth=1)
    panels[0].set(
        ylabel="share of a plain copy's rate",
        title=f"T {anchor.tokens}, H {anchor.hidden}, E {anchor.experts}, K {anchor.slots}",
    )
    panels[1].set(ylabel="times as fast as the faster torch", title="permute, unpermute and both backwards")
    legend(figure, panels)
    close_empty(panels)
    figure.suptitle(machine_line(rows, "torch", "triton", "transformers", "deepspeed"))
    return save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--shapes", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--contenders", nargs="+", default=list(NAMES), choices=list(NAMES), metavar="NAME")
    parser.add_argument("--minutes", type=float, default=4.0, help="start no further operation after this time")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder")
    parser.add_argument("--figure", type=Path, metavar="CSV", help="only print the verdict on this CSV and draw it")
    args = parser.parse_args()
    console = Console(width=200, highlight=False)
    if args.figure:
        verdict(read_rows(args.figure), console)
        console.print(f"{draw(args.figure)}")
        return
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a GPU; on the CPU, see tests/otpo_kernels")
    path = args.output / f"memcpy_{name_of_gpu()}.csv"
    shapes = [shape for shape in SHAPES if shape.name in args.shapes]
    contenders = [moves for moves in MOVES if moves.name in args.contenders]
    rows = run(shapes, contenders, Deadline(args.minutes), path, console)
    verdict(rows, console)
    console.print(f"{path} {draw(path)}")


if __name__ == "__main__":
    main()

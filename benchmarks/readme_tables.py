"""The README's two tables, made of committed results: `python -m benchmarks.readme_tables` prints them.

`tests/benchmarks/test_results.py` compares the README with what these functions return.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import read_rows

RESULTS = Path(__file__).parent / "results"
METHODS = ("dpo", "budget", "otpo")
PAPER = ("48.14", "52.60", "53.37")
"""Length-controlled win rates on AlpacaEval 2 of [`METHODS`] with 8B models, arXiv 2505.18720."""
OURS = (
    ("smollm2_hh", "SmolLM2-135M, human pairs: right answer preferred", "preferred", "%"),
    ("smollm2_hh", "the same: win rate over the model before, by a reward model", "win_rate", "%"),
    ("smollm2_hh", "the same: change of an answer's length", "length_drift", " tokens"),
    ("smollm2_demo", "SmolLM2-135M, bundled pairs: right answer preferred", "preferred", "%"),
    ("compass_small", "Compass of 1B, bundled pairs: right answer preferred", "preferred", "%"),
)
"""File (`ablation_FILE_h100.csv`), what the row is called, column, unit."""
ANSWERS = (
    ("constraints", "SmolLM2-135M, its own answers to checked tasks, before {}: right"),
    ("shop", "Compass of 1B, its own answers about a shop, before {}: right"),
)
"""File (`headroom_FILE_h200_summary.csv`) and what the row is called."""
Row = dict[str, Any]


def honest_table() -> str:
    """What weights were worth: in the paper, and in our runs as mean and standard deviation over seeds."""
    lines: list[Sequence[str]] = [("", *(f"`{name}`" if name != "dpo" else "DPO" for name in METHODS))]
    lines.append(("the paper, 8B: AlpacaEval 2, length-controlled win rate", *(f"{value}%" for value in PAPER)))
    for file, title, column, unit in OURS:
        rows = {row["weighting"]: row for row in read_rows(RESULTS / f"ablation_{file}_h100.csv")}
        cells = (f"{_number(rows[name], column)} ± {_number(rows[name], column + '_std')}{unit}" for name in METHODS)
        lines.append((title, *cells))
    for file, title in ANSWERS:
        rows = {
            row["weighting"]: row for row in read_rows(RESULTS / f"headroom_{file}_h200_summary.csv") if _last(row)
        }
        cells = (f"{_number(rows[name], 'right')} ± {_number(rows[name], 'right_sd')}%" for name in METHODS)
        lines.append((title.format(f"{_number(rows['start'], 'right')}%"), *cells))
    return _markdown(lines)


def _last(row: Row) -> bool:
    """Whether a row is of all held-out prompts, after the second round or before the first."""
    return row["held_out"] == "all" and row["round"] in ("0", "2")


def speed_table() -> str:
    """Median times on one H100: what others take, what ours takes."""
    steps = "preference_step_h100.csv"
    lines: list[Sequence[str]] = [("what", "compared with", "otpo", "times as fast")]
    for lengths, title in (("ragged", "of uneven lengths"), ("full", "of 1,011 tokens each")):
        case = {"shape": "qwen3-1.7b", "lengths": lengths, "adapter": "full", "checkpointing": "yes"}
        trl = _one(steps, **case, contender="trl")
        ours = _one(steps, **case, contender="otpo-packed-compiled")
        title = f"[step](benchmarks/results/{steps}): 8 pairs {title}, Qwen3-1.7B's shape"
        lines.append(_line(title, "`trl.DPOTrainer`", trl["ms"], ours["ms"]))

    solver = "transport_h100.csv"
    problem = {"pairs": "8", "length": "1024", "hidden": "4096", "reg": "1.0", "reg_m": "0.2"}
    title = f"[weights](benchmarks/results/{solver}) of 8 pairs of 1,024 tokens, default `ot_reg`"
    lines.append(_line(title, "POT", *(_one(solver, **problem, method=name)["ms"] for name in ("pot", "triton"))))

    experts = "moe_layer_h100.csv"
    pair = [_one(experts, shape="qwen3-30b-a3b", contender=name) for name in ("grouped_mm", "memcpy")]
    title = (
        f"[memcpy](benchmarks/results/{experts}): a layer of Qwen3-30B-A3B's experts and its backward, 16,384 tokens"
    )
    lines.append(_line(title, "`grouped_mm`", *(row["forward_backward_ms"] for row in pair)))

    pretrained = "pretraining_h100.csv"
    pair = [_one(pretrained, shape="compass-small", variant=name) for name in ("grouped_mm", "default")]
    title = f"[pretraining](benchmarks/results/{pretrained}): a step of Compass of 1B, 16,384 tokens"
    lines.append(_line(title, "`grouped_mm`", *(row["ms"] for row in pair)))
    return _markdown(lines)


def _one(file: str, **wanted: str) -> Row:
    """The only row that has these values, a time that was taken."""
    found = [row for row in read_rows(RESULTS / file) if all(row[name] == value for name, value in wanted.items())]
    if len(found) != 1 or found[0].get("status", "ok") != "ok":
        raise ValueError(f"{file} has {len(found)} rows of {wanted}, not one that was timed.")
    return found[0]


def _line(title: str, before: str, theirs: str, ours: str) -> tuple[str, ...]:
    times = float(theirs) / float(ours)
    return title, f"{before}, {_time(theirs)}", _time(ours), f"{times:.0f}" if times >= 10 else f"{times:.1f}"


def _time(ms: str) -> str:
    return f"{float(ms):,.0f} ms" if float(ms) >= 100 else f"{float(ms):.3g} ms"


def _number(row: Row, column: str) -> str:
    return f"{float(row[column]):.1f}"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    first, *rest = lines
    return "".join(f"| {' | '.join(line)} |\n" for line in (first, ["---"] * len(first), *rest))


if __name__ == "__main__":
    print(f"{honest_table()}\n{speed_table()}", end="")

"""The rows, the table and the figure of a comparison. Shapes: S seeds, N held-out prompts."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.ablation.length_control import length_controlled_win_rate
from benchmarks.ablation.statistics import Indices, Interval, paired_bootstrap, summarise
from benchmarks.harness import write_rows

from .plan import HELD_OUT, Job, Plan, result_path

BASELINE = "dpo"
Rows = list[dict[str, Any]]


class Cells(NamedTuple):
    """What is there of a plan: the start's result, and each weighting's by seed."""

    start: Mapping[str, Any]
    cells: dict[str, dict[int, Mapping[str, Any]]]


def read_cells(plan: Plan) -> Cells:
    """The results that are there.

    Raises:
        ValueError: The start has none.
    """
    start = _read(plan, Job("start"))
    if start is None:
        raise ValueError(f"`--output {plan.output}` has no result of the start. Run the command without `--report`.")
    cells: dict[str, dict[int, Mapping[str, Any]]] = {}
    for name in plan.weightings:
        found = {seed: _read(plan, Job("cell", seed, name)) for seed in plan.seeds}
        cells[name] = {seed: cell for seed, cell in found.items() if cell is not None}
    return Cells(start, cells)


def cell_rows(found: Cells) -> Rows:
    """One row for each weighting, seed, round (0: the start) and held-out split (`all` too)."""
    rows = _rows_of("start", "", 0, found.start["rounds"][0], found.start)
    for name, seeds in found.cells.items():
        for seed, cell in seeds.items():
            for number, one in enumerate(cell["rounds"], start=1):
                rows += _rows_of(name, seed, number, one, cell)
    return rows


def _rows_of(name: str, seed: Any, number: int, one: Mapping[str, Any], cell: Mapping[str, Any]) -> Rows:
    outcomes = one.get("outcomes", {})
    told = {
        **{kind: outcomes.get(kind, "") for kind in ("pair", "tie", "low", "failed")},
        **{key: one.get(key, "") for key in ("steps", "rewards_margins", "logps_chosen")},
        **{key: one.get(key, "") for key in ("pair_seconds", "align_seconds", "check_seconds")},
        "device": cell["device"],
    }
    rows = []
    for split in (*HELD_OUT, "all"):
        right, tokens = (_column(one, key, split) for key in ("right", "tokens"))
        counted = {"right": int(right.sum()), "prompts": right.size, "tokens": round(float(tokens.mean()), 2)}
        rows.append({"weighting": name, "seed": seed, "round": number, "held_out": split, **counted, **told})
    return rows


def summary_rows(found: Cells, split: str = "all") -> Rows:
    """For each weighting and round, over the seeds that it shares with the baseline: right answers, and differences.

    Returns:
        `right` in percent with its standard deviation over seeds; points over the start and over `dpo`, each with a
        paired 95% interval over seeds and prompts; `win_rate_length` against `dpo`, at equal length; `tokens`.
    """
    start = found.start["rounds"][0]
    before = 100 * _column(start, "right", split)
    rows: Rows = [
        {"weighting": "start", "round": 0, "seeds": "", "right": round(float(before.mean()), 2), "right_sd": ""}
        | dict.fromkeys(_INTERVALS, "")
        | {"win_rate_length": "", "tokens": round(float(_column(start, "tokens", split).mean()), 2)}
    ]
    baseline = found.cells.get(BASELINE, {})
    for name, cells in found.cells.items():
        rounds = max((len(cell["rounds"]) for cell in cells.values()), default=0)
        for number in range(rounds):
            seeds = [seed for seed, cell in cells.items() if len(cell["rounds"]) > number]
            own = _table(cells, seeds, number, "right", split)
            tokens = _table(cells, seeds, number, "tokens", split)
            means = summarise([float(value) for value in 100 * own.mean(1)])
            row: dict[str, Any] = {
                "weighting": name,
                "round": number + 1,
                "seeds": len(seeds),
                "right": round(means.mean, 2),
                "right_sd": round(means.std, 2),
                **_interval(100 * own - before, "over_start"),
                **dict.fromkeys(_INTERVALS[3:], ""),
                "win_rate_length": "",
                "tokens": round(float(tokens.mean()), 2),
            }
            shared = [seed for seed in seeds if seed in baseline and len(baseline[seed]["rounds"]) > number]
            if shared and name != BASELINE:
                mine, other = (_table(of, shared, number, "right", split) for of in (cells, baseline))
                row |= _interval(100 * (mine - other), "over_dpo")
                lengths = [_table(of, shared, number, "tokens", split).ravel() for of in (cells, baseline)]
                wins = length_controlled_win_rate(((1 + mine - other) / 2).ravel(), lengths[0], lengths[1])
                row["win_rate_length"] = round(100 * wins.win_rate, 2)
            rows.append(row)
    return rows


_INTERVALS = tuple(f"{name}{end}" for name in ("over_start", "over_dpo") for end in ("", "_low", "_high"))


def markdown(rows: Rows, title: str) -> str:
    """The last round of each weighting, and the start, as a table."""
    last = max(row["round"] for row in rows)
    shown = [row for row in rows if row["round"] in (0, last)]
    lines = [
        title,
        "",
        "| weighting | right, % | over the start | over `dpo` | win rate at equal length, % | tokens |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in shown:
        spread = "" if row["right_sd"] == "" else f" ± {row['right_sd']:.1f}"
        cells = [f"`{row['weighting']}`", f"{row['right']:.1f}{spread}"]
        cells += [_told(row, "over_start"), _told(row, "over_dpo")]
        cells += ["" if row["win_rate_length"] == "" else f"{row['win_rate_length']:.1f}", f"{row['tokens']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def headroom_line(rows: Rows) -> str:
    """Whether the task is one to compare weightings on: what the start gets right, and what DPO gains."""
    start = rows[0]["right"]
    dpo = [row for row in rows if row["weighting"] == BASELINE]
    gain = f"`dpo` gains {_told(dpo[-1], 'over_start')} points" if dpo else "`dpo` is not among the weightings"
    room = "within" if 40 <= start <= 70 else "outside"
    return f"The start gets {start:.1f}% right, {room} 40 to 70; {gain} (5 at least are asked for)."


def draw(rows: Rows, title: str, path: Any) -> None:
    """Right answers by round, a line a weighting, and the last round's difference to `dpo` with its interval."""
    import matplotlib.pyplot as plt

    figure, (rounds, over) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    names = list(dict.fromkeys(row["weighting"] for row in rows[1:]))
    for place, name in enumerate(names):
        own = [rows[0], *(row for row in rows if row["weighting"] == name)]
        spread = [float(row["right_sd"] or 0) for row in own]
        at = [row["round"] + 0.03 * (place - len(names) / 2) for row in own]
        rounds.errorbar(at, [row["right"] for row in own], yerr=spread, marker="o", capsize=2, label=name)
    rounds.set(xlabel="round", ylabel="right answers to held-out prompts, %", title=title)
    rounds.set_xticks(sorted({row["round"] for row in rows}))
    if names:
        rounds.legend(fontsize=8)
    last = max(row["round"] for row in rows)
    shown = [row for row in rows if row["round"] == last and row["over_dpo"] != ""]
    values = [row["over_dpo"] for row in shown]
    ends = [[abs(row["over_dpo"] - row[f"over_dpo_{end}"]) for row in shown] for end in ("low", "high")]
    if shown:
        over.errorbar(values, range(len(shown)), xerr=ends, fmt="o", capsize=3, color="#1f6f8b")
        over.set_yticks(range(len(shown)), [row["weighting"] for row in shown])
        over.invert_yaxis()
    else:
        over.text(0.5, 0.5, "nothing to compare with dpo", ha="center", transform=over.transAxes)
    over.axvline(0, color="#555555", linewidth=0.8, linestyle=":")
    over.set(xlabel="points over dpo, 95% interval", title=f"after round {last}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_report(plan: Plan) -> str:
    """Writes `headroom_TASK.csv`, `headroom_TASK_summary.csv`, `.md` and `.png` into the folder; the text of the page.

    Raises:
        ValueError: The start has no result.
    """
    found = read_cells(plan)
    stem = plan.folder / f"headroom_{plan.task}"
    write_rows(stem.with_suffix(".csv"), cell_rows(found))
    by_split = {split: summary_rows(found, split) for split in ("all", *HELD_OUT)}
    write_rows(
        stem.with_name(f"{stem.name}_summary.csv"),
        [{"held_out": split, **row} for split, rows in by_split.items() for row in rows],
    )
    title = f"{plan.task}, {plan.held_out} held-out prompts, half of them in wordings that no training has seen"
    parts = [markdown(by_split["all"], title), headroom_line(by_split["all"])]
    parts.append(markdown(by_split["test_templates"], "The new wordings alone"))
    parts.append(_kinds(found.start["rounds"][0]))
    parts.append(_hours(plan))
    page = "\n\n".join(part.strip() for part in parts) + "\n"
    stem.with_suffix(".md").write_text(page, encoding="utf-8")
    draw(by_split["all"], f"{plan.task}", stem.with_suffix(".png"))
    return page


def _kinds(start: Mapping[str, Any]) -> str:
    """What the start gets right by kind of prompt, to tell how hard the task is."""
    told = []
    for split in HELD_OUT:
        one = start["held_out"][split]
        for kind in sorted(set(one["kinds"])):
            right = [is_right for is_right, own in zip(one["right"], one["kinds"], strict=True) if own == kind]
            told.append(f"{split}, {kind}: {sum(right)} of {len(right)}")
    return f"The start by kind: {'; '.join(told)}."


def _hours(plan: Plan) -> str:
    runs = [json.loads(line) for line in (plan.folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = sum(run["seconds"] for run in runs)
    hours = sum(run["seconds"] * run["gpus"] for run in runs) / 3600
    last = runs[-1]
    return (
        f"{seconds:.0f} s on {last['gpus']} x {last['device']}, {last['processes']} processes: {hours:.2f} GPU hours."
    )


def _interval(differences: NDArray[np.float64], name: str) -> dict[str, float]:
    def mean(seeds: Indices, prompts: Indices) -> float:
        return float(differences[np.ix_(seeds, prompts)].mean())

    got: Interval = paired_bootstrap(mean, *differences.shape)
    ends = (got.difference, got.low, got.high)
    return {f"{name}{end}": round(value, 2) for end, value in zip(("", "_low", "_high"), ends, strict=True)}


def _table(cells: Mapping[int, Any], seeds: Sequence[int], number: int, key: str, split: str) -> NDArray[np.float64]:
    """`(S, N)` of a round."""
    return np.stack([_column(cells[seed]["rounds"][number], key, split) for seed in seeds])


def _column(one: Mapping[str, Any], key: str, split: str) -> NDArray[np.float64]:
    splits = HELD_OUT if split == "all" else (split,)
    return np.concatenate([np.asarray(one["held_out"][name][key], dtype=np.float64) for name in splits])


def _told(row: Mapping[str, Any], name: str) -> str:
    if row[name] == "":
        return ""
    return f"{row[name]:+.1f} [{row[f'{name}_low']:+.1f}, {row[f'{name}_high']:+.1f}]"


def _read(plan: Plan, job: Job) -> Mapping[str, Any] | None:
    path = result_path(plan, job)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

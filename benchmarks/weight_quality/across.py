"""One setting of `contrast` for all models: chosen on one half of the pairs, reported on the other, model by model.

    python -m benchmarks.weight_quality.across runs/wq_smollm2 runs/wq_smollm2_dpo runs/wq_compass --output runs/wq

Reads what `python -m benchmarks.weight_quality` leaves in each folder (`auroc.npz`). The setting is the one whose
AUROC over the plain diff's is highest on average over models. A layer is named as `hidden_layer` takes it, from the
end (-1) or from the start (0 for the embeddings), or by its share of a model's depth. Shapes: S scores, N pairs.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from benchmarks.harness import write_rows

from .halves import halves_of
from .report import Rows, means_of, table_of
from .scores import CONTRAST, TRANSPORT, Column, Found

FAMILIES = {"contrast": CONTRAST, "otpo": TRANSPORT}
SHARES = (0.25, 0.33, 0.5, 0.67, 0.75, 0.8, 0.9)
DIFF = "unmatched"
_FILE = "auroc.npz"
_HALVES = ("first", "second")


class Model(NamedTuple):
    """How well scores found the spans with one model; the names of policy and reference."""

    found: Found
    model: str
    reference: str


def save_found(found: Found, folder: Path, model: str, reference: str | None) -> None:
    """Writes `auroc.npz` into a folder."""
    columns = json.dumps([list(column) for column in found.columns])
    told = {"columns": columns, "kinds": found.kinds, "last": found.last, "model": model, "reference": reference or ""}
    np.savez_compressed(folder / _FILE, auroc=found.auroc, **told)  # pyright: ignore[reportArgumentType]


def read_found(folder: Path) -> Model:
    """What [`save_found`] wrote.

    Raises:
        ValueError: The folder has no such file.
    """
    if not (folder / _FILE).is_file():
        raise ValueError(
            f"{folder} has no {_FILE}. Run `python -m benchmarks.weight_quality --output {folder}` first."
        )
    with np.load(folder / _FILE) as kept:
        columns = [Column(*column) for column in json.loads(str(kept["columns"]))]
        found = Found(columns, kept["auroc"], [str(kind) for kind in kept["kinds"]], int(kept["last"]))
        return Model(found, str(kept["model"]), str(kept["reference"]))


def places_of(last: int) -> dict[str, int]:
    """Number of the layer by each of its names, of a model with so many layers."""
    from_end = {f"-{back}": last + 1 - back for back in range(1, last + 2)}
    from_start = {str(number): number for number in range(last + 1)}
    return {**from_end, **from_start, **{f"{share:.0%} of the depth": round(share * last) for share in SHARES}}


def across(models: Sequence[Model], family: str) -> Rows:
    """For each half, the setting that the other half chooses, and each model's AUROC on this one.

    Args:
        models: One at least, each with `unmatched` and schemes of the family.
        family: One of [`FAMILIES`].

    Raises:
        ValueError: A model lacks the diff or the schemes, or they share no setting.
    """
    tables = [_scores_of(model, family) for model in models]
    shared = [key for key in tables[0] if all(key in table for table in tables)]
    if not shared:
        raise ValueError(f"The models share no setting of {family}. Run `benchmarks.weight_quality` with all layers.")
    halves = [halves_of(model.found) for model in models]
    rows = []
    for reported, half in enumerate(_HALVES):
        there = np.stack(
            [
                _over_diff(model, [table[key] for key in shared], halves[place][1 - reported])
                for place, (model, table) in enumerate(zip(models, tables, strict=True))
            ]
        )
        best = shared[int(there.mean(0).argmax())]
        for place, (model, table) in enumerate(zip(models, tables, strict=True)):
            here = halves[place][reported]
            own = model.found.auroc[[table[best]]][:, here]
            diff = model.found.auroc[[_diff_of(model)]][:, here]
            row: dict[str, Any] = {
                "family": family,
                "reported_on": half,
                "chosen_among": len(shared),
                "scheme": best[0],
                "layer": best[1],
                "number": model.found.columns[table[best]].layer,
                **_rounded(means_of(own), "auroc", "low", "high"),
                "diff": round(float(means_of(diff).mean[0]), 4),
                **_rounded(means_of(own - diff), "over_diff", "over_diff_low", "over_diff_high"),
            }
            rows.append({**row, "model": model.model, "reference": model.reference})
    return rows


def _scores_of(model: Model, family: str) -> dict[tuple[str, str], int]:
    """Place of each score among the columns, by scheme and name of the layer."""
    numbers = {
        (column.scheme, column.layer): place
        for place, column in enumerate(model.found.columns)
        if column.score == "weight" and column.scheme in FAMILIES[family]
    }
    names = places_of(model.found.last)
    return {
        (scheme, name): numbers[scheme, number]
        for scheme in FAMILIES[family]
        for name, number in names.items()
        if (scheme, number) in numbers
    }


def _diff_of(model: Model) -> int:
    for place, column in enumerate(model.found.columns):
        if column.scheme == DIFF:
            return place
    raise ValueError(f"{model.model} has no scores of {DIFF!r}. Run `benchmarks.weight_quality` with that scheme.")


def _over_diff(model: Model, places: list[int], half: Any) -> Any:
    """AUROC over the diff's on a half, `(settings,)`."""
    auroc = model.found.auroc
    return means_of((auroc[places] - auroc[[_diff_of(model)]])[:, half], draws=1).mean


def _rounded(means: Any, *names: str) -> dict[str, float]:
    values = (means.mean[0], means.low[0], means.high[0])
    return {name: round(float(value), 4) for name, value in zip(names, values, strict=True)}


def markdown(rows: Rows) -> str:
    """The rows as a table."""
    lines = []
    for row in rows:
        over = f"{row['over_diff']:+.3f} [{row['over_diff_low']:+.3f}, {row['over_diff_high']:+.3f}]"
        lines.append(
            {
                "model": row["model"] + (f" after {row['reference']}" if row["reference"] else ""),
                "half": row["reported_on"],
                "setting": f"{row['scheme']}, layer {row['layer']}",
                "AUROC": f"{row['auroc']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
                "diff": f"{row['diff']:.3f}",
                "over the diff": over,
            }
        )
    return table_of(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes `across.csv` and `across.md`; 2 if there is something wrong with what was asked."""
    parser = argparse.ArgumentParser(
        "benchmarks.weight_quality.across", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="outputs of benchmarks.weight_quality")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=["contrast"])
    parser.add_argument("--output", type=Path, required=True, help="folder")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False, markup=False)
    try:
        models = [read_found(folder) for folder in args.folders]
        rows = [row for family in args.families for row in across(models, family)]
    except (ValueError, OSError) as error:
        console.print(str(error), style="red")
        return 2
    write_rows(args.output / "across.csv", rows)
    text = markdown(rows)
    (args.output / "across.md").write_text(text, encoding="utf-8")
    console.print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The first tables of docs/ablations.md and two of benchmarks/README.md, each made from committed CSVs.

Tests compare the pages with them.
"""

from collections import Counter
from typing import Any

from benchmarks.committed import read, table
from benchmarks.headroom.report import markdown
from benchmarks.weight_quality.scores import PRODUCTS
from otpo.training.hidden_states import layer_number
from otpo.weighting.registry import WEIGHTINGS


def headroom(task: str) -> str:
    """Right answers of a task by weighting, for docs/ablations.md."""
    words = ("held_out", "weighting")
    rows: list[dict[str, Any]] = [
        {name: value if name in words or not value else float(value) for name, value in row.items()}
        for row in read(f"headroom_{task}_h200_summary.csv")
        if row["held_out"] == "all"
    ]
    return markdown(rows, "").strip() + "\n"


def found_spans() -> str:
    """How well `contrast` at its defaults finds the known spans, for docs/ablations.md."""
    rows = [
        (
            row["model"] + (f", from {row['reference']}" if row["reference"] else ""),
            row["reported_on"],
            f"{float(row['auroc']):.3f} [{float(row['low']):.3f}, {float(row['high']):.3f}]",
            f"{float(row['diff']):.3f}",
            " ".join(("{:+.3f}", "[{:+.3f},", "{:+.3f}]")).format(
                *(float(row[f"over_diff{end}"]) for end in ("", "_low", "_high"))
            ),
        )
        for row in read("contrast_across_h200.csv")
    ]
    return table(("model", "half", "AUROC of `contrast`", "of a diff", "over the diff"), rows)


def products() -> str:
    """How well products with the diff find the known spans, each at its defaults, for docs/ablations.md."""
    models = {
        "SmolLM2-135M-Instruct, English": "smollm2_cpu",
        "compass-tiny after DPO": "compass_tiny_cpu",
        "compass-small after DPO": "compass_small_h200",
    }
    rows = []
    for model, name in models.items():
        found: dict[tuple[str, str], str] = {}
        last = 0
        for row in read(f"weight_quality_{name}.csv"):
            if (row["side"], row["kind"]) == ("both", "all") and row["score"] != "contribution":
                ends = (float(row[end]) for end in ("auroc", "low", "high"))
                found[row["scheme"], row["layer"]] = "{:.3f} [{:.3f}, {:.3f}]".format(*ends)
                last = max(last, int(row["layer"] or 0))
        deep = str(layer_number(WEIGHTINGS["contrast"].defaults["hidden_layer"], last))
        places = (
            ("unmatched", ""),
            (PRODUCTS["contrast*diff"], deep),
            ("otpo*diff", str(last)),
            ("contrast*diff", deep),
        )
        rows.append((model, *(found[place] for place in places)))
    return table(("AUROC", "a diff", "`contrast`", "`otpo*diff`", "`contrast*diff`"), rows)


def at_size() -> str:
    """Steps of Qwen3-30B-A3B's shape on two GPUs, for benchmarks/README.md."""
    names = {"lora": "LoRA", "full": "every weight"}
    rows = []
    for row in read("alignment_at_size_h200_x2.csv"):
        if row["status"] == "ok":
            numbers = (f"{float(row['s_per_step']):.3f}", f"{int(row['tokens_per_s']):,}")
            memory = (f"{float(row['peak_gib']):.1f}", f"{float(row['made_gib']):.1f}")
            shares = (f"{100 * float(row[name]):.0f}%" for name in ("all_to_all_share", "idle_share"))
            cells = (*numbers, *memory, *shares)
        else:
            cells = ("out of memory" if "OutOfMemoryError" in row["status"] else row["status"], *[""] * 5)
        rows.append((f"{names[row['adapter']]} of {row['layers']} layers", *cells))
    head = ("trained", "s a step", "tokens/s", "GiB in training", "GiB while made", "all-to-all", "idle")
    return table(head, rows)


def kills() -> str:
    """How many kills left what behind, and how many of them resumed exactly, for benchmarks/README.md."""
    machines = {"two CPU processes": "random_kills_cpu.csv", "two H200": "random_kills_h200_x2.csv"}
    phases = ("before the first checkpoint", "between checkpoints", "while saving a checkpoint")
    phases += ("after the last checkpoint",)
    rows = []
    for machine, file in machines.items():
        found = read(file)
        counted = Counter(row["phase"] for row in found)
        equal = [row["status"] == "ok" and float(row["losses"]) == float(row["weights"]) == 0 for row in found]
        rows.append((machine, *(counted.pop(phase, 0) for phase in phases), f"{sum(equal)} of {len(found)}"))
        if counted:
            raise ValueError(f"{file} has kills of no known phase: {', '.join(counted)}.")
    return table(("kills on", *phases, "resumed to the same bits"), rows)

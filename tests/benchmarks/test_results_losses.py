"""What `benchmarks/README.md` says of cross-entropies, heads and gradients by name stands in the kept rows."""

from benchmarks.committed import RESULTS
from benchmarks.harness import read_rows

PAGE = (RESULTS.parent / "README.md").read_text()
WAYS = ("forward", "backward")


def table(rows, cell):
    """Lines of a table: a line a contender, a column a shape."""
    shapes, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("shape", "contender"))
    found = {(row["shape"], row["contender"]): row for row in rows}
    return [f"| {name} | {' | '.join(cell(found[shape, name]) for shape in shapes)} |" for name in names]


def test_cross_entropies():
    rows = read_rows(RESULTS / "cross_entropy_h200.csv")

    def cell(row):
        times = row["forward_ms"], row["backward_ms"]
        return "{:.2f} and {:.2f}".format(*map(float, times)) if row["status"] == "ok" else "no number"

    assert "\n".join(table(rows, cell)) in PAGE
    others = [row for row in rows if row["status"] != "ok"]
    assert all(row["contender"] == "quack" and "off by nan" in row["status"] for row in others) and len(others) == 2
    whole = {(row["shape"], row["contender"]): sum(float(row[f"{way}_ms"] or "inf") for way in WAYS) for row in rows}
    for (shape, _), ms in whole.items():
        assert whole[shape, "ours"] <= ms


def test_heads():
    rows = read_rows(RESULTS / "heads_h200.csv")
    assert all(row["status"] == "ok" for row in rows)
    cells = table(rows, lambda row: f"{float(row['ms']):.1f}, {float(row['peak_mib']) / 1024:.1f}")
    assert "\n".join(cells) in PAGE
    found = {(row["shape"], row["contender"]): row for row in rows}
    for row in rows:
        assert float(found[row["shape"], "kernel"]["ms"]) <= float(row["ms"])
    for shape in dict.fromkeys(row["shape"] for row in rows):
        chunked, kernel = (float(found[shape, name]["peak_mib"]) for name in ("chunked", "kernel"))
        assert (chunked < kernel) is (shape != "compass-v3")


def test_gradients_by_name():
    rows = read_rows(RESULTS / "gradients_compass-v3-width_h200.csv")
    nearer = [1 - float(row["default"]) / float(row["grouped_mm"]) for row in rows]
    told = f"in each of {len(rows)}, by {min(nearer):.0%} to {max(nearer):.0%}".replace("%", "", 1)
    assert min(nearer) > 0 and told in " ".join(PAGE.split())

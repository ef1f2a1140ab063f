"""What benchmarks/README.md says of experts spread over two GPUs is what the committed results say."""

import re

from benchmarks import expert_parallel
from benchmarks.committed import RESULTS
from benchmarks.harness import read_rows

RIVALS = ("AutoEP as it comes", "data parallel")


def test_what_is_said_of_spread_experts_was_measured():
    page = (RESULTS.parent / "README.md").read_text()
    rows = read_rows(RESULTS / "expert_parallel_h200_x2.csv")
    assert f"\n\n{expert_parallel.markdown(rows)}\n" in page
    rates = {(row["case"], row["contender"]): int(row["tokens_per_s"]) for row in rows}
    small, block = (
        {name: rate for (case, name), rate in rates.items() if case == one}
        for one in ("compass-small", "compass-v3 block")
    )
    for found, said in ((small, (2.04, 1.62, 0.94)), (block, (1.26, 1.5, 1.35))):
        rivals = ("AutoEP as it comes", "data parallel", "data parallel, as pretrain runs it")
        assert [round(found["ours, as pretrain runs it"] / found[rival], 2) for rival in rivals] == list(said)
    text = " ".join(page.split())
    assert (
        "ours is 2.04 times AutoEP as it comes and 1.62 times data parallelism as it comes at `compass-small`" in text
    )
    assert "and 0.94 times data parallelism with the same compiled layers" in text
    assert "it is 1.26 times AutoEP, 1.5 times data parallelism, and 1.35 times the compiled one" in text
    ours, compiled = (
        next(
            row
            for row in rows
            if (row["contender"], row["case"]) == (f"{name}, as pretrain runs it", "compass-v3 block")
        )
        for name in ("ours", "data parallel")
    )
    shares = [f"{float(row['other_nccl_share']):.0%}" for row in (ours, compiled)]
    assert "has {} of the time of ours' kernels and {} of compiled".format(*shares) in text
    assert 0.4 < float(ours["optimizer_share"]) + float(ours["rest_share"]) < 0.5 and "nearly half of ours is" in text
    idle = [float(row["idle_share"]) for row in rows if row["contender"] == "ours, as pretrain runs it"]
    assert len(idle) == 2 and max(idle) < 0.1
    assert "idle in less than a tenth of such a step of ours at both" in text


def test_what_is_said_of_spread_experts_before_was_measured():
    text = " ".join((RESULTS.parent / "README.md").read_text().split())
    page = text.split("- Before, when DeepSpeed waited")[1]
    ratios, before = [], []
    for name in ("waiting", "waiting_again"):
        rows = read_rows(RESULTS / f"expert_parallel_h200_x2_{name}.csv")
        found = {(row["contender"], row["case"]): row for row in rows}
        for case in ("compass-small", "compass-v3 block"):
            ours, compiled = (found.get((f"{way}, as pretrain runs it", case)) for way in ("ours", "data parallel"))
            if ours and compiled:
                assert f"{int(compiled['tokens_per_s']):,}" in page
                rate = f"{int(ours['tokens_per_s']):,}( tokens/s)?( at [^,]*)?"
                assert re.search(rf"{rate}, idle {ours['idle_share']}", page)
                ratios.append(round(int(ours["tokens_per_s"]) / int(compiled["tokens_per_s"]), 2))
            rivals = [int(found[rival, case]["tokens_per_s"]) for rival in RIVALS] if ours else []
            before += [round(int(ours["tokens_per_s"]) / rate, 2) for rate in rivals if case == "compass-small"]
    assert before == [1.64, 1.48, 1.68, 1.41]
    told = "({} and {} times AutoEP, {} and {} times data parallelism on the hosts below)"
    assert told.format(before[0], before[2], before[1], before[3]) in text
    assert ratios == [1.0, 1.3, 0.85]
    assert "1.0 and 0.85 times compiled data parallelism at `compass-small`, and 1.3 times at v3's width" in page

"""`benchmarks.weighting_cost` on the CPU: every weighting agrees with float64, and a wrong one gets no time."""

import csv

import pytest
import torch

from benchmarks import weighting_cost
from otpo.weighting.registry import WEIGHTINGS

SMALL = ["--pairs", "2", "--length", "9", "--hidden", "16", "--tiny", "--step_ms", "1e9"]


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_weighting_is_checked_and_timed(tmp_path):
    path = tmp_path / "cost.csv"
    assert weighting_cost.main([*SMALL, "--output", str(path)]) == 0
    rows = rows_of(path)
    assert set(WEIGHTINGS) < {row["weighting"] for row in rows} and {row["status"] for row in rows} == {"ok"}
    for row in rows:
        assert float(row["error"]) <= 1e-4 and float(row["ms"]) > 0
        assert float(row["share"]) == pytest.approx(float(row["ms"]) / 1e9, abs=1e-6)


def test_wrong_weights_get_no_time_and_dear_ones_are_told(tmp_path, monkeypatch):
    path = tmp_path / "cost.csv"
    asked = [*SMALL[:-1], "1e-6", "--weightings", "budget", "confpo", "--output", str(path)]
    assert weighting_cost.main(asked) == 1
    assert [row["status"] for row in rows_of(path)] == ["over 0.5%"] * 2
    monkeypatch.setattr(weighting_cost, "error_of", lambda got, want: float("inf"))
    assert weighting_cost.main(asked) == 1
    assert all(row["status"].startswith("not timed") and row["ms"] == "" for row in rows_of(path))


def test_errors_by_hand():
    want = torch.tensor([2.0, 0.5])
    assert weighting_cost.error_of(torch.tensor([2.0, 0.3]), want) == pytest.approx(0.1)
    assert weighting_cost.error_of(torch.tensor([2.0, float("nan")]), want) == float("inf")


@pytest.mark.lengthy
def test_the_step_is_measured():
    assert 0 < weighting_cost.step_time(2, True, torch.device("cpu")) < 60_000

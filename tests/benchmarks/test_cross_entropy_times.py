"""`benchmarks.cross_entropy` on the CPU: contenders are compared with float64, and a wrong one gets no time."""

import pytest
import torch

from benchmarks import cross_entropy as benchmark
from benchmarks.harness import read_rows


def test_each_contender_is_checked_and_timed(tmp_path):
    path = tmp_path / "times.csv"
    assert benchmark.main(["--tiny", "--contenders", "ours", "torch", "--output", str(path)]) == 0
    for row in read_rows(path):
        assert row["status"] == "ok" and float(row["forward_ms"]) > 0 < float(row["backward_ms"])
        assert float(row["loss_error"]) < 1e-6 > float(row["gradient_error"])


@pytest.mark.parametrize("fault", ["sum", "gradient", "no number", "raises"])
def test_a_wrong_contender_has_no_time_and_ours_fails_the_command(tmp_path, monkeypatch, fault):
    def wrong(logits, labels):
        if fault == "raises":
            raise RuntimeError("no such kernel")
        loss = benchmark.plain(logits, labels)
        if fault == "no number":
            return loss * torch.nan
        return 1.01 * loss if fault == "sum" else loss.detach() + 1.01 * (loss - loss.detach())

    monkeypatch.setitem(benchmark.CONTENDERS, "ours", wrong)
    path = tmp_path / "times.csv"
    assert benchmark.main(["--tiny", "--contenders", "ours", "torch", "--output", str(path)]) == 1
    ours, other = read_rows(path)
    assert ours["forward_ms"] == ours["backward_ms"] == "" and other["status"] == "ok"
    assert ("no such kernel" if fault == "raises" else "wrong: ") in ours["status"]


def test_without_a_gpu_only_the_tiny_shape_runs(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmark.main([])
    assert "--tiny" in capsys.readouterr().err

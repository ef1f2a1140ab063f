"""`benchmarks.cross_entropy` and `benchmarks.heads` on the CPU: a wrong contender gets no time."""

import pytest
import torch

from benchmarks import cross_entropy, heads
from benchmarks.harness import read_rows


def test_each_contender_is_checked_and_timed(tmp_path):
    path = tmp_path / "times.csv"
    assert cross_entropy.main(["--tiny", "--contenders", "ours", "torch", "--output", str(path)]) == 0
    for row in read_rows(path):
        assert row["status"] == "ok" and float(row["forward_ms"]) > 0 < float(row["backward_ms"])
        assert float(row["loss_error"]) < 1e-6 > float(row["gradient_error"])


def test_each_head_is_checked_and_timed(tmp_path):
    path = tmp_path / "times.csv"
    assert heads.main(["--tiny", "--contenders", "kernel", "chunked", "logits", "--output", str(path)]) == 0
    rows = read_rows(path)
    assert [row["contender"] for row in rows] == ["kernel", "chunked", "logits"]
    for row in rows:
        assert row["status"] == "ok" and float(row["ms"]) > 0
        assert max(float(row[f"{name}_error"]) for name in ("loss", "states", "weights")) < 1e-6


@pytest.mark.parametrize("fault", ["sum", "gradient", "no number", "raises"])
@pytest.mark.parametrize(("module", "ours", "plain"), [(cross_entropy, "ours", "torch"), (heads, "kernel", "logits")])
def test_a_wrong_contender_has_no_time_and_ours_fails_the_command(tmp_path, monkeypatch, fault, module, ours, plain):
    right = module.CONTENDERS[plain]

    def wrong(*arguments):
        if fault == "raises":
            raise RuntimeError("no such kernel")
        loss = right(*arguments)
        if fault == "no number":
            return loss * torch.nan
        return 1.03 * loss if fault == "sum" else loss.detach() + 1.03 * (loss - loss.detach())

    monkeypatch.setitem(module.CONTENDERS, ours, wrong)
    path = tmp_path / "times.csv"
    assert module.main(["--tiny", "--contenders", ours, plain, "--output", str(path)]) == 1
    first, other = read_rows(path)
    assert all(value == "" for name, value in first.items() if name.endswith("ms")) and other["status"] == "ok"
    assert ("no such kernel" if fault == "raises" else "wrong: ") in first["status"]


def test_without_a_gpu_only_the_tiny_shape_runs(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        cross_entropy.main([])
    assert "--tiny" in capsys.readouterr().err

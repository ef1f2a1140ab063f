"""Loss curves by the weights' type: which rows of an earlier run are kept, and which curves may be compared."""

import pytest
from datasets import Dataset

from benchmarks import harness, weight_types
from benchmarks.weight_types import begin_apart, fingerprint, kept_rows, make_data, read_curves


def save(path, documents):
    Dataset.from_dict({"input_ids": documents}).to_parquet(path)
    return path


def test_a_fingerprint_is_of_the_documents_in_their_order(tmp_path):
    one = fingerprint(save(tmp_path / "a", [[1, 2], [3]]))
    assert one == fingerprint(save(tmp_path / "b", [[1, 2], [3]])) and len(one) == 12
    others = ([[3], [1, 2]], [[1], [2, 3]], [[1, 2, 3]], [[1, 2], [4]], [[1, 2], [3], []])
    assert len({one, *(fingerprint(save(tmp_path / "c", each)) for each in others)}) == len(others) + 1


def test_the_same_call_makes_the_same_documents(tmp_path):
    prints = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        prints.add(fingerprint(make_data(tmp_path / name, "compass-tiny", 20)["tokens"]))
    assert len(prints) == 1


def test_rows_of_other_tokens_are_not_kept(tmp_path):
    """Nor those of a file that does not say which tokens they are of."""
    path = tmp_path / "rows.csv"
    about = {"shape": "compass-tiny", "data": "abc", "date": "2026-11-29"}
    harness.write_rows(path, [about | {"step": 1, "loss": 2.5}])
    assert len(kept_rows(path, about | {"date": "2026-11-30"})) == 1
    assert kept_rows(path, about | {"data": "abd"}) == []
    del about["data"]
    harness.write_rows(path, [about | {"step": 1, "loss": 2.5}])
    assert kept_rows(path, about | {"data": "abc"}) == []


@pytest.mark.parametrize(("first", "apart"), [(10.0, False), (10.0005, False), (9.998, True), (float("nan"), True)])
def test_curves_that_begin_apart_are_named(first, apart):
    curves = {("float32", 0): {1: 10.0, 10: 8.0}, ("bfloat16", 0): {1: first, 10: 8.0}, ("bfloat16", 1): {1: 7.0}}
    assert [line.split(" begins")[0] for line in begin_apart(curves)] == ["bfloat16, seed 0,"] * apart


def test_a_run_of_another_start_ends_with_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(weight_types, "make_data", lambda folder, *_: {"tokens": save(folder / "d", [[1]])})
    losses = {"float32": 2.0, "bfloat16": 2.1}
    found = {"tokens_per_s": 1.0, "peak_gib": None, "seconds": 1.0}
    monkeypatch.setattr(
        weight_types, "measure", lambda variant, *_: found | {"losses": [(1, losses[variant]), (2, 1.0)]}
    )
    output = tmp_path / "rows.csv"
    asked = ["--shape", "compass-tiny", "--seeds", "1", "--variants", "float32", "bfloat16", "--output", str(output)]
    assert weight_types.main(asked) == 1
    assert "bfloat16, seed 0, begins with a loss of 2.1000 and float32 with 2.0000" in capsys.readouterr().out
    # Rows that are there are kept, of the same tokens alone.
    losses["bfloat16"] = 2.0
    assert weight_types.main(asked) == 1
    kept = harness.read_rows(output)
    harness.write_rows(output, [row for row in kept if row["variant"] == "float32"])
    assert weight_types.main(asked) == 0
    assert read_curves(harness.read_rows(output))["bfloat16", 0] == {1: 2.0, 2: 1.0}

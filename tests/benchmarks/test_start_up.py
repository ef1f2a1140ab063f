import shutil

from datasets import load_from_disk

from benchmarks import start_up


def test_trainers_keep_the_same_rows_of_the_benchmarks_data(tmp_path):
    """TRL makes of the text what is written as tokens, and both leave out the one prompt that fills `max_length`."""
    start_up.make_data(tmp_path, 60, 24)
    found = {}
    for contender, data in ((start_up.TRL, "text"), (start_up.OTPO, "text"), (start_up.TOKENIZED, "tokenized")):
        folder = tmp_path / contender
        shutil.copytree(tmp_path / data, folder / "data")
        shutil.copytree(tmp_path / "model", folder / "model")
        found[contender] = start_up.construct(contender, folder, 24)
    assert len({row["fingerprint"] for row in found.values()}) == 1
    assert all(row["kept"] == 59 and row["peak_mib"] > 0 and row["seconds"] > 0 for row in found.values())
    assert "name_row_seconds" in found[start_up.OTPO] and "name_row_seconds" not in found[start_up.TRL]
    whole = load_from_disk(tmp_path / "tokenized")
    assert start_up.fingerprint(whole) != start_up.fingerprint(whole.select(range(59)))

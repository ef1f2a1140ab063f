"""Data of files, folders and names: what is broken is refused with its place, and streams are honoured."""

import gzip
import json
import re

import pytest
from cli_helpers import arguments, refusal
from datasets import DatasetDict, IterableDataset
from helpers import make_pairs
from trl import DatasetMixtureConfig

from otpo.cli import align, explain, sft
from otpo.data.loading import DataArguments, RowArguments, load_pairs, load_rows
from otpo.data.row_checks import pair_problem

pytestmark = pytest.mark.usefixtures("own_process")
GOOD = [json.dumps({"prompt": "a", "chosen": "b", "rejected": text}) for text in "cde"]
ASKED, ANSWERED = {"role": "user", "content": "the box"}, {"role": "assistant", "content": "ships"}


def load(name, **options):
    return load_pairs(DataArguments(dataset_name=str(name), **options), DatasetMixtureConfig(), seed=0, evaluate=False)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", [*GOOD, '{"prompt": "a", '], r"a.jsonl can't be read: line 4 is no JSON: .* in column 16"),
        ("a.jsonl.gz", [GOOD[0], "{", GOOD[1]], "a.jsonl.gz can't be read: line 2 is no JSON"),
        ("a.jsonl", [*GOOD, "3"], "line 4 is no JSON mapping but 3"),
        ("a.json", ["[", *(f"{row}," for row in GOOD), "]"], "line 5 is no JSON"),
        ("a.json", ['[{"prompt": "a"}, 3]'], "row 1 is no JSON mapping but 3"),
        ("a.jsonl", [], "it has no rows"),
        ("a.csv", ["prompt,chosen,rejected", "a,b,c", "a,b,c,d"], "Expected 3 fields in line 3, saw 4"),
        ("a.csv", [], "it has no rows"),
        ("a.parquet", ["PAR1"], "a.parquet can't be read"),
    ],
)
def test_files_that_are_broken(name, content, message, streaming, tmp_path):
    text = "\n".join(content).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name, dataset_streaming=streaming)


def test_files_that_are_no_text(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes("\n".join(GOOD).encode() + '\n{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="line 4 is no UTF-8 text"):
        load(file)
    (tmp_path / "b.jsonl.gz").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"b.jsonl.gz can't be read: Not a gzipped file"):
        load(tmp_path / "b.jsonl.gz")


@pytest.mark.parametrize("command", [align, sft, explain])
def test_commands_name_the_line(command, capsys, model_folder, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join([*GOOD, "{"]))
    argv = arguments(model_folder, str(file), tmp_path)
    if command is explain:
        argv = ["--use_cpu", "--model_name_or_path", model_folder, "--dataset_name", str(file)]
    assert "line 4 is no JSON" in refusal(command.main, capsys, argv)


def test_a_mixture_names_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(GOOD))
    (tmp_path / "b.jsonl").write_text("\n".join([*GOOD, "{"]))
    sources: list = [{"path": "json", "data_files": [str(tmp_path / f"{name}.jsonl") for name in "ab"]}]
    with pytest.raises(ValueError, match=r"`datasets`: the file .*b.jsonl can't be read: line 4 is no JSON"):
        load_pairs(DataArguments(), DatasetMixtureConfig(datasets=sources), seed=0, evaluate=False)


@pytest.mark.parametrize("ending", ["csv", "csv.gz"])
def test_csv_is_text(ending, tmp_path):
    pairs = make_pairs(3).map(lambda row: {name: row[name][0]["content"] for name in ("prompt", "chosen", "rejected")})
    text = 'prompt,chosen,rejected\n1,None,"a, ""b"""\n2,,"c\nd"\n'
    (tmp_path / f"a.{ending}").write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    rows = load(tmp_path / f"a.{ending}")[0]
    assert rows["chosen"][:] == ["None", ""] and rows["rejected"][:] == ['a, "b"', "c\nd"]
    assert rows["prompt"][:] == ["1", "2"]
    pairs.to_csv(tmp_path / "b.csv")
    assert load(tmp_path / "b.csv")[0]["chosen"][:] == pairs["chosen"][:]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "has no 'chosen'"),
        ({"prompt": "a", "rejected": "b"}, "has no 'chosen'"),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, "has 3 in 'chosen', which must be text or"),
        ({"prompt": [ASKED], "chosen": [ANSWERED], "rejected": "b"}, "of one form"),
        ({"prompt": [ASKED], "chosen": [ANSWERED], "rejected": ["b"]}, "has 'b' as message number 0 of 'rejected'"),
        ({"prompt": [{"content": "a"}], "chosen": [ANSWERED], "rejected": [ANSWERED]}, "without a role, number 0"),
        ({"prompt": [ASKED], "chosen": [{"role": "x"}], "rejected": [ANSWERED]}, r"without content \(x\), number 0"),
        ({"prompt": [ASKED], "chosen": [{**ASKED, "content": 3}], "rejected": [ANSWERED]}, "whose content is 3"),
        ({"prompt": [], "chosen": [ANSWERED], "rejected": [ANSWERED]}, "has no messages in 'prompt'"),
        ({"prompt": [ASKED], "chosen": [], "rejected": [ANSWERED]}, "has no messages in 'chosen'"),
        ({"chosen": [ANSWERED], "rejected": []}, "has no messages in 'rejected'"),
        ({"chosen": [ASKED, ANSWERED], "rejected": [ASKED, {**ANSWERED, "content": "b"}]}, None),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, None),
        (
            {"prompt": [ASKED], "chosen": [{**ANSWERED, "content": None, "tool_calls": [{}]}], "rejected": [ANSWERED]},
            None,
        ),
    ],
)
def test_what_is_wrong_with_a_pair(row, problem):
    found = pair_problem(row)
    assert found is None if problem is None else found is not None and re.search(problem, found)


def test_a_broken_row_of_a_stream_is_refused_in_one_line(capsys, model_folder, tmp_path):
    """It is found in training, where other faults keep their trace."""
    rows = make_pairs(6).to_list()
    rows[5]["chosen"] = []
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    argv = arguments(model_folder, str(path), tmp_path / "out", dataset_streaming=True, max_steps=4)
    assert "Row 5 of the training dataset has no messages in 'chosen'" in refusal(align.main, capsys, argv)
    argv = arguments(model_folder, str(path), tmp_path / "out")
    assert "Row 5 of the training dataset has no messages in 'chosen'" in refusal(align.main, capsys, argv)


@pytest.mark.parametrize(
    ("option", "value"),
    [("learning_rate", -1), ("beta", "nan"), ("dataloader_num_workers", -1), ("f_divergence_type", "foo")],
)
def test_values_that_no_step_can_take(option, value, capsys, model_folder, pairs_file, tmp_path):
    argv = arguments(model_folder, pairs_file, tmp_path / "out", **{option: value})
    assert f"`{option}" in refusal(align.main, capsys, argv)


def test_rows_keep_their_numbers(tmp_path):
    rows = [{"prompt": "a", "chosen": str(n), "rejected": "x"} for n in range(20)]
    rows[13]["chosen"] = None
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for streaming in (False, True):
        with pytest.raises(ValueError, match="Row 13 of the training dataset has no 'chosen'"):
            list(load(tmp_path / "a.jsonl", max_train_pairs=20, dataset_streaming=streaming)[0])


def test_explained_rows_keep_their_numbers(capsys, model_folder, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join([*GOOD, '{"prompt": "a", "chosen": null, "rejected": "b"}']))
    argv = ["--use_cpu", "--model_name_or_path", model_folder, "--dataset_name", str(tmp_path / "a.jsonl")]
    argv += ["--output", str(tmp_path / "a.html"), "--rows"]
    assert "Row 3 of the training dataset has no 'chosen'" in refusal(explain.main, capsys, [*argv, "0", "3"])
    assert explain.main([*argv, "0"]) == 0


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": ["hi"]}, "has 'hi' as message number 0 of 'messages'"),
        ({"messages": "hi"}, "has text in 'messages', which must be a list of messages"),
        ({"messages": [{"content": "a"}, ANSWERED]}, "without a role, number 0 of 'messages'"),
        ({"prompt": "a", "completion": [ANSWERED]}, "of one form"),
        ({"prompt": "a", "completion": None}, "has an empty completion"),
        ({"prompt": "a", "completion": 3}, "of one form|has 3 in 'completion'"),
    ],
)
def test_instructions_that_are_refused(row, problem, capsys, compass_folder, tmp_path):
    good = {"prompt": "a", "completion": "b"} if "prompt" in row else {"messages": [ASKED, ANSWERED]}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(row)}")
    message = refusal(sft.main, capsys, arguments(compass_folder, str(tmp_path / "rows.jsonl"), tmp_path / "out"))
    assert re.search(f"Row 1 of the training dataset .*(?:{problem})", message)


def test_streams_of_folders_and_of_bundled_names(tmp_path):
    pairs = make_pairs(4)
    pairs.save_to_disk(tmp_path / "one")
    DatasetDict({"train": pairs}).save_to_disk(tmp_path / "both")
    for name in (tmp_path / "one", tmp_path / "both"):
        rows = load(name, dataset_streaming=True)[0]
        assert isinstance(rows, IterableDataset) and [row["chosen"] for row in rows] == pairs["chosen"][:]
    assert isinstance(load("otpo/demo", dataset_streaming=True)[0], IterableDataset)
    named = RowArguments(dataset_name="otpo/demo-instructions", dataset_streaming=True)
    assert isinstance(load_rows(named, DatasetMixtureConfig(), seed=0, evaluate=False)[0], IterableDataset)


def test_a_folder_called_as_a_bundled_set_is_ambiguous(tmp_path, monkeypatch):
    make_pairs(4).save_to_disk(tmp_path / "otpo/demo")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"`dataset_name=otpo/demo` is both .*Write `./otpo/demo` for yours"):
        load("otpo/demo")
    assert len(load("./otpo/demo")[0]) == 4

"""What `otpo pairs` goes on with must be what it began with: rows, judge, models; a ledger tells by digests."""

import json
import math
import shutil
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pytest
from cli_helpers import refusal
from datasets import Dataset

import otpo
from otpo.cli import pairs
from otpo.cli.pairing.contents import judge_digest, rows_digest
from otpo.pairs.ledger import ledger_path

pytestmark = pytest.mark.usefixtures("own_process")
JUDGE = "def score(prompt, answers, row):\n    return [1.0 * len(answer) for answer in answers]\n"
COUNT = 10


@pytest.fixture
def resumed(model_folder, tokenizer, tmp_path) -> Path:
    """A folder with rows, judge, model and adapter of its own, and the ledger of a run whose answers are all there."""
    shutil.copytree(model_folder, tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "model").mkdir()
    told = {"base_model_name_or_path": str(tmp_path / "base"), "peft_type": "LORA"}
    (tmp_path / "model" / "adapter_config.json").write_text(json.dumps(told))
    (tmp_path / "mine.py").write_text(JUDGE)
    told = {"answer": "red", "tools": None, "chat_template_kwargs": {"deep": 1}}
    rows = [{"prompt": [{"role": "user", "content": "the red"}], "number": number, **told} for number in range(COUNT)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = pairs.make_parser().parse_args_into_dataclasses(resumed_line(tmp_path))[0]
    asked = pairs.load_prompts(options)
    identity = {**pairs.identity_of(vars(options)), **pairs.contents_of(options, asked)}
    with pairs.open_ledger(ledger_path(tmp_path / "pairs.jsonl"), identity) as ledger:
        pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
        ledger.add({"row": n, "outcome": "pair", "reason": "", "answers": [], "pair": pair} for n in range(COUNT))
    assert pairs.main(resumed_line(tmp_path)) == 0
    return tmp_path


def resumed_line(folder: Path) -> list[str]:
    line = f"--model_name_or_path {folder}/model --dataset_name {folder}/rows.jsonl --judge {folder}/mine.py:score"
    return [*line.split(), "--output", str(folder / "pairs.jsonl"), "--use_cpu", "true"]


@pytest.mark.parametrize(
    ("file", "old", "new", "named"),
    [
        ("rows.jsonl", '"answer": "red"', '"answer": "blue"', "prompts"),
        ("rows.jsonl", '"tools": null', '"tools": [{"type": "function"}]', "prompts"),
        ("rows.jsonl", '"deep": 1', '"deep": 2', "prompts"),
        ("rows.jsonl", '"number": 9', '"number": 11', "prompts"),
        ("mine.py", "1.0 *", "2.0 *", "judge_code"),
        ("base/chat_template.jinja", "", "{# other #}", "model_files"),
        ("base/generation_config.json", "{", '{"bos_token_id": 3,', "model_files"),
        ("base/tokenizer.json", "{", "{ ", "model_files"),
        ("base/config.json", "{", "{ ", "model_files"),
        ("model/adapter_config.json", "{", "{ ", "model_files"),
        ("model/tokenizer_config.json", "", "{}", "model_files"),
        ("base/adapter_model.bin", "", "weights", "weights"),
    ],
)
def test_what_the_options_name_may_not_change(resumed, capsys, file, old, new, named):
    path = resumed / file
    before = path.read_text() if path.exists() else ""
    path.write_text(before.replace(old, new, 1) if old else before + new)
    found = refusal(pairs.main, capsys, resumed_line(resumed))
    assert f"pairs.jsonl.ledger is the ledger of another run: `{named}` was " in found
    assert found.count(" was ") == 1 and "Set what it was, name another `output`, or remove the ledger" in found


def test_what_pairs_do_not_depend_on_may_change(resumed):
    for name in ("README.md", "otpo_run.json", "trainer_state.json"):
        (resumed / "base" / name).write_text("other")
    assert pairs.main(resumed_line(resumed)) == 0


def test_a_ledger_without_digests_is_refused_as_older(resumed, capsys):
    ledger = ledger_path(resumed / "pairs.jsonl")
    head, rest = ledger.read_text().split("\n", 1)
    told = json.loads(head)
    for name in ("model_files", "judge_code"):
        del told["run"][name]
    ledger.write_text(json.dumps(told) + "\n" + rest)
    found = refusal(pairs.main, capsys, resumed_line(resumed))
    assert "is the ledger of an older otpo, which did not note `model_files` (" in found and "`judge_code` (" in found
    assert "Name another `output`, or remove the ledger to start anew." in found
    assert ledger.read_text().endswith(rest)


def test_digests_of_values_that_json_lacks_and_of_judges(tmp_path, monkeypatch):
    def digest(**changes):
        row = {"at": datetime(2026, 1, 2), "raw": b"a", "sum": Decimal("1.50"), "x": math.nan, "deep": [{"a": None}]}
        return rows_digest(Dataset.from_list([row, {**row, **changes}]), [0, 1])

    assert digest() == digest()
    others = {"at": datetime(2026, 1, 3), "raw": b"b", "sum": Decimal("1.51"), "x": 1.0, "deep": [{"a": 1}]}
    assert len({digest(), *(digest(**{name: value}) for name, value in others.items())}) == 6
    shuffled = Dataset.from_list([{"a": n} for n in range(2100)]).select(range(2099, -1, -1))
    assert len({rows_digest(shuffled, range(2100)), rows_digest(shuffled, range(1, 2101))}) == 2
    assert rows_digest(shuffled.select([0, 2]), [5, 6]) == rows_digest(
        Dataset.from_list([{"a": 2099}, {"a": 2097}]), [5, 6]
    )

    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "judges_of_mine.py").write_text(JUDGE)
    first = judge_digest("judges_of_mine:score")
    assert first == judge_digest(f"{tmp_path / 'judges_of_mine.py'}:bad") is not None
    (tmp_path / "judges_of_mine.py").write_text(JUDGE + "\n")
    assert judge_digest("judges_of_mine:score") != first
    assert judge_digest("checkers") == judge_digest("reward_model") == f"otpo {otpo.__version__}"
    assert judge_digest("no.such:score") is judge_digest("best") is None
    with pytest.raises(ValueError, match=r"`judge=gone.py:score`: there is no file gone.py"):
        judge_digest("gone.py:score")


def test_files_of_others_stay(resumed, capsys):
    line, output = resumed_line(resumed), resumed / "pairs.jsonl"
    ledger = ledger_path(output)
    head = ledger.read_text().splitlines(keepends=True)[0]
    ledger.write_text(head)  # of a run that answered nothing
    output.write_text("precious")
    assert "no ledger pairs.jsonl.ledger beside it tells the run" in refusal(pairs.main, capsys, line)
    assert output.read_text() == "precious"
    output.unlink()
    for notes in ("my notes", "my notes\n", '{"runs": 1}', "[]\n"):
        ledger.write_text(notes)
        assert "pairs.jsonl.ledger is no ledger of `otpo pairs`" in refusal(pairs.main, capsys, line)
        assert ledger.read_text() == notes
    for begun in ("", '{"ru', head[:-9]):  # killed as it wrote its first line
        ledger.write_text(begun)
        with pairs.open_ledger(ledger, json.loads(head)["run"]) as opened:
            assert not opened.entries
        assert ledger.read_text() == head

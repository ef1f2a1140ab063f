"""`otpo eval`: intervals by their formulas, the report, refusals, and lm-eval itself on an exported model."""

import json
import math
import shutil
from importlib.util import find_spec

import pytest
from cli_helpers import refusal
from compass_helpers import compass_model
from helpers import make_tokenizer, save_model

from otpo.cli import eval as eval_command
from otpo.cli.evaluating import harness
from otpo.cli.evaluating.judged import judged_task
from otpo.cli.evaluating.scores import Score, collect_scores, difference, interval
from otpo.cli.evaluating.tasks import functions
from otpo.cli.main import main
from otpo.data import load_demo_preferences

needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is an extra: pip install 'otpo[eval]'"
)
lengthy = pytest.mark.lengthy
TASK = """\
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def score(*values, stderr=None, better=True):
    numbers = dict(enumerate(map(float, values)))
    return Score(sum(values) / len(values), stderr, numbers, better)


# Intervals


def test_shares_have_wilsons_interval():
    """The two ends solve `|share - p| = z sqrt(p (1 - p) / n)`, which is how Wilson defines them."""
    for right, count in ((3, 8), (0, 5), (7, 7), (1, 1), (250, 1000)):
        found = interval(score(*[1] * right, *[0] * (count - right)))
        for end in (found.low, found.high):
            if 0 < end < 1:
                assert abs(right / count - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / count), rel=1e-4)
        assert 0 <= found.low <= found.value <= found.high <= 1 and found.low < found.high


def test_other_scores_have_the_normal_interval():
    found = interval(score(1.0, 2.0, 6.0))
    half = 1.96 * math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 2 / 3)
    assert (found.value, found.low, found.high) == pytest.approx((3, 3 - half, 3 + half), abs=1e-3)
    assert interval(score(2.0))[1:] == (None, None)
    assert interval(Score(9.0, 0.5, None, None)) == pytest.approx((9, 9 - 0.98, 9 + 0.98), rel=1e-4)
    assert interval(Score(9.0, None, None, None))[1:] == (None, None)


def test_a_difference_is_paired_where_examples_are_the_same():
    left, right = score(0, 0, 1, 1, 0, 1), score(0, 1, 1, 1, 0, 1)
    found = difference(left, right)
    changes = [0, 1, 0, 0, 0, 0]
    variance = sum((change - 1 / 6) ** 2 for change in changes) / 5 / 6
    assert found.value == pytest.approx(1 / 6) and found.high - found.value == pytest.approx(
        1.96 * variance**0.5, rel=1e-4
    )
    other = Score(right.value, 0.3, {9: 1.0}, True)
    unpaired = difference(left._replace(stderr=0.4), other)
    assert unpaired.high - unpaired.value == pytest.approx(1.96 * 0.5, rel=1e-4)
    assert difference(left, left)[1:] == (None, None)


def test_results_of_lm_eval_are_read():
    samples = [{"doc_id": place, "filter": "none", "acc": place % 2, "f1": (0, 1)} for place in range(4)]
    samples += [{"doc_id": place, "filter": "strict", "acc": 1.0} for place in range(4)]
    results = {
        "results": {
            "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc,strict": 1.0, "acc_stderr,strict": "N/A"}
            | {"f1,none": 0.25, "f1_stderr,none": 0.2}
        },
        "samples": {"a": samples},
        "higher_is_better": {"a": {"acc": True}},
    }
    found = collect_scores(results)
    assert list(found) == [("a", "acc"), ("a", "acc (strict)"), ("a", "f1")]
    assert found["a", "acc"] == Score(0.5, 0.1, {0: 0.0, 1: 1.0, 2: 0.0, 3: 1.0}, True)
    assert found["a", "acc (strict)"].stderr is None and found["a", "f1"] == Score(0.25, 0.2, None, None)


def test_the_table_says_what_is_better(capsys):
    before, after = score(*[0, 1] * 20), score(*[1] * 40)
    scores = [
        {("t", "up"): it, ("t", "down"): it._replace(higher_is_better=False), ("t", "same"): before}
        for it in (before, after)
    ]
    report = eval_command.make_report(["one [model]", "other"], scores, {"limit": None})
    assert [row["examples"] for row in report["scores"]] == [40, 40, 40] and json.dumps(report)
    eval_command._show(report)
    text = capsys.readouterr().out
    assert text.count("better") == 1 and text.count("worse") == 1 and "+0.5" in text and "[model]" in text


# Our tasks


def test_right_answers_pass_our_checks_and_wrong_ones_do_not():
    rows, asked = functions.pairs()["test"], functions.prompts()["test"]
    assert len(rows) == len(asked) == 252 and sum(rows["label"]) == 126
    for row, prompt in zip(rows, asked, strict=True):
        assert row["text"] == prompt["text"]
        right, wrong = (functions.check(prompt, [row["choices"][place]]) for place in (row["label"], 1 - row["label"]))
        assert right["all"] == 1.0 and wrong["all"] == 0.0


# Refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "0"], "`--limit` must be at least 1, got 0"),
        (["--batch_size", "-1"], "`--batch_size` must be at least 1"),
        (["--compare", "./nowhere"], "`--compare=./nowhere`: there is no such folder"),
        (["--output", "nowhere/scores.json"], "there is no folder nowhere"),
    ],
    ids=str,
)
def test_options_are_refused(model_folder, words, message, capsys, monkeypatch):
    monkeypatch.setattr(harness, "require_lm_eval", lambda: None)
    assert message in refusal(eval_command.main, capsys, [model_folder, "--tasks", "otpo_pairs", *words])


@pytest.mark.parametrize("words", ["", "/", "/new/"])
def test_a_folder_for_the_report_is_refused_before_anything_is_loaded(
    model_folder, tmp_path, words, capsys, monkeypatch
):
    (tmp_path / "new").mkdir()
    monkeypatch.setattr(harness, "require_lm_eval", lambda: None)
    monkeypatch.setattr(harness, "find_tasks", lambda names: pytest.fail("tasks were looked for"))
    argv = [model_folder, "--tasks", "t", "--output", f"{tmp_path}{words}"]
    assert f"`--output={tmp_path}{words}` is a folder. Name a file" in refusal(eval_command.main, capsys, argv)


def test_scores_are_shown_where_the_report_cannot_be_written(model_folder, tmp_path, capsys, monkeypatch):
    def full(report, path):
        raise OSError(28, "No space left on device", path)

    results = {"results": {"letters": {"acc,none": 0.5}}, "samples": {}, "higher_is_better": {}}
    monkeypatch.setattr(harness, "require_lm_eval", lambda: None)
    monkeypatch.setattr(harness, "find_tasks", lambda names: (names, None))
    monkeypatch.setattr(harness, "evaluate", lambda *args, **options: results)
    monkeypatch.setattr(eval_command, "_write", full)
    argv = [model_folder, "--tasks", "letters", "--output", str(tmp_path / "scores.json")]
    assert eval_command.main(argv) == 2
    found = capsys.readouterr()
    assert "letters" in found.out and "0.5" in found.out and "No space left" in found.err


def test_without_lm_eval_the_extra_is_named(model_folder, capsys, monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    message = refusal(eval_command.main, capsys, [model_folder, "--tasks", "otpo_pairs"])
    assert "pip install 'otpo[eval]'" in message


# With lm-eval


@pytest.fixture
def folders(tmp_path):
    """A Compass model, and what `otpo export` makes of it."""
    tokenizer = make_tokenizer()
    model = compass_model(vocab_size=len(tokenizer), num_mtp_layers=1, eos_token_id=tokenizer.eos_token_id).eval()
    save_model(model, tmp_path / "compass", tokenizer)
    assert main(["export", str(tmp_path / "compass"), str(tmp_path / "served")]) == 0
    rows = [
        {"question": f"the {word}", "choices": ["red", "blue"], "label": len(word) % 2} for word in ("shirt", "box")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "letters.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    return tmp_path


@needs_lm_eval
@lengthy
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("named", ["folder", "file"])
def test_lm_eval_scores_the_exported_model_as_ours(folders, named, capsys):
    task = folders / "tasks" if named == "folder" else folders / "tasks" / "letters.yaml"
    argv = [str(folders / "compass"), "--compare", str(folders / "served"), "--tasks", str(task), "--device", "cpu"]
    assert eval_command.main([*argv, "--output", str(folders / "scores.json")]) == 0
    assert "letters" in capsys.readouterr().out
    (row,) = json.loads((folders / "scores.json").read_text())["scores"]
    assert row["examples"] == 6 and row["difference"] == {"value": 0.0, "low": None, "high": None}
    assert row["models"][0] == row["models"][1]


@needs_lm_eval
@lengthy
@pytest.mark.filterwarnings("default")
def test_lm_evals_own_command_line_reads_the_exported_model(folders):
    """In a process that has never heard of Compass."""
    from cli_helpers import python

    model = f"pretrained={folders / 'served'},dtype=float32"
    words = ["run", "--model", "hf", "--model_args", model, "--tasks", "letters", "--include_path", folders / "tasks"]
    words += ["--device", "cpu", "--output_path", folders / "out"]
    done = python("-m", "lm_eval", *map(str, words))
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = (folders / "out").rglob("results_*.json")
    assert 0 <= json.loads(found.read_text())["results"]["letters"]["acc,none"] <= 1


@needs_lm_eval
@lengthy
@pytest.mark.filterwarnings("default")
def test_an_answer_longer_than_the_model_reads_is_refused(model_folder, tmp_path, capsys):
    shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8}))
    argv = [str(tmp_path / "model"), "--tasks", "otpo_pairs", "--limit", "2", "--device", "cpu"]
    assert "has more tokens than the 8 that it reads. Name other tasks" in refusal(eval_command.main, capsys, argv)


@needs_lm_eval
@lengthy
@pytest.mark.filterwarnings("default")
def test_our_tasks_and_refused_ones(model_folder, capsys, tmp_path):
    argv = [model_folder, "--tasks", "otpo_*", "--limit", "2", "--device", "cpu", "--apply_chat_template"]
    assert eval_command.main([*argv, "--output", str(tmp_path / "scores.json")]) == 0
    rows = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert {row["metric"] for row in rows if row["task"] == "otpo_answers"} == {
        *("all", "attribute", "price", "language", "format")
    }
    assert {row["examples"] for row in rows} == {2}
    message = refusal(eval_command.main, capsys, [model_folder, "--tasks", "otpo_pear"])
    assert "lm-eval has no such task. Close to it: otpo_pairs" in " ".join(message.split())
    assert "has no YAML file of a task" in refusal(eval_command.main, capsys, [model_folder, "--tasks", str(tmp_path)])


# Files of prompts


def write_prompts(folder, rows, name="asked.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def test_a_file_of_prompts_is_a_task(tmp_path):
    rows = [
        {"prompt": "the red", "answer": "shirt"},
        {"messages": [{"role": "user", "content": "blue"}], "answer": ""},
    ]
    task = judged_task(write_prompts(tmp_path, rows), "exact_match", 7)
    docs = task["custom_dataset"]()["test"]
    assert task["task"] == "asked" and docs["text"] == ["the red", "blue"] and "all" in str(task["metric_list"])
    assert task["generation_kwargs"]["max_gen_toks"] == 7
    assert task["process_results"](docs[0], [" Shirt\n"]) == {"score": 1.0, "all": 1.0}
    assert task["process_results"](docs[1], ["shirt"]) == {"score": 0.0, "all": 0.0}


def test_our_checkers_score_rows_that_tell_their_right_answer(tmp_path):
    rows = [dict(row) for row in load_demo_preferences("test").select(range(4))]
    task = judged_task(write_prompts(tmp_path, rows), "checkers", 64)
    docs = task["custom_dataset"]()["test"]
    for doc, row in zip(docs, rows, strict=True):
        assert task["process_results"](doc, [row["chosen"][0]["content"]]) == {"score": 1.0, "all": 1.0}
        wrong = task["process_results"](doc, [row["rejected"][0]["content"]])
        assert wrong["all"] == 0.0 and 0.0 <= wrong["score"] < 1.0


@pytest.mark.parametrize(
    ("rows", "judge", "message"),
    [
        ([{"prompt": "a"}], "checkers", r"row 0: the judge raised ValueError: the row has no 'answer'"),
        ([{"prompt": "a", "answer": "b"}], "reward_model", "`--judge reward_model`: `otpo eval` loads none"),
        ([{"prompt": "a", "answer": "b"}], "exactly", "`judge=exactly` is not known"),
        ([{"prompt": "a", "answer": "b"}, {"prompt": " ", "answer": "b"}], "exact_match", "row 1 has an empty prompt"),
        (
            [{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "answer": "b"}],
            "exact_match",
            "row 0 has a prompt of 2 message\\(s\\), the first one the system's",
        ),
    ],
    ids=["no answer", "reward model", "unknown", "empty", "turns"],
)
def test_prompts_that_cannot_be_asked(tmp_path, rows, judge, message):
    with pytest.raises(ValueError, match=message):
        judged_task(write_prompts(tmp_path, rows), judge, 8)


@needs_lm_eval
@lengthy
@pytest.mark.filterwarnings("default")
def test_lm_eval_runs_files_of_prompts(model_folder, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "def length(prompt, answers, row):\n    return [float(row['of'])] * len(answers)\n"
    )
    asked = write_prompts(tmp_path, [{"prompt": f"the {word}", "of": len(word)} for word in ("red", "blue", "shirt")])
    argv = [model_folder, "--tasks", asked, "otpo_pairs", "--device", "cpu", "--limit", "2", "--max_new_tokens", "4"]
    argv += ["--judge", f"{tmp_path / 'mine.py'}:length", "--compare", model_folder]
    assert eval_command.main([*argv, "--output", str(tmp_path / "scores.json")]) == 0
    report = json.loads((tmp_path / "scores.json").read_text())
    (row,) = [row for row in report["scores"] if row["task"] == "asked"]
    assert row["metric"] == "score" and row["models"][0]["value"] == 3.5 and row["difference"]["value"] == 0.0
    assert report["options"]["judge"].endswith("mine.py:length") and report["options"]["max_new_tokens"] == 4
    assert {row["task"] for row in report["scores"]} == {"asked", "otpo_pairs"}
    (tmp_path / "more").mkdir()
    again = write_prompts(tmp_path / "more", [{"prompt": "a", "of": 1}])
    message = refusal(eval_command.main, capsys, [*argv[:2], asked, again, *argv[4:]])
    assert "two files of prompts are called asked. Rename one" in " ".join(message.split())

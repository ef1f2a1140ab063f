"""`examples/iterate.py` at its smallest: two rounds on a random model, killed and taken up again."""

import csv
import importlib
import json
import shutil
from pathlib import Path

import pytest
import yaml
from cli_helpers import ROOT
from datasets import Dataset
from helpers import WORDS
from transformers import AutoModelForCausalLM

from otpo.cli.iterating.plan import open_plan
from otpo.cli.iterating.rounds import count_right, held_out_rows, run_round
from otpo.cli.iterating.steps import greedy_answers, load_for_answers
from otpo.cli.pairing.contents import model_digest
from otpo.pairs.prompts import prompt_tokens

pytestmark = pytest.mark.usefixtures("own_process")


@pytest.fixture
def iterate(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("iterate")


@pytest.fixture(scope="module")
def folder(model_folder, tokenizer, tmp_path_factory) -> Path:
    """A random model whose answers many tokens end, prompts, and a judge that counts letters."""
    folder = tmp_path_factory.mktemp("iterate")
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(10, 50)]
    model.save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    words = WORDS.split()
    rows = [{"prompt": [{"role": "user", "content": " ".join(words[:n])}]} for n in range(1, 7)]
    Dataset.from_list(rows).to_json(folder / "prompts.jsonl")
    (folder / "judge.py").write_text("def score(prompt, answers, row):\n    return [len(a) for a in answers]\n")
    return folder


def plan(folder: Path, output: Path, **changes) -> str:
    """The committed plan, made small."""
    values = yaml.safe_load((ROOT / "examples" / "iterate.yaml").read_text(encoding="utf-8"))
    prompts, judge = str(folder / "prompts.jsonl"), f"{folder / 'judge.py'}:score"
    values |= {"output": str(output), "model_name_or_path": str(folder / "start")}
    values["pairs"] |= {"dataset_name": prompts, "judge": judge, "max_train_rows": 4, "num_samples": 4}
    values["align"] |= {"max_steps": 1, "per_device_train_batch_size": 2}
    values["held_out"] |= {"dataset_name": prompts, "judge": judge, "right_from": 12}
    values |= changes
    path = output.parent / f"{output.name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_rounds_and_going_on(iterate, folder, tmp_path, capsys):
    output = tmp_path / "run"
    path = plan(folder, output)
    assert iterate.main([path]) == 0
    told = capsys.readouterr().out
    assert told.count("otpo pairs") == told.count("otpo align") == 2 and "of 6 (" in told
    with (output / "rounds.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["round"] for row in rows] == ["0", "1", "2"]
    assert all(0 <= int(row["right"]) <= 6 == int(row["held_out"]) for row in rows)
    assert all(int(row["pairs"]) >= 1 for row in rows[1:])
    assert (output / "rounds.png").stat().st_size > 5_000
    first, second = (json.loads((output / f"round{n}" / "round.json").read_text()) for n in (1, 2))
    assert first["round"] == 1 and second["round"] == 2

    # As if it had been killed in the second round, while pairs were made: only what is missing is done again.
    table, pairs = (output / "rounds.csv").read_bytes(), (output / "round2" / "pairs.jsonl").read_bytes()
    for name in ("round.json", "align.json", "pairs.jsonl"):
        (output / "round2" / name).unlink()
    ledger = output / "round2" / "pairs.jsonl.ledger"
    ledger.write_bytes(ledger.read_bytes()[:-40])
    assert iterate.main([path]) == 0
    told = capsys.readouterr().out
    assert told.count("otpo pairs") == told.count("otpo align") == 1
    assert (output / "rounds.csv").read_bytes() == table
    assert (output / "round2" / "pairs.jsonl").read_bytes() == pairs

    # Nothing is left to do; another plan in the same folder is refused, more rounds are not.
    assert iterate.main([path]) == 0 and "otpo pairs" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        iterate.main([plan(folder, output, seed=3)])
    assert "has the rounds of another plan, which differs in ['seed']" in capsys.readouterr().err
    assert iterate.main([plan(folder, output, rounds=3)]) == 0
    assert "Round 3 of 3" in capsys.readouterr().out


@pytest.fixture
def begun(folder, tmp_path) -> tuple[Path, str]:
    """A copy of the folder, and a plan of it whose first answers are counted."""
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    for name in ("pairs", "held"):
        shutil.copy(mine / "judge.py", mine / f"{name}.py")
        shutil.copy(mine / "prompts.jsonl", mine / f"{name}.jsonl")
    values = yaml.safe_load(Path(plan(mine, tmp_path / "run")).read_text())
    for part, name in (("pairs", "pairs"), ("held_out", "held")):
        values[part] |= {"dataset_name": str(mine / f"{name}.jsonl"), "judge": f"{mine / name}.py:score"}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    open_plan(str(path))
    (tmp_path / "run" / "start.json").write_text("{}")
    open_plan(str(path))
    return mine, str(path)


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("held.jsonl", "held_out.dataset_name"),
        ("held.py", "held_out.judge"),
        ("pairs.jsonl", "pairs.dataset_name"),
        ("pairs.py", "pairs.judge"),
        ("start/generation_config.json", "model_name_or_path"),
    ],
)
def test_contents_of_a_plan_may_not_change(begun, file, named):
    path = begun[0] / file
    path.write_text(path.read_text().replace("red", "blue").replace("len(a)", "-len(a)").replace("{", "{ ", 1))
    if path.suffix == ".json":
        path.write_text(path.read_text() + " ")
    with pytest.raises(ValueError, match=rf"of other contents: what \['{named}'\] name has changed since. Put back"):
        open_plan(begun[1])
    (begun[0].parent / "run" / "start.json").unlink()  # nothing is lost
    open_plan(begun[1])


def test_rounds_of_an_older_otpo_and_of_another_model_are_refused(begun):
    noted = begun[0].parent / "run" / "iterate.json"
    told = json.loads(noted.read_text())
    del told["contents"]
    noted.write_text(json.dumps(told))
    with pytest.raises(
        ValueError, match=r"has rounds of an older otpo, which did not note the contents of \['held_out"
    ):
        open_plan(begun[1])
    done = begun[0].parent / "run" / "round2"
    done.mkdir()
    (done / "round.json").write_text('{"round": 2}')
    (done / "begun.json").write_text(
        json.dumps({"start": model_digest("model_name_or_path", str(begun[0] / "start"))})
    )
    assert run_round(2, begun[0] / "start", done, {}) == {"round": 2}
    (begun[0] / "start" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(SystemExit, match=r"round2 was made of another model than .*start is now. Remove "):
        run_round(2, begun[0] / "start", done, {})


def test_held_out_prompts_are_read_as_pairs_reads_them(folder, tmp_path):
    """Texts, and conversations with options of the template, on whatever device there is; one bad row is named."""
    start, held_out = folder / "start", {"judge": "exact_match", "right_from": 1, "max_new_tokens": 8, "batch_size": 2}
    held_out |= {"dataset_name": str(tmp_path / "held.jsonl"), "dataset_train_split": "train"}
    texts = [{"prompt": "the red shirt", "answer": "a"}, {"prompt": "the", "answer": "b"}, {"prompt": "red blue"}]
    Dataset.from_list(texts).to_json(tmp_path / "held.jsonl")
    assert count_right(start, held_out, use_cpu=False) == {"right": 0, "held_out": 3, "judge_failed": 1}

    model, tokenizer = load_for_answers(start, "cpu")
    tokenizer.chat_template = "{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %} {{ color }}"
    asked = [{"role": "user", "content": "the"}]
    rows = [{"tools": [{"name": "red"}]}, {"chat_template_kwargs": {"color": "blue"}}, {}]
    seen, real = [], model.generate

    def generate(**options):
        seen.extend((options["input_ids"] * options["attention_mask"]).tolist())
        return real(**options)

    model.generate = generate
    together = greedy_answers(model, tokenizer, [asked] * 3, 6, 3, rows)
    for row, tokens in zip(rows, seen, strict=True):
        expected = prompt_tokens(tokenizer, asked, row)
        assert tokens == [0] * (len(tokens) - len(expected)) + expected
    assert together == [greedy_answers(model, tokenizer, [asked], 6, 1, [row])[0] for row in rows]

    Dataset.from_list([{"prompt": "the"}, {"prompt": " "}]).to_json(tmp_path / "held.jsonl")
    with pytest.raises(ValueError, match=r"Row 1 of `held_out`: `dataset_name: .*` has an empty prompt"):
        held_out_rows(held_out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "`rounds` must be a whole number of at least 1, got 0"),
        ({"round": 2}, "must hold the keys"),
        ({"held_out": {"judge": "checkers"}}, "`held_out` has no `dataset_name`"),
        ({"held_out": {"judge": "best", "dataset_name": "x"}}, "`judge=best` is not known"),
        ({"held_out": {"judges": "best"}}, "`held_out` has ['judges']"),
        ({"align": {"seed": 3}}, "`align` has ['seed'], which each round sets itself"),
        ({"held_out": {"judge": "checkers", "dataset_name": "gone.jsonl"}}, "the file gone.jsonl does not exist"),
        ({"align": None}, "`align` must hold options by name, got None"),
        ({"pairs": {"output": "x"}}, "`pairs` has ['output']"),
    ],
)
def test_plans_that_are_refused(iterate, folder, tmp_path, capsys, changes, message):
    with pytest.raises(SystemExit):
        iterate.main([plan(folder, tmp_path / "run", **changes)])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("", "seed", None, "`seed` must be a whole number of at least 0, got None"),
        ("", "seed", "a", "`seed` must be a whole number of at least 0, got 'a'"),
        ("", "rounds", True, "`rounds` must be a whole number of at least 1, got True"),
        ("", "output", None, "`output` must be text, got None"),
        ("", "model_name_or_path", None, "`model_name_or_path` must be text, got None"),
        ("held_out", "batch_size", 0, "`held_out: batch_size` must be a whole number of at least 1, got 0"),
        ("held_out", "max_new_tokens", "a", "`held_out: max_new_tokens` must be a whole number"),
        ("held_out", "right_from", None, "`held_out: right_from` must be a score, a finite number, got None"),
        ("held_out", "judge", 3, "`held_out: judge` must be text, got 3"),
        ("pairs", "nosuch", 3, "`pairs` has options that `otpo pairs` does not know: --nosuch 3"),
        ("align", "nosuch", 3, "Unknown option"),
        ("align", "weighting", "otpo*x", None),
        ("align", "max_steps", "many", None),
    ],
)
def test_slips_cost_no_round(folder, tmp_path, capsys, iterate, part, name, value, message):
    path = Path(plan(folder, tmp_path / "run"))
    values = yaml.safe_load(path.read_text())
    (values[part] if part else values)[name] = value
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit) as ended:
        iterate.main([str(path)])
    told = capsys.readouterr()
    assert ended.value.code == 2 and (message or name) in " ".join(told.err.split())
    assert not (tmp_path / "run").exists() and "otpo pairs --" not in told.out

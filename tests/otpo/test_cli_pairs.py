"""`otpo pairs`: what it writes, how it goes on after it was killed, what bad judges leave, what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from cli_helpers import HANG, ROOT, arguments, refusal
from datasets import Dataset
from helpers import WORDS, lora
from transformers import AutoModelForCausalLM, Qwen3ForSequenceClassification

from otpo.cli import align, pairs

pytestmark = pytest.mark.usefixtures("own_process")
JUDGES = """
import time

def score(prompt, answers, row):
    return [float(len(answer)) for answer in answers]

def slow(prompt, answers, row):
    time.sleep(0.3)
    return score(prompt, answers, row)

def bad(prompt, answers, row):
    number = row["number"]
    if number % 4 == 0:
        raise RuntimeError(f"no idea of {prompt[0]['content']}")
    scores = [1.0] * len(answers) if number % 4 == 1 else score(prompt, answers, row)
    return [float("nan")] * len(answers) if number % 4 == 2 else scores
"""
COUNT = 10


@pytest.fixture(scope="module")
def talker(model_folder, tokenizer, tmp_path_factory) -> str:
    """The random model, whose answers many tokens end, so that few of them are cut off."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(10, 50)]
    folder = tmp_path_factory.mktemp("talker")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def judges(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("judges") / "mine.py"
    path.write_text(JUDGES)
    return str(path)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> str:
    words = WORDS.split()
    rows = [{"prompt": [{"role": "user", "content": " ".join(words[: n + 1])}], "number": n} for n in range(COUNT)]
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    Dataset.from_list(rows).to_json(path)
    return str(path)


def words(model: str, data: str, judge: str, output: Path, **changes: object) -> list[str]:
    options = {
        "model_name_or_path": model,
        "dataset_name": data,
        "judge": judge,
        "output": output,
        "num_samples": 4,
        "max_new_tokens": 24,
        "batch_size": 3,
        "use_cpu": True,
        **changes,
    }
    return [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def made(talker, prompts, judges, tmp_path_factory) -> Path:
    """The file of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("made") / "pairs.jsonl"
    assert pairs.main(words(talker, prompts, f"{judges}:score", output)) == 0
    return output


def ledger_of(output: Path) -> Path:
    return output.with_name(output.name + ".ledger")


def test_pairs_are_the_best_and_the_worst_answers(made, prompts):
    asked, found = read(Path(prompts)), read(made)
    assert len(found) >= 7
    entries = {entry["row"]: entry for entry in read(ledger_of(made))[1:]}
    assert list(entries) == list(range(COUNT))
    for row in found:
        answers = {answer["text"]: answer for answer in entries[row["row"]]["answers"]}
        chosen, rejected = (answers[row[side][0]["content"]] for side in ("chosen", "rejected"))
        assert row["prompt"] == asked[row["row"]]["prompt"] and row["chosen"][0]["role"] == "assistant"
        assert chosen["ended"] and chosen["score"] == row["score_chosen"] == len(chosen["text"])
        assert rejected["score"] == row["score_rejected"] == min(answer["score"] for answer in answers.values())
        assert max(answer["score"] for answer in answers.values() if answer["ended"]) == row["score_chosen"]
        assert row["score_chosen"] > row["score_rejected"]


def test_align_reads_them_as_they_are(talker, made, tmp_path, capsys):
    assert align.main(arguments(talker, str(made), tmp_path / "run", max_length=128)) == 0
    assert f"{len(read(made))} to train on" in capsys.readouterr().out


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.77, 1.0])
def test_a_run_that_was_killed_ends_with_the_same_files(talker, prompts, judges, made, tmp_path, capsys, share):
    """Killed at any byte of the ledger, so also within a line and within a batch."""
    output = tmp_path / "pairs.jsonl"
    whole = ledger_of(made).read_bytes()
    ledger_of(output).write_bytes(whole[: int(share * len(whole))])
    assert pairs.main(words(talker, prompts, f"{judges}:score", output)) == 0
    assert output.read_bytes() == made.read_bytes()
    assert ledger_of(output).read_bytes() == whole
    told = capsys.readouterr().out
    assert ("resuming" in told) == (share > 0) and f"saved      {output}" in told
    assert ("generator" in told) == (share < 1)  # the model is not even loaded where all is there


def test_batches_make_no_difference_but_rounding(talker, prompts, judges, made, tmp_path):
    for size in (1, 7):
        output = tmp_path / f"{size}.jsonl"
        assert pairs.main(words(talker, prompts, f"{judges}:score", output, batch_size=size)) == 0
        assert output.read_bytes() == made.read_bytes()


def test_some_of_the_rows_keep_their_numbers_and_answers(talker, prompts, judges, made, tmp_path):
    output = tmp_path / "pairs.jsonl"
    assert pairs.main(words(talker, prompts, f"{judges}:score", output, max_train_rows=4)) == 0
    all_of_them = {row["row"]: row for row in read(made)}
    found = read(output)
    assert found and all(row == all_of_them[row["row"]] for row in found)
    other = tmp_path / "other.jsonl"
    assert pairs.main(words(talker, prompts, f"{judges}:score", other, seed=1)) == 0
    assert read(other) != read(made)


def test_bad_judges_mark_the_prompt_and_the_run_goes_on(talker, prompts, judges, tmp_path, capsys):
    output = tmp_path / "pairs.jsonl"
    line = words(talker, prompts, f"{judges}:bad", output)
    assert pairs.main(line) == 0
    entries = read(ledger_of(output))[1:]
    judged = [entry for entry in entries if not entry["reason"].startswith("no answer is complete")]
    assert len(judged) >= 9
    for entry in judged:
        kind, reason = {
            0: ("failed", "the judge raised RuntimeError: no idea of the"),
            1: ("tie", "no answer is better than another"),
            2: ("failed", "the judge gave nan for answer 0, not a finite number"),
            3: ("pair", ""),
        }[entry["row"] % 4]
        assert entry["outcome"] == kind and entry["reason"].startswith(reason)
    counts = Counter(entry["outcome"] for entry in entries)
    told = capsys.readouterr().out
    assert f"{counts['pair']} pairs, {counts['tie']} ties, {counts['failed']} failed of {COUNT} prompts" in told

    # Failed prompts stay so, unless they are to be tried again.
    assert pairs.main(line) == 0 and len(read(ledger_of(output))) == 1 + COUNT
    assert pairs.main([*line, "--retry_failed", "true"]) == 0
    assert len(read(ledger_of(output))) == 1 + COUNT + counts["failed"]


def test_without_a_pair_the_command_fails(talker, prompts, judges, tmp_path, capsys):
    output = tmp_path / "pairs.jsonl"
    assert pairs.main(words(talker, prompts, f"{judges}:score", output, max_new_tokens=1, num_samples=2)) == 1
    found = capsys.readouterr()
    assert "10 failed of 10 prompts" in found.out
    assert "10 times: no answer is complete: each is blank or was cut off by `max_new_tokens`" in found.out
    assert f"error: no pair was made of 10 prompts, so `{output}` is empty" in found.err and output.read_text() == ""


def test_text_prompts_become_text_pairs(talker, judges, tmp_path):
    data, output = tmp_path / "prompts.jsonl", tmp_path / "pairs.jsonl"
    Dataset.from_list([{"prompt": f"the red {word}"} for word in WORDS.split()[:5]]).to_json(data)
    line = words(talker, str(data), f"{judges}:score", output, min_margin=5, min_score_chosen=10)
    assert pairs.main(line) == 0
    found = read(output)
    assert found and all(isinstance(row[side], str) for row in found for side in ("prompt", "chosen", "rejected"))
    assert all(row["score_chosen"] >= 10 and row["score_chosen"] - row["score_rejected"] >= 5 for row in found)
    assert align.main(arguments(talker, str(output), tmp_path / "run", max_length=128, max_steps=1)) == 0


def test_a_prompt_that_leaves_no_room_fails_alone(talker, tokenizer, judges, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(talker)
    model.config.max_position_embeddings = 64
    folder, data, output = tmp_path / "short", tmp_path / "prompts.jsonl", tmp_path / "pairs.jsonl"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Dataset.from_list([{"prompt": "red " * count} for count in (3, 60, 4)]).to_json(data)
    assert pairs.main(words(str(folder), str(data), f"{judges}:score", output)) == 0
    reason = read(ledger_of(output))[2]["reason"]
    assert reason.startswith("the prompt has ") and reason.endswith("the model's positions allow 40")
    assert len(read(ledger_of(output))) == 4


def test_a_reward_model_and_an_adapter(talker, tokenizer, prompts, tmp_path, capsys):
    from peft import get_peft_model

    rewards, adapter, output = tmp_path / "rewards", tmp_path / "adapter", tmp_path / "pairs.jsonl"
    Qwen3ForSequenceClassification.from_pretrained(talker, num_labels=1).save_pretrained(rewards)
    tokenizer.save_pretrained(rewards)
    get_peft_model(AutoModelForCausalLM.from_pretrained(talker), lora()).save_pretrained(adapter)
    line = words(str(adapter), prompts, "reward_model", output, reward_model_name_or_path=rewards)
    assert pairs.main(line) == 0
    assert f"judge      reward_model, {rewards}" in capsys.readouterr().out
    assert len({row["score_chosen"] for row in read(output)}) > 4


class FakeEngine:
    """Stands in for `vllm.LLM`: answers with words picked by the seed."""

    def __init__(self, **options):
        self.options = options

    def generate(self, prompts, params, use_tqdm):
        assert all(set(prompt) == {"prompt_token_ids"} for prompt in prompts) and len(prompts) == len(params)
        picked = [WORDS.split()[param.seed % 7 :][: 1 + param.seed % 3] for param in params]
        return [
            SimpleNamespace(outputs=[SimpleNamespace(text=" ".join(text), finish_reason="stop" if text else "length")])
            for text in picked
        ]


def test_vllm_answers_where_it_is_installed(talker, prompts, judges, tmp_path, monkeypatch, capsys):
    line = words(talker, prompts, f"{judges}:score", tmp_path / "pairs.jsonl", generator="vllm", use_cpu=None)
    assert "`generator=vllm` needs the package vllm: `pip install vllm`" in refusal(pairs.main, capsys, line)
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeEngine, lambda **options: SimpleNamespace(**options)
    module.__spec__ = SimpleNamespace(name="vllm")
    monkeypatch.setitem(sys.modules, "vllm", module)
    assert pairs.main(line) == 0
    assert "generator  vLLM" in capsys.readouterr().out
    assert len(read(tmp_path / "pairs.jsonl")) > 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"judge": None},
            "No judge is named. Set `judge` to one of checkers, exact_match, reward_model, or a function",
        ),
        ({"judge": "best"}, "`judge=best` is not known. Set one of checkers"),
        ({"judge": "reward_model"}, "`judge=reward_model` with `reward_model_name_or_path=None`. Name the model"),
        ({"reward_model_name_or_path": "x"}, "Set `judge` to reward_model, or leave it out"),
        ({"output": None}, "No file is named. Set `output`"),
        ({"output": "pairs.csv"}, "`output=pairs.csv` does not end as a file of JSON lines does"),
        ({"model_name_or_path": None}, "No model is named"),
        ({"model_name_or_path": "./gone"}, "`model_name_or_path=./gone`: there is no such folder"),
        ({"dataset_name": None}, "No dataset is named"),
        ({"dataset_name": "gone.jsonl"}, "`dataset_name`: the file gone.jsonl does not exist"),
        (
            {"dataset_name": "otpo/demo-corpus", "dataset_config": 3},
            "Row 0 of `dataset_name=otpo/demo-corpus` has nei",
        ),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"max_train_rows": 0}, "`max_train_rows` must be at least 1, got 0"),
        ({"seed": -1}, "`seed` must be at least 0, got -1"),
        ({"num_samples": 1}, "`num_samples` must be at least 2"),
        ({"min_margin": -1}, "`min_margin` must be a finite number of at least 0"),
        ({"generator": "magic"}, "`generator=magic` is not known. Set one of: transformers, vllm"),
        ({"dtype": "int3"}, "`dtype=int3` is not known. Set one of: auto, bfloat16, float16, float32"),
        ({"max_new_tokens": 10**7}, "`max_new_tokens=10000000` leaves no room for a prompt"),
        ({"tempreature": 1}, "Unknown option(s) --tempreature 1"),
    ],
)
def test_what_is_refused_leaves_the_way_free(talker, prompts, judges, tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(tmp_path)
    options = {"model_name_or_path": talker, "dataset_name": prompts, "judge": f"{judges}:score", **changes}
    named = [options.pop(name) for name in ("model_name_or_path", "dataset_name", "judge")]
    output = options.pop("output", tmp_path / "pairs.jsonl")
    assert message in refusal(pairs.main, capsys, words(*named, output, **options))
    assert not (tmp_path / "pairs.jsonl").exists()


def test_other_options_and_foreign_files_are_refused(talker, prompts, judges, made, tmp_path, capsys):
    found = refusal(pairs.main, capsys, words(talker, prompts, f"{judges}:bad", made, top_p=0.5))
    assert "is the ledger of another run: `judge` was" in found and "`top_p` was 1.0 and is 0.5" in found
    changed = tmp_path / "prompts.jsonl"
    output = tmp_path / "pairs.jsonl"
    changed.write_text(Path(prompts).read_text())
    line = words(talker, str(changed), f"{judges}:score", output)
    assert pairs.main(line) == 0
    changed.write_text(Path(prompts).read_text().replace("the", "a"))
    assert "another run: `prompts` was" in refusal(pairs.main, capsys, line)
    changed.write_text(Path(prompts).read_text())
    model, file = tmp_path / "model", "model.safetensors"
    shutil.copytree(talker, model)
    other = tmp_path / "other.jsonl"
    assert pairs.main(words(str(model), str(changed), f"{judges}:score", other)) == 0
    content = (model / file).read_bytes()
    (model / file).write_bytes(content[:-4] + b"\0\0\0\0")  # trained on, in the same place
    line_of_other = words(str(model), str(changed), f"{judges}:score", other)
    assert "another run: `weights` was" in refusal(pairs.main, capsys, line_of_other)
    ledger_of(output).unlink()
    assert "no ledger pairs.jsonl.ledger beside it tells the run" in refusal(pairs.main, capsys, line)


def test_a_recipe(talker, prompts, judges, made, tmp_path):
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "pairs.jsonl"
    recipe.write_text(f"judge: {judges}:score\nnum_samples: 4\nmax_new_tokens: 24\nbatch_size: 3\nuse_cpu: true\n")
    line = ["--config", str(recipe), "--model_name_or_path", talker, "--dataset_name", prompts]
    assert pairs.main([*line, "--output", str(output)]) == 0
    assert output.read_bytes() == made.read_bytes()


@pytest.mark.lengthy
def test_a_killed_process_goes_on(talker, prompts, judges, tmp_path):
    """A real process, killed without warning when it has written a part, and the same command again."""
    output = tmp_path / "pairs.jsonl"
    line = words(talker, prompts, f"{judges}:slow", output, batch_size=1)
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "otpo.cli.pairs", *line], env=environment, stdout=subprocess.DEVNULL
    )
    begin = time.monotonic()
    while not ledger_of(output).exists() or ledger_of(output).read_bytes().count(b"\n") < 3:
        assert process.poll() is None and time.monotonic() - begin < HANG
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists() and 2 <= ledger_of(output).read_bytes().count(b"\n") - 1 < COUNT
    torch.set_num_threads(1)
    assert pairs.main(line) == 0
    again = tmp_path / "again.jsonl"
    assert pairs.main(words(talker, prompts, f"{judges}:slow", again, batch_size=1)) == 0
    assert output.read_bytes() == again.read_bytes()
    assert ledger_of(output).read_bytes() == ledger_of(again).read_bytes()

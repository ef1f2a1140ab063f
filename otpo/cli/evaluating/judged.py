"""A file of prompts and a judge as a task of lm-eval: free answers, scored as `otpo pairs` scores them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import DatasetMixtureConfig

from otpo.data.loading import RowArguments, load_rows
from otpo.pairs.judges import JUDGES, REWARD_MODEL, Judge, JudgeError, judged, load_judge
from otpo.pairs.prompts import find_prompt

TASKS = "--tasks"
ENDINGS = (".jsonl", ".jsonl.gz")


def is_prompts(name: str) -> bool:
    """Whether what `--tasks` names is a file of prompts."""
    return name.endswith(ENDINGS)


def judged_tasks(
    named: Sequence[str], judge_name: str, max_new_tokens: int, option: str = TASKS
) -> list[dict[str, Any]]:
    """[`judged_task`] of each file of prompts among what an option names, `--tasks` where none is told.

    Raises:
        ValueError: See there; or two of them have one name.
    """
    made: dict[str, dict[str, Any]] = {}
    for path in filter(is_prompts, named):
        task = judged_task(path, judge_name, max_new_tokens, option)
        if task["task"] in made:
            raise ValueError(f"`{option}`: two files of prompts are called {task['task']}. Rename one.")
        made[task["task"]] = task
    return list(made.values())


def judged_task(path: str, judge_name: str, max_new_tokens: int, option: str = TASKS) -> dict[str, Any]:
    """The configuration of a task that lm-eval runs, whose name is the file's.

    Its metric `score` is the mean of the judge's; with a judge of ours, whose best is 1, `all` is the share of answers
    that get it.

    Args:
        path: Rows with a `prompt`, or `messages` up to an answer, and what the judge looks at.
        judge_name: One of [`otpo.pairs.judges.JUDGES`], or a function of the user's.
        max_new_tokens: Tokens of an answer at most.
        option: That named the file.

    Raises:
        ValueError: The file, a row or the judge can't be used; the message names it.
    """
    if judge_name == REWARD_MODEL:
        raise ValueError(f"`--judge {REWARD_MODEL}`: `otpo eval` loads none. Set one of {', '.join(JUDGES)}.")
    judge = load_judge(judge_name)
    rows = _read(path, option)
    texts = [_text(row, place, path, option) for place, row in enumerate(rows)]
    _scored(judge, rows[0], "", 0, (option, path))  # what it can't judge is said before a model is loaded

    def process_results(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
        score = _scored(judge, rows[doc["place"]], results[0], doc["place"], (option, path))
        return {"score": score, **({"all": float(score == 1.0)} if judge_name in JUDGES else {})}

    metrics = ["score", *(["all"] if judge_name in JUDGES else [])]
    docs = Dataset.from_list([{"place": place, "text": text} for place, text in enumerate(texts)])
    return {
        "task": Path(path).name.split(".")[0],
        "custom_dataset": lambda **_: {"test": docs},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "",
        "target_delimiter": "",
        "generation_kwargs": {"until": [], "max_gen_toks": max_new_tokens, "do_sample": False},
        "process_results": process_results,
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
        "metadata": {"version": 1.0},
    }


def _read(path: str, option: str) -> list[dict[str, Any]]:
    rows: Any = load_rows(
        RowArguments(dataset_name=path),
        DatasetMixtureConfig(),
        seed=0,
        evaluate=False,
        check=lambda found, name, numbers: found,
    )[0]
    if not len(rows):
        raise ValueError(f"`{option} {path}`: the file has no rows.")
    return list(rows)


def _text(row: Mapping[str, Any], place: int, path: str, option: str) -> str:
    """What the model is asked: the prompt's text, or that of its one message."""
    try:
        prompt = find_prompt(row)
    except ValueError as error:
        raise ValueError(f"`{option} {path}`: row {place} {error}.") from error
    if isinstance(prompt, str):
        return prompt
    if len(prompt) > 1 or prompt[0]["role"] != "user":
        raise ValueError(
            f"`{option} {path}`: row {place} has a prompt of {len(prompt)} message(s), the first one the "
            f"{prompt[0]['role']}'s. lm-eval asks with one text: leave a single message of the user's."
        )
    return prompt[0]["content"]


def _scored(judge: Judge, row: Mapping[str, Any], answer: str, place: int, named: tuple[str, str]) -> float:
    try:
        return judged(judge, row.get("prompt") or row.get("messages"), [answer.strip()], row)[0]
    except JudgeError as error:
        raise ValueError(f"`{' '.join(named)}`: row {place}: {error}.") from error

"""The parts of `otpo pairs` after sampling: distinct answers, judges, pairs, the ledger."""

import asyncio
import json
import math
import sys
from collections import Counter

import pytest
import torch
from helpers import WORDS, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3ForSequenceClassification

from otpo.data import load_demo_instructions
from otpo.pairs.judges import JUDGES, JudgeError, checkers, exact_match, judged, load_judge
from otpo.pairs.ledger import open_ledger, read_entries
from otpo.pairs.pairing import Answer, PairingRule, before_judging, choose_pair, distinct, preference_row
from otpo.pairs.reward_model import RewardModel
from otpo.pairs.run import judge_answers


def texts(*words: str, ended: bool = True) -> list[Answer]:
    return [Answer(word, ended) for word in words]


# Pairs


def test_the_best_and_the_worst_become_a_pair():
    answers = texts("so so", "good", "bad", "also good", "also bad")
    outcome = choose_pair(answers, [1, 2, 0, 2, 0], PairingRule())
    assert (outcome.kind, outcome.chosen, outcome.rejected) == ("pair", 1, 2)
    row = preference_row(7, "Say!", answers, [1, 2, 0, 2, 0], outcome)
    assert row == {
        "prompt": "Say!", "chosen": "good", "rejected": "bad", "score_chosen": 2, "score_rejected": 0, "row": 7
    }  # fmt: skip
    talk = preference_row(7, [{"role": "user", "content": "Say!"}], answers, [1, 2, 0, 2, 0], outcome)
    assert talk["chosen"] == [{"role": "assistant", "content": "good"}]
    assert talk["rejected"] == [{"role": "assistant", "content": "bad"}] and talk["score_chosen"] == 2


def test_what_was_cut_off_or_is_blank_is_never_chosen():
    answers = [Answer("cut", False), Answer(" \n", True), Answer("whole", True), Answer("worse", False)]
    outcome = choose_pair(answers, [9, 8, 1, 0], PairingRule())
    assert (outcome.chosen, outcome.rejected) == (2, 3)
    assert choose_pair(answers[:3], [9, 8, 1], PairingRule()).kind == "tie"  # the best that may be chosen is the worst
    assert choose_pair([*answers, Answer("ended", True)], [9, 8, 1, 0, 0], PairingRule()).rejected == 4
    for none in ([Answer("cut", False)], texts(" ", ""), texts("a", "b", ended=False)):
        refused = before_judging(none)
        assert refused is not None and refused.kind == "failed" and "cut off by `max_new_tokens`" in refused.reason


def test_answers_that_nothing_tells_apart_are_a_tie():
    assert choose_pair(texts("a", "b"), [1, 1], PairingRule()).kind == "tie"
    alike = before_judging(distinct(texts("a", "a ", "\na")))
    assert alike is not None and alike.kind == "tie" and alike.reason == "all answers are the same"
    assert before_judging(texts("a", "b")) is None


def test_margins_and_least_scores():
    answers, scores = texts("a", "b"), [0.6, 0.4]
    assert choose_pair(answers, scores, PairingRule(min_margin=0.3)).kind == "tie"
    assert choose_pair(answers, scores, PairingRule(min_margin=0.1)).kind == "pair"
    low = choose_pair(answers, scores, PairingRule(min_score_chosen=0.7))
    assert low.kind == "low" and low.reason == "the best score is 0.6, less than `min_score_chosen`"
    assert choose_pair(answers, scores, PairingRule(min_score_chosen=0.6)).kind == "pair"
    with pytest.raises(ValueError, match="`min_margin` must be a finite number of at least 0, got -1"):
        PairingRule(min_margin=-1)
    with pytest.raises(ValueError, match=r"`min_score_chosen` must be a finite number, got nan\. Leave it out"):
        PairingRule(min_score_chosen=math.nan)


@pytest.mark.parametrize(
    ("best", "worst", "least"),
    [(0.9, 0.8, 0.1), (0.3, 0.2, 0.1), (1000.3, 1000.2, 0.1), torch.tensor([0.9, 0.8, 0.1]).tolist(), (1, 0, 1)],
)
def test_margins_and_least_scores_allow_for_rounding(best, worst, least):
    for least_margin, kind in ((least, "pair"), (least * 1.0001, "tie")):
        assert choose_pair(texts("a", "b"), [best, worst], PairingRule(min_margin=least_margin)).kind == kind
    eight = sum([0.1] * 8)
    assert eight < 0.8 and choose_pair(texts("a", "b"), [eight, 0], PairingRule(0.8)).kind == "pair"
    assert choose_pair(texts("a", "b"), [0.79999, 0], PairingRule(0.8)).kind == "low"
    assert choose_pair(texts("a", "b"), [0.3 - 0.1 * 3, -1], PairingRule(0.0)).kind == "pair"  # below 0 by 5e-17
    assert choose_pair(texts("a", "b"), [1, 1], PairingRule(min_margin=0.0)).kind == "tie"


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", "c ", "c", "", " "]), st.booleans(), st.integers(0, 2)), min_size=1)
)
def test_a_pair_always_states_a_preference(drawn):
    found = distinct([Answer(text, ended) for text, ended, _ in drawn])
    assert len({answer.text.strip() for answer in found}) == len(found)
    if before_judging(found) is None:
        scores = [float(score) for _, _, score in drawn][: len(found)]
        outcome = choose_pair(found, scores, PairingRule())
        if outcome.kind == "pair":
            best, worst = found[outcome.chosen or 0], found[outcome.rejected or 0]
            assert best.text.strip() != worst.text.strip() and best.may_be_chosen
            assert scores[outcome.chosen or 0] > scores[outcome.rejected or 0]


def test_distinct_answers_keep_the_one_that_ended():
    answers = [Answer("a", False), Answer("b", True), Answer("a ", True), Answer("b", False)]
    assert distinct(answers) == [Answer("a ", True), Answer("b", True)]


# Judges


class Speechless(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def speechless(prompt, answers, row):
    raise Speechless


def cancelled(prompt, answers, row):
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (lambda prompt, answers, row: 1 / 0, "the judge raised ZeroDivisionError: division by zero"),
        (lambda prompt, answers, row: [1.0, math.nan], "gave nan for answer 1, not a finite number"),
        (lambda prompt, answers, row: [-math.inf, 1], "gave -inf for answer 0"),
        (lambda prompt, answers, row: [1.0], r"gave 1 score\(s\) for 2 answers"),
        (lambda prompt, answers, row: None, "the judge gave a NoneType, None: return a list of one number"),
        (lambda prompt, answers, row: 1.0, "the judge gave a float, 1.0: return a list"),
        (lambda prompt, answers, row: torch.tensor(1.0), r"the judge gave a Tensor, tensor\(1.\): return a list"),
        (
            lambda prompt, answers, row: ["good", "bad"],
            "gave no number for each answer, but .*: ValueError: could not",
        ),
        (lambda prompt, answers, row: [None, 1.0], r"gave no number for each answer, but \[None, 1.0\]: TypeError"),
        (lambda prompt, answers, row: (1 / 0 for _ in answers), "gave no number for each answer.*ZeroDivisionError"),
        (cancelled, "the judge raised CancelledError"),
        (speechless, "the judge raised Speechless: its message can't be shown"),
        (lambda prompt: [1, 2], "raised TypeError"),
        (lambda prompt, answers, row: sys.exit(3), "the judge raised SystemExit: 3"),
        (
            lambda prompt, answers, row: {0: 0.9, 1: 0.1},
            r"the judge gave a dict, \{0: 0.9, 1: 0.1\}: return a list of one num",
        ),
        (lambda prompt, answers, row: {0: 0.9, 1: 0.1}.keys(), "the judge gave a dict_keys"),
        (lambda prompt, answers, row: Counter(answers), "the judge gave a Counter"),
        (lambda prompt, answers, row: "31", "the judge gave a str, '31': return a list"),
        (lambda prompt, answers, row: b"31", "the judge gave a bytes"),
        (lambda prompt, answers, row: {3.0, 1.0}, "the judge gave a set"),
        (lambda prompt, answers, row: frozenset({3.0, 1.0}), "the judge gave a frozenset"),
    ],
)
def test_bad_judges(judge, message):
    with pytest.raises(JudgeError, match=message):
        judged(judge, "p", ["a", "b"], {})


def test_what_a_judge_says_fits_into_the_ledger(tmp_path):
    def judge(prompt, answers, row):
        raise ValueError("no file \udce9.txt")

    made = judge_answers(judge, PairingRule(), 0, "p", texts("a", "b"), {})
    assert made["reason"] == r"the judge raised ValueError: no file \udce9.txt"
    with open_ledger(tmp_path / "ledger", {}) as ledger:
        ledger.add([made])
    assert read_entries(tmp_path / "ledger") == {0: made}


def test_judges_may_give_arrays_and_cannot_change_the_answers():
    def judge(prompt, answers, row):
        answers.clear()
        return torch.tensor([1.0, 2.0])

    answers = ["a", "b"]
    assert judged(judge, "p", answers, {}) == [1.0, 2.0] and answers == ["a", "b"]


def test_judges_cannot_change_what_becomes_the_pair():
    def judge(prompt, answers, row):
        row["prompt"][0]["content"] = row["tools"][0]["name"] = "mine"
        row["chat_template_kwargs"].clear()
        for answer in answers:
            prompt.append({"role": "assistant", "content": answer})
            prompt[0]["content"] += answer
        row.pop("tools")
        return [float(len(answer)) for answer in answers]

    asked = [{"role": "user", "content": "Say!"}]
    row = {"prompt": asked, "tools": [{"name": "search"}], "chat_template_kwargs": {"deep": ({"on": True},)}}
    made = judge_answers(judge, PairingRule(), 0, asked, texts("aa", "b"), row)["pair"]
    assert made["prompt"] == [{"role": "user", "content": "Say!"}] and made["chosen"][0]["content"] == "aa"
    assert made["tools"] == [{"name": "search"}] and made["chat_template_kwargs"] == {"deep": ({"on": True},)}


def test_checkers_score_the_share_that_is_right():
    row = load_demo_instructions("test", ["en"])[0]
    right = row["messages"][1]["content"]
    scores = checkers(None, [right, "Merah sekali warnanya.", ""], row)
    assert scores[0] == 1 and scores[1] < 1 and scores[2] == 0
    with pytest.raises(ValueError, match="no 'answer' as the data that comes with otpo has"):
        checkers(None, ["a"], {"answer": "red"})


def test_exact_matches():
    assert exact_match(None, [" Red\n", "red.", ""], {"answer": "red"}) == [1, 0, 0]
    with pytest.raises(ValueError, match="no text in 'answer'"):
        exact_match(None, ["a"], {"answer": 3})


def test_judges_by_name_module_and_file(tmp_path):
    assert load_judge("checkers") is checkers and set(JUDGES) == {"checkers", "exact_match"}
    assert load_judge("otpo.pairs.judges:exact_match") is exact_match
    path = tmp_path / "mine.py"
    path.write_text("LIMIT = 3\ndef score(prompt, answers, row):\n    return [len(answer) for answer in answers]\n")
    assert load_judge(f"{path}:score")("p", ["a", "bcd"], {}) == [1, 3]
    broken = tmp_path / "broken.py"
    broken.write_text("raise RuntimeError('at home')\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    for name, message in {
        "best": r"`judge=best` is not known. Set one of checkers, exact_match, reward_model",
        f"{path}:LIMIT": "has a int of that name. Name a function",
        f"{path}:other": "has no such name",
        f"{tmp_path / 'gone.py'}:score": "there is no file",
        f"{broken}:score": "can't be imported: RuntimeError: at home",
        f"{tmp_path / 'leaves.py'}:score": "can't be imported: SystemExit: 0",
        "no.such.module:score": "can't be imported: ModuleNotFoundError",
        "module:": "is not known",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_judge(name)


def test_judges_find_modules_beside_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    (tmp_path / "otpo_test_helper.py").write_text("LIMIT = 3\n")
    (tmp_path / "otpo_test_judge.py").write_text(
        "def score(prompt, answers, row):\n    from otpo_test_helper import LIMIT\n    return [LIMIT, 1]\n"
    )
    assert judged(load_judge(f"{tmp_path / 'otpo_test_judge.py'}:score"), "p", ["a", "b"], {}) == [3.0, 1.0]
    sys.path.remove(str(tmp_path))
    with pytest.raises(ValueError, match="can't be imported: ModuleNotFoundError"):
        load_judge("otpo_test_judge:score")
    monkeypatch.chdir(tmp_path)
    assert judged(load_judge("otpo_test_judge:score"), "p", ["a", "b"], {}) == [3.0, 1.0]


@pytest.fixture(scope="module")
def classifier(model_folder):
    torch.manual_seed(0)
    return Qwen3ForSequenceClassification.from_pretrained(model_folder, num_labels=1)


def test_a_reward_model_scores_each_answer_as_it_does_alone(classifier):
    judge = RewardModel(classifier, make_tokenizer())
    prompt = [{"role": "user", "content": "the red shirt"}]
    answers = [" ".join(WORDS.split()[:count]) for count in (1, 9, 3)]
    together = judge(prompt, answers, {})
    assert len(set(together)) == 3
    assert together == pytest.approx([judge(prompt, [answer], {})[0] for answer in answers], abs=1e-5)
    assert judge("the red shirt ", answers, {}) != pytest.approx(together)
    with pytest.raises(ValueError, match="mine has 2 labels, a reward model has one"):
        classifier.config.num_labels = 2
        try:
            RewardModel(classifier, make_tokenizer(), "mine")
        finally:
            classifier.config.num_labels = 1


# The ledger


def entry(row: int, outcome: str = "tie", **more) -> dict:
    return {"row": row, "outcome": outcome, "reason": "", "answers": [], **more}


def test_a_ledger_goes_on_after_any_number_of_bytes(tmp_path):
    path = tmp_path / "folder" / "pairs.jsonl.ledger"
    with open_ledger(path, {"seed": 1}) as ledger:
        ledger.add([entry(4), entry(2, "pair", pair={"prompt": "é"})])
        ledger.add([entry(2, "failed"), entry(0)])  # what is there stays
    whole = path.read_bytes()
    assert [json.loads(line).get("row") for line in whole.splitlines()] == [None, 4, 2, 0]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with open_ledger(path, {"seed": 1}) as ledger:
            assert set(ledger.entries) <= {4, 2, 0} and len(ledger.entries) >= whole[:size].count(b"\n") - 1
            ledger.add([entry(4), entry(2, "pair", pair={"prompt": "é"}), entry(0)])
            assert ledger.counts == Counter(tie=2, pair=1)
        assert path.read_bytes() == whole


def test_a_ledger_of_other_options_is_refused(tmp_path):
    path = tmp_path / "ledger"
    with open_ledger(path, {"seed": 1, "top_p": 1.0}):
        pass
    with open_ledger(path, {"seed": 2}) as ledger:  # nothing is lost
        ledger.add([entry(0, "failed"), entry(1)])
    with (
        pytest.raises(
            ValueError, match=r"another run: `seed` was 2 and is 3; `top_p` was null and is 0.5. Set what it"
        ),
        open_ledger(path, {"seed": 3, "top_p": 0.5}),
    ):
        pass
    with open_ledger(path, {"seed": 2}, forget_failed=True) as ledger:
        assert set(ledger.entries) == {1}
        ledger.add([entry(0, "pair")])
    with open_ledger(path, {"seed": 2}) as ledger:
        assert ledger.counts == Counter(pair=1, tie=1)
    contents = {"prompts": "the rows", "judge_code": "the judge's file"}
    with (
        pytest.raises(ValueError, match=r"of an older otpo, which did not note `prompts` \(the rows\); `judge_code`"),
        open_ledger(path, {"seed": 2, "prompts": "a", "judge_code": "b"}, contents=contents),
    ):
        pass


@pytest.mark.parametrize(
    "line", ["nonsense", "[1]", '{"row": 1, "outcome": "tie"}', json.dumps(entry(1) | {"row": "a"}), ""]
)
def test_a_damaged_line_of_a_ledger_is_named(line, tmp_path):
    path = tmp_path / "ledger"
    path.write_text(f'{{"run": {{"seed": 2}}}}\n{json.dumps(entry(0))}\n{line}\n')
    with pytest.raises(ValueError, match=r"damaged in line 3\. Remove it"), open_ledger(path, {"seed": 2}):
        pass

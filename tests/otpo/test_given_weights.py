"""The user's weights: columns of numbers or of spans, and where they stand in a completion."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import (
    assert_same_parameters,
    make_pairs,
    make_plain_pairs,
    make_tokenizer,
    make_trainer,
    options,
    train_and_evaluate,
)
from weighting_helpers import with_weights

from otpo import OTPOConfig, OTPOTrainer
from otpo.data.given_weights import given_weights
from otpo.data.preferences import PairRule, RowError
from otpo.data.spans import span_tokens

WHOLE = PairRule(None, "keep_start", False)


def tokenized(chosen: str, weights: Any, *, plain: bool = False) -> dict[str, Any]:
    """A row as TRL's tokenization leaves it, after the prompt; the rejected answer is a word."""
    tokenizer = make_tokenizer()
    row: dict[str, Any] = {"prompt_ids": [1, 2], "chosen_weights": weights, "rejected_weights": [1.0]}
    for side, text in (("chosen", chosen), ("rejected", "no")):
        row[f"{side}_ids"] = tokenizer(f"{text}<|end|>", add_special_tokens=False)["input_ids"]
        row[side] = f"{text}<|end|>" if plain else [{"role": "assistant", "content": text}]
    spans = isinstance(weights, list) and weights and isinstance(weights[0], list)
    row["rejected_weights"] = [] if spans else [1.0] * len(row["rejected_ids"])
    return row


def weights_of(row: dict[str, Any], rule: PairRule = WHOLE) -> list[float]:
    return [round(float(each), 6) for each in given_weights(row, rule, make_tokenizer())[0]]


@pytest.mark.parametrize("plain", [False, True], ids=["messages", "plain"])
def test_spans_are_of_characters(plain):
    text = "the red shirt costs twenty dollars"
    spans = [[4, 7, 3.0], [14, 19, 0.0], [15, 16, 7.0]]
    row = tokenized(text, spans, plain=plain)
    begin, want = 0, []
    for number in row["chosen_ids"]:
        end = begin + len(make_tokenizer().decode([number]))
        want.append(next((weight for start, stop, weight in spans[::-1] if start < end and begin < stop), 1.0))
        begin = end
    assert weights_of(row) == want and set(want) >= {1.0, 3.0, 7.0} and want[-1] == 1.0
    row["rejected_weights"] = [[0, 1, 2.0]]
    assert weights_of({**row, "chosen_weights": [[0, 1, 1]]}) == [1.0] * len(want)
    assert weights_of({**row, "chosen_weights": []}) == [1.0] * len(want)
    assert weights_of({**row, "chosen_weights": [], "rejected_weights": []}) == [1.0] * len(want)


def test_spans_cover_whole_signs():
    text = "ราคา ฿3,856 ค่ะ"
    row = tokenized(text, [[text.index("฿"), text.index("฿") + 1, 5]])
    got = weights_of(row)
    count = len(make_tokenizer()("฿", add_special_tokens=False)["input_ids"])
    assert count > 1 and got.count(5.0) >= count and got[0] == got[-1] == 1.0


def test_numbers_are_of_the_completion_or_of_the_answer_alone():
    row = tokenized("the red shirt", None)
    size = len(row["chosen_ids"])
    whole = [0.5 * place for place in range(size)]
    assert weights_of({**row, "chosen_weights": whole}) == whole
    assert weights_of({**row, "chosen_weights": whole[:-1]}) == [*whole[:-1], 1.0]
    assert weights_of({**row, "chosen_weights": np.array(whole[:-1])}) == [*whole[:-1], 1.0]
    # Truncation cuts weights off with their tokens: from the end, or from the start.
    assert weights_of({**row, "chosen_weights": whole}, PairRule(4, "keep_start", False)) == whole[:2]
    assert weights_of({**row, "chosen_weights": whole}, PairRule(3, "keep_end", False)) == whole[size - 2 :]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"has 1 numbers in 'chosen_weights', and its completion has (\d+) tokens, of which (\d+) are the ans"),
        ([], "has 0 numbers in 'chosen_weights', and its completion has"),
        ([1.0, [0, 2, 3.0]], r"has \[0, 2, 3.0\] at chosen_weights\[1\], and numbers of tokens beside it"),
        ([[0, 2, 3.0], 1.0], r"has 1.0 at chosen_weights\[1\], which is no \[start, end, weight\]"),
        ([1.0] * 40, "has 40 numbers in 'chosen_weights'.*Give a number for each of either, or spans of characters"),
        ([1.0, math.nan], r"has the weight nan at chosen_weights\[1\]. Weights are finite numbers of at least 0"),
        ([1.0, math.inf], r"has the weight inf at chosen_weights\[1\]"),
        ([-0.5], r"has the weight -0.5 at chosen_weights\[0\]"),
        ([None], r"has the weight None at chosen_weights\[0\]"),
        (None, "has no 'chosen_weights'. Give a weight for each token, or a list of"),
        ([[0, 3, -1.0]], r"has the weight -1.0 at chosen_weights\[0\]"),
        ([[0, 3]], r"has \[0, 3\] at chosen_weights\[0\], which is no \[start, end, weight\]"),
        ([[0, 3, None]], r"has \[0, 3, None\] at chosen_weights\[0\]"),
        ([[0, 3, 1], [3, 3, 1]], r"has the span \[3, 3\) at chosen_weights\[1\], and its answer has 13 characters"),
        ([[0, 14, 1]], r"the span \[0, 14\) at chosen_weights\[0\], and .* has 13 characters, 'the red shirt'\. Sp"),
        ([[-1, 2, 1]], r"has the span \[-1, 2\) at chosen_weights\[0\]"),
        ([[0.5, 2, 1]], r"has the span \[0.5, 2\) at chosen_weights\[0\]"),
        ([[0, math.inf, 1]], r"has the span \[0, inf\) at chosen_weights\[0\], and its answer has 13 characters"),
        ([[math.nan, 2, 1]], r"has the span \[nan, 2\) at chosen_weights\[0\]"),
        ([[0, 10**400, 1]], r"has the span \[0, inf\) at chosen_weights\[0\]"),
        ([[-(10**400), 2, 1]], r"has the span \[-inf, 2\) at chosen_weights\[0\]"),
        (
            [[0, 2, 1e300]],
            r"has the weight 1e\+300 at chosen_weights\[0\], which float32 can't hold, or not the sums of. Weights",
        ),
        (
            [1e300],
            r"has the weight 1e\+300 at chosen_weights\[0\], which float32 can't hold.* from 1.18e-38 to 1e\+30",
        ),
        ([1.0, 1e-60], r"has the weight 1e-60 at chosen_weights\[1\], which float32 can't hold"),
        ([10**400], r"has the weight 1000+ at chosen_weights\[0\]. Weights are finite numbers"),
        (2.0, "has 2.0 in 'chosen_weights', which is no list. Give a weight for each token, or a list of"),
        (np.float32(2), "in 'chosen_weights', which is no list"),
        (
            [{"end": 3}],
            r"has \{'end': 3\} at chosen_weights\[0\]\. Give numbers of tokens, or each span as a li",
        ),
        ("1 1", "has '1 1' in 'chosen_weights', which is no list"),
        ({"start": 0}, "has {'start': 0} in 'chosen_weights', which is no list"),
    ],
)
def test_what_can_not_be_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        given_weights(tokenized("the red shirt", weights), WHOLE, make_tokenizer())


def test_spans_need_text():
    row = tokenized("the red shirt", [[0, 3, 2.0]])
    for answer in (None, [{"role": "assistant", "content": [{"type": "text", "text": "the red shirt"}]}]):
        with pytest.raises(ValueError, match="has spans of characters in 'chosen_weights', and no answer in plain"):
            given_weights({**row, "chosen": answer}, WHOLE, make_tokenizer())
    with pytest.raises(ValueError, match=r"has weights in 'chosen_weights' that can't be placed\. The comp"):
        given_weights({**row, "chosen": "THE RED SHIRT"}, WHOLE, make_tokenizer())


@pytest.mark.parametrize("plain", [False, True], ids=["messages", "plain"])
def test_white_space_around_an_answer_has_weights(plain):
    """Where the template keeps it, it is the answer's: spans of it, and numbers for the answer's tokens alone."""
    text = "  blue \n"
    row = tokenized(text, [[0, 2, 9], [6, 8, 7]], plain=plain)
    pieces = [make_tokenizer().decode([number]) for number in row["chosen_ids"]]
    assert pieces[0].isspace() and pieces[-2].isspace()
    begins = np.cumsum([0, *map(len, pieces)])[:-1]
    want = [1 if begin >= 8 else 7 if begin + len(piece) > 6 else 9 if begin < 2 else 1
            for begin, piece in zip(begins, pieces, strict=True)]  # fmt: skip
    assert weights_of(row) == want
    numbers = [float(place) for place in range(len(pieces) - 1)]
    row |= {"chosen_weights": numbers, "rejected_weights": [1.0] * len(row["rejected_ids"])}
    assert weights_of(row) == [*numbers, 1.0]


def test_white_space_that_the_template_strips_has_no_weights():
    tokenizer = make_tokenizer()
    ids = tokenizer("blue\n<|end|>", add_special_tokens=False)["input_ids"]
    found = span_tokens(tokenizer, ids, " \t blue", [(0, 4), (3, 7)])
    assert found.in_spans[0].sum() == 1 and found.in_spans[1].tolist() == found.in_answer.tolist()
    assert found.in_answer.tolist() == [True] * (len(ids) - 2) + [False] * 2
    # One side is stripped and the other kept.
    assert span_tokens(tokenizer, ids, " \t blue\n", [(7, 8)]).in_spans[0].tolist() == [False] * (len(ids) - 2) + [
        True,
        False,
    ]
    with pytest.raises(
        ValueError, match=r"has nothing of the span \[0, 3\), ' \\t ', of the answer .* Leave the span"
    ):
        span_tokens(tokenizer, ids, " \t blue", [(0, 3)])
    row = tokenized("blue", [[0, 2, 9]]) | {"chosen": [{"role": "assistant", "content": "  blue"}]}
    with pytest.raises(ValueError, match=r"has weights in 'chosen_weights' that can't be placed\. .* span \[0, 2\)"):
        given_weights(row, WHOLE, tokenizer)
    for text in ("", "  "):  # of which the template has left nothing
        end = [tokenizer.eos_token_id]
        assert not span_tokens(tokenizer, end, text).in_answer.any()
    kept = tokenizer("  <|end|>", add_special_tokens=False)["input_ids"]
    assert span_tokens(tokenizer, kept, "  ", [(0, 2)]).in_spans[0].tolist() == [True] * (len(kept) - 1) + [False]


CALLING = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] or '' }}"
    "{% for call in message.tool_calls or [] %}<call>{{ call | tojson }}</call>{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def calling(content: str | None, word: str) -> list[dict[str, Any]]:
    call = {"name": "find", "arguments": {"colour": word}}
    return [{"role": "assistant", "content": content, "tool_calls": [call]}]


def prepared_weights(model: Any, folder: Any, row: dict[str, Any], template: str = CALLING) -> list[list[Any]]:
    """The tokens of each answer of a trainer's prepared row, with their weights."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    prompt = [{"role": "user", "content": "a shirt"}]
    data = Dataset.from_list([{"prompt": prompt, **row}])
    args = options(folder, weighting="columns")
    made = OTPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer).train_dataset[0]
    sides = [(made[f"{side}_ids"], made[f"{side}_given_weights"]) for side in ("chosen", "rejected")]
    return [[(tokenizer.decode([token]), weight) for token, weight in zip(*side, strict=True)] for side in sides]


def test_tool_calls_behind_an_answer_do_not_take_its_weights(model_folder, tmp_path):
    """A call often repeats words of the answer."""
    row = {"chosen": calling("red", "red"), "rejected": calling("red", "blue")}
    found = prepared_weights(
        model_folder, tmp_path, row | {"chosen_weights": [[0, 3, 5.0]], "rejected_weights": [[1, 2, 2.0]]}
    )
    for side, weight in zip(found, (5.0, 2.0), strict=True):
        assert side[0] == ("red", weight) and {each for _, each in side[1:]} == {1.0}
    assert [name for name, _ in found[0]].count("red") == 2
    numbers = prepared_weights(model_folder, tmp_path, row | {"chosen_weights": [5.0], "rejected_weights": [2.0]})
    assert numbers == found
    silent = CALLING.replace("{{ message['content'] or '' }}", "{% if not message.tool_calls %}{{ message.content }}"
                             "{% endif %}")  # fmt: skip
    spans = {"chosen_weights": [[0, 3, 5.0]], "rejected_weights": [[0, 3, 2.0]]}
    with pytest.raises(RowError, match=r"can't be placed\. The chat template writes the content of .* calls 0 times"):
        prepared_weights(model_folder, tmp_path, row | spans, silent)


def test_an_answer_without_spans_needs_no_text(model_folder, tmp_path):
    row = {"chosen": calling(None, "red"), "rejected": calling(None, "blue")}
    found = prepared_weights(model_folder, tmp_path, row | {"chosen_weights": [], "rejected_weights": []})
    assert {weight for side in found for _, weight in side} == {1.0}
    spans = {"rejected": calling("no", "no"), "chosen_weights": [], "rejected_weights": [[0, 2, 3.0]]}
    assert {weight for _, weight in prepared_weights(model_folder, tmp_path, row | spans)[1]} == {1.0, 3.0}


def test_an_answer_may_have_replacement_characters():
    text = "a\N{REPLACEMENT CHARACTER}b red"
    got = weights_of(tokenized(text, [[4, 7, 5.0]]))
    assert got == [1.0] * (len(got) - 2) + [5.0, 1.0]


@pytest.mark.parametrize("stream", [False, True], ids=["rows", "stream"])
def test_a_row_with_wrong_weights_is_named(stream, model_folder, tmp_path):
    pairs = with_weights(make_pairs(6)).to_list()
    pairs[4]["rejected_weights"] = [[0.0, 2.0, math.nan]]
    data: Any = type(make_pairs(1)).from_list(pairs)
    data = data.to_iterable_dataset() if stream else data
    with pytest.raises(RowError, match=r"Row 4 of the train dataset has the weight nan at rejected_weights\[0\]"):
        make_trainer(model_folder, tmp_path, data, weighting="columns", per_device_train_batch_size=2).train()


def test_columns_that_are_missing_are_named(model_folder, tmp_path):
    pairs = with_weights(make_pairs(6)).remove_columns("rejected_weights")
    told = r"reads the columns .* train dataset lacks \['rejected_weights'\]; it has \['chosen', 'chosen_weights', "
    with pytest.raises(ValueError, match=told):
        make_trainer(model_folder, tmp_path, pairs, weighting="columns")
    with pytest.raises(ValueError, match=r"the eval dataset lacks \['chosen_weights', 'rejected_weights'\]"):
        # Nothing is loaded before: there is no such model.
        args = OTPOConfig(str(tmp_path), weighting="columns", use_cpu=True)
        train = with_weights(make_pairs(6))
        OTPOTrainer("no/such-model", args=args, train_dataset=train, eval_dataset=make_pairs(2))


@pytest.mark.parametrize("form", ["spans", "tokens"])
def test_ones_are_uniform_to_the_last_bit(form, model_folder, other_model_folder, tmp_path):
    def ones(row: dict[str, Any]) -> dict[str, Any]:
        return {f"{side}_weights": [[0.0, 2.0, 1.0]] for side in ("chosen", "rejected")}

    pairs = make_pairs()
    by_name: dict[str, Any] = {"uniform": pairs}
    if form == "spans":
        by_name["columns"] = pairs.map(ones)
    else:
        prepared: Any = make_trainer(model_folder, tmp_path, pairs).train_dataset
        columns = {side: prepared[f"{side}_ids"] for side in ("chosen", "rejected")}
        sides = {f"{side}_weights": [[1.0] * len(ids) for ids in column] for side, column in columns.items()}
        by_name["columns"] = type(pairs).from_dict({**pairs.to_dict(), **sides})
    runs = {
        name: train_and_evaluate(
            make_trainer(model_folder, tmp_path, data, ref_model=other_model_folder, weighting=name)
        )
        for name, data in by_name.items()
    }
    assert_same_parameters(runs["columns"].after, runs["uniform"].after)
    assert runs["columns"].losses == runs["uniform"].losses


def test_plain_text_ends_where_trl_ends_it(model_folder, tmp_path):
    pairs = make_plain_pairs([("the box", " red shirt", " blue"), ("the box", " ten dollars", " twenty")] * 2)
    text = pairs[0]["chosen"]
    at = text.index("shirt")
    pairs = pairs.map(lambda row: {"chosen_weights": [[at, at + 3, 4.0]], "rejected_weights": [[0, 2, 0.0]]})
    trainer = make_trainer(model_folder, tmp_path, pairs, weighting="columns")
    with torch.no_grad():
        weights = trainer.score_batch(trainer.model, trainer.collate([trainer.train_dataset[0]])).weights
    assert set(weights[0].tolist()) == {0.0, 1.0, 4.0} and weights[1].sum() < 2


@pytest.mark.parametrize("answer", ["k", "in", "think", "eos", "<"])
def test_an_answer_is_found_behind_what_a_template_puts_before_it(tokenizer, answer):
    """Qwen3's template writes an empty thought before an answer, and all end a turn by a special token behind it."""
    assert tokenizer.eos_token in tokenizer.all_special_tokens
    before = tokenizer(f"<think>\n\n</think>\n\n{answer} eos\n", add_special_tokens=False)["input_ids"]
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    found = span_tokens(tokenizer, [*before, *ids, tokenizer.eos_token_id], answer, [(0, len(answer))])
    assert found.in_answer.tolist() == [False] * len(before) + [True] * len(ids) + [False]
    assert found.in_spans[0].tolist() == found.in_answer.tolist()

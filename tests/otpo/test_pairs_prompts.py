"""Prompts of `otpo pairs`: where a row has one, its tokens, and rows that have none or none that can be written."""

import json
from types import SimpleNamespace

import pytest
from helpers import CHAT_TEMPLATE, make_tokenizer

from otpo.data.preferences import RowError
from otpo.pairs.pairing import PairingRule
from otpo.pairs.prompts import find_prompt, prompt_tokens
from otpo.pairs.run import PairMaker


def test_prompts_are_found_and_tokenized():
    user, system = {"role": "user", "content": "the red"}, {"role": "system", "content": "blue"}
    answer = {"role": "assistant", "content": "yes"}
    assert find_prompt({"prompt": "the red"}) == "the red"
    assert find_prompt({"prompt": [system, user], "messages": None}) == [system, user]
    assert find_prompt({"messages": [user, answer, user, answer]}) == [user, answer, user]
    assert find_prompt({"messages": [user]}) == [user]
    assert find_prompt({"messages": [user, answer, user]}) == [user, answer, user]  # an open question
    told = {"role": "tool", "content": "red"}
    assert find_prompt({"messages": [user, answer, told]}) == [user, answer, told]
    with pytest.raises(ValueError, match="has no prompt: 'prompt' is null and 'messages' is null"):
        find_prompt({"prompt": None, "messages": None, "text": "a"})
    tokenizer = make_tokenizer()
    assert prompt_tokens(tokenizer, "the red", {}) == tokenizer("the red")["input_ids"]
    told = tokenizer.decode(prompt_tokens(tokenizer, [user], {"tools": None}))
    assert told == "<|user|>the red<|end|><|assistant|>"


def test_tools_may_be_json_as_trl_reads_them():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for tool in tools %}{{ tool.function.name }} {% endfor %}" + CHAT_TEMPLATE
    prompt, tools = [{"role": "user", "content": "the red"}], [{"type": "function", "function": {"name": "find"}}]
    listed = prompt_tokens(tokenizer, prompt, {"tools": tools})
    assert tokenizer.decode(listed).startswith("find <|user|>")
    assert prompt_tokens(tokenizer, prompt, {"tools": json.dumps(tools)}) == listed
    with pytest.raises(ValueError, match=r"has \['tokenize'\] in 'chat_template_kwargs', which are set here"):
        prompt_tokens(tokenizer, prompt, {"chat_template_kwargs": {"tokenize": False}})
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    maker = PairMaker(None, tokenizer, None, PairingRule(), 2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(RowError, match="Row 7 of the prompts has a prompt that the chat template can't write: no suc"):
        maker.run([{"prompt": prompt}], [7], SimpleNamespace(entries={}, add=list), print)  # pyright: ignore


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a"}, r"has neither 'prompt' nor 'messages' but \['chosen'\]"),
        ({"prompt": " "}, "has an empty prompt"),
        ({"prompt": []}, "has an empty prompt"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "has an empty prompt"),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, "ends with the assistant's message"),
        ({"prompt": [{"content": "a"}]}, "has a message without a role"),
        ({"prompt": 3}, "has 3 in 'prompt'"),
        ({"messages": 3}, "has 3 in 'prompt'"),
        ({"prompt": "a", "images": ["x"]}, "has images"),
        (
            {"prompt": [{"role": "user", "content": "a"}], "tools": "find"},
            r"has text in 'tools' that is no JSON \(Exp",
        ),
        (
            {"prompt": [{"role": "user", "content": "a"}], "chat_template_kwargs": "x"},
            "has 'x' in 'chat_template_kwargs', which must be a mapping",
        ),
    ],
)
def test_rows_without_a_prompt(row, message):
    with pytest.raises(ValueError, match=message):
        find_prompt(row)

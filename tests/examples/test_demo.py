"""The demo's parts that need no training: its settings are options of the commands, its checks are of new data."""

import importlib
from importlib import import_module

import pytest
import yaml
from cli_helpers import ROOT
from helpers import MARKED_TEMPLATE

from otpo.cli.options.run_options import read_command_line
from otpo.cli.pairing.options import make_parser as pairs_parser
from otpo.data.ecommerce.answers import check_answer

SCALES = {path.stem: path for path in (ROOT / "examples" / "scales").glob("*.yaml")}
SCALES["start_tiny"] = ROOT / "benchmarks" / "ablation" / "start_tiny.yaml"


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("demo")


def settings(name: str) -> dict:
    return yaml.safe_load(SCALES[name].read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SCALES)
def test_every_setting_is_an_option_of_its_command(name):
    scale = settings(name)
    steps = [step for step in ("pretrain", "sft", "align", "pairs") if step in scale]
    assert len(steps) >= 2
    for step in steps:
        parser = pairs_parser() if step == "pairs" else import_module(f"otpo.cli.{step}").make_parser()
        shared = {**scale["common"], **({} if step == "pairs" else scale["training"])}
        words = []
        for option, value in {**shared, **scale[step]}.items():
            words += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
        assert read_command_line(parser, words).launcher == []


def test_no_step_of_the_tiny_demo_sees_what_it_is_checked_on(demo):
    scale = {**settings("tiny"), "documents": 50, "instructions": 300, "prompts": 100, "held_out": 60}
    data, held_out = demo.make_data(scale, ("en", "id"), seed=0)
    assert {name: len(rows) for name, rows in data.items()} == {"corpus": 50, "instructions": 300, "prompts": 100}
    asked = {row["prompt"][0]["content"] for row in data["instructions"]}
    new = {row["prompt"][0]["content"] for row in data["prompts"]}
    checked = {row["prompt"][0]["content"] for row in held_out}
    assert not asked & new and not (asked | new) & checked
    assert "completion" not in data["prompts"].column_names  # alignment learns from its own answers alone
    groups = {demo.group_of(row) for row in held_out}
    assert groups == {"misread wording", "other wordings"}
    assert all(check_answer(row, row["completion"][0]["content"])["all"] for row in held_out)
    other = demo.make_data(scale, ("en", "id"), seed=1)
    assert other[1].to_list() == held_out.to_list()  # all seeds are checked on the same
    assert other[0]["prompts"].to_list() != data["prompts"].to_list()


def test_no_step_of_the_small_demo_sees_what_it_is_checked_on(demo):
    scale = {**settings("small"), "documents": 50, "instructions": 600, "prompts": 100, "held_out": 60}
    data, held_out = demo.make_data(scale, ("en", "id"), seed=0)
    assert {name: len(rows) for name, rows in data.items()} == {"corpus": 50, "instructions": 600, "prompts": 100}
    asked, new = ({row["messages"][0]["content"] for row in data[name]} for name in ("instructions", "prompts"))
    checked = {row["prompt"][0]["content"] for row in held_out}
    assert not asked & new and not (asked | new) & checked
    assert {row["length"] for row in data["prompts"]} == {"short", "medium", "long"}


def test_the_demos_tokenizer_marks_answers(demo):
    assert demo.CHAT_TEMPLATE == MARKED_TEMPLATE

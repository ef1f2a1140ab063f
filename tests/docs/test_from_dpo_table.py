"""The options that `docs/from_dpo.md` lists have the defaults that it gives them."""

import ast
import re
from pathlib import Path

import pytest

from otpo import OTPOConfig

PAGE = (Path(__file__).parents[2] / "docs" / "from_dpo.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\w+)` \| (\S+) \|", PAGE.split("## New options")[1].split("## ")[0], re.MULTILINE)


def test_the_table_was_found():
    assert len(ROWS) > 6


@pytest.mark.parametrize(("name", "default"), ROWS)
def test_defaults(name, default, tmp_path):
    value = getattr(OTPOConfig(str(tmp_path), use_cpu=True), name)
    assert value == (None if default == "unset" else ast.literal_eval(default.strip("`")))


def test_defaults_of_contrast(tmp_path):
    args = OTPOConfig(str(tmp_path), use_cpu=True, weighting="contrast")
    told = f"`contrast` has other defaults of `ot_reg` and `hidden_layer`, {args.ot_reg} and {args.hidden_layer} of"
    assert told in " ".join(PAGE.split()) and f'`ot_cost="{args.ot_cost}"`' in PAGE

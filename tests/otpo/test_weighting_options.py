"""Options of weightings: their own defaults, options of one's own, and options that are changed later."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from helpers import make_pairs, option_dict, options

from otpo import OTPOConfig, OTPOTrainer
from otpo.registry import Option
from otpo.weighting import WEIGHTINGS, uniform
from otpo.weighting.registry import WeightingKind, registered_option, registered_options

OTPO = WEIGHTINGS["otpo"]


def mine(batch, **keywords):
    return torch.ones_like(batch.logps)


# Own defaults


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        (
            {"ot_reg_m": 7.0},
            r"`defaults={'ot_reg_m': 7\.0}` .* would be ignored: .* their own are \['hidden_layer', 'ot_c",
        ),
        (
            {"ot_reg": 0.3, "beta": 0.5},
            r"`defaults={'beta': 0\.5}` .* is of no option that it takes; its `options` are",
        ),
        (
            {"diff_base": 0.9},
            r"`defaults={'diff_base': 0\.9}` .* Add the option of `registered_options\(\)\['diff_base'",
        ),
        ({"ot_reg": -1}, "`ot_reg` must be a positive finite number, got -1"),
        ({"ot_cost": "taxi"}, "`ot_cost` must be .* got 'taxi'"),
    ],
)
def test_defaults_that_would_be_ignored_are_refused(defaults, message):
    with pytest.raises(ValueError, match=message):
        WeightingKind(mine, "h", "s", OTPO.options, OTPO.bundle, defaults=defaults)


def test_every_default_that_is_accepted_is_used(monkeypatch, tmp_path):
    defaults = {"ot_reg": 0.3, "ot_cost": "cosine", "hidden_layer": 0}
    assert {name for name, option in registered_options().items() if option.own_defaults} == defaults.keys()
    entry = WeightingKind(mine, "h", "s", OTPO.options, OTPO.bundle, defaults=defaults)
    monkeypatch.setitem(WEIGHTINGS, "mine", entry)
    args = options(tmp_path, weighting="mine")
    assert {name: getattr(args, name) for name in defaults} == defaults
    assert options(tmp_path, weighting="otpo").ot_reg == 1.0


# Options of one's own


def test_an_entry_with_an_option_of_its_own_leaves_other_configurations_alone(monkeypatch, tmp_path):
    option = Option("my_option", float, None, "Of 'mine'.", keyword="k", own_defaults=True)
    monkeypatch.setitem(WEIGHTINGS, "mine", WeightingKind(mine, "h", "s", (option,), defaults={"my_option": 2.0}))
    plain = options(tmp_path)  # which knows nothing of the option
    assert plain.with_weighting("budget").weighting == "budget"
    message = r"`weighting='{}'` takes the option `my_option`, which `OTPOConfig` has not\. .* `my_option: float = "
    with pytest.raises(ValueError, match=message.format("mine")):
        options(tmp_path, weighting="mine")
    with pytest.raises(ValueError, match=message.format(r"otpo\*mine")):
        plain.with_weighting("otpo*mine")

    @dataclasses.dataclass
    class Config(OTPOConfig):
        my_option: float | None = registered_option("my_option")

    args = Config(**option_dict(tmp_path, weighting="mine"))
    assert args.describe_weighting() == "mine, my_option 2"
    assert Config(**option_dict(tmp_path, weighting="budget")).describe_weighting() == "budget"


def test_an_option_that_is_not_set_can_be_described(monkeypatch, tmp_path):
    monkeypatch.setitem(WEIGHTINGS, "mine", WeightingKind(mine, "h", "s", (Option("my_option", float, None, "x"),)))

    @dataclasses.dataclass
    class Config(OTPOConfig):
        my_option: float | None = registered_option("my_option")

    assert Config(**option_dict(tmp_path, weighting="mine")).describe_weighting() == "mine, my_option None"


# What is changed later


def test_a_weighting_that_is_set_later_is_refused(model_folder, tmp_path):
    def train(args, **arguments):
        return OTPOTrainer(model_folder, args=args, train_dataset=make_pairs(4), **arguments)

    for later in (copy.deepcopy, lambda args: pickle.loads(pickle.dumps(args))):
        args = later(options(tmp_path))
        args.weighting = "contrast"
        message = r"`weighting='contrast'` was set after .* for 'otpo'.* Take `args.with_weighting\('contrast'\)`"
        for arguments in ({}, {"weighting": uniform}):
            with pytest.raises(ValueError, match=message):
                train(args, **arguments)
        mended = args.with_weighting("contrast")
        assert (mended.ot_cost, mended.ot_reg, mended.hidden_layer) == ("cosine", 0.1, 0.8)
        mended.check_again()
    args.weighting = "nonsense"
    with pytest.raises(ValueError, match=r"`weighting` must be one of .* got 'nonsense'"):
        train(args)
    args.weighting = "otpo"
    args.check_again()
    args.ot_reg = -1.0
    with pytest.raises(ValueError, match=r"`ot_reg` must be a positive finite number, got -1\.0"):
        train(args)
    older = options(tmp_path)
    del older.filled_in_for  # of a pickle that an older version has written
    older.check_again()


# What is no number

NUMBERS = {
    "contrast_mix": r"within \[0, 1\]",
    "diff_base": r"within \[0, 1\]",
    "d2po_gamma": r"within \(0, 1\]",
    "ld_alpha": r"within \[0, 1\]",
    "ot_reg_m": "a positive finite number",
    "ot_tolerance": "a positive finite number",
    "ot_max_iterations": "at least 1",
    "ot_reg": "a positive finite number",
    "hidden_layer": "a finite number",
}


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_refused_by_the_options_name(name, tmp_path):
    empty = (
        (None,)
        if registered_options()[name].default is not None and not registered_options()[name].own_defaults
        else ()
    )
    for value in ("0.5", True, float("nan"), [1], *empty):
        with pytest.raises(ValueError, match=rf"`{name}` must be {NUMBERS[name]}, got "):
            options(tmp_path, **{name: value})
    one = 1 if name != "ot_max_iterations" else np.int64(3)
    assert getattr(options(tmp_path, **{name: one}), name) == one


def test_iterations_are_whole_and_layers_finite(tmp_path):
    for value in (2.5, float("inf")):
        with pytest.raises(ValueError, match=rf"`ot_max_iterations` must be a whole number, got {value}"):
            options(tmp_path, ot_max_iterations=value)
    with pytest.raises(ValueError, match="`hidden_layer` must be a finite number, got -inf"):
        options(tmp_path, hidden_layer=float("-inf"))
    assert options(tmp_path, hidden_layer=np.float32(0.5)).hidden_layer == 0.5

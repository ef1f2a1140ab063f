"""Options and arguments that `OTPOTrainer` refuses, and its defaults."""

import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from datasets import IterableDataset
from helpers import (
    hashed_weights,
    make_pairs,
    make_trainer,
    option_dict,
    options,
    save_model,
    train_and_evaluate,
)
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration
from trl import DPOConfig, DPOTrainer
from weighting_helpers import with_weights

from otpo import OTPOConfig, OTPOTrainer
from otpo.weighting import WEIGHTINGS


@pytest.mark.parametrize("value", [0.0, -0.5, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["ot_reg", "ot_reg_m", "ot_tolerance"])
def test_options_that_must_be_positive_and_finite(name, value, tmp_path):
    with pytest.raises(ValueError, match=rf"`{name}` must be a positive finite number, got {value}\."):
        options(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weighting": "otop"}, r"`weighting` must be one of \['budget', .*'uniform'\], got 'otop'.*callable"),
        ({"weighting": hashed_weights}, "`weighting` must be one of .* pass a callable as the trainer's argument"),
        ({"ot_cost_scale": "max"}, "`ot_cost_scale` must be 'release' or 'pairwise', got 'max'"),
        ({"ot_cost": "l1"}, "`ot_cost` must be 'euclidean' or 'cosine', got 'l1'"),
        ({"d2po_gamma": 0.0}, r"`d2po_gamma` must be within \(0, 1\], got 0.0"),
        ({"d2po_gamma": 1.1}, r"`d2po_gamma` must be within \(0, 1\], got 1.1"),
        ({"contrast_mix": 1.1}, r"`contrast_mix` must be within \[0, 1\], got 1.1"),
        ({"diff_base": -0.5}, r"`diff_base` must be within \[0, 1\], got -0.5"),
        ({"diff_base": math.nan}, r"`diff_base` must be within \[0, 1\], got nan"),
        ({"weighting": "otpo*"}, r"`weighting` must be one of .*, got 'otpo\*'. Several are multiplied where '\*'"),
        ({"weighting": "otpo*ld"}, r"`weighting='otpo\*ld'` needs `ld_alpha`, got None. Set it within \[0, 1\]"),
        ({"ot_max_iterations": 0}, "`ot_max_iterations` must be at least 1, got 0"),
        ({"ld_alpha": 1.5}, r"`ld_alpha` must be within \[0, 1\], got 1.5"),
        ({"ld_alpha": -0.1}, r"`ld_alpha` must be within \[0, 1\], got -0.1"),
        ({"ld_alpha": math.nan}, r"`ld_alpha` must be within \[0, 1\], got nan"),
        ({"weighting": "ld"}, r"`weighting='ld'` needs `ld_alpha`, got None. Set it within \[0, 1\]"),
        ({"truncation_mode": "middle"}, "`truncation_mode` must be keep_start or keep_end, got 'middle'"),
        ({"beta": math.nan}, "`beta` must be a finite number of at least 0, got nan"),
        ({"beta": -0.1}, "`beta` must be a finite number of at least 0, got -0.1: below 0 the rejected"),
    ],
    ids=[
        "unknown_weighting",
        "callable_weighting",
        "cost_scale",
        "cost",
        "gamma_zero",
        "gamma_large",
        "mix_large",
        "base_negative",
        "base_nan",
        "half_a_product",
        "a_factor_without_its_option",
        "no_iterations",
        "ld_alpha_large",
        "ld_alpha_negative",
        "ld_alpha_nan",
        "ld_without_alpha",
        "truncation",
        "beta_nan",
        "beta_negative",
    ],
)
def test_options_out_of_range(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        options(tmp_path, **settings)


@pytest.mark.parametrize("name", [*sorted(WEIGHTINGS), "otpo*diff", "surprisal*confpo*columns"])
def test_every_weighting_trains(name, model_folder, tmp_path):
    data = with_weights(make_pairs())
    run = train_and_evaluate(make_trainer(model_folder, tmp_path, data, weighting=name, ld_alpha=0.0))
    assert all(math.isfinite(loss) for loss in run.losses) and run.losses[3] < run.losses[0]


def test_options_of_dpo_are_refused(model_folder, tmp_path):
    args = DPOConfig(**option_dict(tmp_path))
    with pytest.raises(TypeError, match="`args` must be an `OTPOConfig`, got a `DPOConfig`"):
        OTPOTrainer(model_folder, args=args, train_dataset=make_pairs())


def test_name_of_a_weighting_as_the_argument(model_folder, tmp_path):
    with pytest.raises(TypeError, match=r"Set `OTPOConfig\(weighting='otpo'\)`.* takes a callable"):
        OTPOTrainer(model_folder, args=options(tmp_path), train_dataset=make_pairs(), weighting="otpo")


@dataclass
class OnCPU(OTPOConfig):
    use_cpu: bool = True  # the default options are for a GPU


@pytest.mark.parametrize("as_object", [False, True], ids=["folder", "object"])
def test_default_options(as_object, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("otpo.trainer.OTPOConfig", OnCPU)
    model = AutoModelForCausalLM.from_pretrained(model_folder) if as_object else model_folder
    trainer = OTPOTrainer(model, train_dataset=make_pairs())
    assert trainer.args.output_dir == f"{Path(model_folder).name}-OTPO"
    assert isinstance(trainer.args, OTPOConfig)
    assert (trainer.args.weighting, trainer.args.ot_reg, trainer.args.ot_reg_m) == ("otpo", 1.0, 0.2)


# Arguments


def test_arguments_are_shown_by_name():
    ours, trls = (inspect.signature(trainer.__init__).parameters for trainer in (OTPOTrainer, DPOTrainer))
    assert list(ours) == [*trls, "weighting"]
    assert all(ours[name].default == trls[name].default for name in trls)


@pytest.mark.parametrize("as_object", [False, True], ids=["folder", "object"])
def test_a_layer_that_is_not_there_is_refused_before_anything_is_read(as_object, model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder) if as_object else model_folder
    read = []
    data = IterableDataset.from_generator(lambda: iter(read.append(1) or []))
    with pytest.raises(ValueError, match=r"`hidden_layer` must be .* within \[-3, 2\] .* 2 layers, .* got 99"):
        make_trainer(model, tmp_path, data, hidden_layer=99)
    assert not read


@pytest.mark.parametrize("as_reference", [False, True])
def test_encoder_decoders_are_refused(as_reference, model_folder, tokenizer, tmp_path):
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": len(tokenizer)}
    config = T5Config(**sizes, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    folder = save_model(T5ForConditionalGeneration(config), tmp_path / "t5", tokenizer)
    models: Any = [folder, None]
    if as_reference:
        models = [model_folder, T5ForConditionalGeneration.from_pretrained(folder)]
    with pytest.raises(ValueError, match=r"is an encoder-decoder, T5ForConditionalGeneration, .* Take a causal"):
        OTPOTrainer(*models, options(tmp_path), train_dataset=make_pairs(), processing_class=tokenizer)

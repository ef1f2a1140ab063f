import json

import pytest
import torch
from compass_helpers import compass_config, compass_model
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from moe_backbone import PRESETS, CompassConfig, CompassForCausalLM, preset

POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "moe_intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
)


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", [0, -3])
def test_sizes_are_at_least_one(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got {value}"):
        compass_config(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_shared_experts", -1),
        ("num_mtp_layers", -1),
        ("router_aux_loss_coef", -0.1),
        ("router_z_loss_coef", -0.1),
        ("router_bias_update_speed", -0.1),
        ("mtp_loss_coef", -0.1),
        ("initializer_range", -0.1),
    ],
)
def test_counts_and_coefficients_are_not_negative(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 0, got {value}"):
        compass_config(**{"num_mtp_layers": 1, name: value})


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"num_experts": 4, "num_experts_per_tok": 5}, "Set `num_experts_per_tok` to 4 or less"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 5},
            r"Set `num_key_value_heads` to one of \[1, 2, 3, 4, 6, 12\]",
        ),
        ({"num_attention_heads": 2, "num_key_value_heads": 4}, r"Set `num_key_value_heads` to one of \[1, 2\]"),
        ({"head_dim": 7}, "`head_dim=7` must be even and at least 2"),
        ({"head_dim": 0}, "`head_dim=0` must be even and at least 2"),
        ({"mtp_loss_coef": 0.3}, "Set `num_mtp_layers` to 1 or more, or leave `mtp_loss_coef` out"),
    ],
)
def test_sizes_that_do_not_fit_name_the_remedy(changes, remedy):
    with pytest.raises(ValueError, match=remedy):
        compass_config(**changes)


@pytest.mark.parametrize("value", [0.0, -1e-6])
def test_a_norm_that_would_divide_by_zero(value):
    with pytest.raises(ValueError, match=f"`rms_norm_eps` must be above 0, got {value}"):
        compass_config(rms_norm_eps=value)


def test_a_wrong_type_fails():
    with pytest.raises(StrictDataclassError, match="num_experts"):
        compass_config(num_experts="four")


def test_what_is_set_later_is_checked_before_a_model_is_made():
    config = compass_config()
    config.num_experts_per_tok = 6
    with pytest.raises(ValueError, match="Set `num_experts_per_tok` to 5 or less"):
        CompassForCausalLM(config)


def test_what_is_set_at_load_is_checked(tmp_path):
    compass_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Set `num_experts_per_tok` to 5 or less"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_experts_per_tok=9)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 0.0),
        ({"num_mtp_layers": 2}, 0.1),
        ({"num_mtp_layers": 2, "mtp_loss_coef": 0.0}, 0.0),
        ({"num_mtp_layers": 1, "mtp_loss_coef": 0.3}, 0.3),
        ({"mtp_loss_coef": 0.0}, 0.0),
    ],
)
def test_the_effective_weight_of_the_mtp_loss(changes, expected):
    assert compass_config(**changes).effective_mtp_loss_coef == expected


def test_the_json_has_every_option_and_reads_back_equal(tmp_path):
    changes = {
        "num_mtp_layers": 2,
        "mtp_loss_coef": 0.25,
        "mtp_detach_trunk": True,
        "num_shared_experts": 1,
        "router_bias_update_speed": 1e-3,
        "router_aux_loss_coef": 0.02,
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
        "eos_token_id": [1, 2],
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 5000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    }
    config = compass_config(**changes)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "compass"
    assert {name: stored[name] for name in changes if name != "rope_parameters"} == {
        name: value for name, value in changes.items() if name != "rope_parameters"
    }
    assert changes["rope_parameters"].items() <= stored["rope_parameters"].items()
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is CompassConfig
    assert json.loads(loaded.to_json_string()) == json.loads(config.to_json_string())
    assert CompassConfig.from_dict(stored).to_diff_dict() == config.to_diff_dict()


def test_the_older_name_of_the_number_of_experts_reads_the_same():
    assert compass_config(num_experts=7).num_local_experts == 7


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_take_changes(name):
    assert preset(name).num_experts == PRESETS[name]["num_experts"]
    assert preset(name, num_hidden_layers=3, use_cache=False).num_hidden_layers == 3
    with pytest.raises(ValueError, match="num_experts_per_tok"):
        preset(name, num_experts_per_tok=1000)


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(ValueError, match=r"`compass-v9` is no preset\. There are: .*compass-tiny"):
        preset("compass-v9")


@pytest.mark.parametrize(("name", "total", "active"), [("compass-v3", 245e9, 71e9), ("compass-v2", 30e9, 5e9)])
def test_presets_have_the_published_numbers_of_parameters(name, total, active):
    config = preset(name, num_mtp_layers=0)
    with torch.device("meta"):
        model = CompassForCausalLM(config)
    sizes = {key: value.numel() for key, value in model.named_parameters()}
    experts = sum(size for key, size in sizes.items() if ".experts." in key)
    idle = experts * (1 - config.num_experts_per_tok / config.num_experts)
    assert sum(sizes.values()) == pytest.approx(total, rel=0.01)
    assert sum(sizes.values()) - idle == pytest.approx(active, rel=0.01)

"""Parameters and FLOPs on paper are those of the real model, part by part."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_backbone import PRESETS, CompassConfig, CompassForCausalLM, preset
from moe_backbone.planning.counting import count_flops, count_parameters, flops_per_token

ODD = {
    "vocab_size": 331,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "moe_intermediate_size": 28,
    "num_experts": 5,
    "num_experts_per_tok": 3,
}
VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "shared": {"num_shared_experts": 2},
    "mtp": {"num_mtp_layers": 2},
    "bias": {"attention_bias": True, "num_mtp_layers": 1},
    "no norms of queries and keys": {"use_qk_norm": False, "num_mtp_layers": 1},
    "all": {
        "tie_word_embeddings": True,
        "num_shared_experts": 1,
        "num_mtp_layers": 2,
        "attention_bias": True,
        "router_bias_update_speed": 0.1,
    },
}


PARTS = {  # a module's name in the model, and its part
    "embed_tokens": "embeddings",
    "lm_head": "head",
    "self_attn": "attention",
    "gate": "routers",
    "experts": "experts",
    "shared_expert": "shared_experts",
}


def part_of(name: str, first_mtp_layer: int) -> str:
    words = name.split(".")
    if "layers" in words and int(words[words.index("layers") + 1]) >= first_mtp_layer:
        return "mtp"
    if "norm" in words[-2]:
        return "norms"
    return next(PARTS[word] for word in words if word in PARTS)


def measured(config: CompassConfig) -> dict[str, int]:
    with torch.device("meta"):
        model = CompassForCausalLM(config)
    counts = dict.fromkeys([*PARTS.values(), "norms", "mtp"], 0)
    for name, parameter in model.named_parameters():
        counts[part_of(name, config.num_hidden_layers)] += parameter.numel()
    return counts


def compare(config: CompassConfig) -> None:
    counts, real = count_parameters(config), measured(config)
    assert {name: getattr(counts, name) for name in real} == real
    assert counts.trained == sum(real.values()) == counts.total + real["mtp"]
    idle = counts.experts - counts.active_experts
    assert counts.active == counts.total - idle
    assert idle * config.num_experts == counts.experts * (config.num_experts - config.num_experts_per_tok)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_by_part(name):
    compare(preset(name))


@pytest.mark.parametrize("name", VARIANTS)
def test_odd_sizes_by_part(name):
    compare(CompassConfig(**ODD, **VARIANTS[name]))


@pytest.mark.parametrize(("name", "total", "active"), [("compass-v3", 245e9, 71e9), ("compass-v2", 30e9, 5e9)])
def test_presets_have_the_published_sizes(name, total, active):
    counts = count_parameters(preset(name))
    assert counts.total == pytest.approx(total, rel=0.01)
    assert counts.active == pytest.approx(active, rel=0.01)


def test_compass_small_is_about_a_billion():
    assert count_parameters(preset("compass-small")).total == pytest.approx(1e9, rel=0.1)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("training", [False, True])
def test_flops_are_those_of_the_real_model(name, training):
    """Eager attention computes whole score matrices, so twice our causal half, and torch counts every product.

    Older transformers make the rotary angles by one too, a few of a million.
    """
    rows, length = 2, 12
    config = CompassConfig(**ODD, **VARIANTS[name], mtp_detach_head=name == "all")
    model = CompassForCausalLM._from_config(config, attn_implementation="eager", experts_implementation="eager")
    model.train(training)
    ids = torch.randint(config.vocab_size, (rows, length))
    with FlopCounterMode(display=False) as counter:
        output = model(ids, labels=ids)
        if training:
            output.loss.backward()
    flops = count_flops(config, length, training)
    assert counter.get_total_flops() == pytest.approx(rows * length * (flops.total + flops.scores), rel=1e-4)
    assert flops_per_token(config, length, training) == flops.total


def test_flops_approach_six_times_the_active_parameters():
    config = preset("compass-v3", num_mtp_layers=0)
    table = count_parameters(config).embeddings
    assert flops_per_token(config, 1) == pytest.approx(6 * (count_parameters(config).active - table), rel=1e-3)

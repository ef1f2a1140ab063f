"""Compass models in other names: transformers' own models of them answer alike, and the way back loses no bit."""

import pytest
import torch
from compass_helpers import TINY, YARN, assert_same_state, compass_model, stored_keys, token_ids
from conversion_helpers import assert_same_answers, exported, imported, loaded
from transformers import (
    AutoModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3MoeForSequenceClassification,
    Qwen3NextForCausalLM,
)

from moe_backbone import CompassForCausalLM, CompassForSequenceClassification, CompassModel

PLAIN = {"num_experts": 5, "moe_intermediate_size": 24}
VARIANTS = {
    "plain": ({}, Qwen3MoeForCausalLM),
    "tied": ({"tie_word_embeddings": True}, Qwen3MoeForCausalLM),
    "yarn": ({"rope_parameters": YARN, "max_position_embeddings": 128}, Qwen3MoeForCausalLM),
    "unscaled": ({"norm_topk_prob": False, "rms_norm_eps": 1e-5}, Qwen3MoeForCausalLM),
    "one expert": ({"num_experts": 1, "num_experts_per_tok": 1}, Qwen3MoeForCausalLM),
    "mtp": ({"num_mtp_layers": 2, "num_hidden_layers": 3}, Qwen3MoeForCausalLM),
    "shared": ({"num_shared_experts": 2, "num_mtp_layers": 1, "rope_parameters": YARN}, Qwen3NextForCausalLM),
    "shared, tied": (
        {"num_shared_experts": 1, "tie_word_embeddings": True, "norm_topk_prob": False},
        Qwen3NextForCausalLM,
    ),
    "mixtral": ({"use_qk_norm": False, "tie_word_embeddings": True, "num_mtp_layers": 1}, MixtralForCausalLM),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_exported_model_answers_alike(tmp_path, variant):
    changes, target_class = VARIANTS[variant]
    model = compass_model(**changes).eval()
    model.save_pretrained(tmp_path / "compass")
    written = exported(tmp_path / "compass", tmp_path / "out", max_shard_size=40_000)
    assert written.architecture == target_class.__name__ and written.shards > 1
    assert any("MTP layer(s), `model.layers." in note for note in written.left_out) == ("num_mtp_layers" in changes)
    twin = loaded(tmp_path / "out")
    assert type(twin) is target_class
    assert_same_answers(twin, model)
    # The keys are those that the architecture's own `save_pretrained` writes, and files are not larger than asked for.
    twin.save_pretrained(tmp_path / "again")
    assert stored_keys(tmp_path / "out") == stored_keys(tmp_path / "again")
    assert all(path.stat().st_size < 45_000 for path in (tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "shared" not in name])
def test_there_and_back_is_the_same_bits(tmp_path, variant, dtype):
    changes = VARIANTS[variant][0]
    compass_model(**changes).save_pretrained(tmp_path / "float32")
    model = CompassForCausalLM.from_pretrained(tmp_path / "float32", dtype=dtype, num_mtp_layers=0)
    model.save_pretrained(tmp_path / "compass")
    exported(tmp_path / "compass", tmp_path / "out", max_shard_size=50_000)
    written = imported(tmp_path / "out", tmp_path / "back", max_shard_size=30_000)
    assert written.dtype is dtype
    back = loaded(tmp_path / "back")
    assert type(back) is CompassForCausalLM
    assert_same_state(back, model)
    options, others = back.config.to_dict(), model.config.to_dict()
    different = {name for name in others if options.get(name) != others[name]}
    assert different <= {"_name_or_path"}, different


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}], ids=str)
def test_a_qwen3_moe_becomes_compass(tmp_path, changes):
    config = Qwen3MoeConfig(**TINY, **PLAIN, norm_topk_prob=True, intermediate_size=8, **changes)
    model = Qwen3MoeForCausalLM._from_config(config).eval()
    model.save_pretrained(tmp_path / "qwen")
    imported(tmp_path / "qwen", tmp_path / "compass")
    assert_same_answers(loaded(tmp_path / "compass"), model)


@pytest.mark.parametrize("head_dim", [None, 6])
def test_a_mixtral_becomes_compass_and_trains(tmp_path, head_dim):
    sizes = {**TINY, "head_dim": head_dim, "num_local_experts": 4, "intermediate_size": 24}
    model = MixtralForCausalLM._from_config(MixtralConfig(**sizes, router_jitter_noise=0.1)).eval()
    model.save_pretrained(tmp_path / "mixtral")
    written = imported(tmp_path / "mixtral", tmp_path / "compass")
    assert any("router_jitter_noise=0.1" in note for note in written.left_out)
    compass = loaded(tmp_path / "compass")
    assert_same_answers(compass, model)
    ids = token_ids(2, 9)
    grown = CompassForCausalLM.from_pretrained(tmp_path / "compass", num_mtp_layers=1).train()
    grown(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in grown.parameters())


@pytest.mark.parametrize(
    ("model_class", "auto", "target"),
    [
        (CompassForSequenceClassification, None, Qwen3MoeForSequenceClassification),
        (CompassModel, AutoModel, None),
    ],
)
def test_other_heads(tmp_path, model_class, auto, target):
    model = compass_model(model_class=model_class, num_mtp_layers=1, pad_token_id=0, num_labels=3).eval()
    model.save_pretrained(tmp_path / "compass")
    exported(tmp_path / "compass", tmp_path / "out")
    twin = loaded(tmp_path / "out", target or auto)
    ids = token_ids(2, 7)
    assert torch.equal(twin(ids)[0], model(ids)[0])
    imported(tmp_path / "out", tmp_path / "back")
    assert torch.equal(model_class.from_pretrained(tmp_path / "back")(ids)[0], model(ids)[0])

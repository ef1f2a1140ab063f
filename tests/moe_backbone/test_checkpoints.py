"""Saving and loading models: every bit, a key for each expert, files split anywhere, the Auto classes."""

import json

import pytest
import torch
from compass_helpers import CLOSE, FULL, assert_same_state, compass_config, compass_model, stored_keys, token_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.trainer_utils import load_sharded_checkpoint

from moe_backbone import CompassConfig, CompassForCausalLM, CompassForSequenceClassification, CompassModel


@pytest.mark.parametrize("shard", [None, "30KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_keep_every_bit(tmp_path, dtype, shard, tied):
    compass_model(tie_word_embeddings=tied, **FULL).save_pretrained(tmp_path / "float32")
    model = CompassForCausalLM.from_pretrained(tmp_path / "float32", dtype=dtype)  # `to` would round rotary positions
    tmp_path = tmp_path / "saved"
    model.save_pretrained(tmp_path, **({} if shard is None else {"max_shard_size": shard}))
    files = {path.name for path in tmp_path.iterdir()}
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert ("model.safetensors.index.json" in files) == (shard is not None)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert type(loaded) is CompassForCausalLM and not loaded.training
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.lm_head.weight.dtype is dtype
    assert_same_state(loaded, model)
    ids = token_ids(2, 9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert stored_keys(again) == stored_keys(tmp_path)


def test_the_checkpoint_has_a_key_for_each_expert(tmp_path):
    model = compass_model(num_hidden_layers=1, num_experts=2, num_experts_per_tok=1, **FULL)
    model.save_pretrained(tmp_path)
    hidden, width, vocabulary = 32, 24, 61
    layer = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (32, hidden),
        "self_attn.k_proj.weight": (16, hidden),
        "self_attn.v_proj.weight": (16, hidden),
        "self_attn.o_proj.weight": (hidden, 32),
        "self_attn.q_norm.weight": (8,),
        "self_attn.k_norm.weight": (8,),
        "mlp.gate.weight": (2, hidden),
        "mlp.gate.e_score_correction_bias": (2,),
        "mlp.shared_expert.gate_proj.weight": (2 * width, hidden),
        "mlp.shared_expert.up_proj.weight": (2 * width, hidden),
        "mlp.shared_expert.down_proj.weight": (hidden, 2 * width),
    }
    for expert in range(2):
        layer |= {
            f"mlp.experts.{expert}.gate_proj.weight": (width, hidden),
            f"mlp.experts.{expert}.up_proj.weight": (width, hidden),
            f"mlp.experts.{expert}.down_proj.weight": (hidden, width),
        }
    mtp = {
        "enorm.weight": (hidden,),
        "hnorm.weight": (hidden,),
        "post_norm.weight": (hidden,),
        "eh_proj.weight": (hidden, 2 * hidden),
    }
    assert stored_keys(tmp_path) == {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
        **{f"model.layers.0.{name}": shape for name, shape in layer.items()},
        **{f"model.layers.1.{name}": shape for name, shape in {**layer, **mtp}.items()},
    }
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        experts = model.model.layers[0].mlp.experts
        prefix = "model.layers.0.mlp.experts.1"
        assert torch.equal(file.get_tensor(f"{prefix}.gate_proj.weight"), experts.gate_up_proj[1, :width])
        assert torch.equal(file.get_tensor(f"{prefix}.up_proj.weight"), experts.gate_up_proj[1, width:])
        assert torch.equal(file.get_tensor(f"{prefix}.down_proj.weight"), experts.down_proj[1])


def test_a_file_goes_straight_into_a_model(tmp_path):
    """As the Trainer does when it resumes; experts may not silently stay what they were."""
    model, other = compass_model(**FULL), compass_model(seed=1, **FULL)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    missing, unexpected = other.load_state_dict(stored, strict=False)
    assert not missing and not unexpected
    assert_same_state(other, model)
    other.load_state_dict(compass_model(seed=2, **FULL).state_dict())  # and the layout in memory still works
    assert_same_state(other, compass_model(seed=2, **FULL))


def split(folder, kind):
    """Writes the one file of a checkpoint as several, split in the middle of experts, keys in a random order."""
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    order = torch.randperm(len(stored), generator=torch.Generator().manual_seed(1)).tolist()
    names = [sorted(stored)[place] for place in order]
    if kind == "one key a file":
        files = [[name] for name in names]
    elif kind == "a matrix a file":
        matrices = ("gate_proj", "up_proj", "down_proj")
        files = [[name for name in names if matrix in name] for matrix in matrices]
        files.append([name for name in names if not any(matrix in name for matrix in matrices)])
    else:
        files = [names[start : start + 7] for start in range(0, len(names), 7)]
    weight_map = {}
    for number, part in enumerate(files):
        save_file({name: stored[name] for name in part}, folder / f"part-{number}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(part, f"part-{number}.safetensors")
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.lengthy
@pytest.mark.parametrize("kind", ["one key a file", "a matrix a file", "seven keys a file", "20KB"])
def test_experts_split_over_files(tmp_path, kind):
    model = compass_model(**FULL).eval()
    model.save_pretrained(tmp_path, **({"max_shard_size": kind} if kind == "20KB" else {}))
    if kind != "20KB":
        split(tmp_path, kind)
    assert_same_state(CompassForCausalLM.from_pretrained(tmp_path), model)
    resumed = compass_model(seed=1, **FULL)
    load_sharded_checkpoint(resumed, tmp_path, strict=False)  # as the Trainer does
    assert_same_state(resumed, model)
    with torch.device("meta"):
        empty = CompassForCausalLM(model.config)
    for file in sorted(tmp_path.glob("*.safetensors")):
        empty.load_state_dict(load_file(file), strict=False, assign=True)
    assert_same_state(empty, model)


def test_a_part_of_the_experts_is_loaded_and_the_rest_is_missed():
    model, other = compass_model(num_hidden_layers=1), compass_model(seed=1, num_hidden_layers=1)
    experts, before = other.model.layers[0].mlp.experts, other.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    key, source = "model.layers.0.mlp.experts.{}.{}.weight", model.model.layers[0].mlp.experts
    part = {key.format(3, "up_proj"): source.gate_up_proj[3, 24:], key.format(5, "up_proj"): torch.ones(24, 32)}
    missing, unexpected = other.load_state_dict(part, strict=False)
    assert unexpected == [key.format(5, "up_proj")]  # there are five experts
    assert {name for name in missing if "experts" in name} == {
        "model.layers.0.mlp.experts.down_proj",
        *(key.format(expert, "gate_proj") for expert in range(5)),
        *(key.format(expert, "up_proj") for expert in (0, 1, 2, 4)),
    }
    assert torch.equal(experts.gate_up_proj[3, 24:], source.gate_up_proj[3, 24:])
    experts.gate_up_proj.data[3, 24:] = before["model.layers.0.mlp.experts.gate_up_proj"][3, 24:]
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(RuntimeError, match=r"size mismatch for model.layers.0.mlp.experts.0.down_proj.weight"):
        other.load_state_dict({key.format(0, "down_proj"): torch.ones(2, 2)}, strict=False)


def test_the_auto_classes_know_the_models(tmp_path):
    model = compass_model(**FULL).eval()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is CompassConfig
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["CompassForCausalLM"]
    ids = token_ids(2, 5)
    decoder = AutoModel.from_pretrained(tmp_path)
    assert type(decoder) is CompassModel
    assert torch.equal(decoder(ids).last_hidden_state, model.model(ids).last_hidden_state)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    assert type(classifier) is CompassForSequenceClassification
    assert torch.equal(classifier.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert type(AutoModelForCausalLM.from_config(model.config)) is CompassForCausalLM
    assert type(AutoModel.from_config(model.config)) is CompassModel


def test_a_new_model_has_small_random_weights_everywhere():
    model = CompassForCausalLM(compass_config(initializer_range=0.05, **FULL))
    for name, value in model.named_parameters():
        if "norm" in name:
            assert value.eq(1).all(), name
        else:
            assert value.std().item() == pytest.approx(0.05, rel=0.25), name
            assert abs(value.mean().item()) < 0.02, name


def test_tied_embeddings_are_one_tensor(tmp_path):
    model = compass_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in stored_keys(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert compass_model().lm_head.weight is not compass_model().model.embed_tokens.weight


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_can_be_resized(tmp_path, tied):
    model = compass_model(tie_word_embeddings=tied, **FULL)
    ids, before = token_ids(2, 8), model.lm_head.weight.detach().clone()
    with torch.no_grad():
        logits = model(ids).logits
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model.config.vocab_size == model.vocab_size == 70 and torch.equal(model.lm_head.weight[:61], before)
    torch.testing.assert_close(model(ids).logits[..., :61], logits, **CLOSE)
    larger = ids.clone()
    larger[0, 3:6] = 69
    out = model(larger, labels=larger)
    out.loss.backward()
    assert out.mtp_loss.isfinite() and model.model.embed_tokens.weight.grad[69].abs().max() > 0
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(larger).logits, model.eval()(larger).logits)

"""What a transformers user expects of the models."""

import json
import math

import pytest
import torch
from compass_helpers import (
    IMPLEMENTATIONS,
    SIZES,
    assert_gradients_close,
    compass_config,
    compass_model,
    gradients,
    pack,
    token_ids,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding
from transformers.trainer_utils import load_sharded_checkpoint

from moe_backbone import (
    CompassConfig,
    CompassForCausalLM,
    CompassForQuestionAnswering,
    CompassForSequenceClassification,
    CompassForTokenClassification,
    CompassModel,
)

FULL = {"num_mtp_layers": 1, "num_shared_experts": 2, "router_bias_update_speed": 1e-3}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 16}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32, with sums in another order


def assert_same_state(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    different = [name for name in left if left[name].dtype != right[name].dtype or not left[name].equal(right[name])]
    assert not different, different


def stored_keys(folder):
    keys = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            keys |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return keys


# Against Qwen3-MoE, whose weights fit a model without shared experts and MTP layers


def qwen(model, **changes):
    twin = Qwen3MoeForCausalLM._from_config(
        Qwen3MoeConfig(**{**SIZES, **changes}, norm_topk_prob=model.config.norm_topk_prob, intermediate_size=8)
    )
    twin.load_state_dict(model.state_dict())
    return twin.train(model.training)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"rope_parameters": YARN}, {"num_experts": 2}])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_it_is_qwen3_moe_where_both_exist(changes, norm_topk_prob):
    """Logits, language-model loss and gradients, over positions beyond YaRN's original length."""
    model = compass_model(norm_topk_prob=norm_topk_prob, router_aux_loss_coef=0.0, router_z_loss_coef=0.0, **changes)
    twin, ids = qwen(model, **changes), token_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    labels = ids.masked_fill(mask == 0, -100)
    ours, theirs = (m(ids, attention_mask=mask, labels=labels) for m in (model, twin))
    torch.testing.assert_close(ours.logits[mask == 1], theirs.logits[mask == 1], **CLOSE)
    torch.testing.assert_close(ours.loss, theirs.loss)
    ours.loss.backward()
    theirs.loss.backward()
    assert_gradients_close(gradients(model), gradients(twin), **CLOSE)


def test_with_one_layer_the_balancing_loss_enters_as_in_qwen3_moe():
    changes = {"num_hidden_layers": 1, "router_aux_loss_coef": 0.3}
    model = compass_model(router_z_loss_coef=0.0, **changes)
    twin, ids = qwen(model, **changes), token_ids(2, 12)
    ours, theirs = model(ids, labels=ids), twin(ids, labels=ids, output_router_logits=True)
    torch.testing.assert_close(ours.aux_loss, theirs.aux_loss)
    torch.testing.assert_close(ours.loss, theirs.loss)


# Saving and loading


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


# Inputs


def test_a_token_beyond_the_vocabulary_fails():
    with pytest.raises(IndexError):
        compass_model()(torch.tensor([[1, 61]]))


@pytest.mark.parametrize("arguments", [{}, {"input_ids": token_ids(1, 3), "inputs_embeds": torch.zeros(1, 3, 32)}])
def test_exactly_one_kind_of_input(arguments):
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        compass_model()(**arguments)


def test_embeddings_in_place_of_tokens():
    model, ids = compass_model(**FULL), token_ids(2, 8)
    embedded = model.get_input_embeddings()(ids)
    from_ids, from_embeds = model(ids, labels=ids), model(inputs_embeds=embedded, labels=ids)
    assert torch.equal(from_ids.logits, from_embeds.logits) and torch.equal(from_ids.loss, from_embeds.loss)


def test_all_labels_masked():
    """As in transformers: 0 / 0 without the number of labels of the step, and nothing at all with it."""
    model, ids = compass_model(**FULL), token_ids(2, 8)
    labels = torch.full_like(ids, -100)
    assert model(ids, labels=labels).lm_loss.isnan()
    out = model(ids, labels=labels, num_items_in_batch=10)
    out.loss.backward()
    assert out.loss.item() == 0 and all(gradient.eq(0).all() for gradient in gradients(model).values())


def test_kept_logits_are_the_last():
    model, ids = compass_model().eval(), token_ids(2, 8)
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:], **CLOSE)
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, logits[:, [1, 4]], **CLOSE)


def test_tuples_for_those_who_want_them():
    model, ids = compass_model().eval(), token_ids(2, 8)
    got = model(ids, labels=ids, return_dict=False)
    out = model(ids, labels=ids)
    assert isinstance(got, tuple) and torch.equal(got[0], out.loss) and torch.equal(got[1], out.logits)


# Outputs


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_router_logits_by_layer(mode):
    model, ids = compass_model(**FULL).train(mode == "train"), token_ids(2, 7)
    labels = ids if mode == "train" else None
    assert model(ids, labels=labels).router_logits is None
    out = model(ids, labels=labels, output_router_logits=True)
    layers = 3 if mode == "train" else 2  # MTP layers run in training alone
    assert [layer.shape for layer in out.router_logits] == [(14, 5)] * layers
    assert all(layer.dtype is torch.float32 for layer in out.router_logits)
    assert out.expert_load.shape == (layers, 5) and out.expert_load.sum(1).eq(14 * 2).all()
    router = model.model.routers[0]
    layer = model.model.layers[0]
    embedded = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb(embedded, position_ids=torch.arange(7)[None])
    attended, _ = layer.self_attn(layer.input_layernorm(embedded), position_embeddings=rotary, attention_mask=None)
    first = router(layer.post_attention_layernorm(embedded + attended).reshape(14, 32))
    torch.testing.assert_close(out.router_logits[0], first[0], **CLOSE)


def test_the_configuration_can_ask_for_router_logits():
    model, ids = compass_model(output_router_logits=True).eval(), token_ids(2, 7)
    out = model(ids, labels=ids)
    assert len(out.router_logits) == 2
    expected = out.lm_loss + 0.01 * out.aux_loss + 0.001 * out.z_loss
    torch.testing.assert_close(out.loss, expected)
    assert model(ids, output_router_logits=False).aux_loss is None


def test_the_parts_of_the_loss_add_up():
    coefficients = {"mtp_loss_coef": 0.3, "router_aux_loss_coef": 0.2, "router_z_loss_coef": 0.05}
    model, ids = compass_model(**{**FULL, **coefficients}), token_ids(2, 9)
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.loss, out.lm_loss + 0.3 * out.mtp_loss + 0.2 * out.aux_loss + 0.05 * out.z_loss)
    assert min(out.lm_loss, out.mtp_loss, out.aux_loss, out.z_loss) > 1e-3
    shifted = out.logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])
    torch.testing.assert_close(out.lm_loss.double(), -shifted.mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("aux", "z"), [(0.0, 0.05), (0.2, 0.0)])
def test_either_of_the_routers_losses_can_stand_alone(aux, z):
    model, ids = compass_model(router_aux_loss_coef=aux, router_z_loss_coef=z), token_ids(2, 9)
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.loss, out.lm_loss + aux * out.aux_loss + z * out.z_loss)


def test_without_the_routers_losses_the_load_alone_is_recorded():
    model, ids = compass_model(router_aux_loss_coef=0.0, router_z_loss_coef=0.0), token_ids(2, 9)
    out = model(ids, labels=ids)
    assert out.aux_loss is None and out.z_loss is None and torch.equal(out.loss, out.lm_loss)
    assert out.router_logits is None and out.expert_load.shape == (2, 5)


@pytest.mark.parametrize("speed", [0.0, 1e-3])
@pytest.mark.parametrize(("aux", "z"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1), (0.1, 0.1)])
@pytest.mark.parametrize(
    ("changes", "layers"), [({}, 2), ({"num_mtp_layers": 1}, 3), ({"num_mtp_layers": 1, "mtp_loss_coef": 0.0}, 2)]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_load_hangs_on_nothing_else(speed, aux, z, changes, layers, checkpointing):
    model = compass_model(router_bias_update_speed=speed, router_aux_loss_coef=aux, router_z_loss_coef=z, **changes)
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = token_ids(2, 9)
    out = model(ids, labels=ids)
    out.loss.backward()
    assert out.expert_load.shape == (layers, 5) and out.expert_load.sum(1).eq(2 * 9 * 2).all()
    assert torch.equal(out.expert_load, model(ids, labels=ids, output_router_logits=True).expert_load)
    assert model(ids).expert_load is None and model.eval()(ids, labels=ids).expert_load is None
    assert model(ids, output_router_logits=True).expert_load.shape == (2, 5)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_hidden_states_and_attentions_by_layer(mode):
    model, ids = compass_model(attention="eager", **FULL).train(mode == "train"), token_ids(2, 7)
    out = model(ids, labels=ids, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in out.hidden_states] == [(2, 7, 32)] * 3
    assert [attention.shape for attention in out.attentions] == [(2, 4, 7, 7)] * 2
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids))
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    for attention in out.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, 7))
        assert attention.triu(1).eq(0).all()


def test_every_parameter_learns():
    model, ids = compass_model(**FULL), token_ids(4, 16)
    model(ids, labels=ids).loss.backward()
    without = [name for name, value in model.named_parameters() if value.grad is None or value.grad.eq(0).all()]
    assert not without


# One computation, several ways


@pytest.mark.parametrize("other", IMPLEMENTATIONS)
def test_experts_implementations_agree(other):
    reference = compass_model(implementation="eager", **FULL)
    model = compass_model(implementation=other, **FULL)
    assert model.config._experts_implementation == other
    ids = token_ids(2, 9)
    ours, expected = model(ids, labels=ids), reference(ids, labels=ids)
    torch.testing.assert_close(ours.logits, expected.logits, **CLOSE)
    ours.loss.backward()
    expected.loss.backward()
    assert_gradients_close(gradients(model), gradients(reference), **CLOSE)


def test_grouped_mm_is_the_default_and_reaches_every_layer(monkeypatch):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    model, ids, calls = compass_model(**FULL), token_ids(1, 5), []
    grouped = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    monkeypatch.setitem(
        ALL_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", lambda *a, **k: calls.append(1) or grouped(*a, **k)
    )
    model(ids, labels=ids)
    assert len(calls) == 3
    model.set_experts_implementation("eager")
    model(ids, labels=ids)
    assert len(calls) == 3


@pytest.mark.parametrize("padded", [False, True])
def test_attention_implementations_agree(padded):
    ids = token_ids(2, 9)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 4:6] = -100  # what padding would predict, one token and two ahead
    results = []
    for attention in ("eager", "sdpa"):
        model = compass_model(attention=attention, **FULL)
        assert model.config._attn_implementation == attention
        out = model(ids, attention_mask=mask, labels=labels)
        out.loss.backward()
        results.append((out.logits[mask == 1], gradients(model)))
    torch.testing.assert_close(results[0][0], results[1][0], **CLOSE)
    assert_gradients_close(results[0][1], results[1][1], **CLOSE)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    """Reentrant checkpointing records the routers without a gradient, as in every MoE model of transformers."""
    ids, results = token_ids(2, 9), []
    options = {**FULL, "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0} if reentrant else FULL
    for checkpointing in (False, True):
        model = compass_model(**options)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
            assert all(layer.gradient_checkpointing for layer in model.model.layers)
        out = model(ids, labels=ids, output_router_logits=True, use_cache=False)
        out.loss.backward()
        results.append((out, gradients(model)))
    plain, saving = results[0][0], results[1][0]
    for name in ("loss", "lm_loss", "mtp_loss", "aux_loss", "z_loss", "logits", "expert_load"):
        assert torch.equal(plain[name], saving[name]), name
    assert len(plain.router_logits) == len(saving.router_logits) == 3
    assert_gradients_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-7)


# Rows: packed, padded, split


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_row_is_its_documents(attention):
    """Logits, both losses and every gradient, and the load of the experts."""
    coefficients = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    parts = [token_ids(1, length, seed=length)[0] for length in (7, 1, 3, 6)]
    row = pack(parts)
    items = (row["labels"] != -100).sum()
    packed = compass_model(attention=attention, **{**FULL, "num_mtp_layers": 2}, **coefficients)
    out = packed(**row, num_items_in_batch=items, use_cache=False, output_router_logits=True)
    out.loss.backward()
    alone = compass_model(attention=attention, **{**FULL, "num_mtp_layers": 2}, **coefficients)
    singles = [
        alone(part[None], labels=part[None], num_items_in_batch=items, output_router_logits=True) for part in parts
    ]
    sum(single.loss for single in singles).backward()
    torch.testing.assert_close(out.logits, torch.cat([single.logits for single in singles], dim=1), **CLOSE)
    for name in ("loss", "lm_loss", "mtp_loss"):
        torch.testing.assert_close(out[name], sum(single[name] for single in singles), **CLOSE)
    # the places at a document's end that pair with the next one are not labelled, yet their tokens are routed
    assert torch.equal(out.expert_load[:2], sum(single.expert_load[:2] for single in singles))
    assert_gradients_close(gradients(packed), gradients(alone), **CLOSE)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_packed_row_with_labels_needs_no_option(mode):
    """A cache, which the configuration asks for, would let documents see each other."""
    model = compass_model(**FULL).train(mode == "train")
    row = pack([token_ids(1, length, seed=length)[0] for length in (4, 5)])
    changed = {**row, "input_ids": row["input_ids"].clone()}
    changed["input_ids"][0, 0] = row["input_ids"][0, 0] % 60 + 1
    before, after = model(**row), model(**changed)
    assert before.past_key_values is None
    torch.testing.assert_close(after.logits[:, 4:], before.logits[:, 4:], **CLOSE)
    assert not torch.allclose(after.logits[:, 1:4], before.logits[:, 1:4], atol=1e-2)


def test_a_mask_for_the_router_alone():
    """The padding of a packed row is one more document, left out of the router's losses and the load."""
    model = compass_model(**FULL).eval()
    row = pack([token_ids(1, length, seed=length)[0] for length in (4, 5)])
    padded = pack([token_ids(1, length, seed=length)[0] for length in (4, 5)] + [torch.zeros(3, dtype=torch.int64)])
    mask = torch.ones(1, 12, dtype=torch.int64)
    mask[0, 9:] = 0
    expected = model(**row, output_router_logits=True)
    out = model(**padded, output_router_logits=True, router_mask=mask)
    torch.testing.assert_close(out.logits[:, :9], expected.logits, **CLOSE)
    assert torch.equal(out.expert_load, expected.expert_load)
    torch.testing.assert_close(out.aux_loss, expected.aux_loss)
    torch.testing.assert_close(out.z_loss, expected.z_loss)
    assert model(**padded, output_router_logits=True).expert_load.sum() > out.expert_load.sum()


def test_right_padding_is_ignored():
    model, ids = compass_model(**FULL), token_ids(1, 7)
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.int64)], dim=1)
    mask = (torch.arange(11) < 7).long()[None]
    out = model(padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100))
    expected = model(ids, labels=ids)
    torch.testing.assert_close(out.logits[:, :7], expected.logits, **CLOSE)
    torch.testing.assert_close(out.lm_loss, expected.lm_loss)
    torch.testing.assert_close(out.mtp_loss, expected.mtp_loss)


def test_two_half_batches_sum_to_the_whole():
    ids = token_ids(4, 9)
    labels = ids.clone()
    labels[0, :6] = -100
    labels[3, 4:] = -100
    items = (labels[:, 1:] != -100).sum()
    coefficients = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.05}
    whole, halves = compass_model(**coefficients, **FULL), compass_model(**coefficients, **FULL)
    out = whole(ids, labels=labels, num_items_in_batch=items)
    out.loss.backward()
    parts = [halves(ids[part], labels=labels[part], num_items_in_batch=items) for part in (slice(2), slice(2, 4))]
    sum(part.loss for part in parts).backward()
    for name in ("lm_loss", "mtp_loss"):
        torch.testing.assert_close(out[name], sum(part[name] for part in parts))
    # without the number the means of the halves are over their own labels
    torch.testing.assert_close(out.lm_loss, whole(ids, labels=labels).lm_loss)
    shares = [(labels[part][:, 1:] != -100).sum() / items for part in (slice(2), slice(2, 4))]
    z = sum(share * part.z_loss for share, part in zip(shares, parts, strict=True))
    expected = sum(part.lm_loss + 0.1 * part.mtp_loss for part in parts) + 0.05 * z
    torch.testing.assert_close(sum(part.loss for part in parts), expected)


def test_gradients_of_two_half_batches_sum_to_those_of_the_whole():
    ids, coefficients = token_ids(4, 9), {"router_aux_loss_coef": 0.0}
    whole, halves = compass_model(**coefficients, **FULL), compass_model(**coefficients, **FULL)
    whole(ids, labels=ids, num_items_in_batch=32).loss.backward()
    for part in (slice(2), slice(2, 4)):  # with as many labels each, the z-loss splits evenly too
        halves(ids[part], labels=ids[part], num_items_in_batch=torch.tensor(32)).loss.backward()
    assert_gradients_close(gradients(whole), gradients(halves), **CLOSE)


# Generation


def greedy(model, ids, **options):
    return model.generate(ids, do_sample=False, max_new_tokens=10, pad_token_id=0, **options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_the_cache_changes_nothing(implementation):
    model, ids = compass_model(implementation=implementation, **FULL).eval(), token_ids(2, 6)
    cached, plain = greedy(model, ids), greedy(model, ids, use_cache=False)
    assert torch.equal(cached, plain) and cached.shape == (2, 16)
    for position in range(6, 16):  # and both are the argmax of a forward over the prefix
        assert torch.equal(model(cached[:, :position]).logits[:, -1].argmax(-1), cached[:, position])


@torch.no_grad()
def test_logits_in_pieces_are_those_of_the_whole():
    model, ids = compass_model(**FULL).eval(), token_ids(2, 12)
    whole, past, pieces = model(ids).logits, None, []
    for start, end in ((0, 5), (5, 6), (6, 10), (10, 12)):
        out = model(ids[:, start:end], past_key_values=past, use_cache=True)
        past = out.past_key_values
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **CLOSE)


def test_a_batch_padded_on_the_left_generates_as_its_rows():
    model = compass_model(**FULL).eval()
    rows = [token_ids(1, length, seed=length) for length in (3, 8, 5)]
    ids, mask = torch.zeros(3, 8, dtype=torch.int64), torch.zeros(3, 8, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, 8 - row.size(1) :], mask[index, 8 - row.size(1) :] = row[0], 1
    batch = greedy(model, ids, attention_mask=mask)
    for index, row in enumerate(rows):
        assert torch.equal(batch[index, 8:], greedy(model, row)[0, row.size(1) :])


def test_the_padding_token_has_an_embedding_of_its_own_use():
    model = compass_model(pad_token_id=0)
    assert model.model.embed_tokens.padding_idx == 0
    assert CompassForCausalLM(compass_config(pad_token_id=0)).model.embed_tokens.weight[0].eq(0).all()


# Positions


def test_yarn_survives_a_save_and_stretches_slow_frequencies_alone(tmp_path):
    model = compass_model(rope_parameters=YARN, max_position_embeddings=128, head_dim=32).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.rope_parameters == model.config.rope_parameters
    ids = token_ids(1, 100)
    assert torch.equal(loaded(ids).logits, model(ids).logits)

    plain = compass_model(max_position_embeddings=128, head_dim=32).eval()
    ratio = model.model.rotary_emb.inv_freq / plain.model.rotary_emb.inv_freq
    assert ratio[0].item() == pytest.approx(1) and ratio[-1].item() == pytest.approx(1 / 8)
    assert (ratio.diff() <= 1e-6).all() and ratio.unique().numel() > 2
    assert model.model.rotary_emb.attention_scaling == pytest.approx(0.1 * math.log(8) + 1)
    theirs = Qwen3MoeRotaryEmbedding(
        Qwen3MoeConfig(**{**SIZES, "head_dim": 32, "max_position_embeddings": 128}, rope_parameters=dict(YARN))
    )
    positions = torch.arange(100)[None]
    for ours, expected in zip(
        model.model.rotary_emb(torch.zeros(1), positions), theirs(torch.zeros(1), positions), strict=True
    ):
        assert torch.equal(ours, expected)
    assert not torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-2)


def test_order_matters_and_a_common_shift_does_not():
    model, ids = compass_model().eval(), token_ids(1, 8)
    logits = model(ids).logits
    shifted = model(ids, position_ids=torch.arange(8)[None] + 11).logits
    torch.testing.assert_close(shifted, logits, rtol=1e-3, atol=1e-4)  # rotary angles are rounded at other positions
    spread = model(ids, position_ids=torch.arange(8)[None] * 3, attention_mask=torch.ones_like(ids)).logits
    assert (spread - logits)[:, 1:].abs().max() > 0.01


# Other heads

TOKEN_LABELS = token_ids(4, 8, seed=2) % 3
HEADS = {
    "sequence": (
        CompassForSequenceClassification,
        AutoModelForSequenceClassification,
        {"labels": torch.arange(4) % 3},
    ),
    "token": (CompassForTokenClassification, AutoModelForTokenClassification, {"labels": TOKEN_LABELS}),
    "answer": (
        CompassForQuestionAnswering,
        AutoModelForQuestionAnswering,
        {"start_positions": torch.tensor([0, 1, 2, 3]), "end_positions": torch.tensor([2, 3, 4, 7])},
    ),
}


@pytest.mark.parametrize("head", HEADS)
def test_other_heads_train_and_are_saved(tmp_path, head):
    """MTP layers, which they never run, are frozen: distributed training fails over parameters without a gradient."""
    model_class, auto_class, targets = HEADS[head]
    model = compass_model(model_class=model_class, num_labels=3, pad_token_id=0, **FULL)
    ids, losses = token_ids(4, 8), []
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    for _ in range(20):
        loss = model(ids, **targets).loss
        loss.backward()
        trainable = {name for name, value in model.named_parameters() if value.requires_grad}
        assert gradients(model).keys() == trainable and any("layers.2" not in name for name in trainable)
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is model_class and not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))
    for got, expected in zip(loaded(ids).to_tuple(), model(ids).to_tuple(), strict=True):
        if torch.is_tensor(expected):
            assert torch.equal(got, expected)


def test_scores_of_tokens_are_linear_in_the_decoders_states():
    ids = token_ids(2, 7)
    token, answer = (
        compass_model(model_class=HEADS[name][0], num_labels=3, **FULL).eval() for name in ("token", "answer")
    )
    states = token.model(ids).last_hidden_state
    assert torch.equal(token(ids).logits, token.score(states)) and token(ids).logits.shape == (2, 7, 3)
    starts = answer.qa_outputs(answer.model(ids).last_hidden_state)[..., 0]
    assert torch.equal(answer(ids).start_logits, starts) and answer(ids).end_logits.shape == (2, 7)


@pytest.mark.parametrize("head", [CompassForCausalLM, CompassModel, *(head[0] for head in HEADS.values())])
@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("speed", [0.0, 1e-3])
def test_lists_for_transformers_name_what_there_is(head, layers, speed):
    model = compass_model(model_class=head, num_mtp_layers=layers, router_bias_update_speed=speed)
    classes = {type(module).__name__ for module in model.modules()}
    listed = {"CompassDecoderLayer", "CompassMtpLayer"} & classes
    assert model._no_split_modules == listed and len(listed) == 1 + layers
    assert model._keep_in_fp32_modules_strict == ({"e_score_correction_bias"} if speed else set())


def test_a_classifier_scores_the_last_token_and_trains():
    model = compass_model(model_class=CompassForSequenceClassification, num_labels=1, pad_token_id=0)
    ids = token_ids(4, 8)
    ids[1, 5:] = 0
    scores = model(ids, attention_mask=(ids != 0).long()).logits
    alone = model(ids[1:2, :5]).logits
    torch.testing.assert_close(scores[1:2], alone, **CLOSE)
    target = torch.tensor([1.0, -1, 1, -1])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(ids, attention_mask=(ids != 0).long(), labels=target).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.3 * losses[0]


def test_what_a_classifier_never_runs_is_frozen():
    """Distributed training fails over a trainable parameter without a gradient."""
    model = compass_model(model_class=CompassForSequenceClassification, num_labels=1, pad_token_id=0, **FULL)
    model(token_ids(4, 8), labels=torch.ones(4)).loss.backward()
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    assert gradients(model).keys() == trainable


def test_a_classifier_is_saved_with_its_score(tmp_path):
    model = compass_model(model_class=CompassForSequenceClassification, num_labels=3, pad_token_id=0, **FULL).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ids = token_ids(2, 5)
    assert loaded(ids).logits.shape == (2, 3) and torch.equal(loaded(ids).logits, model(ids).logits)


# Precision


def test_bfloat16_is_near_float32():
    exact, ids = compass_model(initializer_range=0.05, **FULL), token_ids(2, 9)
    model = compass_model(initializer_range=0.05, **FULL).bfloat16()
    out = model(ids, labels=ids)
    assert out.logits.dtype is torch.bfloat16
    out.loss.backward()
    assert all(
        gradient.dtype is torch.bfloat16 and gradient.isfinite().all() for gradient in gradients(model).values()
    )
    assert out.loss.item() == pytest.approx(exact(ids, labels=ids).loss.item(), rel=0.02)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_trains_float32_weights(implementation):
    options = {"initializer_range": 0.05, "implementation": implementation, **FULL}
    model, ids = compass_model(**options), token_ids(2, 9)
    seen = set()
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    exact = model(ids, labels=ids).loss.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen.clear()
        out = model(ids, labels=ids, output_router_logits=True)
    out.loss.backward()
    assert seen == {torch.bfloat16}
    assert out.loss.item() == pytest.approx(exact, rel=0.02)
    assert all(layer.dtype is torch.float32 for layer in out.router_logits)
    assert all(gradient.dtype is torch.float32 for gradient in gradients(model).values())

"""The models with TRL, PEFT, the Trainer, torch.compile, accelerate's offload and flex attention."""

import pytest
import torch
from compass_helpers import assert_gradients_close, compass_model, gradients, token_ids
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl.trainer.utils import add_fused_lm_head

from moe_backbone import CompassForCausalLM

FULL = {"num_mtp_layers": 1, "num_shared_experts": 1, "router_bias_update_speed": 1e-3}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


# TRL


@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_head_of_trl_has_the_same_loss_and_gradients(masked):
    ids = token_ids(2, 9)
    labels = ids.clone()
    if masked:
        labels[:, :4] = -100
    options = {**FULL, "mtp_loss_coef": 0.0, "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    plain, fused = compass_model(**options), compass_model(**options)
    add_fused_lm_head(fused)
    expected, got = plain(ids, labels=labels), fused(ids, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(got.loss, expected.lm_loss)
    log_probs = expected.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(got.log_probs, log_probs.masked_fill(labels[:, 1:] == -100, 0.0), **CLOSE)
    expected.loss.backward()
    got.loss.backward()
    assert_gradients_close(gradients(plain), gradients(fused), **CLOSE)


def test_the_fused_head_of_trl_has_the_balancing_loss_of_one_layer():
    """TRL takes transformers' loss over all layers, which is ours where there is one layer."""
    model, ids = compass_model(num_hidden_layers=1, output_router_logits=True), token_ids(2, 9)
    expected = model(ids, labels=ids).aux_loss
    add_fused_lm_head(model)
    torch.testing.assert_close(model(ids, labels=ids, fused_lm_head=True).aux_loss, expected)


def test_the_fused_head_of_trl_leaves_generation_alone():
    model, prompt = compass_model(**FULL).eval(), token_ids(1, 5)
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    before = model.generate(prompt, **options)
    add_fused_lm_head(model)
    assert torch.equal(model.generate(prompt, **options), before)
    assert torch.equal(model.generate(prompt, use_mtp=True, **options), before)


# PEFT

TARGETS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "both": {
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
}


@pytest.mark.parametrize("targets", TARGETS)
def test_lora_trains_adapters_alone_and_merges_and_reloads(tmp_path, targets):
    base, ids = compass_model(**FULL), token_ids(2, 9)
    base.save_pretrained(tmp_path / "base")
    original = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=8, task_type="CAUSAL_LM", **TARGETS[targets]))
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=0.05)
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert gradients(model).keys() == trainable
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]

    model.eval()
    logits = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        assert (logits - fresh(ids).logits).abs().max() > 0.01  # the adapters do something
    reloaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(reloaded(input_ids=ids).logits, logits, **CLOSE)
    with model.disable_adapter():
        unadapted = AutoModelForCausalLM.from_pretrained(tmp_path / "base")(ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, unadapted, **CLOSE)
    merged = model.merge_and_unload()
    assert type(merged) is CompassForCausalLM and merged.state_dict().keys() == original.keys()
    torch.testing.assert_close(
        merged(ids).logits, logits, rtol=1e-3, atol=1e-3
    )  # sums of weights are rounded once more
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits, merged(ids).logits
    )
    changed = {name for name, value in merged.state_dict().items() if not value.equal(original[name])}
    kinds = {name.split(".")[3] for name in changed}
    assert kinds == {"attention": {"self_attn"}, "experts": {"mlp"}, "both": {"self_attn", "mlp"}}[targets]


def test_lora_on_experts_learns_under_autocast():
    model, ids = compass_model(**FULL), token_ids(2, 9)
    model = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **TARGETS["experts"]))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            model(input_ids=ids, labels=ids).loss.backward()
        results.append(gradients(model))
        model.zero_grad()
    assert results[0].keys() == results[1].keys()
    for name, exact in results[0].items():  # bfloat16 has 8 bits
        assert (results[1][name] - exact).norm() < 0.15 * exact.norm(), name


def test_an_adapted_model_drafts_and_loads_in_one_call(tmp_path):
    base, prompt = compass_model(**FULL), token_ids(1, 5)
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **TARGETS["attention"]))
    model.eval()
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    plain = model.generate(input_ids=prompt, **options)
    assert torch.equal(model.generate(input_ids=prompt, use_mtp=True, **options), plain)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(loaded.generate(input_ids=prompt, **options), plain)


# The Trainer


def arguments(folder, **changes):
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "max_steps": 5,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "lr_scheduler_type": "constant",
            "gradient_checkpointing": False,
            **changes,
        }
    )


def rows(count, length=10):
    ids = token_ids(count, length, seed=5)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.lengthy
@pytest.mark.parametrize("shard", [None, "1KB", "20KB"])
def test_the_trainer_trains_and_resumes(tmp_path, shard):
    """Also of files that split a layer's experts."""
    model = compass_model(**FULL)
    before = {name: value.clone() for name, value in model.named_parameters()}
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    trainer = Trainer(model=model, args=arguments(tmp_path, **options), train_dataset=rows(16))
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert not [name for name, value in model.named_parameters() if value.equal(before[name])]
    if shard is not None:
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
        (tmp_path / "checkpoint-3" / "model.safetensors").unlink()
        saved.save_pretrained(tmp_path / "checkpoint-3", max_shard_size=shard)
    again = Trainer(model=compass_model(**FULL), args=arguments(tmp_path, **options), train_dataset=rows(16))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, value in again.model.named_parameters():
        torch.testing.assert_close(value, model.get_parameter(name), msg=name, **CLOSE)


def test_metrics_are_computed_of_logits_alone(tmp_path):
    model, seen = compass_model(**FULL, output_router_logits=True), []
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path),
        eval_dataset=rows(8),
        compute_metrics=lambda prediction: seen.append(prediction.predictions) or {},
    )
    trainer.evaluate()
    assert seen[0].shape == (8, 10, 61)


def test_gradient_accumulation_is_a_larger_batch(tmp_path):
    """The routers' losses are means over a micro-batch, so that of balance is left out."""
    weights = []
    for batch, steps in ((4, 1), (1, 4)):
        model = compass_model(router_aux_loss_coef=0.0, **FULL)
        changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "optim": "sgd"}
        trainer = Trainer(model=model, args=arguments(tmp_path, max_steps=2, **changes), train_dataset=rows(8))
        trainer.train()
        weights.append(({name: value.detach() for name, value in model.named_parameters()}, losses(trainer)))
    assert_gradients_close(weights[0][0], weights[1][0], rtol=1e-4, atol=1e-5)
    assert weights[0][1] == pytest.approx(weights[1][1], rel=1e-4)


# torch.compile


@pytest.mark.lengthy
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "memcpy"])
def test_it_compiles_as_one_graph(implementation):
    """In evaluation, and in training with every loss; the backend runs the traced graph as it is."""
    torch._dynamo.reset()
    ids = token_ids(2, 9)
    model = compass_model(implementation=implementation, **FULL)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    model.eval()
    with torch.no_grad():
        expected, got = model(ids, use_cache=False), compiled(ids, use_cache=False)
    torch.testing.assert_close(got.logits, expected.logits, **CLOSE)
    model.train()
    got = compiled(ids, labels=ids, use_cache=False)
    got.loss.backward()
    compiled_gradients = gradients(model)
    model.zero_grad()
    expected = model(ids, labels=ids, use_cache=False)
    expected.loss.backward()
    for name in ("loss", "lm_loss", "mtp_loss", "aux_loss", "z_loss"):
        torch.testing.assert_close(got[name], expected[name], **CLOSE)
    assert torch.equal(got.expert_load, expected.expert_load)
    assert_gradients_close(compiled_gradients, gradients(model), **CLOSE)


# Devices


def test_a_device_map_of_one_device(tmp_path):
    model, ids = compass_model(**FULL).eval(), token_ids(2, 9)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.model.layers[2].eh_proj.weight.requires_grad


def test_layers_offloaded_to_disk(tmp_path):
    model, ids = compass_model(**FULL).eval(), token_ids(2, 9)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "offload")
    )
    assert loaded.model.layers[1].mlp.experts.gate_up_proj.is_meta
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, **CLOSE)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(loaded(ids).logits, model(ids).logits)
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    assert torch.equal(loaded.generate(ids[:1], **options), model.generate(ids[:1], **options))


# Flex attention


@pytest.mark.lengthy
def test_flex_attention_agrees_where_it_runs():
    """On CPUs it has no backward, hence evaluation alone, and its kernel takes half a minute to compile."""
    ids = token_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]]).expand(2, -1)
    sdpa, flex = (compass_model(attention=name, **FULL).eval() for name in ("sdpa", "flex_attention"))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for case in ({}, {"attention_mask": mask}, {"position_ids": positions}):
            expected, got = sdpa(ids, use_cache=False, **case).logits, flex(ids, use_cache=False, **case).logits
            seen = mask == 1 if "attention_mask" in case else torch.ones_like(mask) == 1
            torch.testing.assert_close(got[seen], expected[seen], **CLOSE)

"""The hidden states of any layer, as transformers numbers them, and training with their weights."""

from typing import Any

import pytest
import torch
from helpers import make_pairs, options
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlavaForConditionalGeneration,
)

from otpo import OTPOTrainer, PairBatch
from otpo.explain import explain_rows
from otpo.layouts.compiled import compile_layers
from otpo.training.hidden_states import (
    captured_states,
    check_hidden_layer,
    entered_layer,
    evaluating,
    layer_number,
)

FOLDERS = ("model_folder", "moe_folder", "compass_folder")


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("name", FOLDERS)
def test_every_layer_is_the_one_of_its_number(name, request):
    model = load(request.getfixturevalue(name)).eval()
    ids = torch.randint(5, 200, (3, 11))
    with torch.no_grad():
        want = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    assert len(want) == model.config.num_hidden_layers + 1
    for layer in range(-len(want), len(want)):
        check_hidden_layer(model, layer)
        with captured_states(model, layer) as captured:
            model(ids, use_cache=False)
        assert len(captured) == 1 and not captured[0].requires_grad
        torch.testing.assert_close(captured[0], want[layer], rtol=0, atol=0)


def test_vision_language_models_have_the_text_models(vision_folder):
    model = LlavaForConditionalGeneration.from_pretrained(vision_folder).eval()
    ids = torch.randint(5, 200, (2, 7))
    want = model(input_ids=ids, output_hidden_states=True).hidden_states
    with captured_states(model, 1) as captured:
        model(input_ids=ids)
    torch.testing.assert_close(captured[0], want[1].detach(), rtol=0, atol=0)


class Recording(OTPOTrainer):
    """Remembers what its weights were made of, and what the whole model has there."""

    def token_weights(self, batch: PairBatch):
        model: Any = self.accelerator.unwrap_model(self.model)
        with torch.no_grad():
            asked = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
            states = model(**asked, output_hidden_states=True, use_cache=False).hidden_states[self.args.hidden_layer]
        self.seen = batch.hidden_states, states[:, :-1][:, -batch.mask.size(1) :], batch.inputs["input_ids"]
        assert batch.token_ids.equal(batch.inputs["input_ids"][:, 1:])
        return super().token_weights(batch)


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["", "checkpointed", "reentrant"])
@pytest.mark.parametrize("adapter", [None, "lora", "prompt"])
def test_training_takes_them(model_folder, tmp_path, adapter, reentrant):
    model = load(model_folder)
    if adapter == "lora":
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(model, lora)
    elif adapter == "prompt":
        if reentrant is not None:
            pytest.skip("prompt tuning and checkpointing are not combined here")
        model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    checkpointing = {} if reentrant is None else {"use_reentrant": reentrant}
    args = options(
        tmp_path,
        hidden_layer=1,
        ot_reg=0.05,
        max_steps=2,
        gradient_checkpointing=reentrant is not None,
        gradient_checkpointing_kwargs=checkpointing,
    )
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    trainer = Recording(model, args=args, train_dataset=make_pairs(8), processing_class=tokenizer)
    trainer.train()
    got, want, _ = trainer.seen
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.lengthy
def test_layers_give_other_weights_and_other_models(model_folder, tmp_path):
    losses = {}
    for layer in (-1, 0, 1, 2):
        args = options(tmp_path / str(layer), hidden_layer=layer, ot_reg=0.02, max_steps=3)
        trainer = OTPOTrainer(
            load(model_folder),
            args=args,
            train_dataset=make_pairs(8),
            processing_class=AutoTokenizer.from_pretrained(model_folder),
        )
        trainer.train()
        losses[layer] = trainer.state.log_history[-2]["loss"]
    assert losses[-1] == losses[2]  # of two layers
    assert len(set(losses.values())) == 3


@pytest.mark.lengthy
def test_compiled_models_hand_out_each_steps_own(model_folder, tmp_path):
    torch._dynamo.reset()
    losses = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        args = options(tmp_path, hidden_layer=1, ot_reg=0.05, max_steps=2, pad_to_multiple_of=64, **compiled)
        trainer = OTPOTrainer(model_folder, args=args, train_dataset=make_pairs())
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    torch._dynamo.reset()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)


def test_explanations_follow(model_folder, tmp_path):
    """The plan is of the same states, so its marginals are the weights; the line under the page names the layer."""
    args = options(tmp_path, hidden_layer=0, ot_reg=0.05)
    trainer = OTPOTrainer(model_folder, args=args, train_dataset=make_pairs(4))
    pair = explain_rows(trainer, [1])[0]
    assert pair.plan_gives_weights
    assert pair.weighting.endswith(", hidden_layer 0")


def test_what_a_model_has_not_is_refused(model_folder, tmp_path):
    for layer in (3, -4):
        with pytest.raises(
            ValueError, match=rf"`hidden_layer` must be a whole number within \[-3, 2\] .* 2 layers, .* got {layer}"
        ):
            OTPOTrainer(load(model_folder), args=options(tmp_path, hidden_layer=layer), train_dataset=make_pairs(4))
    other = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1))
    check_hidden_layer(other, -1)
    with pytest.raises(ValueError, match=r"`hidden_layer=0` needs a model .* GPT2LMHeadModel has none\. Set"):
        check_hidden_layer(other, 0)


def test_evaluating_gives_each_module_its_mode_back(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder).train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before


def test_a_share_of_the_depth_is_a_layer(model_folder, tmp_path):
    """Within the model; compiled layers leave out the one that it enters."""
    assert [layer_number(0.8, count) for count in (1, 2, 12, 30)] == [1, 1, 10, 24]
    assert [layer_number(share, 12) for share in (0.01, 0.99)] == [1, 11]  # neither the embeddings nor the last
    assert [layer_number(layer, 30) for layer in (0, 1, 24.0, -1, -31)] == [0, 1, 24, 30, 0]
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    layers = model.model.layers
    assert entered_layer(model, 0.3) is layers[1] and entered_layer(model, 0) is layers[0]
    assert entered_layer(model, -1) is None and entered_layer(model, 2) is None
    compile_layers(model, but=entered_layer(model, 0.3), backend="eager")
    assert layers[0]._compiled_call_impl is not None and layers[1]._compiled_call_impl is None
    for layer in (1.5, 0.5 - 3, 2.25, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a share of its depth between 0 and 1"):
            check_hidden_layer(model, layer)

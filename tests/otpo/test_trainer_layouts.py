"""Rows without padding give what padded rows give: losses, every gradient, weights and metrics."""

import copy
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import (
    LOSS_TYPES,
    assert_same_parameters,
    collate,
    history,
    lora,
    make_pairs,
    make_trainer,
    options,
    random_batch,
    train_and_evaluate,
    with_images,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from weighting_helpers import with_weights

from otpo import OTPOTrainer
from otpo.weighting import WEIGHTINGS

LAYOUTS = ["packed", "shared_prompt"]
CLOCK_AND_SOLVER = ("/ms", "residual", "iterations")


def step(trainer: OTPOTrainer, inputs: Any) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    """The loss of a batch in training, its gradients by parameter, and the numbers that it logs."""
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    grads = {name: each.grad.double() for name, each in trainer.model.named_parameters() if each.grad is not None}
    trainer.log({})
    logged = {name: value for name, value in trainer.state.log_history[-1].items() if isinstance(value, float)}
    return loss.item(), grads, {name: logged[name] for name in logged if not name.endswith(CLOCK_AND_SOLVER)}


def compare(make: Any, layout: str, rows: list[int] | None = None, tolerance: float = 1e-5) -> None:
    """Compares a batch in a layout with the padded one: loss, gradients by name, and all that is logged."""
    found = []
    for name in ("padded", layout):
        torch.manual_seed(0)
        trainer = make(name)
        inputs = trainer.collate([trainer.train_dataset[row] for row in rows or range(len(trainer.train_dataset))])
        found.append(step(trainer, inputs))
        assert trainer.layout.name == name
    (loss, grads, logged), (other_loss, other_grads, other_logged) = found
    assert other_loss == pytest.approx(loss, rel=tolerance, abs=1e-6)
    assert grads.keys() == other_grads.keys() and grads
    scale = max(float(value.abs().max()) for value in grads.values())
    for name, value in grads.items():
        assert torch.allclose(other_grads[name], value, rtol=1e-4, atol=tolerance * scale), name
    assert logged.keys() == other_logged.keys() and "weights/ess" in logged
    for name, value in logged.items():
        assert other_logged[name] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), name


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_loss_type(layout, loss_type, model_folder, other_model_folder, tmp_path):
    def make(name: str) -> OTPOTrainer:
        changes = {"loss_type": [loss_type], "row_layout": name, **LOSS_TYPES[loss_type]}
        return make_trainer(model_folder, tmp_path, make_pairs(6), ref_model=other_model_folder, **changes)

    compare(make, layout)


@pytest.mark.parametrize("weighting", [*WEIGHTINGS, "otpo*diff", "confpo*columns"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_weighting(layout, weighting, model_folder, other_model_folder, tmp_path):
    changes: dict[str, Any] = {"weighting": weighting, "ot_reg": 0.1, "ld_alpha": 0.3 if weighting == "ld" else None}

    def make(name: str) -> OTPOTrainer:
        pairs = with_weights(make_pairs(6))
        return make_trainer(model_folder, tmp_path, pairs, ref_model=other_model_folder, row_layout=name, **changes)

    compare(make, layout)


OPTIONS: dict[str, dict[str, Any]] = {
    "ld_alpha": {"ld_alpha": 0.4, "weighting": "uniform"},
    "wpo": {"use_weighting": True},
    "several losses": {"loss_type": ["sigmoid", "ipo", "sft"], "loss_weights": [0.5, 0.3, 0.2]},
    "an earlier layer": {"hidden_layer": 1},
    "the embeddings": {"hidden_layer": 0},
    "keeps the start": {"max_length": 20, "drop_identical_pairs": True, "truncation_mode": "keep_start"},
    "keeps the end": {"max_length": 9, "truncation_mode": "keep_end"},
    "precomputed": {"precompute_ref_log_probs": True},
    "checkpointing": {"gradient_checkpointing": True},
    "eager attention": {"model_init_kwargs": {"attn_implementation": "eager"}},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_options(layout, name, model_folder, other_model_folder, tmp_path):
    def make(rows: str) -> OTPOTrainer:
        changes = {"ref_model": other_model_folder, "row_layout": rows, **OPTIONS[name]}
        return make_trainer(model_folder, tmp_path, make_pairs(6), **changes)

    compare(make, layout)


@pytest.mark.parametrize("trained_on", [False, True], ids=["new adapter", "an adapter trained on"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters(layout, trained_on, model_folder, tmp_path):
    def make(name: str) -> OTPOTrainer:
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        adapter = lora(init_lora_weights=False)
        arguments = {"peft_config": adapter}
        if trained_on:
            model, arguments = get_peft_model(model, adapter), {}
        return OTPOTrainer(model, args=options(tmp_path, row_layout=name), train_dataset=make_pairs(6), **arguments)

    compare(make, layout)


@pytest.mark.parametrize("folder", ["moe_folder", "compass_folder"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_routers_losses_count_each_token_once(layout, folder, request, tmp_path):
    """Equal to padded rows, whose routers' loss leaves padding out, and to transformers' function of real tokens."""
    folder = request.getfixturevalue(folder)
    changes = {"model_init_kwargs": {"output_router_logits": True}, "row_layout": layout}
    compare(lambda name: make_trainer(folder, tmp_path, make_pairs(6), **{**changes, "row_layout": name}), layout)

    trainer = make_trainer(folder, tmp_path, make_pairs(6), **changes)
    assert trainer.aux_loss_enabled
    inputs = collate(trainer, list(range(6)))
    tokens_seen = []
    router = next(module for name, module in trainer.model.named_modules() if name.endswith("layers.0.mlp"))
    router.register_forward_hook(lambda _module, args, _output: tokens_seen.append(args[0].flatten(0, 1).size(0)))
    with torch.no_grad():
        scored = trainer.score_batch(trainer.model, inputs, reference=False)
    # Each real token of each row once, alone, without padding.
    logits: list[list[torch.Tensor]] = []
    for row, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        with torch.no_grad():
            of_row = trainer.model.base_model(input_ids=row[mask][None], use_cache=False, output_router_logits=True)
        logits.append(list(of_row.router_logits))
    joined = tuple(torch.cat(layer) for layer in zip(*logits, strict=True))
    config = trainer.model.config
    plain = load_balancing_loss_func(joined, config.num_experts, config.num_experts_per_tok)
    torch.testing.assert_close(scored.outputs.aux_loss, plain, rtol=1e-5, atol=0)
    # No more tokens reach the experts than there are.
    assert max(tokens_seen[:2]) <= int(inputs["attention_mask"].sum())


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_lengths(data, model_folder, tmp_path):
    """One-token prompts and answers, no shared prompt, answers that begin alike, one that ends within the other."""
    pairs = data.draw(st.integers(1, 3))
    lengths = [data.draw(st.lists(st.integers(1, 8), min_size=pairs, max_size=pairs)) for _ in range(3)]
    begins = data.draw(st.booleans())
    batch = random_batch(*lengths, seed=data.draw(st.integers(0, 9)), vocab=data.draw(st.sampled_from([6, 300])))
    if data.draw(st.booleans()):  # the prompt of one side is another one's
        batch["input_ids"][pairs:, 0] = 7
    rows = random_batch(*lengths, vocab=300, answers_begin_alike=begins)
    for inputs in (batch, rows):
        found = []
        for name in ("padded", *LAYOUTS):
            trainer = make_trainer(model_folder, tmp_path, make_pairs(2), row_layout=name, weighting="budget")
            found.append(step(trainer, inputs))
        for loss, grads, _ in found[1:]:
            assert loss == pytest.approx(found[0][0], rel=1e-5)
            # Answers may be the same, whose gradients cancel: then rounding is that of each alone.
            scale = max(float(value.abs().max()) for value in grads.values())
            for key, value in found[0][1].items():
                assert torch.allclose(grads[key], value, rtol=1e-4, atol=1e-5 * max(scale, 0.1)), key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_accumulation_evaluation_and_resuming(layout, model_folder, tmp_path):
    """1, 2 and 4 micro-batches a step are one trajectory; a run that is resumed goes on as if it had not stopped."""
    runs = []
    for count, name in [(1, "padded"), (1, layout), (2, layout), (4, layout)]:
        sizes = {"per_device_train_batch_size": 4 // count, "gradient_accumulation_steps": count}
        changes = {**sizes, "row_layout": name, "learning_rate": 1e-3, "optim": "sgd", "weighting": "uniform"}
        args = options(tmp_path / f"{count}{name}", **changes)
        runs.append(
            train_and_evaluate(
                OTPOTrainer(model_folder, args=args, train_dataset=make_pairs(), eval_dataset=make_pairs(7, 3))
            )
        )
    expected, *others = runs
    for run in others:
        assert run.losses == pytest.approx(expected.losses, rel=1e-4)
        assert run.evaluation["eval_loss"] == pytest.approx(expected.evaluation["eval_loss"], rel=1e-4)
        margins = [each.evaluation["eval_rewards/margins"] for each in (run, expected)]
        assert margins[0] == pytest.approx(margins[1], rel=1e-3)

    changes = {"row_layout": layout, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(model_folder, tmp_path / "whole", make_pairs(), **changes)
    whole.train()
    again = make_trainer(model_folder, tmp_path / "whole", make_pairs(), **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_parameters(dict(again.model.named_parameters()), dict(whole.model.named_parameters()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_streams(layout, model_folder, tmp_path):
    """Batches that one process reads for the others come without plans, which are made when the batch is there."""
    stored = make_trainer(model_folder, tmp_path, make_pairs(), row_layout=layout)
    assert "row_plan" not in next(iter(stored.get_eval_dataloader(stored.train_dataset.to_iterable_dataset())))
    sent = {"accelerator_config": {"dispatch_batches": True}}
    sent = make_trainer(model_folder, tmp_path, make_pairs(), row_layout=layout, **sent)
    assert "row_plan" not in next(iter(sent.get_train_dataloader()))
    streamed = make_trainer(model_folder, tmp_path, make_pairs().to_iterable_dataset(), row_layout=layout)
    for trainer in (stored, streamed):
        trainer.args.dataloader_num_workers = 0
        trainer.train()
    assert len(history(streamed, "loss")) == 4
    for trainer in (stored, streamed):
        assert "row_plan" in next(iter(trainer.get_train_dataloader()))


@pytest.mark.lengthy
def test_compiled_models(model_folder, tmp_path):
    """`torch_compile` has wrapped the reference before the layout is chosen, and wraps the policy afterwards."""
    torch._dynamo.reset()  # hooks of earlier trainers are not in its graphs
    losses = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        changes = {"row_layout": "shared_prompt", "max_steps": 2, **compiled}
        trainer = make_trainer(model_folder, tmp_path, make_pairs(4), **changes)
        trainer.train()
        losses.append([loss for (loss,) in history(trainer, "loss")])
    torch._dynamo.reset()
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_copy_of_a_model_is_asked_itself(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, make_pairs(4), row_layout="packed")
    copied = copy.deepcopy(trainer.model)
    ids = torch.arange(5, 13)[None]
    asked = {"input_ids": ids, "labels": ids, "fused_lm_head": True}
    with torch.no_grad():
        expected = copied(**asked).log_probs
        for parameter in trainer.model.parameters():
            parameter.zero_()
        torch.testing.assert_close(copied(**asked).log_probs, expected, rtol=0, atol=0)


def test_on_the_cpu_rows_are_padded_unless_asked(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, make_pairs(4))
    assert trainer.layout.name == "padded"
    assert "a mask would cost more than padding" in trainer.layout.describe()


def test_trls_padding_free_is_packed(model_folder, tmp_path):
    assert options(tmp_path, padding_free=True).row_layout == "packed"
    assert options(tmp_path, padding_free=True, row_layout="shared_prompt").row_layout == "shared_prompt"
    assert make_trainer(model_folder, tmp_path, make_pairs(4), padding_free=True).layout.name == "packed"


def test_what_can_not_be_packed_is_refused_by_name(model_folder, vision_folder, tmp_path):
    with pytest.raises(ValueError, match=r"`row_layout='packed'` is not possible with .*prepends tokens.*'auto'"):
        OTPOTrainer(
            model_folder,
            args=options(tmp_path, row_layout="packed"),
            train_dataset=make_pairs(4),
            peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        )
    with pytest.raises(ValueError, match="not possible with images in the data"):
        make_trainer(vision_folder, tmp_path, with_images(make_pairs(4)), row_layout="packed", max_length=None)
    with pytest.raises(ValueError, match=r"`row_layout` must be one of auto, padded, packed, shared_prompt, got 'x'"):
        options(tmp_path, row_layout="x")
    window = {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention"] * 2}
    model = AutoModelForCausalLM.from_pretrained(model_folder, **window)
    with pytest.raises(ValueError, match="a sliding window of 64 tokens"):
        make_trainer(model, tmp_path, make_pairs(4), row_layout="shared_prompt")
    assert make_trainer(model, tmp_path, make_pairs(4), row_layout="shared_prompt", max_length=64).layout.shares


def test_a_model_that_ignores_masks_is_found_out(tokenizer, tmp_path):
    """Bloom's positions are distances within a row, made of its attention mask: no list of ours names it."""
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)
    model = BloomForCausalLM(config)
    trainer = OTPOTrainer(
        model,
        args=options(tmp_path, row_layout="packed"),
        train_dataset=make_pairs(4),
        processing_class=tokenizer,
        ref_model=BloomForCausalLM(config),
    )
    with pytest.raises(
        ValueError, match=r"`row_layout='packed'` is not possible with BloomForCausalLM, (which|whose)"
    ):
        trainer.train()


def test_a_batch_with_more_than_tokens_is_not_packed(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, make_pairs(4), row_layout="packed")
    inputs = {**collate(trainer, [0, 1]), "token_type_ids": torch.zeros(1)}
    with pytest.raises(ValueError, match="the batch's token_type_ids"):
        trainer.compute_loss(trainer.model, inputs)


def test_a_model_that_fails_without_a_word_is_named(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, make_pairs(4), row_layout="packed")

    def fail(_module: Any, _args: Any, kwargs: Any) -> None:
        if "position_ids" in kwargs:
            raise NotImplementedError

    trainer.model.base_model.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM, which fails on it: NotImplementedError"):
        trainer.train()


def test_a_batch_that_is_changed_is_planned_anew(model_folder, tmp_path):
    """A subclass may change a batch after its loader has planned it."""

    class Shorter(OTPOTrainer):
        def score_batch(self, model: Any, inputs: Any, **arguments: Any) -> Any:
            if self.state.global_step % 2:
                inputs["completion_mask"][:, -3:] = 0  # in place
            else:
                inputs = {**inputs, "input_ids": inputs["input_ids"].clamp(max=40)}
            return super().score_batch(model, inputs, **arguments)

    losses = []
    for layout in ("padded", "shared_prompt"):
        changes = {"row_layout": layout, "weighting": "uniform", "loss_type": ["sft"]}
        trainer = Shorter(model_folder, args=options(tmp_path, **changes), train_dataset=make_pairs())
        trainer.train()
        losses.append([loss for (loss,) in history(trainer, "loss")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_answers_that_differ_in_their_prompts(model_folder, tmp_path):
    """Prompts whose tokens differ before the two answers share what they begin with alone."""
    rows = {"prompt_ids": [[5, 6, 7, 8]] * 2, "chosen_ids": [[9, 10], [11]], "rejected_ids": [[12], [11, 13]]}
    compare(
        lambda name: make_trainer(model_folder, tmp_path, Dataset.from_dict(rows), row_layout=name), "shared_prompt"
    )

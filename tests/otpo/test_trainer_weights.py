"""`OTPOTrainer` with weights that are not one, against the loss written out in float64 from the models' logits."""

import copy
import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset, load_from_disk
from helpers import (
    assert_same_parameters,
    collate,
    hashed_weights,
    history,
    make_pairs,
    moved,
    option_dict,
    options,
    parameters,
    train_and_evaluate,
    with_images,
)
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from otpo import OTPOConfig, OTPOTrainer, PairBatch, TokenWeights
from otpo.transport.solve import transport_weights

SGD = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}
LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def load(folder: str, **changes: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **changes)


def uneven_pairs() -> Dataset:
    """Plain texts of odd lengths; some completions are nothing but the end-of-sequence token."""
    return Dataset.from_dict(
        {
            "prompt": ["the red shirt costs", "a box", "today", "and", "ships from Jakarta to Manila", "x", "in the"],
            "chosen": [" twenty dollars", "", " it ships", " a small blue box and ten", "", " y", " small red box"],
            "rejected": ["", " ten dollars today", " no", " cotton", " a", " z z z z z z z z z", " blue box"],
        }
    )


# The loss, written out


class Written:
    """The loss of a batch, in plain torch and float64.

    `weigh` maps a `PairBatch` of float64 tensors to weights.
    """

    def __init__(self, policy: Any, reference: Any, weigh: Callable[[PairBatch], Tensor], **settings: Any) -> None:
        self.policy, self.reference, self.weigh = policy.double(), reference.double(), weigh
        self.beta: float = settings.pop("beta", 0.1)
        self.loss_types: list[str] = settings.pop("loss_type", ["sigmoid"])
        self.coefficients: list[float] = settings.pop("loss_weights", [1.0] * len(self.loss_types))
        self.wpo: bool = settings.pop("use_weighting", False)
        self.forward_kl: bool = settings.pop("f_divergence_type", "reverse_kl") == "forward_kl"
        assert not settings, settings

    def score(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        seen = {name: value for name, value in batch.items() if name != "completion_mask"}
        seen = {name: value.double() if value.is_floating_point() else value for name, value in seen.items()}
        outputs = model(**seen, output_hidden_states=True, use_cache=False)
        logps = outputs.logits[:, :-1].log_softmax(2)
        scored = logps.gather(2, batch["input_ids"][:, 1:].unsqueeze(2)).squeeze(2)
        return scored, outputs.hidden_states[-1][:, :-1], logps.mul(2).exp().sum(2).log()

    def __call__(self, batch: dict[str, Tensor], step: int = 0) -> Tensor:
        mask = batch["completion_mask"][:, 1:].bool()
        logps, states, log_sum_sq = self.score(self.policy, batch)
        with torch.no_grad():
            ref_logps = self.score(self.reference, batch)[0]
            self.seen = PairBatch(mask, batch["input_ids"][:, 1:], logps.detach() * mask, states.detach(), step)
            weights = self.weigh(self.seen) * mask
        self.weights = weights
        self.log_ratios = (logps - ref_logps).detach() * mask
        chosen, rejected = ((logps - ref_logps) * weights).sum(1).chunk(2)
        if self.forward_kl:
            chosen, rejected = 1 - (-chosen).exp(), 1 - (-rejected).exp()
        chosen_mass, rejected_mass = weights.sum(1).chunk(2)
        chosen_logps, chosen_mask = logps.chunk(2)[0], mask.chunk(2)[0]
        factor = torch.ones(len(chosen), dtype=torch.float64)
        if self.wpo:
            likely = (((logps - log_sum_sq) * mask).sum(1) / mask.sum(1)).detach().exp()
            factor = likely.chunk(2)[0] * likely.chunk(2)[1]
        margin, beta = chosen - rejected, self.beta
        normalised = chosen / chosen_mass - rejected / rejected_mass
        terms = {
            "sigmoid": lambda: -logsigmoid(beta * margin),
            "hinge": lambda: (1 - beta * margin).relu(),
            "ipo": lambda: (normalised - 1 / (2 * beta)).square(),
            "sigmoid_norm": lambda: -logsigmoid(beta * normalised),
            "bco_pair": lambda: -logsigmoid(beta * chosen) - logsigmoid(-beta * rejected),
            "apo_zero": lambda: 1 - (beta * chosen).sigmoid() + (beta * rejected).sigmoid(),
            "sft": lambda: -chosen_logps[chosen_mask].mean().expand(len(chosen)),
        }
        return sum(
            coefficient * (terms[name]() * factor).mean()
            for name, coefficient in zip(self.loss_types, self.coefficients, strict=True)
        )


def written_otpo(reg: float, reg_m: float = 0.2, **kind: Any) -> Callable[[PairBatch], Tensor]:
    def weigh(batch: PairBatch) -> Tensor:
        solved = transport_weights(*batch.hidden_states.chunk(2), *batch.mask.chunk(2), reg=reg, reg_m=reg_m, **kind)
        return torch.cat([solved.chosen, solved.rejected])

    return weigh


def written_budget(batch: PairBatch) -> Tensor:
    counts = batch.mask.sum(1).tolist()
    pairs = len(counts) // 2
    rows = [min(count, counts[(row + pairs) % len(counts)]) / count for row, count in enumerate(counts)]
    return torch.tensor(rows, dtype=torch.float64).unsqueeze(1).expand(batch.mask.shape)


# Each weighting: the trainer's options, its argument `weighting`, and the same written out.
WEIGHTS: dict[str, tuple[dict[str, Any], Any, Callable[[PairBatch], Tensor]]] = {
    "otpo": ({"ot_reg": 0.05}, None, written_otpo(0.05)),
    "otpo-pairwise": (
        {"ot_reg": 0.1, "ot_reg_m": 1.0, "ot_cost_scale": "pairwise"},
        None,
        written_otpo(0.1, 1.0, cost_scale="pairwise"),
    ),
    "otpo-cosine": ({"ot_reg": 0.02, "ot_cost": "cosine"}, None, written_otpo(0.02, cost="cosine")),
    "hashed": ({}, hashed_weights, hashed_weights),
    "budget": ({"weighting": "budget"}, None, written_budget),
}
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "beta": {"beta": 0.5},
    "hinge": {"loss_type": ["hinge"]},
    "ipo": {"loss_type": ["ipo"]},
    "sigmoid_norm": {"loss_type": ["sigmoid_norm"]},
    "apo_zero": {"loss_type": ["apo_zero"]},
    "sft": {"loss_type": ["sft"]},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "sft-ipo-sigmoid": {"loss_type": ["sft", "ipo", "sigmoid"], "loss_weights": [0.5, 0.3, 2.0]},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "wpo": {"use_weighting": True},
    "wpo-ipo": {"use_weighting": True, "loss_type": ["ipo"]},
}
PAIRINGS = [(loss, name) for loss in LOSSES for name in ("otpo", "hashed")]
PAIRINGS += [("sigmoid", name) for name in ("otpo-pairwise", "otpo-cosine", "budget")] + [("ipo", "budget")]


@pytest.mark.parametrize(("loss", "weights"), PAIRINGS, ids=[f"{loss}-{weights}" for loss, weights in PAIRINGS])
def test_loss_and_every_gradient(loss, weights, model_folder, other_model_folder, tmp_path):
    settings, argument, weigh = WEIGHTS[weights]
    trainer = OTPOTrainer(
        model_folder,
        load(other_model_folder),
        options(tmp_path, **settings, **LOSSES[loss]),
        train_dataset=uneven_pairs(),
        weighting=argument,
    )
    batch = collate(trainer, list(range(7)))
    got = trainer.compute_loss(trainer.model, batch)
    got.backward()

    written = Written(load(model_folder), load(other_model_folder), weigh, **LOSSES[loss])
    want = written(batch)
    want.backward()

    # The trainer works in float32 on sums of up to twenty log-probabilities near -5.
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    gradients = {name: value.grad for name, value in trainer.model.named_parameters()}
    for name, value in written.policy.named_parameters():
        scale = value.grad.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(gradients[name].double(), value.grad, rtol=1e-3, atol=1e-4 * scale, msg=name)


@pytest.mark.parametrize("weights", ["otpo", "hashed", "budget"])
def test_first_steps_of_a_training(weights, model_folder, other_model_folder, tmp_path):
    """Three steps of plain gradient descent on the whole dataset, whose order then does not matter."""
    settings, argument, weigh = WEIGHTS[weights]
    trainer = OTPOTrainer(
        model_folder,
        load(other_model_folder),
        options(tmp_path, **SGD, **settings, per_device_train_batch_size=7, max_steps=3),
        train_dataset=uneven_pairs(),
        weighting=argument,
    )
    batch = collate(trainer, list(range(7)))
    run = train_and_evaluate(trainer)

    written = Written(load(model_folder), load(other_model_folder), weigh)
    descent = torch.optim.SGD(written.policy.parameters(), lr=SGD["learning_rate"])
    losses = []
    for step in range(3):
        loss = written(batch, step)
        descent.zero_grad()
        loss.backward()
        descent.step()
        losses.append(loss.item())
    assert losses[0] > losses[2] + 0.01
    torch.testing.assert_close(run.losses, losses, rtol=1e-4, atol=1e-5)
    for name, value in written.policy.named_parameters():
        torch.testing.assert_close(run.after[name].double(), value.detach(), rtol=1e-4, atol=1e-5, msg=name)


def test_lora_loss_and_every_gradient(model_folder, other_model_folder, tmp_path):
    torch.manual_seed(2)
    policy = get_peft_model(load(model_folder), LoraConfig(**LORA, init_lora_weights=False))
    written = Written(copy.deepcopy(policy), load(other_model_folder), written_otpo(0.05))
    trainer = OTPOTrainer(
        policy, load(other_model_folder), options(tmp_path, ot_reg=0.05), train_dataset=uneven_pairs()
    )
    batch = collate(trainer, [0, 3, 6])
    got, want = trainer.compute_loss(trainer.model, batch), written(batch)
    got.backward()
    want.backward()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    theirs = {name: value.grad for name, value in written.policy.named_parameters() if value.grad is not None}
    ours = {name: value.grad for name, value in trainer.model.named_parameters() if value.grad is not None}
    assert ours.keys() == theirs.keys() and all("lora" in name for name in ours)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name].double(), value, rtol=1e-3, atol=1e-4 * value.abs().max().item())


def test_vision_loss_and_every_gradient(vision_folder, tmp_path):
    """Images lengthen the prompt and the collator pads it: states, tokens and weights must still line up."""

    def load_vision(seed: int) -> Any:
        model = LlavaForConditionalGeneration.from_pretrained(vision_folder, dtype=torch.float32)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn(value.shape, generator=noise), alpha=0.05)
        return model

    trainer = OTPOTrainer(
        load_vision(1),
        load_vision(2),
        options(tmp_path, ot_reg=0.05, max_length=None),
        train_dataset=with_images(make_pairs()),
    )
    batch = dict(trainer.data_collator([trainer.train_dataset[row] for row in range(5)]))
    got = trainer.compute_loss(trainer.model, batch)
    got.backward()
    written = Written(load_vision(1), load_vision(2), written_otpo(0.05))
    want = written(batch)
    want.backward()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    gradients = {name: value.grad for name, value in trainer.model.named_parameters()}
    expected = {name: value.grad for name, value in written.policy.named_parameters() if value.grad is not None}
    largest = max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():  # the keys' biases have none but rounding, hence one scale for all
        torch.testing.assert_close(gradients[name].double(), value, rtol=1e-3, atol=1e-5 * largest, msg=name)
    assert any(value.abs().max() > 1e-3 * largest for name, value in expected.items() if "vision_tower" in name)


def test_sft_does_not_see_the_weights(model_folder, tmp_path):
    runs = []
    for trainer_class, config_class, extra in (
        (DPOTrainer, DPOConfig, {}),
        (OTPOTrainer, OTPOConfig, {"weighting": hashed_weights}),
    ):
        args = config_class(**option_dict(tmp_path, loss_type=["sft"]))
        runs.append(train_and_evaluate(trainer_class(model_folder, args=args, train_dataset=make_pairs(), **extra)))
    assert runs[0].losses == runs[1].losses
    assert_same_parameters(runs[0].after, runs[1].after)


# Where weights come from


class Doubling(OTPOTrainer):
    def token_weights(self, batch: PairBatch) -> Tensor:
        return torch.full(batch.mask.shape, 2.0)


def double(batch: PairBatch) -> TokenWeights:
    return TokenWeights(torch.full(batch.mask.shape, 2.0), {"weights/two": 2.0})


@pytest.mark.parametrize(
    ("trainer_class", "weighting"),
    [(Doubling, None), (OTPOTrainer, double), (OTPOTrainer, lambda batch: batch.mask * 2)],
    ids=["subclass", "callable", "integers"],
)
def test_weights_of_two_are_twice_the_beta(trainer_class, weighting, model_folder, tmp_path):
    """Bitwise: a factor of two only moves exponents."""
    got = train_and_evaluate(
        trainer_class(model_folder, args=options(tmp_path), train_dataset=make_pairs(), weighting=weighting)
    )
    args = DPOConfig(**option_dict(tmp_path, beta=0.2))
    want = train_and_evaluate(DPOTrainer(model_folder, args=args, train_dataset=make_pairs()))
    assert got.losses == want.losses
    assert_same_parameters(got.after, want.after)
    names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    assert history(got.trainer, *names) == history(want.trainer, *names)
    if weighting is double:
        assert history(got.trainer, "weights/two") == [(2.0,)] * 4


def test_no_gradient_goes_through_the_weights(model_folder, other_model_folder, tmp_path):
    scale = torch.nn.Parameter(torch.ones(32))
    seen: list[PairBatch] = []

    @torch.enable_grad()
    def learned(batch: PairBatch) -> Tensor:
        seen.append(batch)
        return (batch.hidden_states * scale).sum(2).sigmoid() + batch.logps.exp()

    def frozen(batch: PairBatch) -> Tensor:
        return learned(batch).detach()

    gradients = []
    for weighting in (learned, frozen):
        trainer = OTPOTrainer(
            model_folder,
            load(other_model_folder),
            options(tmp_path),
            train_dataset=make_pairs(),
            weighting=weighting,
        )
        trainer.compute_loss(trainer.model, collate(trainer, [0, 1, 2])).backward()
        gradients.append({name: value.grad for name, value in trainer.model.named_parameters()})
    assert scale.grad is None
    assert not seen[0].hidden_states.requires_grad and not seen[0].logps.requires_grad
    assert_same_parameters(*gradients)


@pytest.mark.parametrize(
    "weighting",
    [
        lambda batch: torch.ones(len(batch.mask)),
        lambda batch: torch.ones(len(batch.mask), 1),
        lambda batch: torch.ones(batch.mask.size(0) // 2, batch.mask.size(1)),
        lambda batch: torch.ones(()),
        lambda batch: torch.ones(*batch.mask.shape, 1),
    ],
    ids=["one_a_row", "broadcastable", "half_the_rows", "scalar", "three_dimensions"],
)
def test_weights_of_another_shape_are_refused(weighting, model_folder, tmp_path):
    trainer = OTPOTrainer(model_folder, args=options(tmp_path), train_dataset=make_pairs(), weighting=weighting)
    with pytest.raises(ValueError, match=r"weights of shape .* the batch's mask has \(8, "):
        trainer.train()


def test_weights_outside_the_mask_are_ignored(model_folder, tmp_path):
    """As `TokenWeights` promises. `1 / (batch.positions + 1)` is a user's first idea, and infinite in the prompt."""

    def inverse(batch: PairBatch) -> Tensor:
        return torch.where(batch.mask, hashed_weights(batch), torch.tensor([math.nan]))

    runs = [
        train_and_evaluate(
            OTPOTrainer(model_folder, args=options(tmp_path), train_dataset=make_pairs(), weighting=weighting)
        )
        for weighting in (hashed_weights, inverse)
    ]
    assert runs[0].log == runs[1].log
    assert_same_parameters(runs[0].after, runs[1].after)


def test_a_batch_says_what_the_model_said(model_folder, tmp_path):
    """The states predict the tokens: the head's log-softmax of them is the batch's log-probabilities."""
    batches: list[PairBatch] = []
    trainer = OTPOTrainer(
        model_folder,
        args=options(tmp_path),
        train_dataset=uneven_pairs(),
        weighting=lambda batch: batches.append(batch) or batch.mask.float(),
    )
    inputs = collate(trainer, list(range(7)))
    trainer.compute_loss(trainer.model, inputs)
    (batch,) = batches
    _check_alignment(trainer.model, batch)
    assert torch.equal(batch.mask, inputs["completion_mask"][:, 1:].bool())
    assert torch.equal(batch.token_ids, inputs["input_ids"][:, 1:])
    assert batch.logps[~batch.mask].eq(0).all()
    assert batch.step == 0


def _check_alignment(model: Any, batch: PairBatch) -> None:
    with torch.no_grad():
        logps = model.get_output_embeddings()(batch.hidden_states.float()).log_softmax(2)
    logps = logps.gather(2, batch.token_ids.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(batch.logps[batch.mask], logps[batch.mask], rtol=1e-5, atol=1e-5)


def test_prompt_tuning(model_folder, tmp_path):
    """Virtual tokens stand before the real ones; masks, tokens, states and log-probabilities must still line up."""
    batches: list[PairBatch] = []

    class Looking(OTPOTrainer):
        def token_weights(self, batch: PairBatch) -> Tensor | TokenWeights:
            batches.append(batch)
            return super().token_weights(batch)

    trainer = Looking(
        model_folder,
        args=options(tmp_path, ot_reg=0.05),
        train_dataset=make_pairs(),
        eval_dataset=make_pairs(4, seed=3),
        peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    )
    run = train_and_evaluate(trainer)
    assert moved(run) == ["prompt_encoder.default.embedding.weight"]
    assert all(math.isfinite(loss) for loss in run.losses)
    assert 0 < run.evaluation["eval_weights/ess"] < 1
    for batch in batches:
        assert batch.hidden_states.shape[:2] == batch.mask.shape == batch.logps.shape
        _check_alignment(trainer.model.get_base_model(), batch)


# A precomputed reference


@pytest.mark.parametrize(
    ("settings", "weighting", "adapter"),
    [
        ({"ot_reg": 0.05}, None, False),
        ({}, hashed_weights, False),
        ({"weighting": "sampo"}, None, False),
        ({"weighting": "ld", "ld_alpha": 0.3}, None, False),
        ({"loss_type": ["ipo", "sigmoid", "sft"]}, hashed_weights, False),
        ({"max_length": 24}, hashed_weights, False),
        ({"precompute_ref_batch_size": 3}, hashed_weights, False),
        ({"ot_reg": 0.05}, None, True),
    ],
    ids=["otpo", "hashed", "sampo", "ld", "three_losses", "truncated", "other_batch_size", "lora"],
)
def test_precomputed_is_online(settings, weighting, adapter, model_folder, tmp_path):
    """To float32 rounding alone: the reference's batches are padded otherwise."""
    runs = []
    for precompute in (False, True):
        extra = {"peft_config": LoraConfig(**LORA, init_lora_weights=False)} if adapter else {}
        trainer = OTPOTrainer(
            model_folder,
            args=options(tmp_path, **SGD, **{**settings, "precompute_ref_log_probs": precompute}),
            train_dataset=make_pairs(),
            eval_dataset=make_pairs(6, seed=3),
            weighting=weighting,
            **extra,
        )
        runs.append(train_and_evaluate(trainer))
    online, precomputed = runs
    assert moved(online)
    for name, value in online.after.items():
        torch.testing.assert_close(precomputed.after[name], value, rtol=0, atol=1e-6, msg=name)
    torch.testing.assert_close(precomputed.losses, online.losses, rtol=1e-5, atol=1e-6)
    for key, value in online.evaluation.items():
        if key != "eval_rewards/accuracies":
            assert precomputed.evaluation[key] == pytest.approx(value, rel=1e-4, abs=2e-5), key


@pytest.fixture
def stored_pairs(tmp_path):
    """A dataset in a folder of its own, so that no other test's cache files lie beside it."""
    make_pairs(seed=5).save_to_disk(str(tmp_path / "pairs"))
    return lambda: load_from_disk(str(tmp_path / "pairs"))


@pytest.fixture
def reference_passes(monkeypatch):
    """Counts the batches that TRL's reference pass is run on."""
    calls: list[int] = []
    original = DPOTrainer.compute_ref_log_probs

    def counted(self, model, inputs):
        calls.append(len(inputs["input_ids"]))
        return original(self, model, inputs)

    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", counted)
    return calls


PRECOMPUTE = {"precompute_ref_log_probs": True, "max_length": 30}


@pytest.mark.parametrize(
    ("change", "reused"),
    [
        ({}, True),
        ({"beta": 0.01}, True),
        ({"learning_rate": 1e-4}, True),
        ({"ot_reg": 0.02}, True),
        ({"weighting": "budget"}, True),
        ({"loss_type": ["ipo"]}, True),
        ({"ld_alpha": 0.5}, True),
        ({"seed": 99}, True),
        ({"per_device_train_batch_size": 2}, True),
        ({"max_length": 20}, False),
        ({"max_length": None}, False),
        ({"truncation_mode": "keep_end"}, False),
        ({"bf16": True}, False),
    ],
    ids=lambda value: ",".join(map(str, value.items())) or "nothing" if isinstance(value, dict) else None,
)
def test_cache_of_the_reference(change, reused, model_folder, tmp_path, stored_pairs, reference_passes):
    OTPOTrainer(model_folder, args=options(tmp_path, **PRECOMPUTE), train_dataset=stored_pairs())
    assert len(reference_passes) == 4
    reference_passes.clear()
    trainer = OTPOTrainer(
        model_folder, args=options(tmp_path, **{**PRECOMPUTE, **change}), train_dataset=stored_pairs()
    )
    assert (len(reference_passes) == 0) == reused
    trainer.train()  # and what was read can be trained with


@pytest.mark.parametrize("what", ["weights", "tokens"])
def test_cache_follows_the_model_and_the_data(
    what, model_folder, other_model_folder, tmp_path, stored_pairs, reference_passes
):
    OTPOTrainer(model_folder, args=options(tmp_path, **PRECOMPUTE), train_dataset=stored_pairs())
    reference_passes.clear()
    folder = other_model_folder if what == "weights" else model_folder
    data = stored_pairs() if what == "weights" else stored_pairs().select([*range(15), 0])
    OTPOTrainer(folder, args=options(tmp_path, **PRECOMPUTE), train_dataset=data)
    assert len(reference_passes) == 4


@pytest.mark.parametrize("first", ["dpo", "otpo"])
def test_cache_is_not_shared_with_dpo(first, model_folder, tmp_path, stored_pairs, reference_passes):
    kinds = {"dpo": (DPOTrainer, DPOConfig), "otpo": (OTPOTrainer, OTPOConfig)}
    stored = {}
    for name in (first, "otpo" if first == "dpo" else "dpo"):
        trainer_class, config_class = kinds[name]
        reference_passes.clear()
        trainer = trainer_class(
            model_folder,
            args=config_class(**option_dict(tmp_path, **PRECOMPUTE)),
            train_dataset=stored_pairs(),
        )
        assert len(reference_passes) == 4, f"{name} read the other's cache"
        stored[name] = trainer.train_dataset["ref_chosen_logps"][:]
    sums = torch.tensor([sum(row) for row in stored["otpo"]])
    torch.testing.assert_close(sums, torch.tensor(stored["dpo"]), rtol=1e-5, atol=1e-4)


# What weights may and may not depend on


class Recording(OTPOTrainer):
    """Keeps each response's weights, by step and by its pair's tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: dict[tuple[Any, ...], Tensor] = {}
        super().__init__(*args, **kwargs)

    def token_weights(self, batch: PairBatch) -> Tensor | TokenWeights:
        answer = super().token_weights(batch)
        values = answer.values if isinstance(answer, TokenWeights) else answer
        tokens = [tuple(ids[mask].tolist()) for ids, mask in zip(batch.token_ids, batch.mask, strict=True)]
        pairs = len(tokens) // 2
        for row, (weights, mask) in enumerate(zip(values, batch.mask, strict=True)):
            other = tokens[(row + pairs) % (2 * pairs)]
            self.seen[batch.step, tokens[row], other] = weights[mask].clone()
        return answer


class LeftPadded(DataCollatorForPreference):
    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        for row, count in enumerate(batch["attention_mask"].sum(1).tolist()):
            for name in ("input_ids", "attention_mask", "completion_mask"):
                batch[name][row] = batch[name][row].roll(batch[name].size(1) - count)
        return batch


@pytest.mark.parametrize("weighting", ["otpo", "budget", "length", "sampo", "ld"])
def test_weights_do_not_depend_on_padding_or_company(weighting, model_folder, tmp_path, tokenizer):
    """Rotary positions are relative and padding is masked, so states differ by float32 rounding alone."""
    data = uneven_pairs()
    found = []
    for size, collator in (
        (7, None),
        (1, None),
        (3, DataCollatorForPreference(pad_token_id=0, pad_to_multiple_of=32)),
        (7, LeftPadded(pad_token_id=tokenizer.pad_token_id)),
    ):
        trainer = Recording(
            model_folder,
            args=options(tmp_path, weighting=weighting, ld_alpha=0.5, ot_reg=0.05, per_device_eval_batch_size=size),
            train_dataset=data,
            eval_dataset=data,
            data_collator=collator,
        )
        trainer.evaluate()
        found.append(trainer.seen)
    assert len(found[0]) == 14
    assert len({tuple(value.tolist()) for value in found[0].values()}) > 5
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for key, value in found[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5)


def test_sampo_draws_by_seed_and_step(model_folder, tmp_path):
    def draws(**changes: Any) -> dict[tuple[Any, ...], Tensor]:
        settings = {"weighting": "sampo", "per_device_train_batch_size": 16, "seed": 1, **changes}
        trainer = Recording(model_folder, args=options(tmp_path, **settings), train_dataset=make_pairs())
        trainer.train()
        return trainer.seen

    def by_step(found: dict[tuple[Any, ...], Tensor]) -> list[dict[tuple[Any, ...], list[float]]]:
        return [
            {key[1:]: value.tolist() for key, value in found.items() if key[0] == step}
            for step in sorted({key[0] for key in found})
        ]

    one = by_step(draws())
    assert len(one) == 4 and all(len(step) == 32 for step in one)
    assert one[0] != one[1] and one[1] != one[2]
    assert one == by_step(draws())
    assert one[0] != by_step(draws(seed=2))[0]
    # One step of four micro-batches draws what one of a single micro-batch does.
    accumulated = by_step(draws(per_device_train_batch_size=4, gradient_accumulation_steps=4))
    assert accumulated == one


def test_sampo_draws_once_for_policy_and_reference(model_folder, other_model_folder, tmp_path):
    """The loss of one draw: what the draw leaves out of the policy, it leaves out of the reference."""
    trainer = Recording(
        model_folder,
        load(other_model_folder),
        options(tmp_path, weighting="sampo"),
        train_dataset=make_pairs(),
    )
    batch = collate(trainer, list(range(8)))
    loss = trainer.compute_loss(trainer.model, batch).item()
    chosen, rejected = (list(trainer.seen.values())[part] for part in (slice(8), slice(8, 16)))
    values = torch.zeros(16, batch["input_ids"].size(1) - 1, dtype=torch.float64)
    values[batch["completion_mask"][:, 1:].bool()] = torch.cat([*chosen, *rejected]).double()
    assert set(values.unique().tolist()) == {0.0, 1.0}
    written = Written(load(model_folder), load(other_model_folder), lambda _: values)
    assert loss == pytest.approx(written(batch).item(), rel=1e-5)


@pytest.mark.parametrize("weighting", ["otpo", "budget", "sampo"])
def test_gradient_accumulation_is_a_larger_batch(weighting, model_folder, tmp_path):
    runs = []
    for size, steps in ((8, 1), (2, 4)):
        args = options(
            tmp_path,
            **SGD,
            weighting=weighting,
            ot_reg=0.05,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        runs.append(train_and_evaluate(OTPOTrainer(model_folder, args=args, train_dataset=make_pairs())))
    assert moved(runs[0])
    torch.testing.assert_close(runs[1].losses, runs[0].losses, rtol=1e-5, atol=1e-6)
    for name, value in runs[0].after.items():
        torch.testing.assert_close(runs[1].after[name], value, rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    ("settings", "weighting"),
    [
        ({"ot_reg": 0.05}, None),
        ({"weighting": "sampo"}, None),
        ({"ot_reg": 0.05, "precompute_ref_log_probs": True}, None),
        ({}, hashed_weights),
    ],
    ids=["otpo", "sampo", "otpo-precomputed", "callable"],
)
def test_resuming_repeats_the_trajectory(settings, weighting, model_folder, tmp_path):
    """Bitwise: six steps at once, or the last three from the checkpoint after the third."""

    def make() -> OTPOTrainer:
        args = options(tmp_path, **settings, max_steps=6, save_strategy="steps", save_steps=3)
        return OTPOTrainer(model_folder, args=args, train_dataset=make_pairs(), weighting=weighting)

    straight = train_and_evaluate(make())
    resumed = train_and_evaluate(make(), resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_parameters(resumed.after, straight.after)
    keys = ("step", "loss", "grad_norm", "weights/ess", "rewards/margins_unweighted")
    assert history(resumed.trainer, *keys) == history(straight.trainer, *keys)
    assert len(history(resumed.trainer, *keys)) == 6


# The log


WEIGHT_NAMES = {"weights/entropy", "weights/ess", "weights/max"}
TRANSPORT_NAMES = {"transport/residual", "transport/iterations", "transport/ms"}
REWARD_NAMES = {f"rewards/{name}_unweighted" for name in ("chosen", "rejected", "margins", "accuracies")}


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [("otpo", WEIGHT_NAMES | TRANSPORT_NAMES | REWARD_NAMES), ("budget", WEIGHT_NAMES | REWARD_NAMES)],
)
def test_names_in_the_log(weighting, expected, model_folder, tmp_path):
    trainer = OTPOTrainer(
        model_folder,
        args=options(tmp_path, weighting=weighting),
        train_dataset=make_pairs(),
        eval_dataset=make_pairs(6, seed=3),
    )
    trainer.train()
    evaluated = trainer.evaluate()
    own = ("weights/", "transport/", "unweighted")
    logged = trainer.state.log_history[0]
    assert {name for name in logged if any(part in name for part in own)} == expected
    assert {name for name in evaluated if any(part in name for part in own)} == {f"eval_{n}" for n in expected}
    assert all(math.isfinite(value) for value in evaluated.values())
    if weighting == "otpo":
        assert logged["transport/ms"] > 0
        assert 0 <= logged["transport/residual"] <= 1e-6
        assert logged["transport/iterations"] >= 1


def test_values_in_the_log(model_folder, other_model_folder, tmp_path):
    """By hand, over all pairs of batches of 4 and 2."""
    beta = 0.3
    trainer = OTPOTrainer(
        model_folder,
        load(other_model_folder),
        options(tmp_path, beta=beta),
        train_dataset=make_pairs(),
        eval_dataset=make_pairs(6, seed=3),
        weighting=lambda batch: TokenWeights(hashed_weights(batch), {"mine/size": len(batch.mask)}),
    )
    got = trainer.evaluate()

    written = Written(load(model_folder), load(other_model_folder), hashed_weights, beta=beta)
    sums: dict[str, float] = {}
    for rows in ([0, 1, 2, 3], [4, 5]):
        loss = written(collate(trainer, rows, "eval")).item()
        found = {"loss": loss, "mine/size": 2.0 * len(rows)}
        entropy, ess, largest = [], [], []
        for weights, mask in zip(written.weights, written.seen.mask, strict=True):
            values = weights[mask].tolist()
            shares = [value / sum(values) for value in values]
            entropy.append(-sum(share * math.log(share) for share in shares) / math.log(len(shares)))
            ess.append(sum(values) ** 2 / (len(values) * sum(value**2 for value in values)))
            largest.append(max(values) * len(values) / sum(values))
        for name, values in (("entropy", entropy), ("ess", ess), ("max", largest)):
            found[f"weights/{name}"] = sum(values) / len(values)
        for suffix, weights in (("_unweighted", torch.ones_like(written.weights)), ("", written.weights)):
            chosen, rejected = (beta * (written.log_ratios * weights).sum(1)).chunk(2)
            found[f"rewards/chosen{suffix}"] = chosen.mean().item()
            found[f"rewards/rejected{suffix}"] = rejected.mean().item()
            found[f"rewards/margins{suffix}"] = (chosen - rejected).mean().item()
            found[f"rewards/accuracies{suffix}"] = (chosen > rejected).double().mean().item()
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value * len(rows) / 6
    assert got["eval_rewards/margins"] != pytest.approx(got["eval_rewards/margins_unweighted"], rel=1e-2)
    for name, value in sums.items():
        assert got[f"eval_{name}"] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_times_of_training_and_evaluation_stay_apart(model_folder, tmp_path, monkeypatch):
    """Evaluation in the middle of a logging interval must not take the training's times with it."""
    counts: list[tuple[str, int]] = []
    original = DPOTrainer.log

    def counted(self, logs, start_time=None):
        mode = "train" if self.model.training else "eval"
        found = self._metrics[mode]
        if "weights/ess" in found:
            counts.append((mode, len(found["transport/ms"])))
        original(self, logs, start_time)

    monkeypatch.setattr(DPOTrainer, "log", counted)
    trainer = OTPOTrainer(
        model_folder,
        args=options(tmp_path, logging_steps=4, eval_strategy="steps", eval_steps=2),
        train_dataset=make_pairs(),
        eval_dataset=make_pairs(6, seed=3),
    )
    trainer.train()
    assert sorted(counts) == [("eval", 2), ("eval", 2), ("train", 4)]


def test_auxiliary_loss_of_experts(moe_folder, tmp_path):
    """It is logged, and added to the weighted loss once, however many loss types there are."""
    losses = {}
    for coefficient in (0.0, 0.5):
        trainer = OTPOTrainer(
            moe_folder,
            args=options(tmp_path, ot_reg=0.05, loss_type=["sigmoid", "ipo", "sft"], router_aux_loss_coef=coefficient),
            train_dataset=make_pairs(),
        )
        trainer.train()
        losses[coefficient] = trainer.state.log_history[0]
    auxiliary = losses[0.5]["aux_loss"]
    assert auxiliary > 0.1 and "aux_loss" not in losses[0.0]
    assert losses[0.5]["loss"] == pytest.approx(losses[0.0]["loss"] + 0.5 * auxiliary, rel=1e-5)
    assert losses[0.5]["num_tokens"] == losses[0.0]["num_tokens"]


# Precision and memory


@pytest.mark.parametrize("precision", [{"bf16": True}, {"fp16": True}], ids=["bf16", "fp16"])
def test_weights_are_solved_outside_autocast(precision, model_folder, tmp_path):
    seen: list[tuple[torch.dtype, torch.dtype, torch.dtype]] = []

    class Looking(OTPOTrainer):
        def token_weights(self, batch: PairBatch) -> Tensor | TokenWeights:
            product = torch.ones(2, 2) @ torch.ones(2, 2)
            answer = super().token_weights(batch)
            seen.append((batch.logps.dtype, answer.values.dtype, product.dtype))
            return answer

    trainer = Looking(model_folder, args=options(tmp_path, ot_reg=0.05, **precision), train_dataset=make_pairs())
    batch = collate(trainer, [0, 1, 2, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):  # of the caller's own, around the whole loss
        trainer.compute_loss(trainer.model, batch)
    run = train_and_evaluate(trainer)
    assert set(seen) == {(torch.float32,) * 3}
    assert len(run.losses) == 4 and all(math.isfinite(loss) for loss in run.losses)
    assert run.losses[-1] < run.losses[0]
    assert all(entry["transport/residual"] <= 1e-6 for entry in run.log if "loss" in entry)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_models(dtype, model_folder, tmp_path):
    trainer = OTPOTrainer(
        load(model_folder, dtype=dtype),
        args=options(tmp_path, **SGD, ot_reg=0.05),
        train_dataset=uneven_pairs(),
    )
    run = train_and_evaluate(trainer)
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-3)
    assert all(math.isfinite(loss) for loss in run.losses) and moved(run)


def count_states(rows: int, length: int, width: int) -> int:
    """Distinct storages of live tensors that are a layer's hidden states, or all but their last position."""
    gc.collect()
    storages = set()
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and thing.dim() == 3 and thing.size(0) == rows and thing.size(2) == width:  # noqa: SIM102
            if thing.size(1) in (length - 1, length):
                storages.add(thing.untyped_storage().data_ptr())
    return len(storages)


def test_one_layer_of_hidden_states_is_kept(model_folder, tmp_path):
    counts: list[int] = []
    sizes: list[tuple[int, int, int]] = []

    class Counting(OTPOTrainer):
        def token_weights(self, batch: PairBatch) -> Tensor | TokenWeights:
            rows, length, width = batch.hidden_states.shape
            sizes.append((rows, length + 1, width))
            counts.append(count_states(*sizes[-1]))
            return super().token_weights(batch)

    trainer = Counting(model_folder, args=options(tmp_path), train_dataset=make_pairs(), eval_dataset=make_pairs(4))
    trainer.evaluate()
    assert counts == [1]
    assert count_states(*sizes[-1]) == 0

    trainer.train()
    assert count_states(*sizes[-1]) == 0

    batch = collate(trainer, [0, 1, 2, 3])  # the count counts: two layers, the embeddings and the last norm
    with torch.no_grad():
        outputs = trainer.model(batch["input_ids"], output_hidden_states=True)
    assert count_states(8, batch["input_ids"].size(1), 32) == len(outputs.hidden_states) == 3


# What users do


def test_one_set_of_options_for_two_trainers(model_folder, tmp_path):
    args = options(tmp_path, ot_reg=0.05, max_length=40)
    before = copy.deepcopy(args)
    runs = [
        train_and_evaluate(OTPOTrainer(model_folder, args=used, train_dataset=make_pairs()))
        for used in (args, args, copy.deepcopy(args))
    ]
    assert args.to_dict() == before.to_dict()
    assert runs[0].losses == runs[1].losses == runs[2].losses


def test_options_survive_a_failing_dataset(model_folder, tmp_path):
    args = options(tmp_path, max_length=40)
    broken = make_pairs().map(lambda row: {"chosen": None})
    with pytest.raises(Exception):  # noqa: B017  whatever TRL says of it
        OTPOTrainer(model_folder, args=args, train_dataset=broken)
    assert args.max_length == 40


def test_evaluating_other_datasets(model_folder, tmp_path):
    trainer = OTPOTrainer(model_folder, args=options(tmp_path, ot_reg=0.05), train_dataset=make_pairs())
    trainer.train()
    other = make_pairs(5, seed=8)
    plain = trainer.evaluate(other)
    stream = trainer.evaluate(other.to_iterable_dataset())
    several = trainer.evaluate({"a": other, "b": make_pairs(3, seed=9)})
    for name in ("eval_loss", "eval_weights/ess", "eval_rewards/margins", "eval_rewards/margins_unweighted"):
        assert plain[name] == stream[name]
    assert several["eval_a_loss"] == plain["eval_loss"] != several["eval_b_loss"]
    assert trainer.dropped_pairs.keys() >= {"train", "eval", "a", "b"}
    with pytest.raises(ValueError, match=r"eval dataset lacks the column\(s\) \['chosen'\]"):
        trainer.evaluate(other.rename_column("chosen", "good"))


def test_evaluating_another_dataset_with_a_precomputed_reference(model_folder, other_model_folder, tmp_path):
    """Its completions may be longer than the training dataset's: the width of the stored rows follows."""
    results = []
    for precompute in (False, True):
        trainer = OTPOTrainer(
            model_folder,
            load(other_model_folder),
            options(tmp_path, ot_reg=0.05, precompute_ref_log_probs=precompute),
            train_dataset=uneven_pairs(),
        )
        results.append(trainer.evaluate(make_pairs(5, seed=8)))
        trainer.train()
    assert results[0]["eval_loss"] == pytest.approx(results[1]["eval_loss"], rel=1e-5)


def test_tokenized_datasets(model_folder, tmp_path):
    """A dataset that was tokenized before, as the docstring of `DPOTrainer.evaluate` promises, is taken as it is."""
    trainer = OTPOTrainer(model_folder, args=options(tmp_path), train_dataset=make_pairs())
    tokens = trainer.train_dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    want = train_and_evaluate(trainer)
    got = train_and_evaluate(OTPOTrainer(model_folder, args=options(tmp_path), train_dataset=tokens))
    assert got.losses == want.losses


def test_compute_metrics_gets_the_logits(model_folder, tmp_path):
    shapes = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {"largest": float(prediction.predictions.max())}

    trainer = OTPOTrainer(
        model_folder,
        args=options(tmp_path, loss_type=["sigmoid", "ipo"], ot_reg=0.05),
        train_dataset=make_pairs(),
        eval_dataset=make_pairs(4, seed=3),
        compute_metrics=compute_metrics,
    )
    metrics = trainer.evaluate()
    width = collate(trainer, [0, 1, 2, 3], "eval")["input_ids"].size(1)
    assert shapes == [(8, width, len(trainer.processing_class))]
    assert {"eval_largest", "eval_weights/ess", "eval_rewards/margins_unweighted"} <= metrics.keys()


def test_loaded_model_and_its_own_reference(model_folder, tmp_path):
    """A model object trains as its folder does."""
    runs = [
        train_and_evaluate(OTPOTrainer(model, args=options(tmp_path, ot_reg=0.05), train_dataset=make_pairs()))
        for model in (model_folder, load(model_folder, dtype=torch.float32))
    ]
    assert runs[0].losses == runs[1].losses
    assert_same_parameters(parameters(runs[0].trainer.model), parameters(runs[1].trainer.model))


def test_compiled_models(model_folder, tmp_path):
    """Compiled graphs must still hand out each step's own hidden states, of the policy and not of the reference."""
    torch._dynamo.reset()
    runs = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = OTPOTrainer(
            model_folder,
            args=options(tmp_path, ot_reg=0.05, max_steps=2, pad_to_multiple_of=64, **compiled),
            train_dataset=make_pairs(),
            eval_dataset=make_pairs(4, seed=3),
        )
        runs.append(train_and_evaluate(trainer))
    torch._dynamo.reset()
    torch.testing.assert_close(runs[1].losses, runs[0].losses, rtol=1e-5, atol=1e-6)
    assert runs[1].evaluation["eval_weights/ess"] == pytest.approx(runs[0].evaluation["eval_weights/ess"], rel=1e-4)

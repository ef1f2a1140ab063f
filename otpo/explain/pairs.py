"""What a trainer computes of a pair, token by token: weights, log-probabilities, rewards, the transport plan.

Shapes: M tokens of the chosen response, N tokens of the rejected one, T scored positions.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from otpo.data.preferences import PairRule
from otpo.data.prepared import free_name
from otpo.data.token_values import tokenizer_of
from otpo.training.hidden_states import evaluating, has_listed_layers
from otpo.training.metrics import pair_similarity, weight_metrics
from otpo.training.scoring import Scored, rewarded_loss_type
from otpo.transport.solve import solve_plan
from otpo.weighting import TokenWeights, ld
from otpo.weighting.registry import make_weighting, values_of

from .pieces import Piece, split_pieces

# Weights that are the plan's marginals differ from them by what the solvers differ, at most 1e-4 of a weight.
_SAME_SHARE = 1e-3


class ScoringTrainer(Protocol):
    """What of an [`otpo.OTPOTrainer`] is used here, all of it public."""

    accelerator: Any
    args: Any
    beta: Any
    eval_dataset: Any
    ld_alpha: Any
    loss_types: Any
    model_wrapped: Any
    prepared_datasets: Any
    processing_class: Any
    train_dataset: Any

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of rows, on the trainer's device."""
        ...

    def score_batch(self, model: Any, inputs: Any, *, reference: bool = True) -> Scored:
        """Scores and weights of a batch."""
        ...

    def describe_weighting(self) -> str:
        """The weighting and its options, in one line."""
        ...


@dataclass(frozen=True)
class ExplainedResponse:
    """A response of n tokens. All tensors are `(n,)` float64 on the CPU.

    Attributes:
        pieces: Its text, in pieces of one or more tokens.
        weights: Weight of each token, those that multiply the log-probabilities in the loss.
        logps: The policy's log-probabilities, in nats.
        reference_logps: The reference's; None when there is no reference.
        beta: The loss's, by which rewards are multiplied.
    """

    pieces: list[Piece]
    weights: Tensor
    logps: Tensor
    reference_logps: Tensor | None
    beta: float

    def contributions(self, *, weighted: bool) -> Tensor:
        """What each token adds to the response's reward: `beta * w * (log pi - log pi_ref)`, with `w = 1` for DPO.

        They sum to the trainer's `rewards/*` when `weighted`, and to its `rewards/*_unweighted` otherwise. Without a
        reference there is no reward: then these are the log-probabilities themselves, times `w` when `weighted`.
        """
        scores = self.logps if self.reference_logps is None else self.beta * (self.logps - self.reference_logps)
        return scores * self.weights if weighted else scores


@dataclass(frozen=True)
class ExplainedPair:
    """A pair of responses and what aligns them.

    Attributes:
        name: What the pair is called, such as `"row 3"`.
        prompt: The prompt as the model reads it.
        chosen: The chosen response, M tokens.
        rejected: The rejected response, N tokens.
        plan: `(M, N)` float64, see [`otpo.transport.solve.solve_plan`].
        plan_gives_weights: Whether the weights are the plan's marginals, up to a factor for each response.
        weighting: The weighting and its options, to be read.
        similarity: How alike the hidden states of both are, see [`otpo.training.metrics.pair_similarity`].
        beside: By name of other weightings, what they give the chosen and the rejected tokens, `(M,)` and `(N,)`.
    """

    name: str
    prompt: str
    chosen: ExplainedResponse
    rejected: ExplainedResponse
    plan: Tensor
    plan_gives_weights: bool
    weighting: str
    similarity: float = math.nan
    beside: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def has_reference(self) -> bool:
        """Whether the contributions are rewards rather than log-probabilities."""
        return self.chosen.reference_logps is not None

    def numbers(self) -> dict[str, float]:
        """The pair's `ess`, `entropy` and `max` of weights, its `similarity` (`otpo.training.metrics`), margins."""
        sides = (self.chosen, self.rejected)
        weights = torch.nn.utils.rnn.pad_sequence([side.weights for side in sides], batch_first=True)
        lengths = torch.tensor([len(side.weights) for side in sides])
        mask = torch.arange(weights.size(1)) < lengths[:, None]
        named = {name.split("/")[1]: float(value[0]) for name, value in weight_metrics(weights, mask).items()}
        for name, weighted in (("margin", True), ("margin_unweighted", False)):
            chosen, rejected = (float(side.contributions(weighted=weighted).sum()) for side in sides)
            named[name] = chosen - rejected
        return {**named, "similarity": self.similarity}

    def top_alignments(self, count: int = 10) -> list[tuple[int, int, float]]:
        """The largest entries of the plan, largest first: chosen token, rejected token, mass."""
        masses, places = self.plan.flatten().topk(min(count, self.plan.numel()))
        width = self.plan.size(1)
        return [
            (place // width, place % width, mass) for place, mass in zip(places.tolist(), masses.tolist(), strict=True)
        ]


def explain_rows(
    trainer: ScoringTrainer,
    rows: Sequence[int],
    *,
    split: str = "train",
    reference: bool = True,
    beside: Sequence[str] = (),
) -> list[ExplainedPair]:
    """Explains rows of a trainer's dataset with the trainer's own tokenization, weights and reference.

    Before, in or after training. Nothing of the trainer is changed, nor its metrics, nor the state of torch's, numpy's
    and Python's random generators. Where processes hold shards of the model, each has to call it, with the same rows;
    with a whole model in each, one alone can.

    Args:
        trainer: The trainer, whose model is the policy.
        rows: Numbers of rows in the dataset that the trainer was given, from 0.
        split: `"train"`, `"eval"`, or a name of an `eval_dataset` that is a dictionary; `"eval_train"` where that
            name is "train".
        reference: Whether the trainer's reference is asked; without it, pairs have log-probabilities alone.
        beside: Names of other weightings, with the options that the trainer was given and, for others, defaults of
            their own. Those that look at another layer have a pass of their own; of a model without a list of layers,
            all look at the trainer's.

    Raises:
        ValueError: There is no such split or row, or the trainer has dropped the row; the message says which. Or there
            is no such weighting, or it needs something that is not there.
        FloatingPointError: A hidden state or a log-probability is not finite.
    """
    examples = [find_row(trainer, row, split) for row in rows]
    return [
        _explain(trainer, example, f"row {row}", reference, beside)
        for row, example in zip(rows, examples, strict=True)
    ]


def find_row(trainer: ScoringTrainer, row: int, split: str = "train") -> dict[str, Any]:
    """A row of a trainer's prepared dataset by its number in the dataset that the trainer was given.

    Of a stream, it is the row that comes at that place when the stream is read from its start. Reading it here counts
    for nothing in `trainer.dropped_pairs`.

    Args:
        trainer: The trainer.
        row: Number of the row, from 0.
        split: See [`explain_rows`].

    Raises:
        ValueError: There is no such split or row, or the trainer has dropped the row.
    """
    splits = _splits(trainer)
    if split not in splits:
        raise ValueError(f"`split={split!r}`: the trainer has the dataset(s) {sorted(splits)}. Name one of them.")
    return trainer.prepared_datasets.row(splits[split], row, split)


def _splits(trainer: ScoringTrainer) -> dict[str, Any]:
    """A trainer's datasets by name. "train" is the training dataset, whatever evaluation datasets are called."""
    evaluation: Any = trainer.eval_dataset
    named = evaluation if isinstance(evaluation, dict) else {"eval": evaluation}
    found = {"train": trainer.train_dataset}
    for name, dataset in named.items():
        found[free_name(name, found)] = dataset
    return {name: dataset for name, dataset in found.items() if dataset is not None}


def _explain(
    trainer: ScoringTrainer, example: dict[str, Any], name: str, reference: bool, beside: Sequence[str]
) -> ExplainedPair:
    # What the loss would be made of.
    inputs = trainer.collate([example])
    scored = _look(trainer, inputs, reference)
    weights = scored.weights_for(rewarded_loss_type(trainer.loss_types))
    if trainer.ld_alpha is not None:  # TRL's own, beside a weighting
        weights = weights * ld(scored.batch, alpha=trainer.ld_alpha)

    # Each response's tokens, as text and as numbers.
    tokenizer = tokenizer_of(trainer.processing_class)
    sides = []
    for row, mask in enumerate(scored.mask):
        values = [_on_cpu(value[row][mask]) for value in (weights, scored.policy_logps, scored.reference_logps)]
        pieces = split_pieces(tokenizer, scored.batch.token_ids[row][mask].tolist())
        sides.append(ExplainedResponse(pieces, values[0], values[1], values[2] if reference else None, trainer.beta))

    # The transport between them, whether the weights are made of it or not.
    states = [scored.batch.hidden_states[row][mask] for row, mask in enumerate(scored.mask)]
    plan = _on_cpu(solve_plan(*states, options=trainer.args.transport_options()))
    agrees = _same_shares(sides[0].weights, plan.sum(1)) and _same_shares(sides[1].weights, plan.sum(0))
    prompt_mask = inputs["attention_mask"][0].bool() & ~inputs["completion_mask"][0].bool()
    prompt = split_pieces(tokenizer, inputs["input_ids"][0][prompt_mask].tolist())
    text = "".join(piece.text for piece in prompt)
    similarity = float(pair_similarity(scored.batch.hidden_states, scored.mask))
    others = {other: _weights_by(other, trainer, example, inputs, scored, reference) for other in beside}
    told = trainer.describe_weighting()
    return ExplainedPair(name, text, sides[0], sides[1], plan, agrees, told, similarity, others)


def _weights_by(
    weighting: str,
    trainer: ScoringTrainer,
    example: dict[str, Any],
    inputs: dict[str, Any],
    scored: Scored,
    reference: bool,
) -> tuple[Tensor, Tensor]:
    """What another weighting, with the options that the trainer was given, makes of the pair."""
    args = trainer.args.with_weighting(weighting)
    if args.hidden_layer != trainer.args.hidden_layer and has_listed_layers(
        trainer.accelerator.unwrap_model(trainer.model_wrapped)
    ):
        scored = _look(trainer, inputs, reference, args.hidden_layer)
    mask, rule = scored.mask, PairRule(args.max_length, args.truncation_mode, drop_identical=True)
    if "prompt_ids" not in example:  # as with images: what is scored, behind one token of a prompt
        ids = [row[own].tolist() for row, own in zip(scored.batch.token_ids, mask, strict=True)]
        example = {**example, "prompt_ids": [0], "chosen_ids": ids[0], "rejected_ids": ids[1]}
        rule = PairRule(None, args.truncation_mode, drop_identical=True)
    values: dict[str, Tensor] = {}
    for kind in values_of(weighting):
        values[kind.name] = torch.zeros(mask.shape, device=mask.device)
        made = kind.load()(example, rule, tokenizer_of(trainer.processing_class))
        for row, own in enumerate(made):
            values[kind.name][row][mask[row]] = torch.as_tensor(own, dtype=torch.float32, device=mask.device)
    with torch.no_grad(), _same_generators(mask.device):
        answer = make_weighting(args)(replace(scored.batch, token_values=values))
    weights = answer.values if isinstance(answer, TokenWeights) else answer
    return _on_cpu(weights[0][mask[0]]), _on_cpu(weights[1][mask[1]])


def _look(trainer: ScoringTrainer, inputs: dict[str, Any], reference: bool, layer: float | None = None) -> Scored:
    """The trainer's scores of a batch, without dropout, gradients, or a trace in the random generators.

    With a `layer`, the hidden states are of that one in place of the trainer's.
    """
    model: Any = trainer.model_wrapped
    if isinstance(model, DistributedDataParallel):  # whose own forward exchanges buffers with the other processes
        model = model.module
    device = trainer.accelerator.device
    with torch.no_grad(), evaluating(model), _same_generators(device), trainer.accelerator.autocast():
        own = trainer.args.hidden_layer
        trainer.args.hidden_layer = own if layer is None else layer
        try:
            return trainer.score_batch(model, inputs, reference=reference)
        finally:
            trainer.args.hidden_layer = own


@contextmanager
def _same_generators(device: torch.device) -> Iterator[None]:
    """Gives the random generators back as they were: a weighting may draw from them."""
    devices = [] if device.type == "cpu" else [device]
    numpys, pythons = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        try:
            yield
        finally:
            np.random.set_state(numpys)
            random.setstate(pythons)


def _on_cpu(values: Tensor) -> Tensor:
    return values.detach().cpu().double()


def _same_shares(weights: Tensor, marginal: Tensor) -> bool:
    mass = weights.sum()
    return bool(mass > 0) and torch.allclose(weights / mass, marginal / marginal.sum(), rtol=_SAME_SHARE, atol=1e-9)

"""Scores of the tokens of bundled pairs, by weightings and layers, and how well each finds the known spans.

Shapes: B pairs of a batch, N pairs in all, W tokens of the longest completion, D hidden size, K layers that are asked
for, S scores; rows are the chosen responses, then the rejected ones.
"""

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_backbone  # noqa: F401 - makes Compass known to transformers
from otpo import OTPOConfig, OTPOTrainer
from otpo.data.token_table import TOKEN_COLUMNS
from otpo.data.token_values import unmatched, unmatched_sides
from otpo.transport.solve import transport_weights
from otpo.weighting import PairBatch, confpo, d2po, ld, sampo, uniform
from otpo.weighting.methods import diff, product, within_budget
from otpo.weighting.optimal_transport import LEAST_DESTROYED, destroyed_mass

from .labels import TokenLabels, auroc, token_labels

SIDES = ("chosen", "rejected")
REGS = {"": 1.0, "-reg0.1": 0.1, "-reg0.02": 0.02}
COSTS: dict[str, dict[str, Any]] = {"": {}, "-pairwise": {"cost_scale": "pairwise"}, "-cosine": {"cost": "cosine"}}
TRANSPORT = {
    f"otpo{cost}{name}": {"reg": reg, **settings} for cost, settings in COSTS.items() for name, reg in REGS.items()
}
"""Settings of [`transport_weights`] by name."""
CONTRAST = {name.replace("otpo", "contrast"): name for name in TRANSPORT}
"""By name of `contrast` with the same settings, the name among [`TRANSPORT`]: the mass that this plan destroys."""
PRODUCTS = {"otpo*diff": "otpo", "contrast*diff": "contrast-cosine-reg0.1"}
"""By name of a product with `diff`, its other factor: `otpo` and `contrast` with their own defaults."""
LAYERED = (*TRANSPORT, *CONTRAST, *PRODUCTS)
"""Schemes that depend on the layer."""
FREE = {"uniform": uniform, "sampo": sampo, "ld": partial(ld, alpha=0.5), "d2po": d2po, "confpo": confpo}
"""Weightings that look at no hidden states. `budget` and `length` rank tokens as `uniform` does: not at all."""
BASELINES = ("surprisal", "reference_surprisal", "unmatched")
"""What needs no weighting: -log pi of the policy, that of the reference where there is one, and one where a diff finds
no such token in the other response. The weightings `surprisal` and `diff` rank tokens as the last two do, but that
`diff` takes one alignment for both responses, and this baseline one from either side."""
SCHEMES = (*LAYERED, *FREE, *BASELINES)


def family(scheme: str) -> str:
    """What a scheme's setting is chosen among: those of `otpo`, those of `contrast`; any other scheme is alone."""
    if scheme in TRANSPORT:
        return "otpo"
    return "contrast" if scheme in CONTRAST else scheme


class Column(NamedTuple):
    """What a score is: the name of its scheme, its layer (None where it has none), and which kind of score.

    Kinds: `"weight"`, `"baseline"`, or `"contribution"`, which is `w (log pi - log pi_ref)` for chosen responses and
    its negative for rejected ones: what is right should be raised and what is wrong lowered.
    """

    scheme: str
    layer: int | None
    score: str


@dataclass(frozen=True)
class Found:
    """How well S scores found the spans of N pairs.

    Attributes:
        columns: What the scores are.
        auroc: `(S, N, 2)`, chosen and rejected; NaN for responses whose span leaves nothing to find.
        kinds: What is wrong with the rejected answer, of each pair.
        last: Number of the last layer, L.
    """

    columns: list[Column]
    auroc: NDArray[np.float64]
    kinds: list[str]
    last: int


def resolve_layers(asked: Sequence[str], last: int) -> list[int]:
    """Numbers within 0 to `last` of the layers that `--layers` names: `all`, `last`, or numbers.

    Raises:
        ValueError: It names something else, or a layer that is not there.
    """
    if list(asked) == ["all"]:
        return list(range(last + 1))
    if list(asked) == ["last"]:
        return [last]
    wrong = [word for word in asked if not word.lstrip("-").isdigit() or not -last - 1 <= int(word) <= last]
    if wrong or not asked:
        raise ValueError(
            f"`--layers {' '.join(asked)}`: give 'all', 'last', or numbers within [{-last - 1}, {last}], which this "
            "model has."
        )
    return sorted({int(word) % (last + 1) for word in asked})


class Scorer:
    """A policy, and a reference or none, that score pairs as the trainer tokenizes them."""

    def __init__(
        self, rows: Dataset, model: str, reference: str | None, *, dtype: torch.dtype, use_cpu: bool = False
    ) -> None:
        tokenizer: Any = _loaded("model", AutoTokenizer, model)
        if tokenizer.chat_template is None:
            raise ValueError(
                f"`--model {model}` has no chat template, and the bundled pairs are conversations. Name a chat model, "
                "or put a `chat_template.jinja` into its folder."
            )
        policy = _loaded("model", AutoModelForCausalLM, model, dtype=dtype)
        # Without a reference none is asked, and a shallow copy spares a second model in memory.
        other = copy.copy(policy)
        if reference is not None:
            other = _loaded("reference", AutoModelForCausalLM, reference, dtype=dtype)
        sizes = [one.config.get_text_config().vocab_size for one in (policy, other)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"`--reference {reference}` has {sizes[1]} tokens in its vocabulary, `--model {model}` {sizes[0]}. "
                "Name the model that the policy was trained from."
            )
        self.has_reference = reference is not None
        with tempfile.TemporaryDirectory() as folder:
            args = OTPOConfig(
                folder,
                use_cpu=use_cpu,
                bf16=False,
                gradient_checkpointing=False,
                max_length=None,
                report_to="none",
                disable_tqdm=True,
            )
            args._n_gpu = min(1, args.n_gpu)
            pairs = rows.select_columns(["prompt", *SIDES])
            self.trainer = OTPOTrainer(policy, other, args, train_dataset=pairs, processing_class=tokenizer)
        self.trainer.model.eval()
        self.trainer.ref_model.eval()
        self.last: int = policy.config.get_text_config().num_hidden_layers
        prepared: Any = self.trainer.train_dataset
        self.tokens = list(zip(*(prepared[column][:] for column in TOKEN_COLUMNS[1:]), strict=True))
        self.labels: list[list[TokenLabels]] = []
        for row, ids in zip(rows, self.tokens, strict=True):
            pair: Any = row
            sides = [(pair[side][0]["content"], pair[f"{side}_spans"]) for side in SIDES]
            self.labels.append([token_labels(tokenizer, own, *side) for own, side in zip(ids, sides, strict=True)])
        self.kinds: list[str] = rows["kind"][:]

    def find(
        self, schemes: Sequence[str], layers: Sequence[int], batch: int = 16, console: Console | None = None
    ) -> Found:
        """Scores the pairs whose spans leave something to find, `batch` of like length at a time.

        `console` is where progress goes; None for nowhere.

        Raises:
            ValueError: There is no such pair.
            FloatingPointError: A score is not finite.
        """
        places = [place for place, sides in enumerate(self.labels) if any(labels.searchable for labels in sides)]
        if not places:
            raise ValueError(
                "Every answer of these pairs is right or wrong as a whole, as those of the kinds language and format "
                "are, so there is no span to find. Raise `--pairs`, or name other `--languages`."
            )
        places.sort(key=lambda place: max(map(len, self.tokens[place])))
        columns: list[Column] = []
        found = np.empty(0)
        steps = range(0, len(places), batch)
        for begin in track(steps, "batches of pairs", console=console, disable=console is None):
            chunk = places[begin : begin + batch]
            columns, scores = self._scores(chunk, schemes, layers)
            if not begin:
                found = np.full((len(columns), len(self.kinds), len(SIDES)), np.nan)
            found[:, chunk] = self._auroc(chunk, scores)
        return Found(columns, found, self.kinds, self.last)

    @torch.no_grad()
    def _scores(
        self, places: Sequence[int], schemes: Sequence[str], layers: Sequence[int]
    ) -> tuple[list[Column], NDArray[np.float64]]:
        """All scores of some pairs, `(S, 2B, W)`, of each response from its first token on."""
        pairs, states, reference_logps = self._forward(places, layers)
        if not PRODUCTS.keys().isdisjoint(schemes):
            pairs = replace(pairs, token_values={"unmatched": self._of_tokens(unmatched_sides, places, pairs)})
        weights: dict[Column, Tensor] = {}
        solved: dict[str, Tensor] = {}  # `otpo` and `contrast` of the same settings are of one plan
        for name in schemes:
            if name in LAYERED:
                factor = PRODUCTS.get(name, name)
                plan = CONTRAST.get(factor, factor)
                solved[plan] = solved[plan] if plan in solved else _transport(pairs, states, plan)
                layered = _contrast(pairs, solved[plan]) if factor in CONTRAST else solved[plan]
                layered = _times_diff(pairs, layered) if name in PRODUCTS else layered
                weights |= zip((Column(name, layer, "weight") for layer in layers), layered, strict=True)
            elif name in FREE:
                weights[Column(name, None, "weight")] = FREE[name](pairs)
        scores = dict(weights)
        if "surprisal" in schemes:
            scores[Column("surprisal", None, "baseline")] = -pairs.logps
        if "reference_surprisal" in schemes and reference_logps is not None:
            scores[Column("reference_surprisal", None, "baseline")] = -reference_logps
        if "unmatched" in schemes:
            scores[Column("unmatched", None, "baseline")] = self._of_tokens(_unmatched, places, pairs)
        if reference_logps is not None:
            gains = pairs.logps - reference_logps
            size = len(places)
            gains = torch.cat([gains[:size], -gains[size:]])
            scores |= {Column(c.scheme, c.layer, "contribution"): weight * gains for c, weight in weights.items()}
        stacked = torch.stack([score.double() for score in scores.values()])
        if not bool(stacked[:, pairs.mask].isfinite().all()):
            raise FloatingPointError("A hidden state or a log-probability is not finite. Try `--dtype float32`.")
        return list(scores), stacked.cpu().numpy()

    def _forward(self, places: Sequence[int], layers: Sequence[int]) -> tuple[PairBatch, Tensor, Tensor | None]:
        """What both models say of the completions: the batch, states `(K, 2B, W, D)`, reference log-probabilities."""
        trainer = self.trainer
        prepared: Any = trainer.train_dataset
        inputs = trainer.collate([prepared[place] for place in places])
        ids = inputs["input_ids"]
        completion = inputs["completion_mask"].bool()
        labels = ids.masked_fill(~completion, -100)
        asked = {"input_ids": ids, "attention_mask": inputs["attention_mask"], "labels": labels}
        kept: list[Any] = []
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        handle = model.base_model.register_forward_hook(
            lambda _module, _args, output: kept.append(output.hidden_states)
        )
        try:
            outputs = trainer.model(**asked, use_cache=False, fused_lm_head=True, output_hidden_states=True)
        finally:
            handle.remove()
        mask = completion[:, 1:]
        width = int(mask.sum(1).max())
        index = mask.byte().argsort(dim=1, descending=True, stable=True)[:, :width]
        pairs = PairBatch(
            mask.gather(1, index), ids[:, 1:].gather(1, index), outputs.log_probs.gather(1, index), ids.new_zeros(0)
        )
        wide = index.unsqueeze(2).expand(-1, -1, kept[0][0].size(2))
        states = torch.stack([kept[0][layer].gather(1, wide) for layer in layers])
        if not self.has_reference:
            return pairs, states, None
        reference = trainer.ref_model(**asked, use_cache=False, fused_lm_head=True)
        return pairs, states, reference.log_probs.gather(1, index)

    def _of_tokens(self, make: Callable[..., Any], places: Sequence[int], pairs: PairBatch) -> Tensor:
        """What is made of both responses' tokens, `(2B, W)`."""
        result = torch.zeros(pairs.mask.shape, dtype=torch.float64)
        for row, place in enumerate(places):
            for number, values in enumerate(make(*self.tokens[place])):
                result[number * len(places) + row, : len(values)] = torch.from_numpy(values)
        return result.to(pairs.mask.device)

    def _auroc(self, places: Sequence[int], scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """`(S, B, 2)`."""
        result = np.full((len(scores), len(places), len(SIDES)), np.nan)
        for row, place in enumerate(places):
            for number, labels in enumerate(self.labels[place]):
                if labels.searchable:
                    own = scores[:, number * len(places) + row, : len(labels.in_span)]
                    result[:, row, number] = auroc(own, labels.in_span)
        return result


def _unmatched(chosen: Sequence[int], rejected: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    return unmatched(chosen, rejected), unmatched(rejected, chosen)


def _transport(pairs: PairBatch, states: Tensor, name: str) -> Tensor:
    """Weights of all layers at once, `(K, 2B, W)`."""
    layers, rows, width, _ = states.shape
    chosen, rejected = (side.flatten(0, 1) for side in states.chunk(2, dim=1))
    masks = [side.repeat(layers, 1) for side in pairs.mask.chunk(2)]
    solved = transport_weights(chosen, rejected, *masks, **TRANSPORT[name])
    sides = [side.view(layers, rows // 2, width) for side in (solved.chosen, solved.rejected)]
    return torch.cat(sides, dim=1)


def _contrast(pairs: PairBatch, moved: Tensor) -> Tensor:
    """What the plans of all layers destroy, scaled to the budget, `(K, 2B, W)`."""
    return torch.stack([within_budget(destroyed_mass(layer, pairs) + LEAST_DESTROYED, pairs) for layer in moved])


def _times_diff(pairs: PairBatch, layered: Tensor) -> Tensor:
    """The product of all layers' weights with those of `diff`, scaled to the budget, `(K, 2B, W)`."""
    return torch.stack([product(pairs, factors=(lambda _: layer, diff)).values for layer in layered])  # noqa: B023


def _loaded(option: str, auto_class: Any, name: str, **kwargs: Any) -> Any:
    try:
        return auto_class.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`--{option} {name}` can't be loaded: {' '.join(str(error).split())[:200]} Name a folder that holds a "
            "model and its tokenizer, or a model of the Hub."
        ) from error

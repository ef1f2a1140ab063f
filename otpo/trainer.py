"""DPO with token weights: TRL's `DPOTrainer`, and only what differs from it.

`DPOTrainer._compute_loss` does nothing with its model but call it and read `log_probs`. So `OTPOTrainer` hands
it a stand-in that runs the real model, takes the last hidden states on the way, asks the weighting for weights
and returns weighted log-probabilities. Losses, divergences, adapters and metrics stay TRL's.

Shapes: B pairs, T scored positions (the padded length less one), D hidden size; rows are the chosen responses,
then the rejected ones.
"""

import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor
from trl import DPOTrainer
from trl.trainer.utils import get_config_model_id

from .config import OTPOConfig
from .data.validation import PairRule, drop_unusable_pairs, require_preference_columns
from .guards import require_finite_parameters, require_finite_step
from .metrics import reward_metrics, weight_metrics
from .reference import dataset_key, longest_completion
from .timing import DeviceTimer
from .token_rows import pack_rows, unpack_rows
from .weighting import WEIGHTINGS, PairBatch, TokenWeights, Weighting

# How a loss type takes the weights. Most sum weighted log-ratios. These two divide by the completion's length,
# so weights of mean one make that a division by the weights' mass. The likelihood term is no preference.
_LENGTH_NORMALISED = {"ipo", "sigmoid_norm"}
_UNWEIGHTED = {"sft"}


@dataclass
class _Scored:
    """What the models said of a micro-batch, before any weight."""

    outputs: Any
    policy_logps: Tensor
    reference_logps: Tensor
    weights: Tensor
    mask: Tensor

    def weights_for(self, loss_type: str) -> Tensor:
        if loss_type in _UNWEIGHTED:
            return torch.ones_like(self.weights)
        if loss_type in _LENGTH_NORMALISED:
            mass = (self.weights * self.mask).sum(1, keepdim=True)
            return self.weights * torch.where(mass > 0, self.mask.sum(1, keepdim=True) / mass, 0.0)
        return self.weights


class OTPOTrainer(DPOTrainer):
    """Direct preference optimisation whose tokens are weighted by optimal transport (arXiv 2505.18720).

    Takes the arguments of [`trl.DPOTrainer`], and everything that it can do: its loss types and divergences,
    adapters, a synchronised or precomputed reference, streaming, vision-language and Mixture-of-Experts models.
    The same detached weights multiply the log-probabilities of policy and reference:

        loss = -log sigmoid(beta * (sum_i w_c,i log(pi/pi_ref)_i - sum_j w_r,j log(pi/pi_ref)_j))

    Logged beside TRL's metrics, whose `rewards/*` are the weighted ones: `rewards/*_unweighted`,
    `weights/{entropy,ess,max}` (see `otpo.metrics`), `transport/residual`, `transport/iterations` and
    `transport/ms`. To change the weights, pass `weighting` or override [`token_weights`].

    Loss types: `ipo` and `sigmoid_norm`, which divide by the response's length in DPO, divide by the weights' mass
    here; `sft` and the WPO factor of `use_weighting` stay unweighted. With several loss types, `rewards/*` are
    those of the first that is weighted.

    Args:
        model: As in [`trl.DPOTrainer`], and so are all arguments that are not named here.
        ref_model: As in [`trl.DPOTrainer`].
        args: Options; the defaults of [`OTPOConfig`] when None.
        weighting: A weighting of `otpo.weighting` or your own callable, in place of `args.weighting`.
        **kwargs: The other arguments of [`trl.DPOTrainer`].

    Raises:
        ValueError: An option or a row of the data can't be trained with; the message names it.
        FloatingPointError: In training, a hidden state or a log-probability is not finite.
    """

    args: OTPOConfig
    model: Any
    ref_model: Any

    _tag_names = ["trl", "dpo", "otpo"]  # noqa: RUF012
    _name = "OTPO"
    _paper = {  # noqa: RUF012
        "title": "Optimal Transport-Based Token Weighting scheme for Enhanced Preference Optimization",
        "id": "2505.18720",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{li2025otpo,
                title     = {{Optimal Transport-Based Token Weighting scheme for Enhanced Preference Optimization}},
                author    = {Meng Li and Guangda Huzhang and Haibo Zhang and Xiting Wang and Anxiang Zeng},
                year      = 2025,
                booktitle = {Proceedings of the 63rd Annual Meeting of the Association for Computational Linguistics},
                pages     = {21311--21334},
            }"""),
    }

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: OTPOConfig | None = None,
        *,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        weighting: Weighting | str | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = OTPOConfig(f"{name.split('/')[-1]}-OTPO")
        if not isinstance(args, OTPOConfig):
            raise TypeError(f"`args` must be an `OTPOConfig`, got a `{type(args).__name__}`.")
        if isinstance(weighting, str):
            raise TypeError(f"Set `OTPOConfig(weighting={weighting!r})`: the argument `weighting` takes a callable.")
        if args.precompute_ref_log_probs and isinstance(train_dataset, IterableDataset):
            raise ValueError(
                "`precompute_ref_log_probs=True` needs a dataset that can be read before training, and "
                "`train_dataset` is a stream. Set `precompute_ref_log_probs=False`, or load it without streaming."
            )
        datasets = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
        for name, dataset in {"train": train_dataset, **datasets}.items():
            if dataset is not None:
                require_preference_columns(dataset, name)

        self.weighting = weighting or WEIGHTINGS[args.weighting](args)
        self.dropped_pairs: dict[str, Counter[str]] = {}
        self._timers = {"train": DeviceTimer(), "eval": DeviceTimer()}
        self._row_width = 0
        super().__init__(model, ref_model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        if weighting is None and args.weighting == "ld":
            self.ld_alpha = None  # the weights carry it

    def token_weights(self, batch: PairBatch) -> Tensor | TokenWeights:
        """Weights of the tokens of a batch of pairs; override this for a weighting that needs the trainer.

        Runs without gradients and outside autocast, once for each micro-batch.

        Args:
            batch: Mask, tokens, log-probabilities and hidden states of the micro-batch.

        Returns:
            Weights of the shape of `batch.mask`, alone or with numbers to log.
        """
        return self.weighting(batch)

    # The data, before training

    def _prepare_dataset(self, dataset, processing_class, args: OTPOConfig, dataset_name):
        require_preference_columns(dataset, dataset_name)
        # TRL drops pairs whose prompt fills `max_length` unseen; without the limit it drops none, and we count.
        with _swapped(args, max_length=None):
            dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        rule = PairRule(args.max_length, args.truncation_mode, args.drop_identical_pairs)
        dataset, self.dropped_pairs[dataset_name] = drop_unusable_pairs(dataset, rule, dataset_name)
        return dataset

    def _precompute_ref_logps(self, dataset, name, batch_size):
        # TRL stores whatever `compute_ref_log_probs` returns, under a key made of the model and the dataset's
        # fingerprint. Rows must not share a key with TRL's sums, nor with rows of another truncation.
        self._row_width = longest_completion(dataset, self.args.max_length)
        args = self.args
        key = dataset_key(dataset, args.max_length, args.truncation_mode, self.accelerator.mixed_precision)
        with (
            _swapped(dataset, _fingerprint=key),
            _swapped(self, compute_ref_log_probs=self._compute_ref_rows),
        ):
            return super()._precompute_ref_logps(dataset, name, batch_size)

    def _compute_ref_rows(self, model: Callable[..., Any], inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        mask = inputs["completion_mask"][:, 1:].bool()
        logps = self._reference_logps(model, inputs, mask)
        return pack_rows(logps, mask, self._row_width).chunk(2)

    # The loss

    def _compute_loss(self, model, inputs, return_outputs):
        inputs = dict(inputs)
        scored: _Scored | None = None

        def stand_in(**kwargs: Any) -> Any:
            nonlocal scored
            if not kwargs.get("fused_lm_head"):
                return model(**kwargs)  # TRL's extra pass for `compute_metrics`
            if scored is None:
                scored = self._score(model, inputs, kwargs)
            weights = scored.weights_for(self.loss_types[0])
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = self._summed(
                scored.reference_logps * weights, inputs
            )
            return _with_weights(scored, weights)

        result: Any = None
        for position, (loss_types, coefficients) in enumerate(self._loss_groups()):
            # The first group carries TRL's metrics, the auxiliary loss and the outputs; the others only a loss.
            rest = (
                {}
                if position == 0
                else {"aux_loss_enabled": False, "_metrics": _discarded(), "_total_train_tokens": 0}
            )
            with _swapped(self, precompute_ref_logps=True, loss_types=loss_types, loss_weights=coefficients, **rest):
                part = super()._compute_loss(stand_in, inputs, return_outputs and position == 0)
            if position == 0:
                result = part
            elif return_outputs:
                result = (result[0] + part, result[1])
            else:
                result = result + part
        assert scored is not None
        self._log_unweighted_rewards(scored)
        return result

    def _loss_groups(self) -> list[tuple[list[str], list[float]]]:
        """Loss types that take the same weights, with their coefficients; the unweighted ones last."""
        groups: dict[int, tuple[list[str], list[float]]] = {}
        for loss_type, coefficient in zip(self.loss_types, self.loss_weights, strict=True):
            kind = 2 if loss_type in _UNWEIGHTED else 1 if loss_type in _LENGTH_NORMALISED else 0
            names, coefficients = groups.setdefault(kind, ([], []))
            names.append(loss_type)
            coefficients.append(coefficient)
        return sorted(groups.values(), key=lambda group: group[0][0] in _UNWEIGHTED)

    def _score(self, model: Callable[..., Any], inputs: dict[str, Any], kwargs: dict[str, Any]) -> _Scored:
        """Runs policy and reference on a micro-batch and solves for its weights."""
        mask = inputs["completion_mask"][:, 1:].bool()
        with self._last_hidden_states() as captured:
            outputs = model(**kwargs)
        # Prompt-learning adapters prepend virtual tokens; the real ones are the last.
        logps = outputs.log_probs[:, -mask.size(1) :]
        device = logps.device
        states = captured.pop()[:, :-1][:, -mask.size(1) :].to(device)
        mask = mask.to(device)
        require_finite_step(states, logps, mask, inputs, self.train_dataset, self.state.global_step)

        token_ids = inputs["input_ids"][:, 1:].to(device)
        batch = PairBatch(mask, token_ids, logps.detach(), states, self.state.global_step)
        timed = self._timers[self._mode].region(device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False), timed:
            answer = self.token_weights(batch)
        values, metrics = answer if isinstance(answer, TokenWeights) else (answer, {})
        if values.shape != mask.shape:
            raise ValueError(
                f"The weighting returned weights of shape {tuple(values.shape)}, the batch's mask has "
                f"{tuple(mask.shape)}: return one weight for each position of `batch.mask`."
            )
        values = values.detach().to(device=device, dtype=logps.dtype)
        self._append_metrics({**weight_metrics(values, mask), **metrics})
        if "ref_chosen_logps" in inputs:
            rows = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
            reference = unpack_rows(rows.to(device), mask)
        else:
            reference = self._reference_logps(self.ref_model or self.model, inputs, mask)
        return _Scored(outputs, logps, reference, values, mask)

    def _reference_logps(self, model: Callable[..., Any], inputs: dict[str, Any], mask: Tensor) -> Tensor:
        """The reference's log-probability of each token, `(2B, T)`, by TRL's own reference pass."""
        kept: list[Tensor] = []

        def keep(**kwargs: Any) -> Any:
            outputs = model(**kwargs)
            kept.append(outputs.log_probs[:, -mask.size(1) :])
            return outputs

        super().compute_ref_log_probs(keep, inputs)
        return kept.pop()

    def _summed(self, logps: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Sums per-token reference log-probabilities as TRL does, `ld_alpha` included."""
        return super().compute_ref_log_probs(lambda **_: SimpleNamespace(log_probs=logps), inputs)

    @contextmanager
    def _last_hidden_states(self) -> Iterator[list[Tensor]]:
        """Collects the backbone's output. Adapters bypass the causal LM's hooks, never its backbone's."""
        causal_lm = self.accelerator.unwrap_model(self.model)
        if is_peft_model(causal_lm):
            causal_lm = causal_lm.get_base_model()
        captured: list[Tensor] = []
        handle = causal_lm.base_model.register_forward_hook(
            lambda _module, _args, output: captured.append(output.last_hidden_state.detach())
        )
        try:
            yield captured
        finally:
            handle.remove()

    # The log and the checkpoints

    def _log_unweighted_rewards(self, scored: _Scored) -> None:
        rewards = self.beta * (scored.policy_logps.detach() - scored.reference_logps).sum(1)
        self._append_metrics(reward_metrics(rewards, "_unweighted"))

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _append_metrics(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Averages numbers over processes, residuals and the like by their maximum, in one exchange."""
        device = self.accelerator.device
        values = torch.stack(
            [torch.as_tensor(value, dtype=torch.float32, device=device) for value in metrics.values()]
        )
        gathered: Any = self.accelerator.gather(values.unsqueeze(0))
        for name, mean, largest in zip(metrics, gathered.mean(0).tolist(), gathered.amax(0).tolist(), strict=True):
            self._metrics[self._mode][name].append(largest if name.startswith("transport/") else mean)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, with the weights' time, which is only read off the device here."""
        metrics = self._metrics[self._mode]
        times = self._timers[self._mode].take()
        if times and "transport/iterations" in metrics:
            metrics["transport/ms"].extend(times)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model, unless a parameter is not finite: a bad step must not take a good checkpoint's place."""
        require_finite_parameters(self.model, self.accelerator, self.state.global_step)
        super().save_model(output_dir, _internal_call)


def _with_weights(scored: _Scored, weights: Tensor) -> Any:
    """The policy's outputs with weighted log-probabilities, and WPO's factor as if they were not."""
    outputs = scored.outputs
    padding = outputs.log_probs.size(1) - weights.size(1)
    full = torch.nn.functional.pad(weights, (padding, 0), value=1.0)
    weighted = outputs.log_probs * full
    changed: dict[str, Any] = {**outputs, "log_probs": weighted}
    if outputs.log_sum_sq_probs is not None:
        changed["log_sum_sq_probs"] = outputs.log_sum_sq_probs + (weighted - outputs.log_probs).detach()
    return type(outputs)(**changed)


def _discarded() -> dict[str, Any]:
    return {mode: defaultdict(list) for mode in ("train", "eval")}


@contextmanager
def _swapped(target: Any, **values: Any) -> Iterator[None]:
    """Gives attributes other values for a while; those set on the instance alone are taken off again."""
    missing = object()
    saved = {name: vars(target).get(name, missing) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is missing:
                delattr(target, name)
            else:
                setattr(target, name, value)

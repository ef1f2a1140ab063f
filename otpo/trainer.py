"""DPO with token weights: TRL's `DPOTrainer`, and only what differs from it.

`DPOTrainer._compute_loss` does nothing with its model but call it and read `log_probs`. So `OTPOTrainer` hands
it a stand-in that runs the real model, takes the last hidden states on the way, asks the weighting for weights
and returns weighted log-probabilities. Losses, divergences, adapters and metrics stay TRL's.

Shapes: B pairs, T scored positions (the padded length less one), D hidden size; rows are the chosen responses,
then the rejected ones.
"""

import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor
from trl import DPOTrainer
from trl.trainer.utils import get_config_model_id

from .callbacks import LogTokenWeightsCallback
from .config import OTPOConfig
from .data.validation import PairRule, drop_unusable_pairs, is_tokenized, require_preference_columns
from .guards import (
    RowFinder,
    require_finite_parameters,
    require_finite_step,
    require_same_start,
    states_not_finite,
)
from .hidden_states import captured_states, check_hidden_layer
from .metrics import reward_metrics, weight_metrics
from .reference import dataset_key, longest_completion, shared_cache_file
from .scoring import Scored, loss_groups, model_inputs
from .swap import swapped
from .timing import DeviceTimer
from .token_rows import pack_rows, unpack_rows
from .transport import warn_unsolved
from .weighting import WEIGHTINGS, PairBatch, TokenWeights, Weighting


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
        data_collator: As in [`trl.DPOTrainer`].
        train_dataset: As in [`trl.DPOTrainer`].
        eval_dataset: As in [`trl.DPOTrainer`].
        *trl_args: The other arguments of [`trl.DPOTrainer`], in its order.
        weighting: Your own callable (see `otpo.weighting`), in place of `args.weighting`.
        **trl_kwargs: The other arguments of [`trl.DPOTrainer`], by name.

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
        data_collator: Any = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        *trl_args: Any,
        weighting: Weighting | None = None,
        **trl_kwargs: Any,
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
        self._kept_rows: dict[str, list[int]] = {}
        self._row_width = 0
        super().__init__(model, ref_model, args, data_collator, train_dataset, eval_dataset, *trl_args, **trl_kwargs)
        check_hidden_layer(self.model, args.hidden_layer)
        self._reference_is_copy = ref_model is None and not is_peft_model(self.model)
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

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as [`trl.DPOTrainer`] does; callbacks that look at the weights get to know the trainer first."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, LogTokenWeightsCallback):
                callback.attach(self)
        return super().train(*args, **kwargs)

    # The data, before training

    def _prepare_dataset(self, dataset, processing_class, args: OTPOConfig, dataset_name):
        require_preference_columns(dataset, dataset_name)
        # TRL drops pairs whose prompt fills `max_length` unseen; without the limit it drops none, and we count.
        if not is_tokenized(dataset):
            with swapped(args, max_length=None):
                dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        dataset, dropped, self._kept_rows[dataset_name] = drop_unusable_pairs(dataset, _pair_rule(args), dataset_name)
        self.dropped_pairs[dataset_name] = dropped
        return dataset

    def _precompute_ref_logps(self, dataset, name, batch_size):
        if isinstance(dataset, IterableDataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)  # which says that it can't
        # TRL stores whatever `compute_ref_log_probs` returns, under a key made of the model and the dataset's
        # fingerprint. Rows must not share a key with TRL's sums, nor with rows of another truncation.
        self._row_width = longest_completion(dataset, self.args.max_length)
        args = self.args
        key = dataset_key(dataset, args.max_length, args.truncation_mode, self.accelerator.mixed_precision)
        place = {} if dataset.cache_files else {"_get_cache_file_path": shared_cache_file}
        with (
            swapped(dataset, _fingerprint=key, **place),
            swapped(self, compute_ref_log_probs=self._compute_ref_rows),
        ):
            return super()._precompute_ref_logps(dataset, name, batch_size)

    def _compute_ref_rows(self, model: Callable[..., Any], inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        mask = inputs["completion_mask"][:, 1:].bool()
        logps = self._reference_logps(model, inputs, mask)
        return pack_rows(logps, mask, self._row_width).chunk(2)

    # The loss

    def _compute_loss(self, model, inputs, return_outputs):
        inputs = dict(inputs)
        scored: Scored | None = None

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
            return scored.outputs_with(weights)

        result: Any = None
        groups = list(loss_groups(self.loss_types, self.loss_weights))
        # TRL adds the auxiliary loss last, and the order decides the last bit of a sum.
        add_auxiliary = self.aux_loss_enabled and len(groups) > 1
        for position, (loss_types, coefficients) in enumerate(groups):
            only: dict[str, Any] = {"loss_types": loss_types, "loss_weights": coefficients}
            if add_auxiliary:
                only["router_aux_loss_coef"] = 0.0
            if position > 0:  # TRL's metrics, the auxiliary loss's too, and the outputs are the first group's
                only.update(aux_loss_enabled=False, _metrics=_discarded(), _total_train_tokens=0)
            with swapped(self, precompute_ref_logps=True, **only):
                part = super()._compute_loss(stand_in, inputs, return_outputs and position == 0)
            result = part if position == 0 else _added(result, part)
        assert scored is not None
        if add_auxiliary:
            result = _added(result, self.router_aux_loss_coef * scored.outputs.aux_loss)
        rewards = self.beta * (scored.policy_logps.detach() - scored.reference_logps).sum(1)
        self._append_metrics({**scored.metrics, **reward_metrics(rewards, "_unweighted")})
        return result

    def _score(self, model: Callable[..., Any], inputs: dict[str, Any], kwargs: dict[str, Any]) -> Scored:
        """Runs policy and reference on a micro-batch and solves for its weights."""
        mask = inputs["completion_mask"][:, 1:].bool()
        causal_lm = self.accelerator.unwrap_model(self.model)
        with captured_states(causal_lm, self.args.hidden_layer) as captured:
            outputs = model(**kwargs)
        # Prompt-learning adapters prepend virtual tokens; the real ones are the last.
        logps = outputs.log_probs[:, -mask.size(1) :]
        device = logps.device
        if not captured:
            raise RuntimeError(
                "The model ran without its backbone's forward hook, so there are no hidden states to weight by. "
                "A graph that `torch.compile` made earlier in this process does that: call `torch._dynamo.reset()`."
            )
        states = captured.pop()[:, :-1][:, -mask.size(1) :].to(device)
        mask = mask.to(device)
        self._require_finite(states_not_finite(states, logps, mask), "Hidden states or log-probabilities", inputs)

        token_ids = inputs["input_ids"][:, 1:].to(device)
        step, called_with = self.state.global_step, model_inputs(inputs)
        batch = PairBatch(mask, token_ids, logps.detach().clone(), states, step, called_with)
        timed = self._timers[self._mode].region(device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False), timed:
            answer = self.token_weights(batch)
        values, metrics = answer if isinstance(answer, TokenWeights) else (answer, {})
        if values.shape != mask.shape:
            raise ValueError(
                f"The weighting returned weights of shape {tuple(values.shape)}, the batch's mask has "
                f"{tuple(mask.shape)}: return one weight for each position of `batch.mask`."
            )
        # What lies outside the mask is nobody's: a NaN there would spoil the sums, even times zero.
        values = values.detach().to(device=device, dtype=logps.dtype).masked_fill(~mask, 0.0)
        if "ref_chosen_logps" in inputs:
            stored = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
            reference = unpack_rows(stored.to(device), mask)
        else:
            reference = self._reference_logps(self.model if self.ref_model is None else self.ref_model, inputs, mask)
        self._require_finite(
            ~values.isfinite() | (~reference.isfinite() & mask), "Weights or reference log-probabilities", inputs
        )
        if self._reference_is_copy and self._mode == "train" and self.state.global_step == 0:
            require_same_start(logps, reference, mask)
        return Scored(outputs, logps, reference, values, mask, {**weight_metrics(values, mask), **metrics})

    def _require_finite(self, bad: Tensor, what: str, inputs: dict[str, Any]) -> None:
        rows = RowFinder(self.train_dataset, self._kept_rows.get("train"), _pair_rule(self.args))
        require_finite_step(bad, what, inputs, rows, self.state.global_step)

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

    # The log and the checkpoints

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
        """TRL's log, with the weights' time, which is only read off the device here; warns of unsolved transport."""
        metrics = self._metrics[self._mode]
        times = self._timers[self._mode].take()
        if times and "transport/iterations" in metrics:
            metrics["transport/ms"].extend(times)
        residuals = metrics.get("transport/residual")
        if residuals and self.accelerator.device.type == "cuda" and self.is_world_process_zero():
            # Anywhere else the solver has looked itself; on a GPU nothing may wait for it, and here it is on the host.
            warn_unsolved(max(residuals), **self.args.solver_options())
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model, unless a parameter is not finite: a bad step must not take a good checkpoint's place."""
        require_finite_parameters(self.model, self.accelerator, self.state.global_step)
        super().save_model(output_dir, _internal_call)


def _pair_rule(args: OTPOConfig) -> PairRule:
    return PairRule(args.max_length, args.truncation_mode, args.drop_identical_pairs)


def _added(result: Any, loss: Tensor) -> Any:
    """A loss, or a loss with the model's outputs, and another loss."""
    return (result[0] + loss, result[1]) if isinstance(result, tuple) else result + loss


def _discarded() -> dict[str, Any]:
    return {mode: defaultdict(list) for mode in ("train", "eval")}

"""DPO with token weights: TRL's `DPOTrainer`, and only what differs from it.

`DPOTrainer._compute_loss` does nothing with its model but call it and read `log_probs`. So `OTPOTrainer` hands
it a stand-in that runs the real model, takes the last hidden states on the way, asks the weighting for weights
and returns weighted log-probabilities. Losses, divergences, adapters and metrics stay TRL's.

Shapes: B pairs, T scored positions (the padded length less one), D hidden size; rows are the chosen responses,
then the rejected ones.
"""

import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, is_peft_model, parse_flag_from_env
from datasets import Dataset, IterableDataset, concatenate_datasets
from datasets.fingerprint import Hasher
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoConfig
from trl import DPOTrainer
from trl.models.utils import prepare_deepspeed
from trl.trainer.utils import get_config_model_id

from .callbacks import LogTokenWeightsCallback
from .config import OTPOConfig
from .data.preferences import PairRule, has_tokens_alone, no_rows, require_preference_columns
from .data.prepared import PreparedDatasets, free_name, refuse_unread_stream
from .data.streams import AlreadyTokenized, FirstRow
from .swap import swapped
from .training.finite_checks import (
    is_same_start,
    require_finite_parameters,
    require_finite_step,
    require_same_start,
    require_unwritten,
    start_gap,
    states_not_finite,
    tensor_versions,
)
from .training.hidden_states import captured_states, check_hidden_layer, check_layer_number, evaluating
from .training.metrics import averaged_over_pairs, reward_metrics, weight_metrics
from .training.reference_cache import (
    REFERENCE_COLUMNS,
    StoredRowsCollator,
    cache_file,
    reference_key,
    stored_under,
    without_stored,
    write_rows,
)
from .training.row_layouts import pack_rows, unpack_rows
from .training.scoring import Scored, loss_groups, model_inputs
from .training.timing import DeviceTimer
from .transport.solve import warn_unsolved
from .trl_seam import (
    HandedInputs,
    bring_router_logits_to_head,
    no_metrics,
    on_device,
    require_known_loss,
    require_read,
)
from .weighting import WEIGHTINGS, PairBatch, TokenWeights, Weighting

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig


class OTPOTrainer(DPOTrainer):
    """Direct preference optimisation whose tokens are weighted by optimal transport (arXiv 2505.18720).

    Takes the arguments of [`trl.DPOTrainer`], and everything that it can do: its loss types and divergences,
    adapters, a synchronised or precomputed reference, streaming, vision-language and Mixture-of-Experts models.
    The same detached weights multiply the log-probabilities of policy and reference:

        loss = -log sigmoid(beta * (sum_i w_c,i log(pi/pi_ref)_i - sum_j w_r,j log(pi/pi_ref)_j))

    Logged beside TRL's metrics, whose `rewards/*` are the weighted ones: `rewards/*_unweighted`,
    `weights/{entropy,ess,max}` (see `otpo.training.metrics`), `transport/residual`, `transport/iterations` and
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
        processing_class: As in [`trl.DPOTrainer`].
        compute_metrics: As in [`trl.DPOTrainer`].
        callbacks: As in [`trl.DPOTrainer`]; see also [`otpo.LogTokenWeightsCallback`].
        optimizers: As in [`trl.DPOTrainer`].
        quantization_config: As in [`trl.DPOTrainer`].
        peft_config: As in [`trl.DPOTrainer`].
        weighting: Your own callable (see `otpo.weighting.batch`), in place of `args.weighting`.

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
        processing_class: Any = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        *,
        weighting: Weighting | None = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = OTPOConfig(f"{name.split('/')[-1]}-OTPO")
        if not isinstance(args, OTPOConfig):
            raise TypeError(f"`args` must be an `OTPOConfig`, got a `{type(args).__name__}`.")
        if isinstance(weighting, str):
            raise TypeError(f"Set `OTPOConfig(weighting={weighting!r})`: the argument `weighting` takes a callable.")
        _check_datasets(args, train_dataset, eval_dataset)
        _check_layer_of(model, args)

        self.weighting = weighting or WEIGHTINGS[args.weighting](args)
        self.prepared_datasets = PreparedDatasets()
        self._own_names: frozenset[str] | None = None  # of its datasets, once all are prepared
        self._evaluated: Any = None
        self._timers = {"train": DeviceTimer(), "eval": DeviceTimer()}
        self._pairs: dict[str, list[int]] = {"train": [], "eval": []}
        self._losses: list[np.ndarray] = []
        # Checks of the first loss, made once: that TRL reads what it is handed, and that the reference is the policy.
        self._models_are_ready = False
        self._seam_is_checked = False
        self._start_is_checked = False
        with swapped(args, **_one_device_each(args)):
            try:
                super().__init__(
                    model,
                    ref_model,
                    args,
                    data_collator,
                    train_dataset,
                    eval_dataset,
                    processing_class,
                    compute_metrics,
                    callbacks,
                    optimizers,
                    quantization_config,
                    peft_config,
                )
            except StopIteration as error:  # TRL looks at the first row of a stream
                raise ValueError(no_rows("train")) from error
        self._look_at_models()
        self._own_names = frozenset(self.dropped_pairs)
        self._reference_is_copy = ref_model is None and not is_peft_model(self.model)
        if weighting is None and args.weighting == "ld":
            self.ld_alpha = None  # the weights carry it

    def _look_at_models(self) -> None:
        """Refuses a policy without the hidden states that are asked for; makes split models fit TRL's loss. Once."""
        if self._models_are_ready:
            return
        self._models_are_ready = True
        check_hidden_layer(self.model, self.args.hidden_layer)
        for model in (self.model, self.ref_model):
            if model is not None:
                bring_router_logits_to_head(model)

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
        """Trains as [`trl.DPOTrainer`] does; callbacks that look at the weights get to know the trainer first.

        Raises:
            ValueError: A stream was read to its end and no pair of it could be trained on.
        """
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, LogTokenWeightsCallback):
                callback.attach(self)
        result = super().train(*args, **kwargs)
        self._start_is_checked = True
        if self.state.global_step == 0:
            refuse_unread_stream(self.train_dataset, self.prepared_datasets.get(self.train_dataset))
        return result

    @property
    def dropped_pairs(self) -> dict[str, Counter[str]]:
        """How many pairs of each dataset were left out, by problem; those of a stream grow while it is read."""
        return self.prepared_datasets.dropped()

    # The data, before training

    def _prepare_dataset(self, dataset, processing_class, args: OTPOConfig, dataset_name):
        name = self._name_of(dataset_name)
        require_preference_columns(dataset, name)
        dataset = self._tokenized(dataset, processing_class, args, name)
        if not args.precompute_ref_log_probs:
            dataset = without_stored(dataset)
        rule = _pair_rule(args, is_stream=isinstance(dataset, IterableDataset))
        return self.prepared_datasets.prepare(dataset, rule, name)

    def _name_of(self, dataset_name: str) -> str:
        """What a dataset is called: TRL's name for it, unless that is another one's already.

        TRL prepares the training dataset first, as "train"; an evaluation dataset may be called so by its user, and
        one that is passed to `evaluate` is called as the trainer's own.
        """
        if self._own_names is not None:
            return f"evaluate({dataset_name})" if dataset_name in self._own_names else dataset_name
        return free_name(dataset_name, self.dropped_pairs)

    def _tokenized(self, dataset: Any, processing_class: Any, args: OTPOConfig, name: str) -> Any:
        """The dataset with token columns, by TRL's own tokenization."""
        columns = dataset.column_names
        if columns is not None and has_tokens_alone(columns):
            return dataset
        looked_at = dataset if columns is not None else dataset.map(FirstRow(name))
        # TRL drops pairs whose prompt fills `max_length` unseen; without the limit it drops none, and we count.
        with swapped(args, max_length=None):
            try:
                return super()._prepare_dataset(looked_at, processing_class, args, name)
            except AlreadyTokenized:
                return dataset
            except StopIteration as error:
                raise ValueError(no_rows(name)) from error

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As in transformers; the dataset is kept while it is evaluated, to name rows of it."""
        if isinstance(eval_dataset, str):
            self._evaluated = self.eval_dataset[eval_dataset]
        else:
            self._evaluated = self.eval_dataset if eval_dataset is None else eval_dataset
        return super().get_eval_dataloader(eval_dataset)

    # The reference, precomputed

    def _precompute_ref_logps(self, dataset, name, batch_size):
        if isinstance(dataset, IterableDataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)  # which says that it can't
        self._look_at_models()  # the pass takes long, and what training would refuse is refused before it
        if not isinstance(self.data_collator, StoredRowsCollator):
            self.data_collator = StoredRowsCollator(self.data_collator)
        reference = self.accelerator.unwrap_model(self.model if self.ref_model is None else self.ref_model)
        settings = (
            self.args.max_length,
            self.args.truncation_mode,
            self.accelerator.mixed_precision,
            self.accelerator.device.type,
            torch.get_float32_matmul_precision(),
            Hasher.hash(self.data_collator.collator),
        )
        key = reference_key(dataset, reference, str(self._precompute_model_hash), *settings)
        path = cache_file(dataset, key)
        # Shards and files differ between processes, and all must go the same way: the first one's.
        agreed = [key, path.exists()]
        broadcast_object_list(agreed, from_process=0)
        key, is_there = agreed
        path = cache_file(dataset, key)
        if stored_under(dataset, key, name):
            return dataset
        if not is_there:
            rows = self._reference_rows(dataset, name, batch_size)
            if self.accelerator.is_main_process:
                write_rows(path, key, rows)
            else:
                for _ in rows:
                    pass
            self.accelerator.wait_for_everyone()
        joined = concatenate_datasets([dataset, Dataset.from_file(str(path))], axis=1)
        self.prepared_datasets.replace(dataset, joined)
        return joined

    def _reference_rows(self, dataset: Dataset, name: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The reference's log-probabilities of a dataset's completions, batch by batch, on all processes.

        Yields:
            Padded rows `(2B, W)`, chosen responses first, and how many of each are tokens `(2B,)`, of all processes.
        """
        loader = DataLoader(
            dataset,  # pyright: ignore[reportArgumentType]
            batch_size=batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        model = self._model_of_reference_rows()
        for inputs in tqdm(
            self.accelerator.prepare(loader),
            desc=f"Reference log-probabilities of the {name} dataset",
            disable=self.args.disable_tqdm or not self.accelerator.is_local_main_process,
        ):
            mask = inputs["completion_mask"][:, 1:].bool()
            sides = []
            for part, side in zip(self._reference_logps(model, inputs, mask).chunk(2), mask.chunk(2), strict=True):
                rows = self.accelerator.pad_across_processes(pack_rows(part, side), dim=1)
                sides.append(self.accelerator.gather_for_metrics((rows, side.sum(1))))
            width = max(rows.size(1) for rows, _ in sides)
            padded = [torch.nn.functional.pad(rows, (0, width - rows.size(1))) for rows, _ in sides]
            yield torch.cat(padded).cpu(), torch.cat([counts for _, counts in sides]).cpu()

    def _model_of_reference_rows(self) -> Any:
        """The reference, before the Trainer has prepared the policy; DeepSpeed's shards need an engine around them."""
        if self.ref_model is not None:
            return self.ref_model
        if not self.is_deepspeed_enabled:
            return self.model
        if self._precompute_engine is None:
            self._precompute_engine = prepare_deepspeed(self.model, self.accelerator)
        return self._precompute_engine

    # The loss

    def _compute_loss(self, model, inputs, return_outputs):
        if not self._seam_is_checked:
            require_known_loss(self, super()._compute_loss)
            self._seam_is_checked = True
        handed = HandedInputs(inputs)
        scored: Scored | None = None
        sums: Any = None

        def stand_in(**kwargs: Any) -> Any:
            nonlocal scored, sums
            if not kwargs.get("fused_lm_head"):
                return model(**kwargs)  # TRL's extra pass for `compute_metrics`
            if scored is None:
                scored = self._score(model, inputs, kwargs)
                self._check_start(model, kwargs, scored)
            weights = scored.weights_for(self.loss_types[0])
            sums = self._summed(scored.reference_logps * weights, inputs)
            handed.update(zip(REFERENCE_COLUMNS, sums, strict=True))
            return scored.outputs_with(weights)

        result = rewarded = None
        groups = list(loss_groups(self.loss_types, self.loss_weights))
        # TRL adds the auxiliary loss last, and the order decides the last bit of a sum.
        add_auxiliary = self.aux_loss_enabled and len(groups) > 1
        for position, (loss_types, coefficients) in enumerate(groups):
            only: dict[str, Any] = {"loss_types": loss_types, "loss_weights": coefficients}
            if add_auxiliary:
                only["router_aux_loss_coef"] = 0.0
            if position > 0:  # TRL's metrics, the auxiliary loss's too, and the outputs are the first group's
                only.update(aux_loss_enabled=False, **no_metrics())
            handed.read.clear()
            with swapped(self, precompute_ref_logps=True, **only):
                part = super()._compute_loss(stand_in, handed, return_outputs and position == 0)
            require_read(handed, scored)
            rewarded = sums if position == 0 else rewarded
            result = part if position == 0 else _added(result, part)
        assert scored is not None
        if add_auxiliary:
            result = _added(result, self.router_aux_loss_coef * scored.outputs.aux_loss)
        self._log_pairs(scored, groups[0][0][0], inputs, rewarded, result[0] if return_outputs else result)
        return result

    def _score(
        self, model: Callable[..., Any], inputs: dict[str, Any], kwargs: dict[str, Any], *, reference: bool = True
    ) -> Scored:
        """Runs policy and reference on a micro-batch and solves for its weights.

        Without `reference` the reference is not asked, and its log-probabilities are zeros.
        """
        mask = inputs["completion_mask"][:, 1:].bool()
        causal_lm = self.accelerator.unwrap_model(self.model)
        with captured_states(causal_lm, self.args.hidden_layer) as captured:
            outputs = on_device(model(**kwargs), mask.device)
        # Prompt-learning adapters prepend virtual tokens; the real ones are the last.
        logps: Tensor = outputs.log_probs[:, -mask.size(1) :]
        if not captured:
            raise RuntimeError(
                "The model ran without its backbone's forward hook, so there are no hidden states to weight by. "
                "A graph that `torch.compile` made earlier in this process does that: call `torch._dynamo.reset()`."
            )
        states = captured.pop()[:, :-1][:, -mask.size(1) :].to(mask.device)
        self._require_finite(states_not_finite(states, logps, mask), "Hidden states or log-probabilities", inputs)

        values, metrics = self._weigh(mask, logps, states, inputs)
        reference_logps = torch.zeros_like(logps)
        if reference and self.args.precompute_ref_log_probs:
            missing = [name for name in REFERENCE_COLUMNS if name not in inputs]
            if missing:
                raise ValueError(
                    f"`precompute_ref_log_probs=True`, and the batch has no {missing[0]!r}. Pass the dataset to the "
                    "trainer as `train_dataset` or `eval_dataset`, or to `evaluate`, which precompute it."
                )
            reference_logps = unpack_rows(torch.cat([inputs[name] for name in REFERENCE_COLUMNS]), mask)
        elif reference:
            reference_model = self.model if self.ref_model is None else self.ref_model
            reference_logps = self._reference_logps(reference_model, inputs, mask)
        self._require_finite(
            ~values.isfinite() | (~reference_logps.isfinite() & mask),
            "Weights or reference log-probabilities",
            inputs,
        )
        return Scored(outputs, logps, reference_logps, values, mask, metrics)

    def _weigh(
        self, mask: Tensor, logps: Tensor, states: Tensor, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The weights of a micro-batch, `(2B, T)`, zero outside the mask, and the weighting's own numbers to log."""
        # The weighting gets copies of what is small, and may not write into the rest, which the loss still needs.
        batch = PairBatch(
            mask.clone(),
            inputs["input_ids"][:, 1:].clone(),
            logps.detach().clone(),
            states,
            self.state.global_step,
            model_inputs(inputs),
        )
        versions = tensor_versions(batch)
        timed = self._timers[self._mode].region(mask.device)
        with torch.no_grad(), torch.autocast(mask.device.type, enabled=False), timed:
            answer = self.token_weights(batch)
        require_unwritten(batch, versions)
        values, metrics = answer if isinstance(answer, TokenWeights) else (answer, {})
        if values.shape != mask.shape:
            raise ValueError(
                f"The weighting returned weights of shape {tuple(values.shape)}, the batch's mask has "
                f"{tuple(mask.shape)}: return one weight for each position of `batch.mask`."
            )
        # What lies outside the mask is nobody's: a NaN there would spoil the sums, even times zero.
        return values.detach().to(device=mask.device, dtype=logps.dtype).masked_fill(~mask, 0.0), metrics

    def _check_start(self, model: Any, kwargs: dict[str, Any], scored: Scored) -> None:
        """Refuses a reference that is made as the policy's copy and isn't one, before this trainer's first step.

        Dropout and other noise of training makes a difference too, so what looks different is asked again without.
        All processes go the same way, since each may hold a shard of the model.
        """
        if self._start_is_checked or self._mode != "train":
            return
        self._start_is_checked = True
        if not self._reference_is_copy or self.state.global_step > 0:
            return

        def largest_gap(logps: Tensor) -> float:
            gap = start_gap(logps.detach(), scored.reference_logps, scored.mask)
            return self.accelerator.gather(gap.reshape(1)).max().item()  # pyright: ignore

        if not is_same_start(largest_gap(scored.policy_logps)):
            with torch.no_grad(), evaluating(model):
                outputs = on_device(model(**kwargs), scored.mask.device)
            require_same_start(largest_gap(outputs.log_probs[:, -scored.mask.size(1) :]))

    def _require_finite(self, bad: Tensor, what: str, inputs: dict[str, Any]) -> None:
        evaluating = self._mode == "eval" and self._evaluated is not None
        dataset = self._evaluated if evaluating else self.train_dataset
        known = None if dataset is None else self.prepared_datasets.get(dataset)
        require_finite_step(
            bad,
            what,
            lambda pair: self.prepared_datasets.find(dataset, inputs, pair),
            "training" if dataset is self.train_dataset or known is None else known.name,
            self.state.global_step,
        )

    def _reference_logps(self, model: Callable[..., Any], inputs: dict[str, Any], mask: Tensor) -> Tensor:
        """The reference's log-probability of each token, `(2B, T)`, by TRL's own reference pass."""
        kept: list[Tensor] = []

        def keep(**kwargs: Any) -> Any:
            outputs = on_device(model(**kwargs), mask.device)
            kept.append(outputs.log_probs[:, -mask.size(1) :])
            return outputs

        super().compute_ref_log_probs(keep, inputs)
        return kept.pop()

    def _summed(self, logps: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Sums per-token log-probabilities as TRL does, `ld_alpha` included: `(B,)` of chosen and of rejected."""
        return super().compute_ref_log_probs(lambda **_: SimpleNamespace(log_probs=logps), inputs)

    # The log and the checkpoints

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _log_pairs(self, scored: Scored, loss_type: str, inputs: dict[str, Any], sums: Any, loss: Tensor) -> None:
        """Averages numbers of pairs over all processes' pairs, and a weighting's own over processes, in one exchange.

        Args:
            scored: The micro-batch.
            loss_type: The one whose weights TRL's `rewards/*` have.
            inputs: The batch.
            sums: The reference's weighted sums that TRL was given, `(B,)` of chosen and of rejected.
            loss: The micro-batch's mean loss.
        """
        log_ratios = scored.policy_logps.detach() - scored.reference_logps
        columns = {
            **weight_metrics(scored.weights, scored.mask),
            **reward_metrics(self.beta * log_ratios.sum(1), "_unweighted"),
        }
        pairs = scored.mask.size(0) // 2
        # The last batch on several processes is filled up with pairs that were there before.
        # (In training the loop is ahead of the micro-batch that is computed, so there this can't be told.)
        loop = self.accelerator.gradient_state
        everyones = pairs * self.accelerator.num_processes
        repeats = self._mode == "eval" and loop.end_of_dataloader and 0 < loop.remainder < everyones
        if repeats:  # TRL counts those too, so its numbers of this batch are replaced
            weighted = scored.policy_logps.detach() * scored.weights_for(loss_type)
            logps = torch.cat(self._summed(weighted, inputs))
            columns |= reward_metrics(self.beta * (logps - torch.cat(sums)))
            columns |= dict(zip(("logps/chosen", "logps/rejected"), logps.chunk(2), strict=True))
        self._refuse_names(scored.metrics, columns)
        columns |= {name: torch.as_tensor(value).reshape(1).expand(pairs) for name, value in scored.metrics.items()}
        numbers = [*columns.values(), loss.detach().reshape(1).expand(pairs)]
        table = torch.stack([number.to(scored.mask.device, torch.float32) for number in numbers], 1)
        table = self.accelerator.gather(table).cpu()  # pyright: ignore[reportAttributeAccessIssue]
        table = table[: loop.remainder] if repeats else table

        metrics = self._metrics[self._mode]
        of_columns = table[:, : len(columns)]
        means, largest = of_columns.double().nanmean(0).tolist(), of_columns.amax(0).tolist()
        for name, mean, most in zip(columns, means, largest, strict=True):
            if name in metrics and len(metrics[name]) > len(self._pairs[self._mode]):
                metrics[name][-1] = mean  # in TRL's place
            else:
                metrics[name].append(most if name.startswith("transport/") else mean)
        self._pairs[self._mode].append(len(table))
        if self._mode == "eval":
            self._losses.append(table[:, -1].numpy())

    def _refuse_names(self, metrics: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
        """Raises a `ValueError` for a number of a weighting that is called as one of TRL's or of ours."""
        logged = self._metrics[self._mode]
        ours = [name for name in metrics if len(logged.get(name, ())) > len(self._pairs[self._mode])]
        taken = [*ours, *(name for name in metrics if name in columns or name in ("loss", "transport/ms"))]
        if taken:
            raise ValueError(
                f"The weighting logs a number as {taken[0]!r}, which the trainer logs itself. Give it another name."
            )

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As in transformers, whose loss counts a row of the last, smaller batch otherwise than one of the others.

        On several processes a process's loss of a batch that is filled up with repeated pairs is the mean with them.
        """
        for collected in (self._losses, self._pairs["eval"], self._metrics["eval"]):
            collected.clear()  # of a prediction, or of an evaluation that was broken off
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self._evaluated = None
        if self._losses and output.metrics:
            output.metrics[f"{metric_key_prefix}_loss"] = float(np.concatenate(self._losses).mean())
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, an evaluation's as means over pairs, with the weights' time, which is read off the device here.

        Training's are means over micro-batches as TRL's are, since each has the same share in the step's loss.
        Warns of transport that was not solved: on a GPU nothing may wait for the solver, and here its residual is on
        the host. Anywhere else the solver has looked itself.
        """
        metrics, pairs = self._metrics[self._mode], self._pairs[self._mode]
        residuals = metrics.get("transport/residual")
        if residuals and self.accelerator.device.type == "cuda" and self.is_world_process_zero():
            warn_unsolved(max(residuals), self.args.transport_options())
        shares = pairs if self._mode == "eval" else [1] * len(pairs)
        metrics.update(averaged_over_pairs(metrics, shares))
        pairs.clear()
        times = self._timers[self._mode].take()
        if times and "transport/iterations" in metrics:
            metrics["transport/ms"].extend(times)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model, unless a parameter is not finite: a bad step must not take a good checkpoint's place."""
        require_finite_parameters(self.model, self.accelerator, self.state.global_step)
        super().save_model(output_dir, _internal_call)


def _check_datasets(args: OTPOConfig, train_dataset: Any, eval_dataset: Any) -> None:
    """Refuses what can be seen of the data before anything is loaded."""
    if train_dataset is not None and not isinstance(train_dataset, Dataset | IterableDataset | dict):
        raise TypeError(
            f"`train_dataset` must be a `Dataset` or `IterableDataset`, got `{type(train_dataset).__name__}`. Make "
            "one with `datasets.Dataset.from_list(rows)`."
        )
    if isinstance(train_dataset, dict):
        splits = sorted(map(str, train_dataset)) or ["train"]
        raise TypeError(
            f"`train_dataset` must be a `Dataset` or `IterableDataset`, got `{type(train_dataset).__name__}`. Pass "
            f"one of its splits, such as `train_dataset=dataset[{splits[0]!r}]`; it has {splits}."
        )
    named = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    for name, dataset in {"train": train_dataset, **{f"eval_{name}": each for name, each in named.items()}}.items():
        if args.precompute_ref_log_probs and isinstance(dataset, IterableDataset):
            raise ValueError(
                f"`precompute_ref_log_probs=True` is not supported with IterableDataset, and the {name} dataset is a "
                "stream: it has to be read before training. Set `precompute_ref_log_probs=False`, or load it without "
                "streaming."
            )
    for name, dataset in named.items():
        if dataset is not None and not isinstance(dataset, Dataset | IterableDataset):
            raise TypeError(
                f"The {name} dataset must be a `Dataset` or `IterableDataset`, got `{type(dataset).__name__}`. Make "
                "one with `datasets.Dataset.from_list(rows)`."
            )
    for name, dataset in [("train", train_dataset), *named.items()]:
        if dataset is not None:
            require_preference_columns(dataset, name)


def _check_layer_of(model: Any, args: OTPOConfig) -> None:
    """Refuses a `hidden_layer` that the model does not have, before the model and the data are loaded."""
    if args.hidden_layer == -1:
        return
    if not isinstance(model, str):
        check_hidden_layer(model, args.hidden_layer)
        return
    loading: Any = args.model_init_kwargs or {}
    trusted = loading.get("trust_remote_code", args.trust_remote_code)
    config = AutoConfig.from_pretrained(model, revision=loading.get("revision"), trust_remote_code=trusted)
    check_layer_number(config.get_text_config().num_hidden_layers, args.hidden_layer, type(config).__name__)


def _one_device_each(args: OTPOConfig) -> dict[str, Any]:
    """Options under which each of several processes loads policy and reference on one device.

    TRL sees to that with DDP and DeepSpeed. Under FSDP it takes the policy for DDP's and the reference for nobody's,
    and transformers would spread it over all visible GPUs.
    """
    chosen: Any = args.model_init_kwargs or {}
    sharded = args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")
    if args.world_size == 1 or not sharded or "device_map" in chosen:
        return {}
    return {"model_init_kwargs": {**chosen, "device_map": None}}


def _pair_rule(args: OTPOConfig, *, is_stream: bool) -> PairRule:
    drops = is_stream if args.drop_identical_pairs is None else args.drop_identical_pairs
    return PairRule(args.max_length, args.truncation_mode, drops)


def _added(result: Any, loss: Tensor) -> Any:
    """A loss, or a loss with the model's outputs, and another loss."""
    return (result[0] + loss, result[1]) if isinstance(result, tuple) else result + loss

"""DPO with token weights: TRL's `DPOTrainer`, and only what differs from it.

`DPOTrainer._compute_loss` does nothing with its model but call it and read `log_probs`. So `OTPOTrainer` scores a
batch first ([`OTPOTrainer.score_batch`]): policy, weights, reference. Then it hands TRL a stand-in of the model that
answers with the weighted log-probabilities. Losses, divergences, adapters and metrics stay TRL's; what of TRL this
leans on stands in `otpo.trl_seam`.

In reading order: construction, data, reference, `score_batch`, loss, log, save. The file is over 350 lines since a
subclass's author has to see all of it at once; a third of them are docstrings and TRL's arguments.

Shapes: B pairs, T scored positions (the padded length less one), D hidden size; rows are the chosen responses,
then the rejected ones.
"""

import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from torch import Tensor
from torch.utils.data import DataLoader
from trl import DPOTrainer

from . import trl_seam
from .config import OTPOConfig
from .data.arguments import check_datasets
from .data.preferences import PairRule, as_lists, has_tokens_alone, no_rows, require_preference_columns
from .data.prepared import PreparedDatasets, free_name, refuse_unread_stream
from .data.row_checks import check_pairs
from .data.row_numbers import numbers_of
from .data.streams import AlreadyTokenized, FirstRow
from .data.token_budget import TokenBudget
from .data.token_values import tokenizer_of, with_token_values
from .layouts.choice import Layout
from .layouts.collator import PlanningCollator
from .layouts.models import LaidOutModels
from .plain_model import has_adapter
from .training.finite_checks import (
    pairs_not_finite,
    require_finite_everywhere,
    require_finite_pairs,
    require_finite_parameters,
    states_not_finite,
)
from .training.hidden_states import (
    captured_states,
    check_hidden_layer,
    check_layer_before_loading,
    evaluating,
    require_decoder_alone,
)
from .training.late_reads import LateReads
from .training.lent import require_unwritten, tensor_versions
from .training.pair_log import PairLog, pair_columns, pair_table, table_summary, trl_columns
from .training.reference_cache import StoredRowsCollator, reference_key, without_stored
from .training.reference_pass import reference_rows, with_reference_rows
from .training.scoring import LossGroup, Scored, loss_groups, model_inputs
from .training.start_check import is_same_start, require_same_start, start_gap
from .training.stored_rows import unpack_rows
from .training.timing import DeviceTimer
from .training.token_batches import SHARE, BatchShare, make_budget, make_loader, share_steps
from .training.watching import TrainerWatcher
from .training.whole_layers import gather_whole_layers, require_trained_leaves
from .transport.solve import warn_unsolved
from .trl_seam import REFERENCE_COLUMNS, TOKEN_VALUES, ConvertedWeights, FullySharded
from .weighting import PairBatch, TokenWeights, Weighting
from .weighting.answer import read_answer
from .weighting.callables import same_weighting, values_of_callable
from .weighting.registry import check_weighting, make_weighting, split, values_of

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig


class OTPOTrainer(FullySharded, ConvertedWeights, DPOTrainer):
    """Direct preference optimisation whose tokens are weighted by optimal transport (arXiv 2505.18720).

    Takes the arguments of [`trl.DPOTrainer`], and everything that it can do: its loss types and divergences,
    adapters, a synchronised or precomputed reference, streaming, vision-language and Mixture-of-Experts models.
    The same detached weights multiply the log-probabilities of policy and reference:

        loss = -log sigmoid(beta * (sum_i w_c,i log(pi/pi_ref)_i - sum_j w_r,j log(pi/pi_ref)_j))

    Logged beside TRL's metrics, whose `rewards/*` are the weighted ones: `rewards/*_unweighted`,
    `weights/{entropy,ess,max}` and `pairs/similarity` (see `otpo.training.metrics`), `transport/residual`,
    `transport/iterations` and `transport/ms`. To change the weights, pass `weighting` or override [`token_weights`].

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
        weighting: Your own callable (see `otpo.weighting.batch`), in place of `args.weighting`. The numbers of tokens
            that it looks at are found as [`otpo.weighting.callables.values_of_callable`] says.

    Raises:
        ValueError: An option or a row of the data can't be trained with, or `ld_alpha` is set beside a callable
            as `weighting`; the message names it.
        TypeError: `args` is no [`OTPOConfig`], or `weighting` no function.
        FloatingPointError: In training, a hidden state or a log-probability is not finite, or a weight is negative.
            On a GPU a step is found out in the next one, or before anything is logged, evaluated or saved.
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
            args = OTPOConfig(f"{trl_seam.model_name(model).split('/')[-1]}-OTPO")
        if not isinstance(args, OTPOConfig):
            raise TypeError(f"`args` must be an `OTPOConfig`, got a `{type(args).__name__}`.")
        if isinstance(weighting, str):
            raise TypeError(f"Set `OTPOConfig(weighting={weighting!r})`: the argument `weighting` takes a callable.")
        if weighting is not None and not callable(weighting):
            raise TypeError(
                f"`weighting` must be a function of a batch of pairs, or None for `OTPOConfig.weighting`, got "
                f"{weighting!r}."
            )
        args.check_again()
        if weighting is not None and args.ld_alpha is not None:
            raise ValueError(
                f"`ld_alpha={args.ld_alpha!r}` beside a callable as `weighting`: TRL's loss would multiply the "
                "callable's weights by it past the shorter response. Leave `ld_alpha` None, with another "
                "`OTPOConfig.weighting` than 'ld', and let the callable do it, such as "
                "`functools.partial(otpo.weighting.ld, alpha=0.5)`."
            )
        # Numbers of tokens that are made of the data.
        self._token_values = values_of(args.weighting) if weighting is None else values_of_callable(weighting)
        check_datasets(
            train_dataset,
            eval_dataset,
            precompute=args.precompute_ref_log_probs,
            tokens_per_batch=args.tokens_per_batch,
            token_values=self._token_values,
        )
        check_layer_before_loading(model, args)

        # TRL's constructor calls our methods, which read these attributes.
        self.weighting = make_weighting(args) if weighting is None else weighting
        self._named_weighting = self.weighting if weighting is None else None
        self.prepared_datasets = PreparedDatasets()
        self._own_names: frozenset[str] | None = None  # of its datasets, once all are prepared
        self._evaluated: Any = None
        self._pair_log = PairLog()
        self._token_budget: tuple[Any, TokenBudget] | None = None  # of a dataset
        self._reads = LateReads()
        self._found: list[Tensor] = []  # by the checks of a micro-batch that is read late: pairs, `(B,)` bool
        # Checks of the first loss, made once: that TRL reads what it is handed, and that the reference is the policy.
        self._models_are_ready = False
        self._whole_layers = 0  # of the policy, that ZeRO-3 gathers
        self._seam_is_checked = False
        self._start_is_checked = False
        with trl_seam.loads_on_one_device(args), trl_seam.before_sharding(partial(gather_whole_layers, trained=False)):
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
        if self._token_values:
            trl_seam.require_rows_of_tokens(self, args.weighting if weighting is None else str(weighting))
            self._collate_stored_rows()
        self._own_names = frozenset(self.dropped_pairs)
        # Where the device works on its own, a training step does not wait for what it has to check and to log.
        self._reads_late: bool = self.accelerator.device.type == "cuda"
        self._reference_is_copy = ref_model is None and not has_adapter(self.model)
        if weighting is None and "ld" in split(args.weighting):
            self.ld_alpha = None  # the weights carry it
        self.token_budget()  # what it refuses is refused before training

    def _look_at_models(self) -> None:
        """Refuses a policy without the hidden states that are asked for; makes split models fit TRL's loss. Once."""
        if self._models_are_ready:
            return
        self._models_are_ready = True
        for model in (self.model, self.ref_model):
            if model is not None:
                require_decoder_alone(model)
        self.on_models_loaded()
        if trl_seam.shards_parameters(self.accelerator):
            self._whole_layers = gather_whole_layers(self.model, trained=True)
        check_hidden_layer(self.model, self.args.hidden_layer)
        for model in (self.model, self.ref_model):
            if model is not None:
                trl_seam.bring_router_logits_to_head(model)
        self._laid_out = LaidOutModels(self)

    def on_models_loaded(self) -> None:
        """Called once when policy and reference are loaded and neither has run; override it to set how they run.

        It does nothing here: a model runs as whoever loaded it said, its attention and its experts too.
        """

    # How the rows are laid out

    @property
    def layout(self) -> Layout:
        """How the rows of micro-batches are laid out for the model, and why."""
        return self._laid_out.layout

    @contextmanager
    def _plans_rows(self, dataset: Any) -> Iterator[None]:
        """Lets loaders that are made inside the block plan the rows on the host.

        Loaders that gather batches on one process and cut them anew for the others are planned late. accelerate makes
        those by `dispatch_batches`, and of streams unless it is false, which TRL sets where it trains on a stream.
        """
        collator, asked = self.data_collator, self.accelerator.dispatch_batches
        is_cut_anew = isinstance(dataset, IterableDataset) if asked is None else asked
        if self.layout.way is not None and not is_cut_anew:
            self.data_collator = PlanningCollator(collator, share=self.layout.shares)
        try:
            yield
        finally:
            self.data_collator = collator

    def token_weights(self, batch: PairBatch) -> Tensor | TokenWeights:
        """Weights of the tokens of a batch of pairs; override this for a weighting that needs the trainer.

        Runs without gradients and outside autocast, once for each micro-batch.

        Args:
            batch: Mask, tokens, log-probabilities and hidden states of the micro-batch.

        Returns:
            Weights of the shape of `batch.mask`, none of them negative, alone or with numbers to log.
        """
        return self.weighting(batch)

    def describe_weighting(self) -> str:
        """The weighting that is used and its options, in one line."""
        if type(self).token_weights is not OTPOTrainer.token_weights:
            return f"{type(self).__name__}.token_weights"
        is_named = same_weighting(self.weighting, make_weighting(self.args))
        return self.args.describe_weighting() if is_named else "a weighting of your own"

    def _refuse_other_options(self) -> None:
        """Raises a `ValueError` where `args` names another weighting, or other options of it, than the trainer has."""
        if self.weighting is not self._named_weighting:
            return
        check_weighting(self.args)
        if not same_weighting(self.weighting, make_weighting(self.args)):
            raise ValueError(
                f"`args` was changed to {self.args.describe_weighting()!r} after the trainer was made, which weighs "
                "by what it said before. Make the trainer anew with these options."
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as [`trl.DPOTrainer`] does; callbacks that look at the weights get to know the trainer first.

        Raises:
            ValueError: A stream was read to its end and no pair of it could be trained on, or the weighting's options
                were changed after the trainer was made.
        """
        self._refuse_other_options()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TrainerWatcher):
                callback.attach(self)
        self._reads.forget()
        try:
            result = super().train(*args, **kwargs)
        except Exception:
            self._reads.read()  # an optimizer or a callback may have failed on what the step before has found
            raise
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
        name, numbers = self._name_of(dataset_name), numbers_of(dataset)
        require_preference_columns(dataset, name)
        dataset = as_lists(dataset, name)
        dataset = self._tokenized(dataset, processing_class, args, name, numbers)
        if not args.precompute_ref_log_probs:
            dataset = without_stored(dataset)
        drops = (
            isinstance(dataset, IterableDataset) if args.drop_identical_pairs is None else args.drop_identical_pairs
        )
        rule = PairRule(args.max_length, args.truncation_mode, drops)
        dataset = with_token_values(
            dataset,
            self._token_values,
            rule,
            tokenizer_of(processing_class),
            name,
            numbers=numbers,
            processes=args.dataset_num_proc,
            first=args.main_process_first(desc="values of tokens"),
        )
        return self.prepared_datasets.prepare(dataset, rule, name, numbers)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        columns = [column for kind in self._token_values for column in kind.columns]
        self._signature_columns += [column for column in columns if column not in self._signature_columns]

    def _collate_stored_rows(self) -> None:
        """Lets batches have what prepared rows hold of numbers of tokens."""
        if not isinstance(self.data_collator, StoredRowsCollator):
            self.data_collator = StoredRowsCollator(self.data_collator, self._token_values)

    def _name_of(self, dataset_name: str) -> str:
        """What a dataset is called: TRL's name for it, unless that is another one's already.

        TRL prepares the training dataset first, as "train"; an evaluation dataset may be called so by its user, and
        one that is passed to `evaluate` is called as the trainer's own.
        """
        if self._own_names is not None:
            return f"evaluate({dataset_name})" if dataset_name in self._own_names else dataset_name
        return free_name(dataset_name, self.dropped_pairs)

    def _tokenized(self, dataset: Any, processing_class: Any, args: OTPOConfig, name: str, numbers: Any) -> Any:
        """The dataset with token columns, by TRL's own tokenization."""
        columns = dataset.column_names
        if columns is not None and has_tokens_alone(columns):
            return dataset
        looked_at = dataset if columns is not None else dataset.map(FirstRow(name))
        # TRL drops pairs whose prompt fills `max_length` unseen; without the limit it drops none, and we count.
        try:
            return super()._prepare_dataset(looked_at, processing_class, trl_seam.without_length_limit(args), name)
        except AlreadyTokenized:
            return dataset
        except StopIteration as error:
            raise ValueError(no_rows(name)) from error
        except Exception:
            if isinstance(dataset, Dataset):
                check_pairs(dataset, name, numbers)  # which names the row, if that is at fault
            raise

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, also of rows that are not tokenized yet, as `evaluate` takes them."""
        if self.prepared_datasets.get(test_dataset) is None and not trl_seam.has_images(self):
            processing_class: Any = self.processing_class
            test_dataset = self._prepare_dataset(test_dataset, processing_class, self.args, "test")
        return super().predict(test_dataset, *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As in transformers; the dataset is kept while it is evaluated, to name rows of it."""
        if isinstance(eval_dataset, str):
            self._evaluated = self.eval_dataset[eval_dataset]
        else:
            self._evaluated = self.eval_dataset if eval_dataset is None else eval_dataset
        with self._plans_rows(self._evaluated):
            return super().get_eval_dataloader(eval_dataset)

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of rows of a prepared dataset, on the trainer's device, as [`score_batch`] takes it."""
        return self._prepare_inputs(self.data_collator(examples))

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        self._laid_out.keep_plan(inputs)
        return inputs

    # Training batches by a number of tokens

    def token_budget(self) -> TokenBudget | None:
        """The micro-batches of `tokens_per_batch`; None where a number of pairs makes them.

        Raises:
            ValueError: The training dataset or the processes don't go with it.
        """
        if self.args.tokens_per_batch is None or self.train_dataset is None:
            return None
        if self._token_budget is None or self._token_budget[0] is not self.train_dataset:
            self._token_budget = self.train_dataset, make_budget(self)
        return self._token_budget[1]

    def get_train_dataloader(self) -> DataLoader:
        """As in transformers, or the micro-batches of `tokens_per_batch`.

        Where rows are laid out without padding, batches come with their plans.
        """
        budget = self.token_budget()
        with self._plans_rows(self.train_dataset):
            if budget is None:
                return super().get_train_dataloader()
            return make_loader(self, budget, self._remove_unused_columns(self.train_dataset, "training"))

    def get_total_train_batch_size(self, args: Any) -> int:
        """Pairs of a step, for the times that transformers logs; with `tokens_per_batch` their mean."""
        budget = self.token_budget()
        if budget is None:
            return super().get_total_train_batch_size(args)
        return round(budget.pairs_per_batch * args.gradient_accumulation_steps * budget.processes)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in transformers; batches of `tokens_per_batch` get to know their part in the step."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        trl_seam.copy_without_waiting(self.accelerator)
        share_steps(batches, self.accelerator.num_processes)
        return batches, items

    # The reference, precomputed

    def _precompute_ref_logps(self, dataset, name, batch_size):
        if isinstance(dataset, IterableDataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)  # which says that it can't
        self._look_at_models()  # the pass takes long, and what training would refuse is refused before it
        self._collate_stored_rows()
        joined = with_reference_rows(
            dataset,
            name,
            self._reference_key(dataset),
            self.accelerator,
            lambda: self._reference_rows(dataset, name, batch_size),
        )
        self.prepared_datasets.replace(dataset, joined)
        return joined

    def _reference_key(self, dataset: Dataset) -> int:
        """What the reference's log-probabilities of a dataset depend on."""
        reference = self.accelerator.unwrap_model(self.model if self.ref_model is None else self.ref_model)
        settings = (
            self.args.max_length,
            self.args.truncation_mode,
            self.accelerator.mixed_precision,
            self.accelerator.device.type,
            torch.get_float32_matmul_precision(),
            self.layout.name,
            self.layout.way,
            Hasher.hash(self.data_collator.collator),
        )
        return reference_key(dataset, reference, trl_seam.reference_digest(self), *settings)

    def _reference_rows(self, dataset: Any, name: str, batch_size: int) -> Any:
        with self._plans_rows(dataset):
            collator = self.data_collator
        loader = DataLoader(
            dataset,
            batch_size=batch_size,
            collate_fn=collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        model = trl_seam.model_of_reference_pass(self)

        def ask(inputs: Mapping[str, Any]) -> Tensor:
            self._laid_out.settle(model, inputs)
            return self._reference_logps(model, inputs)

        return reference_rows(loader, name, ask, self.accelerator, quiet=bool(self.args.disable_tqdm))

    # Scores and weights

    def score_batch(
        self,
        model: Callable[..., Any],
        inputs: Mapping[str, Any],
        *,
        reference: bool = True,
        timer: DeviceTimer | None = None,
    ) -> Scored:
        """Runs policy and reference on a batch and makes its weights.

        The loss is made of this, and so are the pages of `otpo explain`. It logs nothing, counts nothing and draws no
        random numbers but the model's and the weighting's. Precision, gradients and dropout are those of the caller:
        outside of training open `accelerator.autocast()` and `torch.no_grad()` around it, and put the model into its
        evaluation mode. Override it for losses that need more of the models than log-probabilities.

        Args:
            model: The policy as it is called, with whatever engine is around it: what `compute_loss` is given.
            inputs: A collated batch on the policy's device, see [`collate`].
            reference: Whether the reference is asked; else its log-probabilities are zeros.
            timer: Times the weights.

        Raises:
            FloatingPointError: A hidden state, a weight or a log-probability is not finite, or a weight is negative;
                the message names the row.
            TypeError: The weighting returned no tensor, or logs what is no number.
            ValueError: The weighting's answer can't be used, or the batch lacks precomputed log-probabilities.
        """
        # The policy, with its hidden states taken on the way.
        mask = inputs["completion_mask"][:, 1:].bool()
        causal_lm = self._laid_out.unwrapped(self.model)
        self._laid_out.settle(model, inputs)
        with captured_states(causal_lm, self.args.hidden_layer) as captured:
            outputs = self._ask(model, inputs, router_logits=self.aux_loss_enabled)
        # Prompt-learning adapters prepend virtual tokens; the real ones are the last.
        logps: Tensor = outputs.log_probs[:, -mask.size(1) :]
        if not captured:
            raise RuntimeError(
                "The model ran without its backbone's forward hook, so there are no hidden states to weight by. "
                "A graph that `torch.compile` made earlier in this process does that: call `torch._dynamo.reset()`."
            )
        states = self._laid_out.scored_states(captured.pop(), inputs).to(mask.device)
        self._require_finite(states_not_finite(states, logps, mask), "Hidden states or log-probabilities", inputs)

        # The reference: stored rows, or a pass of its model.
        reference_logps = torch.zeros_like(logps)
        if reference and self.args.precompute_ref_log_probs:
            reference_logps = self._stored_logps(inputs, mask)
        elif reference:
            reference_model = self.model if self.ref_model is None else self.ref_model
            reference_logps = self._reference_logps(reference_model, inputs)

        # The weights. The weighting gets copies of what is small, and may not write into the rest.
        batch = PairBatch(
            mask.clone(),
            inputs["input_ids"][:, 1:].clone(),
            logps.detach().clone(),
            states,
            self.state.global_step,
            model_inputs(inputs),
            reference_logps.clone() if reference else None,
            {
                name: unpack_rows(rows, mask, self._reads.add, what=f"{name} of tokens")
                for name, rows in inputs.get(TOKEN_VALUES, {}).items()
            },
        )
        weights, metrics = self._weigh(batch, mask, logps.dtype, timer or DeviceTimer())
        bad = ~weights.isfinite() | (weights < 0) | (~reference_logps.isfinite() & mask)
        self._require_finite(bad, "Weights or reference log-probabilities", inputs, besides=", or weights negative,")
        return Scored(outputs, logps, reference_logps, weights, mask, metrics, batch)

    def _ask(self, model: Any, inputs: Mapping[str, Any], *, router_logits: bool = False) -> Any:
        """A model's answer to a batch, see [`otpo.layouts.models.LaidOutModels.ask`]."""
        return self._laid_out.ask(model, inputs, router_logits=router_logits)

    def _weigh(
        self, batch: PairBatch, mask: Tensor, dtype: torch.dtype, timer: DeviceTimer
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The weights of a batch, `(2B, T)`, zero outside the mask, and the weighting's own numbers to log."""
        versions = tensor_versions(batch)
        with torch.no_grad(), torch.autocast(mask.device.type, enabled=False), timer.region(mask.device):
            answer = self.token_weights(batch)
        require_unwritten(batch, versions)
        values, metrics = read_answer(answer, mask)
        # Positions outside the mask may hold NaN, which would spoil the sums, even times zero.
        return values.detach().to(device=mask.device, dtype=dtype).masked_fill(~mask, 0.0), metrics

    def _reference_logps(self, model: Callable[..., Any], inputs: Mapping[str, Any]) -> Tensor:
        """The reference's log-probability of each token, `(2B, T)`, under the adapters of TRL's own reference pass."""

        def answer(**_of_padded_rows: Any) -> Any:
            return self._ask(model, inputs)

        compute = super().compute_ref_log_probs.__func__
        return trl_seam.reference_logps(compute, self, self._laid_out.unwrapped(self.model), answer, inputs)

    def _stored_logps(self, inputs: Mapping[str, Any], mask: Tensor) -> Tensor:
        missing = [name for name in REFERENCE_COLUMNS if name not in inputs]
        if missing:
            raise ValueError(
                f"`precompute_ref_log_probs=True`, and the batch has no {missing[0]!r}. Pass the dataset to the "
                "trainer as `train_dataset` or `eval_dataset`, or to `evaluate`, which precompute it."
            )
        return unpack_rows(torch.cat([inputs[name] for name in REFERENCE_COLUMNS]), mask, self._reads.add)

    def _require_finite(self, bad: Tensor, what: str, inputs: Mapping[str, Any], besides: str = "") -> None:
        evaluating = trl_seam.mode_of(self) == "eval" and self._evaluated is not None
        dataset = self._evaluated if evaluating else self.train_dataset
        known = None if dataset is None else self.prepared_datasets.get(dataset)
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        check = partial(
            require_finite_pairs,
            what=what,
            find_rows=lambda pair: self.prepared_datasets.find(dataset, tokens, pair),
            dataset="training" if dataset is self.train_dataset or known is None else known.name,
            step=self.state.global_step,
            late=self._reads.in_step,
            besides=besides,
        )
        found = pairs_not_finite(bad)
        self._reads.add(found, check)
        if self._reads.in_step:
            self._found.append(found)

    # The loss

    def training_step(self, *args, **kwargs):
        """As in TRL. On a GPU nothing of it is waited for: what a step finds out about itself is read in the next one.

        Whatever logs, evaluates or saves reads it before, so that no checkpoint follows a step with numbers that are
        not finite.
        """
        self._found.clear()
        if self._whole_layers:
            require_trained_leaves(self.model)
        with self._reads.step(late=self._reads_late):
            return super().training_step(*args, **kwargs)

    def _compute_loss(self, model, inputs, return_outputs):
        share: BatchShare | None = inputs.pop(SHARE, None)
        if not self._seam_is_checked:
            trl_seam.require_known_loss(self, super()._compute_loss, late=self._reads_late)
            self._seam_is_checked = True
        late = trl_seam.LateMetrics(self) if self._reads.in_step else None
        mode = trl_seam.mode_of(self)
        scored = self.score_batch(model, inputs, timer=self._pair_log.timers[mode])
        self._check_start(model, inputs, scored)

        # Loss types that take the same weights share a call of TRL's loss. The first call's metrics and outputs are
        # the ones that count. With several calls the routers' loss comes after all: the order decides the last bit.
        first, *others = loss_groups(self.loss_types, self.loss_weights)
        result, sums = self._loss_of(
            first, model, inputs, scored, return_outputs=return_outputs, is_alone=not others, late=late
        )
        for group in others:
            part, _ = self._loss_of(group, model, inputs, scored, is_first=False, late=late)
            result = _added(result, part)
        if others and self.aux_loss_enabled:
            result = _added(result, self.router_aux_loss_coef * scored.outputs.aux_loss)

        loss = result[0] if return_outputs else result
        self._log_pairs(mode, scored, first.loss_types[0], sums, inputs, loss, late, share)
        return result if share is None else _multiplied(result, share.factor)

    def _loss_of(
        self,
        group: LossGroup,
        model: Any,
        inputs: Mapping[str, Any],
        scored: Scored,
        *,
        return_outputs: bool = False,
        is_first: bool = True,
        is_alone: bool = False,
        late: trl_seam.LateMetrics | None = None,
    ) -> tuple[Any, tuple[Tensor, ...]]:
        """TRL's loss of a group of loss types, and the reference's sums that it was given, `(B,)` a side."""
        weights = scored.weights_for(group.loss_types[0])
        sums = self._summed(scored.reference_logps * weights, inputs)
        options: dict[str, Any] = {"loss_types": group.loss_types, "loss_weights": group.coefficients}
        # The first call logs the routers' loss, and adds it too where it is the only one.
        options["aux_loss_enabled"] = self.aux_loss_enabled and is_first
        if options["aux_loss_enabled"] and not is_alone:
            options["router_aux_loss_coef"] = 0.0
        names = trl_seam.policy_argument_names(inputs, router_logits=options["aux_loss_enabled"])
        stand_in = trl_seam.ModelStandIn(model, scored.outputs_with(weights), names)
        loss = trl_seam.dpo_loss(
            self,
            super()._compute_loss,
            stand_in,
            inputs,
            sums,
            return_outputs=return_outputs,
            logs=is_first,
            late=late,
            **options,
        )
        return loss, sums

    def _summed(self, logps: Tensor, inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Sums per-token log-probabilities as TRL does, `ld_alpha` included: `(B,)` of chosen and of rejected."""
        return trl_seam.summed(super().compute_ref_log_probs.__func__, self, logps, inputs)

    def _check_start(self, model: Any, inputs: Mapping[str, Any], scored: Scored) -> None:
        """Refuses a reference that is made as the policy's copy and isn't one, before this trainer's first step.

        Dropout and other noise of training makes a difference too, so what looks different is asked again without.
        All processes go the same way, since each may hold a shard of the model.
        """
        if self._start_is_checked or trl_seam.mode_of(self) != "train":
            return
        self._start_is_checked = True
        if not self._reference_is_copy or self.state.global_step > 0:
            return

        def largest_gap(logps: Tensor) -> float:
            gap = start_gap(logps.detach(), scored.reference_logps, scored.mask)
            return self.accelerator.gather(gap.reshape(1)).max().item()  # pyright: ignore

        if not is_same_start(largest_gap(scored.policy_logps)):
            with torch.no_grad(), evaluating(model):
                outputs = self._ask(model, inputs)
            require_same_start(largest_gap(outputs.log_probs[:, -scored.mask.size(1) :]))

    # The log and the checkpoints

    def _log_pairs(
        self,
        mode: str,
        scored: Scored,
        loss_type: str,
        sums: tuple[Tensor, ...],
        inputs: Mapping[str, Any],
        loss: Tensor,
        late: trl_seam.LateMetrics | None,
        share: BatchShare | None,
    ) -> None:
        """Adds what is known of each pair to the log, beside TRL's numbers of the micro-batch.

        Args:
            mode: `"train"` or `"eval"`.
            scored: The micro-batch.
            loss_type: The one whose weights TRL's `rewards/*` have.
            sums: The reference's weighted sums that TRL was given, `(B,)` of chosen and of rejected.
            inputs: The batch.
            loss: The micro-batch's mean loss.
            late: TRL's numbers, where they are not known yet: these and ours then cross the processes together.
            share: How many pairs count, in training by a number of tokens.
        """
        columns = pair_columns(scored, self.beta)
        if mode == "eval":
            kept = trl_seam.pairs_without_repeats(self.accelerator, scored.pairs)
        else:
            kept = share.kept(scored.pairs * self.accelerator.num_processes) if share else None
        if kept is not None:  # TRL counts the repeated pairs too, so its numbers of this batch are replaced
            weighted = scored.policy_logps.detach() * scored.weights_for(loss_type)
            columns |= trl_columns(torch.cat(self._summed(weighted, inputs)), torch.cat(sums), self.beta)
        table, collected = pair_table(columns, scored.metrics, loss), trl_seam.collected_metrics(self)
        gather: Any = self.accelerator.gather
        counted = share.of_all if share else 1
        if late is not None:
            row, summary, step = late.row(), table.summary(), self.state.global_step
            found = torch.stack([pairs.sum() for pairs in self._found]).sum() if self._found else row.new_zeros(())

            def enter(rows: Tensor) -> None:
                require_finite_everywhere(rows[:, -1], step)
                late.enter(rows[:, : len(row)])
                # Where pairs are repeated, each process has one.
                summaries = rows[:kept, len(row) : -1].unflatten(1, summary.shape)
                self._pair_log.add(mode, collected, table, summaries, counted)

            self._reads.add(gather(torch.cat([row, summary.flatten(), found.double()[None]])[None]), enter)
        elif mode == "eval":
            self._pair_log.add_evaluated(collected, table, gather(table.values).cpu()[:kept])
        else:
            summaries = table_summary(gather(table.values).cpu()[:kept])[None]
            self._pair_log.add(mode, collected, table, summaries, counted)

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
        self._reads.read()
        self._pair_log.start_evaluation(trl_seam.collected_metrics(self, "eval"))
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self._evaluated = None
        loss = self._pair_log.evaluation_loss()
        if loss is not None and output.metrics:
            output.metrics[f"{metric_key_prefix}_loss"] = loss
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, an evaluation's as means over pairs, with the weights' time, which is read off the device here.

        Warns of transport that was not solved: on a GPU nothing may wait for the solver, and here its residual is on
        the host. Anywhere else the solver has looked itself.
        """
        self._reads.read()
        collected = trl_seam.collected_metrics(self)
        residuals = collected.get("transport/residual")
        if residuals and self.accelerator.device.type == "cuda" and self.is_world_process_zero():
            warn_unsolved(max(residuals), self.args.transport_options())
        self._pair_log.average(trl_seam.mode_of(self), collected)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model, unless a parameter is not finite: a bad step must not take a good checkpoint's place."""
        self.check_before_saving()
        super().save_model(output_dir, _internal_call)

    def check_before_saving(self) -> None:
        """Raises where a number is not finite; a subclass that writes models in a way of its own calls it first."""
        self._reads.read()
        require_finite_parameters(self.model, self.accelerator, self.state.global_step)


def _multiplied(result: Any, factor: float) -> Any:
    """A loss, or a loss with the model's outputs, times a number."""
    return (result[0] * factor, result[1]) if isinstance(result, tuple) else result * factor


def _added(result: Any, loss: Tensor) -> Any:
    """A loss, or a loss with the model's outputs, and another loss."""
    return (result[0] + loss, result[1]) if isinstance(result, tuple) else result + loss

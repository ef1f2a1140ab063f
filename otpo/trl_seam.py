"""Every private or undocumented thing of TRL, transformers and accelerate that the library leans on, by name.

Each function says who reads the thing there and what breaks if it changes. A release that renames one of them would
mostly go on without an error and train on another loss. So what is handed over records that it was read, the first
loss of a trainer is preceded by one of made-up numbers whose value is known, and `tests/otpo/test_trl_seam.py`
compares signatures and the order of calls with what is installed, and names the function here that has to change.
The file is over 350 lines since it is the one place to look at when a release of TRL breaks something.

Shapes: B pairs, T scored positions; rows are the chosen responses, then the rejected ones.
"""

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from accelerate import DistributedType
from accelerate import accelerator as accelerate_accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import parse_flag_from_env
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing, prepare_deepspeed
from trl.trainer import dpo_trainer
from trl.trainer.utils import FusedCausalLMOutput, get_config_model_id, use_adapter

from .plain_model import has_adapter, without_adapter
from .training.late_numbers import LateGathered, LateNumber, LocalNumbers

REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
"""Where `DPOTrainer._compute_loss` looks up the reference's sums when `precompute_ref_logps` is set."""

NOT_OF_THE_MODEL = ("completion_mask", *REFERENCE_COLUMNS)
"""Entries of a batch that `DPOTrainer._compute_loss` does not call its model with (`_non_model_keys` there)."""

ROW_PLAN = "row_plan"
"""The entry of a batch that is ours, an [`otpo.layouts.plan.RowPlan`]: neither the model nor TRL gets it."""

TOKEN_VALUES = "token_values"
"""The entry of a batch that is ours too: tensors `(2B, W)` by name, of the completions' scored tokens, in rows."""

OURS = (ROW_PLAN, TOKEN_VALUES)
"""All entries that are."""

OVERRIDDEN = {
    "_prepare_dataset": ("dataset", "processing_class", "args", "dataset_name"),
    "_precompute_ref_logps": ("dataset", "name", "batch_size"),
    "_compute_loss": ("model", "inputs", "return_outputs"),
    "compute_ref_log_probs": ("model", "inputs"),
    "log": ("logs", "start_time"),
    "save_model": ("output_dir", "_internal_call"),
    "training_step": ("args", "kwargs"),
    "get_eval_dataloader": ("eval_dataset",),
    "evaluation_loop": ("dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"),
    "_prepare_inputs": ("inputs",),
    "create_accelerator_and_postprocess": (),
    "get_train_dataloader": (),
    "_remove_unused_columns": ("dataset", "description"),
    "_set_signature_columns_if_needed": (),
    "get_total_train_batch_size": ("args",),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_best_model": (),
    "_prepare_for_training": ("max_steps", "train_dataloader", "resume_from_checkpoint"),
}
"""Methods of `DPOTrainer` that [`otpo.OTPOTrainer`] overrides or calls, with their parameters after `self`."""

CLASS_ATTRIBUTES = ("_name", "_paper", "_tag_names")
"""What `DPOTrainer` puts on model cards and the Hub: the trainer's name, its paper, its tags."""

IMPORTED_ELSEWHERE = {
    "trl.cli.accelerate_config": ("resolve_accelerate_config_argument",),
    "trl.trainer.utils": ("create_model_from_path",),
    "trl.chat_template_utils": ("get_training_chat_template", "has_generation_markers"),
    "accelerate.commands.config": ("default_config_file", "load_config_from_file"),
    "accelerate.commands.config.config_args": ("ClusterConfig",),
    "accelerate.commands.launch": ("launch_command", "launch_command_parser"),
    "transformers.integrations.integration_utils": (
        *("INTEGRATION_TO_CALLBACK", "get_available_reporting_integrations"),
        *("is_azureml_available", "is_flytekit_available"),
    ),
    "transformers.models.qwen3_moe.modeling_qwen3_moe": ("Qwen3MoeRotaryEmbedding",),
}
"""Undocumented names that the commands import themselves, since this file would make them start slowly. One that is
renamed ends in an `ImportError`."""

_TOLERANCE = 1e-4


class SeamError(RuntimeError):
    """The installed TRL does not read what it is handed, so its loss would be another one."""


# The loss


def policy_arguments(inputs: Mapping[str, Any], *, router_logits: bool) -> dict[str, Any]:
    """What `DPOTrainer._compute_loss` calls its model with, in its first lines.

    If a name is added or taken away there, [`dpo_loss`] refuses the first step. That the values are TRL's, the tests
    of the seam compare with the installed release.

    Args:
        inputs: A collated batch.
        router_logits: The trainer's `aux_loss_enabled`.
    """
    arguments = {name: value for name, value in inputs.items() if name not in (*NOT_OF_THE_MODEL, *OURS)}
    arguments["use_cache"] = False
    if router_logits:
        arguments["output_router_logits"] = True
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    return {**arguments, "labels": labels, "fused_lm_head": True}


def policy_argument_names(inputs: Mapping[str, Any], *, router_logits: bool) -> set[str]:
    """Names of [`policy_arguments`]."""
    of_trl = {"use_cache", "labels", "fused_lm_head", *(["output_router_logits"] if router_logits else [])}
    return (inputs.keys() - {*NOT_OF_THE_MODEL, *OURS}) | of_trl


class HandedInputs(dict[str, Any]):
    """A batch that knows which of its entries were looked up by name."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        """The entry."""
        self.read.add(name)
        return super().__getitem__(name)


class ModelStandIn:
    """What TRL's loss calls in the model's place: it answers with outputs that are there already.

    Args:
        model: The model, for the extra pass that TRL makes for `compute_metrics`.
        outputs: The answer, a `FusedCausalLMOutput`.
        names: Of the arguments that TRL has to call it with; None for made-up outputs, whose call is not compared.
    """

    def __init__(self, model: Any, outputs: Any, names: set[str] | None = None) -> None:
        self._model, self._outputs, self._names = model, outputs, names
        self.was_called = False

    def __call__(self, **arguments: Any) -> Any:
        """The outputs; the model's own where TRL wants its logits."""
        if not arguments.get("fused_lm_head"):
            return self._model(**arguments)
        if self._names is not None and arguments.keys() != self._names:
            different = sorted(arguments.keys() ^ self._names)
            raise SeamError(
                f"`DPOTrainer._compute_loss` calls its model with other arguments than `trl_seam.policy_arguments` "
                f"does; they differ in {different}. {_remedy()}"
            )
        self.was_called = True
        return self._outputs


def dpo_loss(
    trainer: Any,
    compute_loss: Callable[..., Any],
    stand_in: ModelStandIn,
    inputs: Mapping[str, Any],
    reference_sums: tuple[Tensor, ...],
    *,
    return_outputs: bool = False,
    logs: bool = True,
    late: "LateMetrics | None" = None,
    **options: Any,
) -> Any:
    """TRL's loss of outputs and reference sums that it is given.

    `DPOTrainer._compute_loss` reads its options off the trainer (`loss_types`, `loss_weights`, `beta`,
    `router_aux_loss_coef`, ...), takes the reference's sums from the batch where `precompute_ref_logps` is true, and
    adds to the trainer's `_metrics` and `_total_train_tokens`. They have other values while it runs, then their own.

    Args:
        trainer: The trainer.
        compute_loss: `DPOTrainer._compute_loss` of that trainer.
        stand_in: Answers in the model's place.
        inputs: The batch.
        reference_sums: The reference's summed log-probabilities, `(B,)` of chosen and of rejected.
        return_outputs: As in `_compute_loss`.
        logs: Whether TRL's metrics of this call count.
        late: Takes them, so that nothing waits for the device; None: TRL reads them at once.
        **options: Attributes of the trainer that have these values for this loss.

    Returns:
        The loss, or the loss and the model's outputs.

    Raises:
        SeamError: TRL did not call the stand-in, or did not read the sums.
    """
    # TRL reads options and metrics off the trainer, so they stand there for the call alone.
    handed = HandedInputs({**inputs, **dict(zip(REFERENCE_COLUMNS, reference_sums, strict=True))})
    for name in OURS:
        handed.pop(name, None)
    elsewhere: dict[str, Any] = {} if logs else _other_metrics()
    if late is not None:
        elsewhere |= late.attributes if logs else {"accelerator": late.attributes["accelerator"]}
    with (
        _replaced(trainer, precompute_ref_logps=True, **options, **elsewhere),
        nullcontext() if late is None else _WithoutWaits(),
    ):
        result = compute_loss(stand_in, handed, return_outputs)
    # A release that read something else would have computed another loss.
    missing = [name for name in REFERENCE_COLUMNS if name not in handed.read]
    if missing or not stand_in.was_called:
        what = f"the reference's {' and '.join(missing)}" if stand_in.was_called else "the model's stand-in"
        raise SeamError(f"`DPOTrainer._compute_loss` has not used {what}, so its loss is not OTPO's. {_remedy()}")
    return result


def require_known_loss(trainer: Any, compute_loss: Callable[..., Any], *, late: bool = False) -> None:
    """Raises a [`SeamError`] unless TRL's loss of made-up log-probabilities, weighted with 2, has a doubled beta.

    The model is not asked.

    Args:
        trainer: The trainer, whose attributes are TRL's options of the loss.
        compute_loss: `DPOTrainer._compute_loss` of that trainer.
        late: Whether the losses to come have [`LateMetrics`].
    """
    device = trainer.accelerator.device
    generator = torch.Generator().manual_seed(0)
    policy, reference = (-torch.rand(2, 4, 3, generator=generator)).to(device)
    ids = torch.ones(4, 4, dtype=torch.long, device=device)
    inputs = {"input_ids": ids, "attention_mask": ids, "completion_mask": ids}
    nothing = torch.zeros_like(policy)
    outputs = FusedCausalLMOutput(
        log_probs=2.0 * policy, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool(), label_mask=None
    )
    # Everything else that TRL could make of the numbers is off, so that the loss is known in closed form.
    plain: dict[str, Any] = {"loss_types": ["sigmoid"], "loss_weights": [1.0], "beta": 0.3, "ld_alpha": None}
    plain |= {"f_divergence_type": "reverse_kl", "use_weighting": False, "aux_loss_enabled": False}
    sums = (2.0 * reference).sum(1).chunk(2)
    stand_in = ModelStandIn(None, outputs)
    try:
        metrics = LateMetrics(trainer) if late else None
        found = float(dpo_loss(trainer, compute_loss, stand_in, inputs, sums, logs=False, late=metrics, **plain))
    except SeamError:
        raise
    except Exception as error:  # whatever a renamed attribute leads to
        raise SeamError(
            f"`DPOTrainer._compute_loss` fails on what `OTPOTrainer` hands it: {error!r}. {_remedy()}"
        ) from error
    chosen, rejected = (policy - reference).sum(1).chunk(2)
    expected = float(-logsigmoid(2.0 * plain["beta"] * (chosen - rejected)).mean())
    if not abs(found - expected) < _TOLERANCE:
        raise SeamError(
            f"`DPOTrainer._compute_loss` gives {found:.4f} for numbers whose loss is {expected:.4f}, so it does not "
            f"read what `OTPOTrainer` hands it. {_remedy()}"
        )


def reference_logps(
    compute_ref_log_probs: Callable[..., Any], trainer: Any, policy: Any, model: Any, inputs: Mapping[str, Any]
) -> Tensor:
    """The reference's log-probability of each token, `(2B, T)`.

    `DPOTrainer.compute_ref_log_probs` calls the model without gradients, and reads its `log_probs`; it returns their
    sums, and the tokens' own are kept on the way.

    Args:
        compute_ref_log_probs: `DPOTrainer.compute_ref_log_probs`, as a function of a trainer.
        trainer: The trainer.
        policy: Its policy without its engine.
        model: The reference, with its engine.
        inputs: A collated batch.
    """
    kept: list[Tensor] = []

    def keep(**arguments: Any) -> Any:
        outputs = on_device(model(**arguments), inputs["completion_mask"].device)
        kept.append(outputs.log_probs[:, 1 - inputs["completion_mask"].size(1) :])
        return outputs

    with policy_as_reference(trainer, policy) if trainer.ref_model is None else nullcontext():
        compute_ref_log_probs(_ReferenceOfItsOwn(trainer), keep, inputs)
    return kept.pop()


class _ReferenceOfItsOwn:
    """What `DPOTrainer.compute_ref_log_probs` reads of a trainer whose reference is another model than its policy.

    It switches adapters and checkpointing of the policy off and on around each call, also around one that only sums:
    four walks through all modules and more, which take longer than the step of a small model. What is needed of it,
    [`policy_as_reference`] does in one walk.
    """

    def __init__(self, trainer: Any) -> None:
        self.accelerator, self.args, self.ld_alpha = trainer.accelerator, trainer.args, trainer.ld_alpha
        self.model = SimpleNamespace(is_gradient_checkpointing=False)
        self.ref_model = self.model


@contextmanager
def policy_as_reference(trainer: Any, policy: Any) -> Iterator[None]:
    """The policy without its adapter, or with the adapter that TRL keeps as "ref", and without checkpointing.

    PEFT's layers look at `_disable_adapters`, which `PeftModel.disable_adapter` sets in all of them after it has
    listed every layer's status, and then switches gradients off and on, which a pass without gradients has no use for.

    Args:
        trainer: The trainer.
        policy: Its policy without its engine.
    """
    if not _has_plain_adapter(policy):
        adapted = has_adapter(policy)
        with (
            disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs),
            use_adapter(policy, "ref" if "ref" in policy.peft_config else None) if adapted else nullcontext(),
        ):
            yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    switched: list[tuple[Any, str, bool]] = []
    for module in policy.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            switched.append((module, "_disable_adapters", True))
        if vars(module).get("gradient_checkpointing"):  # PEFT's wrappers would answer for the model
            switched.append((module, "gradient_checkpointing", False))
    before = [getattr(module, name) for module, name, _ in switched]
    for module, name, value in switched:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(switched, before, strict=True):
            setattr(module, name, value)


def _has_plain_adapter(policy: Any) -> bool:
    """Whether PEFT's adapter is one whose layers look at an attribute; what does more, or has more to say, is not."""
    if not has_adapter(policy) or "ref" in policy.peft_config:
        return False
    from peft.tuners.tuners_utils import BaseTuner

    tuner: Any = type(policy.base_model)
    is_plain = getattr(tuner, "disable_adapter_layers", None) is BaseTuner.disable_adapter_layers
    return is_plain and getattr(policy.peft_config[policy.active_adapter], "bias", "none") == "none"


def scores_rows(causal_lm: Any) -> None:
    """Lets TRL's fused head score chosen positions of rows that are laid out in another way, see [`scored_rows`].

    `trl.trainer.utils.add_fused_lm_head` has put a function in the place of `causal_lm.forward`, which asks its first
    argument for `base_model` and `get_output_embeddings()`. It gets one that answers for the model. Calls without
    `scored_positions` run as before. Calling this again changes nothing.

    Args:
        causal_lm: A causal language model with TRL's head, or a PEFT model around it.
    """
    causal_lm = getattr(causal_lm, "_orig_mod", causal_lm)  # `torch_compile` has compiled the reference by now
    plain = without_adapter(causal_lm)
    fused = plain.forward
    if hasattr(fused, "scores_rows"):
        return

    @functools.wraps(fused.__func__)
    def forward(self: Any, *args: Any, scored_positions: Tensor | None = None, **kwargs: Any) -> Any:
        # The model is `self`, which in a copy of the model is the copy.
        if scored_positions is None:
            return fused.__func__(self, *args, **kwargs)
        # Compilers can't trace such labels, nor do they count the labelled positions without waiting.
        if not torch.compiler.is_compiling():
            kwargs["shift_labels"] = _AllLabelled.of(kwargs["shift_labels"])
        return fused.__func__(_ScoredPositions(self, scored_positions), *args, **kwargs)

    forward.scores_rows = True  # pyright: ignore
    plain.forward = MethodType(forward, plain)


def row_arguments(
    tokens: dict[str, Any], scored: Tensor, targets: Tensor, copies: Tensor, *, router_logits: bool
) -> dict[str, Any]:
    """What a model of [`scores_rows`] is called with to score chosen positions.

    Args:
        tokens: `input_ids` and `position_ids` `[1, N]`, and what the attention needs, `attention_mask` too.
        scored: `[S]`, positions within N that predict, any of them several times.
        targets: `[S]`, the tokens that they predict.
        copies: `[1, N]`, how often each token counts in the routers' loss.
        router_logits: Whether the routers' loss is asked for.
    """
    attention = {"attention_mask": tokens["attention_mask"]}
    arguments = {name: value for name, value in tokens.items() if name != "attention_mask"}
    arguments |= {"scored_positions": scored, "row_attention": attention, "use_cache": False, "fused_lm_head": True}
    # TRL's head hands its `attention_mask` to the routers' loss, which weighs each token by it.
    arguments |= {"shift_labels": targets[None], "attention_mask": copies}
    return {**arguments, "output_router_logits": True} if router_logits else arguments


class _ScoredPositions:
    """Answers for a causal LM in TRL's fused head, with the hidden states of the scored positions in a row."""

    def __init__(self, causal_lm: Any, positions: Tensor) -> None:
        self._causal_lm, self._positions = causal_lm, positions

    def base_model(self, *args: Any, row_attention: dict[str, Any], **kwargs: Any) -> Any:
        """The backbone's outputs, whose last hidden states are `[1, S, D]`."""
        outputs = self._causal_lm.base_model(*args, **{**kwargs, **row_attention})
        states = outputs.last_hidden_state.flatten(0, 1)
        outputs.last_hidden_state = states.index_select(0, self._positions.to(states.device))[None]
        return outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._causal_lm, name)


class _AllLabelled(Tensor):
    """Labels none of which is -100, or the mask that says so.

    TRL's head takes the labelled positions out by a boolean mask, and the host waits for the device to learn how many
    there are. Here all are labelled, so taking them out is a change of shape. Everything else is as with any tensor.
    """

    @classmethod
    def of(cls, labels: Tensor) -> Tensor:
        """Labels as such a tensor."""
        return labels.as_subclass(cls)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Takes positions out, and puts them back, without looking at the mask; other functions run as they are."""
        last = args[1] if len(args) > 1 else None
        if isinstance(last, cls) and last.dtype == torch.bool:
            if func is Tensor.__getitem__:
                return _plain(args[0]).flatten(0, last.ndim - 1)
            if func is Tensor.masked_scatter:
                return args[2].view_as(args[0])
        result = super().__torch_function__(func, types, args, kwargs or {})
        stays = func in (Tensor.to, Tensor.ne, Tensor.__ne__)  # on its way to the device, and the comparison with -100
        return result if stays or not isinstance(result, cls) else _plain(result)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor) if isinstance(tensor, _AllLabelled) else tensor


def summed(compute_ref_log_probs: Callable[..., Any], trainer: Any, logps: Tensor, inputs: Any) -> tuple[Tensor, ...]:
    """Sums of per-token log-probabilities `(2B, T)` as TRL makes them, `(B,)` of chosen and of rejected.

    `DPOTrainer.compute_ref_log_probs` sums what its model answers, with `ld_alpha` past the shorter response.

    Args:
        compute_ref_log_probs: `DPOTrainer.compute_ref_log_probs`, as a function of a trainer.
        trainer: The trainer.
        logps: `(2B, T)`.
        inputs: A collated batch.
    """
    return compute_ref_log_probs(_ReferenceOfItsOwn(trainer), lambda **_: SimpleNamespace(log_probs=logps), inputs)


def on_device(outputs: Any, device: torch.device) -> Any:
    """A model's `FusedCausalLMOutput` on the device of the batch, where TRL's loss adds and masks it.

    A model that is split over devices leaves its log-probabilities on the last and the routers' loss on another one.
    """
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in outputs.items()}
    return type(outputs)(**moved)


def bring_router_logits_to_head(causal_lm: Any) -> None:
    """Makes the router logits of a model that is split over devices come out where its head is.

    TRL's head adds the routers' loss, which is computed where the first logits are, to the loss of the tokens.

    Args:
        causal_lm: The model, or a PEFT model around it.
    """
    if len({parameter.device for parameter in causal_lm.parameters()}) < 2:
        return
    plain = without_adapter(causal_lm)
    device = plain.get_output_embeddings().weight.device

    def move(_module: Any, _args: Any, outputs: Any) -> None:
        logits = outputs.get("router_logits")
        if logits is not None:
            outputs["router_logits"] = tuple(layer.to(device) for layer in logits)

    plain.base_model.register_forward_hook(move)


# The log


class LateMetrics:
    """The metrics of `DPOTrainer._compute_loss` of a micro-batch, which stay on the device until they are asked for.

    TRL gathers some fifteen numbers one by one over the processes and waits for each. It does so through
    `trainer.accelerator` with `gather` and `gather_for_metrics`, takes a sum or a mean, `.item()`, a quotient whose
    divisor it has found to be `> 0`, and adds the result to `_metrics` and `_total_train_tokens`. Here the accelerator
    answers with numbers that can do this and are known later. If TRL does anything else with one, its loss fails.

    Args:
        trainer: The trainer, in training.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._numbers = LocalNumbers()
        self.attributes = {"accelerator": _LateAccelerator(trainer.accelerator, self._numbers), **_other_metrics()}

    def row(self) -> Tensor:
        """This process's share, `(L,)` float64, after the loss."""
        return self._numbers.row()

    def enter(self, rows: Tensor) -> None:
        """Adds the metrics to the trainer's, where TRL would have added them.

        Args:
            rows: The shares of all processes, `(P, L)` on the host.
        """
        collected = collected_metrics(self._trainer, "train")
        for name, (number,) in self.attributes["_metrics"]["train"].items():
            value = number.of(rows) if isinstance(number, LateNumber) else number
            if name == "num_tokens":  # of the training so far, in place of the one before
                self._trainer._total_train_tokens += value
                collected[name] = [self._trainer._total_train_tokens]
            else:
                collected[name].append(value)


class _LateAccelerator:
    """The accelerator as `DPOTrainer._compute_loss` knows it, see [`LateMetrics`]."""

    def __init__(self, accelerator: Any, numbers: LocalNumbers) -> None:
        self._accelerator, self._numbers = accelerator, numbers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, tensor: Tensor) -> LateGathered:
        return LateGathered(self._numbers, tensor, None)

    def gather_for_metrics(self, tensor: Tensor) -> LateGathered:
        """As accelerate's of a scalar: of one a process, it cuts off as many as the last batch has rows too few."""
        loop = self._accelerator.gradient_state
        is_cut = loop.end_of_dataloader and loop.remainder > 0 and self._accelerator.num_processes > 1
        return LateGathered(self._numbers, tensor, loop.remainder if is_cut else None)


class _WithoutWaits(TorchFunctionMode):
    """Inside, the two other things that `DPOTrainer._compute_loss` waits for are done without.

    It takes sums of `mean_logits`, and the mean of the `sft` loss, over what a mask selects; and it makes a scalar
    tensor of `label_smoothing`, which is a copy from the host.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            return _Selected(*args)
        if func is torch.tensor and isinstance(args[0], float):
            return torch.full((), args[0], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Selected:
    """The elements of a tensor where a mask of its shape is true, of which a sum or a mean is wanted."""

    def __init__(self, values: Tensor, mask: Tensor) -> None:
        self._values, self._mask = values.masked_fill(~mask, 0), mask

    def sum(self) -> Tensor:
        return self._values.sum()

    def mean(self) -> Tensor:
        wide = torch.promote_types(self._values.dtype, torch.float32)
        return (self._values.sum(dtype=wide) / self._mask.sum()).to(self._values.dtype)


def mode_of(trainer: Any) -> str:
    """`"train"` or `"eval"`, as `DPOTrainer._compute_loss` and `DPOTrainer.log` tell them apart."""
    return "train" if trainer.model.training else "eval"


def collected_metrics(trainer: Any, mode: str | None = None) -> dict[str, list[float]]:
    """Numbers of micro-batches by name, which `DPOTrainer.log` averages, prefixes in evaluations and clears.

    Args:
        trainer: The trainer.
        mode: `"train"` or `"eval"`; the present one when None.
    """
    return trainer._metrics[mode or mode_of(trainer)]


def pairs_without_repeats(accelerator: Any, pairs: int) -> int | None:
    """How many of all processes' pairs of a micro-batch are no repeats; None if no pair is a repeat.

    accelerate fills up the last batch on several processes with rows that were there before; `gather_for_metrics` cuts
    them off by `gradient_state`, which knows them while the loop is at its last batch. (In training the loop is ahead
    of the micro-batch that is computed, so there this can't be told.)

    Args:
        accelerator: The trainer's.
        pairs: Pairs of this process.
    """
    loop = accelerator.gradient_state
    is_filled_up = loop.end_of_dataloader and 0 < loop.remainder < pairs * accelerator.num_processes
    return loop.remainder if is_filled_up else None


# Batches


def loader_of_process(accelerator: Any, loader: DataLoader) -> DataLoader:
    """A loader of accelerate's around one whose batch sampler yields the batches of this process alone.

    `Accelerator.prepare` would share them among the processes again; `prepare_data_loader`, which it calls, leaves the
    batch sampler as it is where it is told of one process. `set_epoch` reaches the batch sampler there, and in resumed
    epochs, where `skip_first_batches` wraps it, by its attribute `sampler`.

    Args:
        accelerator: The trainer's.
        loader: With a batch sampler that has `set_epoch` and `sampler`.
    """
    return prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=accelerator.device_placement,
        rng_types=accelerator.rng_types.copy(),
        dispatch_batches=False,
        non_blocking=accelerator.non_blocking,
    )


def copy_without_waiting(accelerator: Any) -> None:
    """Lets the loader that is iterated over copy batches to the device as the options say.

    `skip_first_batches` makes the loader of a resumed epoch anew without `non_blocking`, so that each batch would wait
    for the device. The loaders read `_non_blocking` at each batch.

    Args:
        accelerator: The trainer's.
    """
    loader = accelerator.gradient_state.active_dataloader
    if loader is not None:
        loader._non_blocking = accelerator.non_blocking


def has_own_sampler(trainer: Any) -> bool:
    """Whether a trainer's class chooses the order of training rows itself, by `Trainer._get_train_sampler`."""
    return type(trainer)._get_train_sampler is not DPOTrainer._get_train_sampler


def loss_factor(pairs: int, of_step: int, batches: int, processes: int) -> float:
    """What a micro-batch's mean loss is multiplied by so that a step's loss and gradient are means over its pairs.

    `Trainer.training_step` divides each micro-batch's loss by their number in the step, and the engines average
    gradients over processes, as `Trainer._maybe_log_save_evaluate` averages what is logged.

    Args:
        pairs: Of the micro-batch.
        of_step: Of all micro-batches and processes in the step, at least 1.
        batches: Micro-batches of a process in the step.
        processes: How many there are.
    """
    return pairs * batches * processes / of_step


# Loading, before training


@contextmanager
def loads_on_one_device(args: Any) -> Iterator[None]:
    """Makes each of several processes load policy and reference on one device inside the block.

    `DPOTrainer.__init__` sees to that with DDP and DeepSpeed, by `distributed_state.distributed_type`. Under FSDP it
    takes the policy for DDP's and the reference for nobody's, and transformers would spread it over all visible GPUs.

    Args:
        args: The trainer's options, whose `model_init_kwargs` have a `device_map` inside the block.
    """
    chosen: Any = args.model_init_kwargs or {}
    sharded = args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")
    if args.world_size == 1 or not sharded or "device_map" in chosen:
        yield
        return
    with _replaced(args, model_init_kwargs={**chosen, "device_map": None}):
        yield


@contextmanager
def before_sharding(change: Callable[[Any], Any]) -> Iterator[None]:
    """Has a reference changed before ZeRO-3's engine is made around it inside the block.

    `DPOTrainer.__init__` loads the reference and hands it to `prepare_deepspeed` at once.

    Args:
        change: What is called with the model.
    """

    def prepare(model: Any, accelerator: Any) -> Any:
        if shards_parameters(accelerator):
            change(model)
        return prepare_deepspeed(model, accelerator)

    with _replaced(dpo_trainer, prepare_deepspeed=prepare):
        yield


class NoStepTooMany:
    """A trainer that takes no further step where a checkpoint of its last one is resumed.

    A run that is killed while it saves its model leaves such a checkpoint. `Trainer._run_epoch` looks at `max_steps`
    after a step alone (transformers 5.23), so a resumed run would take one more, unless an epoch ends there.
    `tests/otpo/test_resuming_experts.py` fails once it does not; this class can go then.
    """

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = self
        if trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


class ConvertedWeights(NoStepTooMany):
    """A trainer that loads checkpoints whose weights have other names on disk than in the model; see below."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not load_converted_weights(self, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # pyright: ignore[reportAttributeAccessIssue]

    def _load_best_model(self) -> None:
        trainer: Any = self
        if not load_converted_weights(trainer, trainer.state.best_model_checkpoint):
            super()._load_best_model()  # pyright: ignore[reportAttributeAccessIssue]


def load_converted_weights(trainer: Any, folder: str) -> bool:
    """Loads a checkpoint of weights that `save_pretrained` renamed or split; the workaround for transformers 5.23.

    `save_pretrained` writes a key for each expert, of Qwen3-MoE's and most other models', and `from_pretrained` joins
    them to the model's tensors again. `Trainer._load_from_checkpoint` and `Trainer._load_best_model` pass the files to
    `load_state_dict` as they are: no key of an expert matches, which they log, and training goes on with the experts
    that are in memory. `tests/otpo/test_resuming_experts.py` fails once they do not; this function and its callers
    can go then.

    Args:
        trainer: Of a whole model, its experts not spread.
        folder: The checkpoint.

    Returns:
        Whether it was loaded so. Nothing is done where the Trainer can load it, and for adapters, DeepSpeed and FSDP,
        whose states have the model's names.

    Raises:
        ValueError: The checkpoint lacks weights of the model.
    """
    model: Any = trainer.model
    if has_adapter(model) or not isinstance(trainer.model, PreTrainedModel):
        return False
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or not _renamed_weights(model, folder):
        return False
    loaded, report = type(model).from_pretrained(folder, dtype="auto", output_loading_info=True)
    weights = loaded.state_dict()
    missing = sorted(set(report["missing_keys"]) | (model.state_dict().keys() - weights.keys()))
    if missing:
        raise ValueError(
            f"`resume_from_checkpoint={folder}` lacks weights of the model: {', '.join(missing[:5])}. Resume a "
            "checkpoint that this model saved."
        )
    model.load_state_dict(weights)
    return True


def _renamed_weights(model: Any, folder: str) -> set[str]:
    """Weights of a model that no key of a checkpoint's files is called after.

    Those of modules that read such keys themselves, as Compass's experts do, do not count.
    """
    saved: set[str] = set()
    for path in Path(folder).glob("model*.safetensors"):  # those of adapters are called otherwise
        with safe_open(path, "pt") as file:
            saved.update(file.keys())
    known = (name for name, module in model.named_modules() if module._load_state_dict_pre_hooks)
    read_by_themselves = tuple(f"{name}." for name in known)
    names = model.state_dict().keys() - saved - set(getattr(model, "all_tied_weights_keys", None) or ())
    return {name for name in names if saved and not name.startswith(read_by_themselves)}


def shards_parameters(accelerator: Any) -> bool:
    """Whether DeepSpeed runs with ZeRO-3, by the plugin in accelerate's state."""
    plugin = accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


def keep_outputs_as_they_are(accelerator: Any) -> None:
    """Keeps FSDP2 from casting what the models return to half precision, log-probabilities and the loss with it.

    accelerate makes the policy of mixed precision with one dtype for parameters, gradients and outputs. A loss of
    bfloat16 numbers is a few hundredths off, which is more than a preference step moves it. Layers return what they
    compute, so nothing takes more memory.

    Args:
        accelerator: Before it has prepared a model.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def count_without_waiting(accelerator: Any) -> None:
    """Keeps DeepSpeed from waiting for the device before each micro-batch and after each step, unless it is to.

    It does so to know how many samples it trains in a second (`timers.throughput.synchronized`).

    Args:
        accelerator: Before it has prepared a model.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        timers = plugin.deepspeed_config.setdefault("timers", {})
        timers.setdefault("throughput", {}).setdefault("synchronized", False)


class FullySharded:
    """A trainer whose models FSDP2 shards with all that they save and return; see the two functions below."""

    def create_accelerator_and_postprocess(self) -> None:
        """As in transformers; FSDP2 keeps the precision of outputs, and DeepSpeed counts samples without waiting."""
        super().create_accelerator_and_postprocess()  # pyright: ignore[reportAttributeAccessIssue]
        trainer: Any = self
        keep_outputs_as_they_are(trainer.accelerator)
        count_without_waiting(trainer.accelerator)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        with keeps_buffers():
            return super()._prepare_for_training(  # pyright: ignore[reportAttributeAccessIssue]
                max_steps, train_dataloader, resume_from_checkpoint
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers; what is no checkpoint is whole under `SHARDED_STATE_DICT` too, and loads anywhere."""
        trainer: Any = self
        with whole_states(trainer.accelerator) if not _internal_call else nullcontext():
            super().save_model(output_dir, _internal_call)  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def whole_states(accelerator: Any) -> Iterator[None]:
    """Has FSDP gather what is saved inside the block.

    `Trainer.save_model` saves nothing where the plugin's `state_dict_type` is that of parts: those are written beside
    the optimizer's states of a checkpoint. A whole state is gathered in the first process.

    Args:
        accelerator: Of the trainer.
    """
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
    if plugin is None or "SHARDED" not in str(plugin.state_dict_type):
        yield
        return
    before = plugin.state_dict_type
    plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        plugin.set_state_dict_type(before.name)


@contextmanager
def keeps_buffers() -> Iterator[None]:
    """Lets FSDP2 shard models that save buffers, such as the biases of a router, inside the block.

    With `fsdp_cpu_ram_efficient_loading` the first process sends each entry of a model's state to the others, and
    `accelerate.utils.fsdp_utils.fsdp2_load_full_state_dict` asks each for a mesh, which a buffer has none of. It puts
    buffers that are not saved back as they were, so those that are saved pass for such ones meanwhile, and are sent
    here. `Accelerator._prepare_fsdp2` looks the function up in its module.
    """
    shard = accelerate_accelerator.fsdp2_prepare_model

    def prepare(accelerator: Any, model: Any) -> Any:
        saved = [
            (module, name)
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if buffer is not None and name not in module._non_persistent_buffers_set
        ]
        for module, name in saved:
            module._non_persistent_buffers_set.add(name)
        try:
            model = shard(accelerator, model)
        finally:
            for module, name in saved:
                module._non_persistent_buffers_set.discard(name)
        for module, name in saved:
            torch.distributed.broadcast(getattr(module, name), 0)
        return model

    with _replaced(accelerate_accelerator, fsdp2_prepare_model=prepare):
        yield


def use_one_gpu(args: Any) -> None:
    """Keeps transformers' Trainer from wrapping the model in `DataParallel` on several GPUs; it reads `_n_gpu`."""
    args._n_gpu = min(1, args.n_gpu)


def new_model(model_class: Any, config: Any, **options: Any) -> Any:
    """A model with random weights of a configuration and a dtype, as `from_pretrained` makes it before it loads.

    `PreTrainedModel._from_config` is what `AutoModel.from_config` calls.
    """
    return model_class._from_config(config, **options)


def leave_boolean_buffers_to_ranks(model: Any) -> None:
    """Keeps boolean buffers out of DDP's broadcasts, which reads `_ddp_params_and_buffers_to_ignore` of the model."""
    model._ddp_params_and_buffers_to_ignore = [
        name for name, buffer in model.named_buffers() if buffer.dtype == torch.bool
    ]


def without_length_limit(args: Any) -> Any:
    """A copy of the options under which `DPOTrainer._prepare_dataset` drops no pair unseen.

    It drops pairs whose prompt fills `args.max_length`, and reads nothing else of the limit.
    """
    unlimited = copy.copy(args)
    unlimited.max_length = None
    return unlimited


def reference_digest(trainer: Any) -> str:
    """A digest of the reference's parameters, agreed on by all processes: `DPOTrainer._precompute_model_hash`."""
    return str(trainer._precompute_model_hash)


def model_of_reference_pass(trainer: Any) -> Any:
    """The reference before transformers has prepared the policy; DeepSpeed's shards need an engine around them.

    `DPOTrainer._precompute_ref_logps` makes that engine once, as `_precompute_engine`, and trains without it.
    """
    if trainer.ref_model is not None:
        return trainer.ref_model
    if not trainer.is_deepspeed_enabled:
        return trainer.model
    if trainer._precompute_engine is None:
        trainer._precompute_engine = prepare_deepspeed(trainer.model, trainer.accelerator)
    return trainer._precompute_engine


def model_name(model: Any) -> str:
    """What TRL calls a model, a name or a loaded one: the last part names the default output folder."""
    return model if isinstance(model, str) else get_config_model_id(model.config)


def autocast_dtype(accelerator: Any) -> torch.dtype | None:
    """The dtype of a run's mixed precision; None without it."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)


def layout_obstacle(trainer: Any) -> str | None:
    """What of a run, beside its models, keeps its rows padded; None if nothing does.

    transformers' Trainer splits batches over several GPUs of one process where `_n_gpu` says so; TRL knows
    of images in the rows.
    """
    if trainer.args._n_gpu > 1:
        return "`DataParallel`, which splits batches: start a process on each GPU"
    if has_images(trainer):
        return "images in the data"
    parallel = trainer.accelerator.parallelism_config
    if parallel is not None and (parallel.cp_size > 1 or parallel.sp_size > 1):
        return "context or sequence parallelism, which split rows"
    return None


def has_images(trainer: Any) -> bool:
    """Whether rows come with images, of which TRL makes tokens with each batch (`_is_vision_dataset`)."""
    return getattr(trainer, "_is_vision_dataset", False)


def require_rows_of_tokens(trainer: Any, weighting: str) -> None:
    """Raises a `ValueError` for images in the data, whose tokens are made with each batch.

    Args:
        trainer: The trainer.
        weighting: The one that looks at numbers of the prepared rows' tokens.
    """
    if has_images(trainer):
        raise ValueError(
            f"`weighting={weighting!r}` looks at the tokens of prepared rows, and pairs with images get theirs when a "
            "batch is made. Set another `weighting`."
        )


def implementations(config: Any) -> tuple[str | None, str | None]:
    """The attention and the experts that transformers has chosen for a model of that configuration."""
    return config._attn_implementation, config._experts_implementation


def have_experts_run_by(config: Any, name: str) -> None:
    """Sets what runs the experts whose modules hold that configuration, where it has such a setting."""
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = name


# Help


def _other_metrics() -> dict[str, Any]:
    return {"_metrics": {mode: defaultdict(list) for mode in ("train", "eval")}, "_total_train_tokens": 0}


@contextmanager
def _replaced(target: Any, **values: Any) -> Iterator[None]:
    """Gives an object's attributes other values inside the block; those it did not hold itself are taken off again."""
    held = {name: value for name, value in vars(target).items() if name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in held:
                setattr(target, name, held[name])
            else:
                delattr(target, name)


def _remedy() -> str:
    return f"trl {version('trl')} is installed: install 'trl>=1.16,<1.17', and report it."

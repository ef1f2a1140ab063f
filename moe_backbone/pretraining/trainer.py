"""Pretraining by transformers' Trainer on packed rows; it logs the loss by part, the routers' load and the speed."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from moe_backbone.model.modeling_compass import CompassForCausalLM
from moe_backbone.model.mtp import IGNORED
from moe_backbone.packed_attention import NAME as TORCH_VARLEN
from moe_backbone.packed_attention import joins_rows
from moe_backbone.planning.counting import flops_per_token
from moe_backbone.planning.hardware import recognise_gpu

from .fused_clipping import clip_in_optimizer, takes_scales
from .loaders import copy_without_waiting
from .log_window import LogWindow
from .norm_check import NormCheck, SpareWaits, spare_looks
from .packing import PackedCollator
from .router_bias import RouterBiasUpdate
from .state_types import guard_states
from .token_losses import TOKEN_LOSSES, find_token_loss
from .weight_types import choose_optimizer


@dataclass
class PretrainingConfig(TrainingArguments):
    """transformers' options with defaults for pretraining, and the length of a row.

    Compass-v3's learning rate, decay and betas of Adam are not published; the defaults are common choices.

    Args:
        sequence_length: Tokens of a packed row, >= 2.
        peak_tflops: Dense 16-bit TFLOP/s of a device. The log's MFU is the share of it that the model's operations
            take. None takes the rate of a GPU in `moe_backbone.planning.hardware.GPUS`, and logs no MFU on others.
        token_loss: How cross-entropies are computed in training, see [`moe_backbone.pretraining.token_losses`].

    Raises:
        ValueError: An option is out of its range, or does not work with packed rows or the model's own loss.
    """

    sequence_length: int = field(default=4096, metadata={"help": "Tokens of a packed row."})
    peak_tflops: float | None = field(
        default=None,
        metadata={"help": "Dense 16-bit TFLOP/s of a device, to log MFU. Unset: known GPUs' own, else no MFU."},
    )
    token_loss: str = field(
        default="auto",
        metadata={
            "help": "How cross-entropies are computed in training: `logits` by transformers' function, `kernel` by "
            "one kernel each way that reads logits in the head's precision, `chunked` by TRL's head, which has the "
            "logits of a part of the tokens at a time. `auto`: kernel on a GPU with Triton, else logits.",
            "choices": ["auto", *TOKEN_LOSSES],
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Leave NaN and infinite losses out of the logged mean. It makes every step wait for the device, "
            "and such a loss stops the training anyway, but under fp16."
        },
    )
    bf16: bool | None = field(  # pyright: ignore - None is resolved below
        default=None, metadata={"help": "Whether to compute in bfloat16. Unset: on a GPU, unless `fp16` is set."}
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Adam's beta 2."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two entries of the log."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: rows are packed."})
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Whether DDP looks for parameters without a gradient: all that train have one."},
    )
    prediction_loss_only: bool = field(default=True, metadata={"help": "Whether evaluation keeps the loss alone."})

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = torch.cuda.is_available() and not (self.use_cpu or self.fp16)
        asked: Any = self.accelerator_config
        read_from_file = isinstance(asked, str) and not asked.startswith("{")
        is_set = "non_blocking" in asked if isinstance(asked, str | dict) else asked is not None
        super().__post_init__()
        resolved: Any = self.accelerator_config
        # Apple's GPUs copy from memory that is not pinned, where a batch may be gone before it is read.
        if not is_set and not read_from_file and self.dataloader_pin_memory and self.device.type != "mps":
            resolved.non_blocking = True
        if resolved.dispatch_batches is None and self.world_size == 1:
            resolved.dispatch_batches = False  # nobody to read for
        if self.token_loss not in ("auto", *TOKEN_LOSSES):
            raise ValueError(f"`token_loss` must be auto, {', '.join(TOKEN_LOSSES)}, got {self.token_loss!r}.")
        if self.sequence_length < 2:
            raise ValueError(f"`sequence_length` must be at least 2, got {self.sequence_length}.")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"`peak_tflops` must be above 0, got {self.peak_tflops}. Leave it out to log no MFU.")
        if self.remove_unused_columns:
            raise ValueError(
                "`remove_unused_columns` must stay false: it would remove the lengths of packed documents."
            )
        if self.use_liger_kernel:
            raise ValueError(
                "`use_liger_kernel`: Liger has no kernels for Compass and would change nothing. Leave it out."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor={self.label_smoothing_factor}`: the Trainer would compute a loss of its "
                "own, without the MTP layers and the routers. Leave it out."
            )


class PretrainingTrainer(Trainer):
    """Trains a [`CompassForCausalLM`] on packed rows.

    Beside transformers' metrics, each entry of the log has these over the steps since the last entry:

    - `lm_loss`, `mtp_loss`, `aux_loss` and `z_loss`.
    - `router/load_entropy`, `router/max_load` and `router/dead_experts`; see [`router_health`].
    - `router/dropped`: the number of experts that tokens chose and nobody computed, 0 by design.
    - `tokens_per_second` over all processes, without padding, and `mfu`.

    The loss of an evaluation is that of the next token alone.

    Args:
        model: The model.
        args: Options.
        train_dataset: Rows of [`pack_documents`], `args.sequence_length` long.
        eval_dataset: Such rows, or several datasets of them by name.
        processing_class: The tokenizer, which is saved with the model.
        kwargs: Other arguments of transformers' Trainer.
    """

    args: PretrainingConfig

    def __init__(
        self,
        model: CompassForCausalLM,
        args: PretrainingConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ):
        pad = model.config.pad_token_id
        collator = PackedCollator(
            0 if pad is None else pad, args.sequence_length, flatten=joins_rows(model.config._attn_implementation)
        )
        if args.n_gpu > 1:
            raise ValueError(
                f"This process sees {args.n_gpu} GPUs, and would cut each batch of packed documents for them. Start "
                "one process a GPU, by `accelerate launch` or torchrun, or set CUDA_VISIBLE_DEVICES to one of them."
            )
        config: Any = model.config
        options: Any = args.gradient_checkpointing_kwargs or {}
        detached = config.effective_mtp_loss_coef and config.mtp_detach_trunk and config.mtp_detach_head
        if detached and args.gradient_checkpointing and options.get("use_reentrant"):
            raise ValueError(
                "`gradient_checkpointing_kwargs` has `use_reentrant`, with `mtp_detach_trunk` and `mtp_detach_head`: "
                "all that an MTP layer reads is detached, and it would get no gradient. Set it to false."
            )
        super().__init__(
            model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self._top_k = model.config.num_experts_per_tok
        self._flops_per_token = flops_per_token(model.config, args.sequence_length)
        self._peak_tflops = args.peak_tflops
        if self._peak_tflops is None and torch.cuda.is_available():
            gpu = recognise_gpu(torch.cuda.get_device_name())
            self._peak_tflops = None if gpu is None else gpu.tflops
        self._norms = NormCheck()
        spare_looks(self.accelerator)
        self.add_callback(SpareWaits(self))
        self._left_out = False  # whether the optimizer leaves out the step to come if its norm is not finite
        # What the optimizer is, as a header says it; `told_optimizer` is read by commands.
        self.told_optimizer = "none, since there is nothing to train on"
        if train_dataset is not None:
            chosen, self.told_optimizer = choose_optimizer(self)
            self.optimizer_cls_and_kwargs = chosen or self.optimizer_cls_and_kwargs
        self._token_loss = find_token_loss(args.token_loss, model, args.device)
        self._window = LogWindow()
        self._load_of_step: Tensor | None = None
        if model.config.router_bias_update_speed:
            self.add_callback(RouterBiasUpdate(self))

    @property
    def tokens_in_batch(self) -> int:
        """The most tokens of a micro-batch of training, in any process."""
        rows = self._train_batch_size  # which a search for the largest batch changes, and not the option
        processes = self.accelerator.num_processes if self.accelerator.split_batches else 1
        return rows // processes * self.args.sequence_length

    def is_cut(self, dataset: Any) -> bool:
        """Whether one process reads a dataset for all and cuts what it read into equal parts, as accelerate does.

        Ends of documents can't be cut, so the rows of such a dataset come without.
        """
        asked = self.accelerator.dispatch_batches
        streamed = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__")
        return streamed if asked is None else bool(asked)

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        collator: Any = self.data_collator
        if isinstance(collator, PackedCollator) and collator.flatten and self.is_cut(dataset):
            joined = self.model.config._attn_implementation != TORCH_VARLEN  # pyright: ignore
            self.data_collator = PackedCollator(
                collator.pad_token_id, collator.sequence_length, flatten=joined, tell_ends=False
            )
        try:
            return super()._get_dataloader(dataset, *args, **kwargs)
        finally:
            self.data_collator = collator

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Computes the model's own loss, and in training keeps its parts for the log.

        The loss is 0 for a step or an evaluation's rows without a label, as documents of one token have.
        """
        if num_items_in_batch is not None:
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        for name in ("cu_seq_lens_q", "cu_seq_lens_k"):  # as many as a batch has documents, which no graph should ask
            if name in inputs:
                torch._dynamo.maybe_mark_dynamic(inputs[name], 0)
        compass: Any = self.model
        compass.token_loss = self._token_loss if model.training else None
        try:
            computed: Any = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        finally:
            compass.token_loss = None
        loss, outputs = computed
        if not model.training:
            loss = torch.where((inputs["labels"] != IGNORED).any(), loss, 0.0)
        if model.training:
            self._window.add(outputs, inputs, self._top_k)
            if outputs.expert_load is not None:
                load = outputs.expert_load
                self._load_of_step = load if self._load_of_step is None else self._load_of_step + load
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Trains on a micro-batch as transformers does; the first one since an entry of the log starts the clock."""
        self._window.start(self.state.global_step)
        copy_without_waiting(self.accelerator)
        return super().training_step(*args, **kwargs)

    @cached_property
    def _parameters_outside_embeddings(self) -> int:
        return self.model.num_parameters(exclude_embeddings=True)  # pyright: ignore

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Operations of a batch as transformers counts them, without a walk through the model in each step."""
        return 6 * inputs["input_ids"].numel() * self._parameters_outside_embeddings

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics since the last entry to training's entries."""
        self._norms.read()
        if "loss" in logs and self._window.micro_batches:
            logs = {**logs, **self._window_metrics()}
        super().log(logs, start_time)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Makes the optimizer as transformers does; it loads states of its own kind, in their own types."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if not isinstance(optimizer, AcceleratedOptimizer):  # that of an earlier training, which has the hooks
            guard_states(optimizer)
        return optimizer

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            engine: Any = self.model_wrapped  # which has clipped; accelerate would wait for its norm
            return engine.get_global_grad_norm()
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        scaled = self.accelerator.scaler is not None  # by fp16, whose scaler unscales gradients itself
        self._left_out = not scaled and takes_scales(optimizer, self.accelerator.distributed_type)
        if not self._left_out:
            return super()._clip_grad_norm(model)
        return clip_in_optimizer(optimizer, self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            norm: Any = self._clip_grad_norm(model) if grad_norm is None else grad_norm
            self._norms.add_of_deepspeed(self.model_wrapped, norm, self.state.global_step)
            return norm
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.accelerator.scaler is None:  # fp16's skips such steps itself
            left_out = self._left_out and grad_norm is not None  # None where nothing is clipped
            self._norms.add(norm, self.state.global_step, left_out=left_out)
        return norm

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as transformers does; the last step's gradient is looked at before it returns."""
        trained = super().train(*args, **kwargs)
        self._norms.read()
        return trained

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # What an earlier training left, or a try with more rows (`auto_find_batch_size`), is of no step of this one.
        self._norms, self._window, self._load_of_step = NormCheck(), LogWindow(), None
        return super()._inner_training_loop(*args, **kwargs)

    def check_before_saving(self) -> None:
        """Looks at the last step's gradient; a subclass that writes models in a way of its own calls it first."""
        self._norms.read()

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Saves as transformers does, checkpoints too, after a look at the last step's gradient."""
        self.check_before_saving()
        super().save_model(*args, **kwargs)

    def _window_metrics(self) -> dict[str, float]:
        """Metrics of all processes since the last entry; starts a new window."""
        window, self._window = self._window, LogWindow()
        return window.metrics(self.accelerator, self.state.global_step, self._flops_per_token, self._peak_tflops)

    def take_load_of_step(self) -> Tensor | None:
        """Number of tokens that each expert took since the last call, over all processes, `[layers, E]`."""
        load: Any = self._load_of_step
        self._load_of_step = None
        return None if load is None else self.accelerator.reduce(load, "sum")  # pyright: ignore

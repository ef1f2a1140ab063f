"""The options of OTPO on top of TRL's `DPOConfig`."""

import copy
import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from trl import DPOConfig

from .data.token_budget import check_budget_options
from .layouts.names import ROW_LAYOUTS, RowLayout
from .transport.options import TransportOptions
from .transport.registry import Cost, CostScale, Solver
from .weighting.registry import (
    check_weighting,
    describe_weighting,
    registered_option,
    set_defaults,
    weighting_names,
    weightings_help,
)


@dataclass
class OTPOConfig(DPOConfig):
    r"""Options of [`OTPOTrainer`]: every option of [`trl.DPOConfig`], and those of the token weights.

    The defaults are the official OTPO release's for its 8B models (`ot_reg` 1, `ot_reg_m` 0.2); its 3B recipes
    set `ot_reg` to 0.1. `weighting="contrast"` has defaults of its own, `ot_cost="cosine"`, `ot_reg=0.1` and
    `hidden_layer=0.8`; an option that is None is set to its weighting's default. For another
    weighting take [`with_weighting`], since options that were set so stay otherwise. `beta` keeps TRL's default of
    0.1; the release takes 0.01 for 8B and 0.1 for 3B.

    Parameters:
        weighting: Name of the token weighting, a key of `otpo.weighting.WEIGHTINGS`, whose entries say what each does,
            which of the options here it takes and where it was published; or several such names joined by `*`, which
            are multiplied and scaled to OTPO's budget. A callable goes to the trainer's own argument `weighting`
            instead.
        ot_reg: Option `reg` of the transport, see [`otpo.transport.TransportOptions`], and so are all that begin with
            `ot_`.
        ot_reg_m: `reg_m` there.
        ot_cost: `cost` there.
        ot_cost_scale: `cost_scale` there.
        ot_tolerance: `tolerance` there.
        ot_max_iterations: `max_iterations` there. `transport/residual` in the log says what was reached.
        ot_solver: `solver` there.
        d2po_gamma: Of `weighting="d2po"`.
        contrast_mix: Of `weighting="contrast"`.
        diff_base: Of `weighting="diff"`.
        hidden_layer: Hidden states that the weights are made of, as transformers numbers them: 0 for the embeddings,
            `l` for the output of the l-th layer, negative from the end. -1: the last ones, after the final norm, as
            in the paper. Between 0 and 1: that share of the model's depth, 0.8 being layer 24 of 30.
        row_layout: How the rows of a micro-batch are laid out for the model, see [`otpo.layouts.choice`]: `"padded"`
            to the longest, `"packed"` without padding, or `"shared_prompt"`, packed with the tokens that both rows of
            a pair begin with run once. `"auto"` takes the fastest that model, attention and options allow; the
            trainer's attribute `layout` says which and why. Losses, weights and metrics are the same up to rounding.
            TRL's `padding_free=True` sets `"packed"`.
        compile_layers: Whether the decoder layers are compiled by `torch.compile`, see
            [`otpo.layouts.compiled`]. None: on a GPU, for dense models and rows without padding, in runs of at least
            300 micro-batches.
        drop_identical_pairs: What happens to a pair whose chosen and rejected completions are the same tokens
            after truncation. It carries no preference. False: an error that names the row. True: the pair is
            dropped and counted. None: an error, but in streams, where it would end a training in its middle, the
            pair is dropped and counted, with a warning that names the first.
        tokens_per_batch: Tokens of a process's micro-batch in training, at least 1: it has as many pairs of similar
            length as fit, each counted as its chosen and its rejected row after truncation. It wins over
            `per_device_train_batch_size`, which then is the batch of the reference's pass before training alone;
            evaluations keep theirs. A step's loss and gradient are means over its pairs, however many
            each micro-batch and process has; what TRL computes of a micro-batch as a whole, the routers' loss and
            the mean over tokens of `loss_type="sft"`, counts by the micro-batch's pairs. None:
            `per_device_train_batch_size` pairs. See `otpo.data.token_budget`.
        logging_nan_inf_filter: As in [`transformers.TrainingArguments`], but off by default.

    Raises:
        ValueError: An option is outside its range; the message names it, its value and the range.
    """

    weighting: str = field(default="otpo", metadata={"help": weightings_help(), "choices": weighting_names()})
    # Defaults, helps and checks of these are in the registry of weightings; None is the weighting's own default.
    ot_reg: float | None = registered_option("ot_reg")
    ot_reg_m: float = registered_option("ot_reg_m")
    ot_cost: Cost | None = registered_option("ot_cost")
    ot_cost_scale: CostScale = registered_option("ot_cost_scale")
    ot_tolerance: float = registered_option("ot_tolerance")
    ot_max_iterations: int = registered_option("ot_max_iterations")
    ot_solver: Solver = registered_option("ot_solver")
    d2po_gamma: float = registered_option("d2po_gamma")
    contrast_mix: float = registered_option("contrast_mix")
    diff_base: float = registered_option("diff_base")
    hidden_layer: float | None = registered_option("hidden_layer")
    row_layout: RowLayout = field(
        default="auto",
        metadata={
            "help": "How the rows of a batch are laid out for the model: padded to the longest, packed without "
            "padding, or packed with tokens that both rows of a pair begin with run once (shared_prompt). auto takes "
            "the fastest that model, attention and options allow, and says which.",
            "choices": ROW_LAYOUTS,
        },
    )
    compile_layers: bool | None = field(
        default=None,
        metadata={
            "help": "Compile the model's decoder layers, all by one graph, for any lengths. The first steps take a "
            "minute or two; later starts find what they need in torch's cache. Unset: on a GPU, for dense models and "
            "rows without padding, in runs of at least 300 micro-batches."
        },
    )
    drop_identical_pairs: bool | None = field(
        default=None,
        metadata={
            "help": "Drop and count pairs whose completions are the same tokens, instead of stopping with an "
            "error that names the row. Unset: drop them in streams alone."
        },
    )
    tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a micro-batch of each process: as many pairs of similar length as fit, in place of "
            "`per_device_train_batch_size` pairs. A step's gradient is the mean over its pairs. Unset: pairs."
        },
    )

    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Leave NaN and infinite losses out of the logged mean. It makes every step wait for the device, "
            "and such a loss stops the training anyway."
        },
    )

    def __post_init__(self) -> None:
        if self.padding_free:  # TRL has switched its own off for DPO, and would warn
            self.padding_free = False
            if self.row_layout == "auto":
                self.row_layout = "packed"
        if self.row_layout not in ROW_LAYOUTS:
            raise ValueError(f"`row_layout` must be one of {', '.join(ROW_LAYOUTS)}, got {self.row_layout!r}.")
        asked: Any = self.accelerator_config
        read_from_file = isinstance(asked, str) and not asked.startswith("{")
        is_set = "non_blocking" in asked if isinstance(asked, str | dict) else asked is not None
        super().__post_init__()
        # Apple's GPUs copy from memory that is not pinned, where a batch may be gone before it is read.
        if not is_set and not read_from_file and self.dataloader_pin_memory and self.device.type != "mps":
            resolved: Any = self.accelerator_config
            resolved.non_blocking = True
        _check_of_trl(self)
        self.filled_in, self.filled_in_for = set_defaults(self), self.weighting
        check_weighting(self)
        check_budget_options(self)

    def transport_options(self) -> TransportOptions:
        """The options of the transport problem and its solution."""
        return TransportOptions.of(self)

    def with_weighting(self, weighting: str) -> "OTPOConfig":
        """A copy for another weighting; options that were not set have that weighting's defaults.

        Raises:
            ValueError: There is no such weighting, or it needs an option that is not set.
        """
        other = copy.copy(self)
        other.weighting = weighting
        # What was set to something else since then counts as set; of an older version's pickle all was.
        for name, default in getattr(self, "filled_in", {}).items():
            if getattr(self, name) == default:
                setattr(other, name, None)
        other.filled_in, other.filled_in_for = set_defaults(other), weighting
        check_weighting(other)
        return other

    def check_again(self) -> None:
        """Checks what may have been set since the options were made; the trainer calls it.

        Raises:
            ValueError: An option is outside its range, or `weighting` was set to another, whose defaults these
                options have not. `dataclasses.replace` makes options anew, for which the old weighting's defaults are
                options that were set; `with_weighting` knows them apart.
        """
        made_for = getattr(self, "filled_in_for", self.weighting)  # of an older version's pickle it is not known
        if self.weighting != made_for and self.weighting in weighting_names():
            raise ValueError(
                f"`weighting={self.weighting!r}` was set after these options were made for {made_for!r}, whose "
                f"defaults they have. Take `args.with_weighting({self.weighting!r})`, or `OTPOConfig(weighting=...)`."
            )
        check_weighting(self)

    def describe_weighting(self) -> str:
        """The weighting and those of its options that matter, in one line."""
        return describe_weighting(self)


def _check_of_trl(args: OTPOConfig) -> None:
    """Refuses what TRL finds out in a training step, or not at all."""
    if args.truncation_mode not in ("keep_start", "keep_end"):
        raise ValueError(f"`truncation_mode` must be keep_start or keep_end, got {args.truncation_mode!r}.")
    if not isinstance(args.beta, Real) or not math.isfinite(args.beta) or args.beta < 0:
        raise ValueError(
            f"`beta` must be a finite number of at least 0, got {args.beta!r}: below 0 the rejected answers are "
            "learnt."
        )

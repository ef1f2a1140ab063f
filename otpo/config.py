"""The options of OTPO on top of TRL's `DPOConfig`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from trl import DPOConfig

from .transport.backend import Solver, check_solver
from .transport.sinkhorn import check_positive
from .transport.solve import check_cost, check_cost_scale
from .weighting.methods import WEIGHTINGS


@dataclass
class OTPOConfig(DPOConfig):
    r"""Options of [`OTPOTrainer`]: every option of [`trl.DPOConfig`], and those of the token weights.

    The defaults are the official OTPO release's for its 8B models (`ot_reg` 1, `ot_reg_m` 0.2); its 3B recipes
    set `ot_reg` to 0.1. `beta` keeps TRL's default of 0.1; the release takes 0.01 for 8B and 0.1 for 3B.

    Parameters:
        weighting: Name of the token weighting, see `otpo.weighting.methods`. `"otpo"`: optimal transport (arXiv
            2505.18720). `"uniform"`: ones, which is DPO. `"budget"`: every token of a response alike, with OTPO's
            budget min(|y_c|, |y_r|). `"length"`: 1/|y|. `"sampo"`: a seeded random subset of the longer response
            (arXiv 2406.10957). `"ld"`: `ld_alpha` past the shorter response's length (arXiv 2409.06411). `"d2po"`:
            `d2po_gamma` to the power of the position (arXiv 2502.14340). A callable goes to the trainer's own argument
            `weighting` instead.
        ot_reg: Weight of the entropy of the plan, > 0. Small values concentrate the weights: at 1 they are within
            5% of uniform on a 135M chat model, at 0.02 the largest is 2.6 times the mean.
        ot_reg_m: Weight of the two marginal terms, > 0. Large values push the weights towards uniform.
        ot_cost: What moving mass between two tokens costs. `"euclidean"`: the distance of their hidden states, as in
            the paper. `"cosine"`: one less their cosine, our choice; `ot_cost_scale` makes no difference to it.
        ot_cost_scale: What the largest cost is taken over before the costs are divided by it. `"release"`: the
            distances and the norms of the hidden states, which is what the official release computes because it
            pads with zero vectors. `"pairwise"`: the distances between real tokens alone.
        ot_tolerance: Largest relative violation of the optimality condition at which the solver stops, > 0.
        ot_max_iterations: Most sweeps of the solver, >= 1. `transport/residual` in the log says what was reached.
        ot_solver: `"triton"`: the library's kernels, on a GPU, for 16-bit and float32 hidden states; under half a
            percent of a training step. `"torch"`: plain torch in float64, anywhere. `"auto"`: the kernels where they
            can run; on a GPU where they cannot, a warning says why.
        d2po_gamma: Factor by which a token counts less than the one before it with `weighting="d2po"`, within (0, 1].
        hidden_layer: Hidden states that the weights are made of, as transformers numbers them: 0 for the embeddings,
            `l` for the output of the l-th layer, negative from the end. -1: the last ones, after the final norm, as
            in the paper.
        drop_identical_pairs: What happens to a pair whose chosen and rejected completions are the same tokens
            after truncation. It carries no preference. False: an error that names the row. True: the pair is
            dropped and counted. None: an error, but in streams, where it would end a training in its middle, the
            pair is dropped and counted, with a warning that names the first.

    Raises:
        ValueError: An option is outside its range; the message names it, its value and the range.
    """

    weighting: str = field(
        default="otpo",
        metadata={
            "help": "Token weighting: 'otpo' (optimal transport), 'uniform' (DPO), 'budget' (uniform under OTPO's "
            "budget), 'length' (1/|y|), 'sampo' (seeded subset of the longer response), 'ld' (ld_alpha past the "
            "shorter response's length) or 'd2po' (d2po_gamma to the power of the position).",
            "choices": sorted(WEIGHTINGS),
        },
    )
    ot_reg: float = field(
        default=1.0,
        metadata={"help": "Weight of the plan's entropy, > 0. Small values (0.02) concentrate the weights."},
    )
    ot_reg_m: float = field(
        default=0.2,
        metadata={"help": "Weight of the marginal terms, > 0. Large values push the weights towards uniform."},
    )
    ot_cost: Literal["euclidean", "cosine"] = field(
        default="euclidean",
        metadata={"help": "Cost between two tokens: the distance of their hidden states, or one less their cosine."},
    )
    ot_cost_scale: Literal["release", "pairwise"] = field(
        default="release",
        metadata={
            "help": "Largest cost that the costs are divided by: over distances and norms ('release', as the "
            "official code) or over distances between real tokens alone ('pairwise')."
        },
    )
    ot_tolerance: float = field(default=1e-6, metadata={"help": "Residual at which the transport solver stops, > 0."})
    ot_max_iterations: int = field(default=1000, metadata={"help": "Most iterations of the transport solver, >= 1."})
    ot_solver: Solver = field(
        default="auto",
        metadata={
            "help": "What solves the transport: the GPU kernels ('triton'), float64 in plain torch ('torch'), or "
            "the kernels where they can run ('auto')."
        },
    )
    d2po_gamma: float = field(
        default=0.98, metadata={"help": "Weight of a token over that of the one before it with 'd2po', in (0, 1]."}
    )
    hidden_layer: int = field(
        default=-1,
        metadata={
            "help": "Hidden states that the weights are made of: 0 for the embeddings, l for the output of the l-th "
            "layer, negative from the end; -1 for the last, after the final norm."
        },
    )
    drop_identical_pairs: bool | None = field(
        default=None,
        metadata={
            "help": "Drop and count pairs whose completions are the same tokens, instead of stopping with an "
            "error that names the row. Unset: drop them in streams alone."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weighting not in WEIGHTINGS:
            raise ValueError(
                f"`weighting` must be one of {sorted(WEIGHTINGS)}, got {self.weighting!r}. To use your own "
                "weighting, pass a callable as the trainer's argument `weighting`."
            )
        check_positive(ot_reg=self.ot_reg, ot_reg_m=self.ot_reg_m, ot_tolerance=self.ot_tolerance)
        check_cost(self.ot_cost, "ot_cost")
        check_cost_scale(self.ot_cost_scale, "ot_cost_scale")
        check_solver(self.ot_solver, "ot_solver")
        if self.ot_max_iterations < 1:
            raise ValueError(f"`ot_max_iterations` must be at least 1, got {self.ot_max_iterations}.")
        if not 0.0 < self.d2po_gamma <= 1.0:
            raise ValueError(f"`d2po_gamma` must be within (0, 1], got {self.d2po_gamma}.")
        if self.ld_alpha is not None and not 0.0 <= self.ld_alpha <= 1.0:
            raise ValueError(f"`ld_alpha` must be within [0, 1], got {self.ld_alpha}.")
        if self.weighting == "ld" and self.ld_alpha is None:
            raise ValueError(
                "`weighting='ld'` needs `ld_alpha`, got None. Set it within [0, 1]; the LD-DPO paper finds 0.5 best "
                "for Llama-3-8B-Instruct."
            )

    def transport_options(self) -> dict[str, Any]:
        """The options of the transport problem and its solution, as [`otpo.transport.transport_plan`] takes them."""
        return {"cost": self.ot_cost, "cost_scale": self.ot_cost_scale, **self.solver_options()}

    def solver_options(self) -> dict[str, Any]:
        """The options of the solver, as [`otpo.transport.solve.warn_unsolved`] takes them."""
        return {
            "reg": self.ot_reg,
            "reg_m": self.ot_reg_m,
            "tolerance": self.ot_tolerance,
            "max_iterations": self.ot_max_iterations,
        }

    def describe_weighting(self) -> str:
        """The weighting and those of its options that matter, in one line."""
        if self.weighting == "ld":
            return f"ld, ld_alpha {self.ld_alpha:g}"
        if self.weighting == "d2po":
            return f"d2po, d2po_gamma {self.d2po_gamma:g}"
        if self.weighting != "otpo":
            return self.weighting
        cost = f"ot_cost_scale {self.ot_cost_scale}" if self.ot_cost == "euclidean" else f"ot_cost {self.ot_cost}"
        layer = "" if self.hidden_layer == -1 else f", hidden_layer {self.hidden_layer}"
        return f"otpo, ot_reg {self.ot_reg:g}, ot_reg_m {self.ot_reg_m:g}, {cost}{layer}"

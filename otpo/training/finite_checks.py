"""Stops for numbers that can't be right, before they reach an update or a checkpoint."""

from collections.abc import Callable

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor

from otpo.weighting import PairBatch

# Nats a token. Half precision and another kernel make less than a tenth of it; another model makes far more.
_LARGEST_START_GAP = 0.1


def require_finite_step(
    bad: Tensor, what: str, find_rows: Callable[[int], list[int]], dataset: str, step: int
) -> None:
    """Raises a `FloatingPointError` that names the pairs that have a number that is not finite.

    Waits for the device once. A process that raises ends alone; its launcher ends the others.

    Args:
        bad: `(2B, T)` bool, true where a number is not finite and matters.
        what: What the numbers are, in plural.
        find_rows: From the number of a pair in the batch to its rows in the user's dataset, several where rows are
            alike.
        dataset: What that dataset is called.
        step: Optimizer steps done so far.
    """
    bad_rows = bad.any(1)
    bad_pairs = bad_rows[: len(bad_rows) // 2] | bad_rows[len(bad_rows) // 2 :]
    if not bad_pairs.any():
        return
    pairs = bad_pairs.nonzero().flatten().tolist()
    where = ", ".join(" or ".join(map(str, rows)) for pair in pairs if (rows := find_rows(pair)))
    raise FloatingPointError(
        f"{what} of pair(s) {pairs} of the micro-batch"
        + (f" (row(s) {where} of the {dataset} dataset)" if where else "")
        + f" are not finite after {step} optimizer step(s). No update was made from them and nothing was saved. "
        "Resume from the last checkpoint with a lower `learning_rate` or `max_grad_norm`, or with bf16 in place of "
        "fp16; if it is step 0, the model's weights, the weighting or this pair's text are at fault."
    )


def states_not_finite(states: Tensor, logps: Tensor, mask: Tensor) -> Tensor:
    """Where hidden states `(2B, T, D)` or log-probabilities `(2B, T)` are not finite within the mask."""
    norms = torch.linalg.vector_norm(states.detach(), dim=2, dtype=torch.float32)
    return (~norms.isfinite() | ~logps.detach().isfinite()) & mask


def start_gap(policy_logps: Tensor, reference_logps: Tensor, mask: Tensor) -> Tensor:
    """By how many nats a token the reference's log-probabilities differ from the policy's, a scalar.

    Args:
        policy_logps: `(2B, T)`.
        reference_logps: `(2B, T)`.
        mask: `(2B, T)` bool.
    """
    return ((policy_logps - reference_logps).abs() * mask).sum() / mask.sum().clamp(min=1)


def is_same_start(gap: float) -> bool:
    """Whether a [`start_gap`] can be that of a copy."""
    return gap <= _LARGEST_START_GAP


def require_same_start(gap: float) -> None:
    """Raises a `RuntimeError` when a reference that is made as the policy's copy isn't one before the first step.

    The copy is loaded from the path in the model's config, so it misses changes made in memory; and a sharded
    engine may load it wrongly (seen with FSDP2, where `trl.DPOTrainer` starts at a loss of 20 for it).

    Args:
        gap: See [`start_gap`], of a policy without noise.
    """
    if not is_same_start(gap):
        raise RuntimeError(
            f"Before the first step the reference's log-probabilities differ from the policy's by {gap:.3f} nats a "
            "token, though it should be a copy of it. It is loaded from the path in `model.config`: if your model was "
            "changed in memory, pass `ref_model`; under FSDP, train an adapter, which needs no second model."
        )


def tensor_versions(batch: PairBatch) -> dict[str, int]:
    """How often each tensor was written to that a weighting is lent rather than given a copy of."""
    lent = {"hidden_states": batch.hidden_states}
    lent |= {f"inputs[{name!r}]": value for name, value in batch.inputs.items() if isinstance(value, Tensor)}
    return {name: value._version for name, value in lent.items() if not value.is_inference()}


def require_unwritten(batch: PairBatch, versions: dict[str, int]) -> None:
    """Raises a `ValueError` that names a tensor of the batch that a weighting has written into.

    The loss and its gradient still need it.

    Args:
        batch: What the weighting was given.
        versions: Of [`tensor_versions`], before it ran.
    """
    written = [name for name, version in tensor_versions(batch).items() if version != versions[name]]
    if written:
        raise ValueError(
            f"The weighting has written into `batch.{written[0]}`, which the loss still needs. Let it write into a "
            f"copy: `batch.{written[0]}.clone()`."
        )


def require_finite_parameters(model: torch.nn.Module, accelerator: Accelerator, step: int) -> None:
    """Raises a `FloatingPointError` when a trained parameter is not finite.

    Where processes hold shards, all of them have to call this, as they have to for saving, and all raise. Where each
    holds the whole model nothing is exchanged, so that one of them can save alone.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    bad = next((name for name, value in trained.items() if not _local(value).isfinite().all()), None)
    if bad is not None:
        accelerator.print(f"Parameter {bad} is not finite.")
    anywhere = bad is not None
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if sharded or any(_is_shard(parameter) for parameter in trained.values()):
        flag = torch.tensor([float(anywhere)], device=accelerator.device)
        anywhere = accelerator.reduce(flag, reduction="sum").item() > 0  # pyright: ignore
    if anywhere:
        raise FloatingPointError(
            f"The model has parameters that are not finite after {step} optimizer step(s), so it was not saved; "
            "earlier checkpoints are as they were. Resume from the last one with a lower `learning_rate` or "
            "`max_grad_norm`."
        )


def _is_shard(parameter: Tensor) -> bool:
    """Whether other processes hold other numbers: of ZeRO-3, of a DTensor, or of DeepSpeed's spread experts."""
    spread = not getattr(parameter, "allreduce", True)
    return spread or isinstance(parameter, DTensor) or hasattr(parameter, "ds_tensor")


def _local(parameter: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter).detach()  # ZeRO-3 keeps its shard there

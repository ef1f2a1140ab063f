"""Checks that numbers are finite, before they reach an update or a checkpoint."""

from collections.abc import Callable

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor


def pairs_not_finite(bad: Tensor) -> Tensor:
    """Which pairs have a response with a number that is not finite, `(B,)` bool.

    Args:
        bad: `(2B, T)` bool, true where a number is not finite and matters.
    """
    chosen, rejected = bad.any(1).chunk(2)
    return chosen | rejected


def require_finite_pairs(
    bad: Tensor,
    what: str,
    find_rows: Callable[[int], list[int]],
    dataset: str,
    step: int,
    *,
    late: bool = False,
    besides: str = "",
) -> None:
    """Raises a `FloatingPointError` that names the pairs that have a number that is not finite.

    A process that raises ends alone, and its launcher ends the others, but where numbers are read late: there all end,
    see [`require_finite_everywhere`].

    Args:
        bad: `(B,)` bool on the host, see [`pairs_not_finite`].
        what: What the numbers are, in plural.
        find_rows: From the number of a pair in the batch to its rows in the user's dataset, several where rows are
            alike.
        dataset: What that dataset is called.
        step: Optimizer steps done before the numbers were made.
        late: Whether the step may have gone on to its update in the meantime.
        besides: What else may be wrong with them, behind "are not finite".
    """
    if not bad.any():
        return
    pairs = bad.nonzero().flatten().tolist()
    where = ", ".join(" or ".join(map(str, rows)) for pair in pairs if (rows := find_rows(pair)))
    update = "No update was made from them and nothing was saved."
    if late:
        update = "Nothing was saved after them, though the model in memory may have been updated."
    raise FloatingPointError(
        f"{what} of pair(s) {pairs} of the micro-batch"
        + (f" (row(s) {where} of the {dataset} dataset)" if where else "")
        + f" are not finite{besides} after {step} optimizer step(s). {update} "
        "Resume from the last checkpoint with a lower `learning_rate` or `max_grad_norm`, or with bf16 in place of "
        "fp16; if it is step 0, the model's weights, the weighting or this pair's text are at fault."
    )


def require_finite_everywhere(found: Tensor, step: int) -> None:
    """Raises a `FloatingPointError` where a process has found what is not finite, on those too that have not.

    Such a process names its pair itself, by [`require_finite_pairs`]. The others would log its numbers, and blame
    pairs of theirs for what an update has made of the model.

    Args:
        found: `(P,)` on the host, how often each of the processes has found something, the same on all of them.
        step: Optimizer steps done before the numbers were made.
    """
    processes = found.nonzero().flatten().tolist()
    if processes:
        raise FloatingPointError(
            f"Numbers of process(es) {processes} are not finite after {step} optimizer step(s); the error there names "
            "the pair. Nothing was saved after them, though the model in memory may have been updated."
        )


def states_not_finite(states: Tensor, logps: Tensor, mask: Tensor) -> Tensor:
    """Where hidden states `(2B, T, D)` or log-probabilities `(2B, T)` are not finite within the mask."""
    norms = torch.linalg.vector_norm(states.detach(), dim=2, dtype=torch.float32)
    return (~norms.isfinite() | ~logps.detach().isfinite()) & mask


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

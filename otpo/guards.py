"""Stops for numbers that are not finite, before they reach an update or a checkpoint."""

from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from torch.distributed.tensor import DTensor


def require_finite_step(
    states: Tensor, logps: Tensor, mask: Tensor, inputs: dict[str, Any], dataset: Any, step: int
) -> None:
    """Raises a `FloatingPointError` that names the pairs whose states or log-probabilities are not finite.

    Costs one pass over the states and one wait for the device.

    Args:
        states: Hidden states `(2B, T, D)`.
        logps: Log-probabilities `(2B, T)`.
        mask: `(2B, T)` bool; what lies outside it is not looked at.
        inputs: The batch, to find the pair's row in the dataset.
        dataset: The training dataset.
        step: Optimizer steps done so far.
    """
    norms = torch.linalg.vector_norm(states.detach(), dim=2, dtype=torch.float32)
    bad = ((~norms.isfinite() | ~logps.detach().isfinite()) & mask).any(1)
    bad_pairs = bad[: len(bad) // 2] | bad[len(bad) // 2 :]
    if not bad_pairs.any():
        return
    pairs = bad_pairs.nonzero().flatten().tolist()
    rows = [_find_row(dataset, inputs, pair) for pair in pairs]
    where = ", ".join(str(row) for row in rows if row is not None)
    raise FloatingPointError(
        f"Hidden states or log-probabilities of pair(s) {pairs} of the micro-batch"
        + (f" (row(s) {where} of the training dataset)" if where else "")
        + f" are not finite after {step} optimizer step(s). No update was made from them and nothing was saved. "
        "Resume from the last checkpoint with a lower `learning_rate` or `max_grad_norm`, or with bf16 in place of "
        "fp16; if it is step 0, the model's weights or this pair's text are at fault."
    )


def _find_row(dataset: Any, inputs: dict[str, Any], pair: int) -> int | None:
    """The row of the dataset whose chosen sequence is the pair's; None if it can't be told."""
    if not isinstance(dataset, Dataset) or "chosen_ids" not in dataset.column_names:
        return None
    ids = inputs["input_ids"][pair][inputs["attention_mask"][pair].bool()].tolist()
    columns = dataset.select_columns(["prompt_ids", "chosen_ids"])
    for row, example in enumerate(columns):
        tokens = example["prompt_ids"] + example["chosen_ids"]  # pyright: ignore
        if tokens[: len(ids)] == ids or tokens[-len(ids) :] == ids:
            return row
    return None


def require_finite_parameters(model: torch.nn.Module, accelerator: Accelerator, step: int) -> None:
    """Raises a `FloatingPointError` on every process when a trained parameter is not finite on any.

    Looks at the shards that each process holds, so that nothing is gathered.
    """
    bad = torch.zeros(1, device=accelerator.device)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not _local(parameter).isfinite().all():
            bad.fill_(1.0)
            accelerator.print(f"Parameter {name} is not finite.")
            break
    if accelerator.reduce(bad, reduction="sum").item() > 0:  # pyright: ignore
        raise FloatingPointError(
            f"The model has parameters that are not finite after {step} optimizer step(s), so it was not saved; "
            "earlier checkpoints are as they were. Resume from the last one with a lower `learning_rate` or "
            "`max_grad_norm`."
        )


def _local(parameter: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter).detach()  # ZeRO-3 keeps its shard there

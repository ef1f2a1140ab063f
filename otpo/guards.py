"""Stops for numbers that can't be right, before they reach an update or a checkpoint."""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from torch.distributed.tensor import DTensor

from .data.validation import PairRule, token_lists

# Nats a token. Half precision and another kernel make less than a tenth of it; another model makes far more.
_LARGEST_START_GAP = 0.1


def require_finite_step(bad: Tensor, what: str, inputs: dict[str, Any], rows: "RowFinder", step: int) -> None:
    """Raises a `FloatingPointError` that names the pairs that have a number that is not finite.

    Waits for the device once.

    Args:
        bad: `(2B, T)` bool, true where a number is not finite and matters.
        what: What the numbers are, in plural.
        inputs: The batch, to find the pair's row in the dataset.
        rows: Finds a pair in the training dataset.
        step: Optimizer steps done so far.
    """
    bad_rows = bad.any(1)
    bad_pairs = bad_rows[: len(bad_rows) // 2] | bad_rows[len(bad_rows) // 2 :]
    if not bad_pairs.any():
        return
    pairs = bad_pairs.nonzero().flatten().tolist()
    found = [rows.find(inputs, pair) for pair in pairs]
    where = ", ".join(str(row) for row in found if row is not None)
    raise FloatingPointError(
        f"{what} of pair(s) {pairs} of the micro-batch"
        + (f" (row(s) {where} of the training dataset)" if where else "")
        + f" are not finite after {step} optimizer step(s). No update was made from them and nothing was saved. "
        "Resume from the last checkpoint with a lower `learning_rate` or `max_grad_norm`, or with bf16 in place of "
        "fp16; if it is step 0, the model's weights, the weighting or this pair's text are at fault."
    )


def states_not_finite(states: Tensor, logps: Tensor, mask: Tensor) -> Tensor:
    """Where hidden states `(2B, T, D)` or log-probabilities `(2B, T)` are not finite within the mask."""
    norms = torch.linalg.vector_norm(states.detach(), dim=2, dtype=torch.float32)
    return (~norms.isfinite() | ~logps.detach().isfinite()) & mask


def require_same_start(policy_logps: Tensor, reference_logps: Tensor, mask: Tensor) -> None:
    """Raises a `RuntimeError` when a reference that is made as the policy's copy isn't one before the first step.

    The copy is loaded from the path in the model's config, so it misses changes made in memory; and a sharded
    engine may load it wrongly (seen with FSDP2, where `trl.DPOTrainer` starts at a loss of 20 for it).

    Args:
        policy_logps: `(2B, T)`.
        reference_logps: `(2B, T)`.
        mask: `(2B, T)` bool.
    """
    gap = ((policy_logps.detach() - reference_logps).abs() * mask).sum() / mask.sum().clamp(min=1)
    if gap > _LARGEST_START_GAP:
        raise RuntimeError(
            f"Before the first step the reference's log-probabilities differ from the policy's by {gap:.3f} nats a "
            "token, though it should be a copy of it. It is loaded from the path in `model.config`: if your model was "
            "changed in memory, pass `ref_model`; under FSDP, train an adapter, which needs no second model."
        )


@dataclass
class RowFinder:
    """Finds the row of a pair of a batch in the dataset that the user passed.

    Attributes:
        dataset: The dataset that batches are made of.
        original: The row in the user's dataset of each of its rows, None where they are the same.
        rule: How sequences are truncated.
    """

    dataset: Any
    original: list[int] | None
    rule: PairRule

    def find(self, inputs: dict[str, Any], pair: int) -> int | None:
        """The row whose two sequences are the pair's; None if it can't be told."""
        if not isinstance(self.dataset, Dataset) or "chosen_ids" not in self.dataset.column_names:
            return None
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        other = pair + len(ids) // 2
        chosen, rejected = ids[pair][mask[pair]].tolist(), ids[other][mask[other]].tolist()
        for row, (prompt, *completions) in enumerate(token_lists(self.dataset)):
            if [self.rule.truncate(prompt + completion) for completion in completions] == [chosen, rejected]:
                return row if self.original is None else self.original[row]
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

"""Whether the reference starts as the policy's copy, which it is meant to be when the user passes none.

TRL loads the copy from the path in the model's config, so it misses changes made in memory; and a sharded engine may
load it wrongly (seen with FSDP2, where `trl.DPOTrainer` starts at a loss of 20 for it).

Shapes: B pairs, T scored positions.
"""

from torch import Tensor

# Nats a token. Half precision and another kernel make less than a tenth of it; another model makes far more.
_LARGEST_START_GAP = 0.1


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

    Args:
        gap: See [`start_gap`], of a policy without noise.
    """
    if not is_same_start(gap):
        raise RuntimeError(
            f"Before the first step the reference's log-probabilities differ from the policy's by {gap:.3f} nats a "
            "token, though it should be a copy of it. It is loaded from the path in `model.config`: if your model was "
            "changed in memory, pass `ref_model`; under FSDP, train an adapter, which needs no second model."
        )

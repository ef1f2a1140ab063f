"""What [`otpo.OTPOTrainer`] hands to TRL's loss, and proof that TRL reads it.

TRL's `_compute_loss` is private. A release that renames one of the things it reads would go on without an error, and
train on another loss. So what is handed over records that it was read, and the first loss of a trainer is preceded by
one of made-up numbers, whose value is known.
"""

from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl.trainer.utils import FusedCausalLMOutput

from .swap import swapped
from .training.reference_cache import REFERENCE_COLUMNS

_TOLERANCE = 1e-4


class HandedInputs(dict[str, Any]):
    """A batch that knows which of its entries were looked up by name."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        """The entry."""
        self.read.add(name)
        return super().__getitem__(name)


def require_read(inputs: HandedInputs, scored: object) -> None:
    """Raises a `RuntimeError` unless TRL called the stand-in of the model and read the reference's sums.

    Args:
        inputs: What TRL's loss was given.
        scored: What the stand-in has kept of its call, None if it was not called.
    """
    missing = [name for name in REFERENCE_COLUMNS if name not in inputs.read]
    if scored is None or missing:
        what = f"the reference's {' and '.join(missing)}" if scored is not None else "the model's stand-in"
        raise RuntimeError(f"`DPOTrainer._compute_loss` has not used {what}, so its loss is not OTPO's. {_remedy()}")


def require_known_loss(trainer: Any, compute_loss: Callable[..., Any]) -> None:
    """Raises a `RuntimeError` unless TRL's loss of made-up log-probabilities, weighted with 2, has a doubled beta.

    The model is not asked.

    Args:
        trainer: The trainer, whose attributes are TRL's options of the loss.
        compute_loss: `DPOTrainer._compute_loss` of that trainer.
    """
    device = trainer.accelerator.device
    generator = torch.Generator().manual_seed(0)
    policy, reference = (-torch.rand(2, 4, 3, generator=generator)).to(device)
    ids = torch.ones(4, 4, dtype=torch.long, device=device)
    sums = (2.0 * reference).sum(1).chunk(2)
    inputs = HandedInputs({"input_ids": ids, "attention_mask": ids, "completion_mask": ids})
    inputs.update(zip(REFERENCE_COLUMNS, sums, strict=True))

    def stand_in(**_: Any) -> FusedCausalLMOutput:
        nothing = torch.zeros_like(policy)
        return FusedCausalLMOutput(
            log_probs=2.0 * policy, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool(), label_mask=None
        )

    beta = 0.3
    with swapped(
        trainer,
        precompute_ref_logps=True,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        beta=beta,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        aux_loss_enabled=False,
        **no_metrics(),
    ):
        try:
            found = float(compute_loss(stand_in, inputs, False))
        except Exception as error:  # whatever a renamed attribute leads to
            raise RuntimeError(
                f"`DPOTrainer._compute_loss` fails on what `OTPOTrainer` hands it: {error!r}. {_remedy()}"
            ) from error
    chosen, rejected = (policy - reference).sum(1).chunk(2)
    expected = float(-logsigmoid(2.0 * beta * (chosen - rejected)).mean())
    if not abs(found - expected) < _TOLERANCE:
        raise RuntimeError(
            f"`DPOTrainer._compute_loss` gives {found:.4f} for numbers whose loss is {expected:.4f}, so it does not "
            f"read what `OTPOTrainer` hands it. {_remedy()}"
        )


def no_metrics() -> dict[str, Any]:
    """Attributes of a trainer in whose place TRL's loss collects metrics that nobody sees."""
    return {"_metrics": {mode: defaultdict(list) for mode in ("train", "eval")}, "_total_train_tokens": 0}


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
    plain = causal_lm.get_base_model() if is_peft_model(causal_lm) else causal_lm
    device = plain.get_output_embeddings().weight.device

    def move(_module: Any, _args: Any, outputs: Any) -> None:
        logits = outputs.get("router_logits")
        if logits is not None:
            outputs["router_logits"] = tuple(layer.to(device) for layer in logits)

    plain.base_model.register_forward_hook(move)


def _remedy() -> str:
    return f"trl {version('trl')} is installed: install 'trl>=1.16,<1.17', and report it."

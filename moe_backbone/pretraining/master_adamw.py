"""AdamW for bfloat16 weights that trains their float32 masters.

No library that we could keep does it: FlashOptim 0.1.4 and torchao keep moments in the weights' type, and FlashOptim
has neither a step counted on the device nor a scale of gradients. torch's fused AdamW takes weights, gradients and
moments of one type, so whole masters beside the weights would move as many bytes as float32 weights under autocast.
"""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from otpo_kernels.master_weights import first_remainder, step_numbers, update_all

_MOMENTS = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}
_GROUP = {"lr", "betas", "eps", "weight_decay"}
_OTHERS = {"maximize": False, "decoupled_weight_decay": True}
"""Options of torch's Adam and AdamW that make another step of the same states, and what is done here."""


class MasterAdamW(torch.optim.Optimizer):
    """AdamW whose moments are float32 and whose bfloat16 weights are the rounded upper halves of float32 masters.

    Masters begin anywhere in what rounds to their weights ([`first_remainder`]). On the CPU a step gives the bits of
    `torch.optim.AdamW` on the float32 masters and the same gradients. A weight's state has `step`, `exp_avg`,
    `exp_avg_sq` and, of a bfloat16 weight, the int16 `remainder`. So a checkpoint holds the masters in two files:
    upper halves in the model's, remainders in the optimizer's.

    As in torch's fused AdamW, a scalar tensor `grad_scale` divides the gradients, and one of `found_inf` above 0
    leaves the step out, so that not even `step` changes. Unlike there, gradients are not written.

    Args:
        params: Weights in bfloat16 or float32, or groups of them.
        lr: Learning rate, a number or a scalar tensor, >= 0.
        betas: Of both moments, each in `[0, 1)`.
        eps: >= 0.
        weight_decay: >= 0.

    Raises:
        ValueError: A number is out of its range, or a weight is of another type or spread over devices.
    """

    # Without values: torch.amp.GradScaler multiplies a `grad_scale` that it finds, and deletes both after the step.
    grad_scale: Tensor
    found_inf: Tensor
    _step_supports_amp_scaling = True  # what torch.amp.GradScaler looks for before it sets the two above

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of weights, as every optimizer does.

        Raises:
            ValueError: As where the optimizer is made; the group is not added.
        """
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates the weights that have gradients.

        Args:
            closure: Computes the loss anew; what it returns is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_device: dict[torch.device, list[Tensor]] = {}
            for weight in group["params"]:
                grad = weight.grad
                if grad is not None:
                    if grad.is_sparse:  # before any state is written
                        raise RuntimeError("MasterAdamW has no update for sparse gradients.")
                    by_device.setdefault(weight.device, []).append(weight)
            for device, weights in by_device.items():
                self._step(group, device, weights)
        return loss

    def _step(self, group: dict[str, Any], device: torch.device, weights: list[Tensor]) -> None:
        """Updates the weights of a group on one device."""
        states = [self._state(weight) for weight in weights]
        steps = [state["step"] for state in states]
        told = (getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        scale, found = (each if each is None else each.to(device, non_blocking=True) for each in told)
        now = torch.stack(steps) + 1
        numbers = step_numbers(now, group["lr"], group["betas"], group["weight_decay"], scale, found)
        # A scaler counts what it has found, and may have found more than one.
        counted = torch.ones_like(now[0]) if found is None else (~(found > 0)).float()
        # One for each, since a lone scalar tensor is read by the host as a number, for which it waits for the device.
        torch._foreach_add_(steps, [counted] * len(steps))
        remainders = [state.get("remainder") for state in states]
        grads: Any = [weight.grad for weight in weights]
        first, second = ([state[name] for state in states] for name in _MOMENTS)
        update_all(weights, remainders, grads, first, second, numbers, group["betas"], group["eps"])

    def _state(self, weight: Tensor) -> dict[str, Any]:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            for name, dtype in _MOMENTS.items():
                state[name] = torch.zeros_like(weight, dtype=dtype, memory_format=torch.preserve_format)
            if weight.dtype == torch.bfloat16:
                state["remainder"] = first_remainder(weight)
        if ("remainder" in state) != (weight.dtype == torch.bfloat16):
            raise ValueError(
                f"A weight was cast to {weight.dtype} after a step of MasterAdamW, whose state is of its type before. "
                "Make a new optimizer after the cast."
            )
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave. torch's own method would cast moments and remainders to the weights' type.

        Raises:
            ValueError: The states are not those of a `MasterAdamW` of weights of these types.
        """
        for group in state_dict["param_groups"]:
            # Not `defaults`, to which torch adds one of its own where states are unpickled.
            if lacking := ", ".join(sorted(_GROUP - group.keys())):
                raise _other_states(f"its groups have no {lacking}")
            for name, own in _OTHERS.items():
                if group.get(name, own) != own:
                    raise _other_states(f"its groups have {name}={group[name]}")
        sizes = [[len(group["params"]) for group in each["param_groups"]] for each in (state_dict, vars(self))]
        if sizes[0] != sizes[1]:
            raise _other_states(f"its groups have {sizes[0]} weights, and this run's {sizes[1]}")
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        states: dict[Tensor, dict[str, Any]] = {}
        for index, weight in zip(saved, own, strict=True):
            if index in state_dict["state"]:
                found = state_dict["state"][index]
                _check_state(weight, found)
                states[weight] = {name: value.to(weight.device) for name, value in found.items()}
        super().load_state_dict({**state_dict, "state": {}})
        self.state.update(states)


def refuse_remainders(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """A hook before an optimizer loads states: those of a [`MasterAdamW`] would be read as float32 moments.

    Raises:
        ValueError: The states have remainders of bfloat16 weights.
    """
    if any("remainder" in state for state in state_dict["state"].values()):
        raise ValueError(
            "The checkpoint's optimizer has the lower halves of float32 masters of bfloat16 weights, and this run's "
            f"optimizer is {type(optimizer).__name__}. Set `dtype` to bfloat16 and `optim` to adamw_torch_fused as "
            "they were, or start from the checkpoint's weights: `model_name_or_path` without `resume_from_checkpoint`."
        )


def _check_group(group: dict[str, Any]) -> None:
    lr, betas, eps, weight_decay = (group[name] for name in ("lr", "betas", "eps", "weight_decay"))
    two = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
    ranges = {"lr": lr >= 0, "betas": two, "eps": eps >= 0, "weight_decay": weight_decay >= 0}
    for name, right in ranges.items():
        if not right:
            wanted = "two numbers in [0, 1)" if name == "betas" else "at least 0"
            raise ValueError(f"`{name}={group[name]}` is out of AdamW's range. Set it to {wanted}.")
    for weight in group["params"]:
        if weight.dtype not in (torch.bfloat16, torch.float32) or isinstance(weight, DTensor):
            kind = "spread over devices" if isinstance(weight, DTensor) else f"in {weight.dtype}"
            raise ValueError(f"MasterAdamW trains whole weights in bfloat16 or float32, and one is {kind}.")


def _state_types(weight: Tensor) -> dict[str, torch.dtype]:
    """Types of the states that have a weight's shape."""
    halves = {"remainder": torch.int16} if weight.dtype == torch.bfloat16 else {}
    return _MOMENTS | halves


def _check_state(weight: Tensor, state: dict[str, Any]) -> None:
    wanted = {"step": torch.float32} | _state_types(weight)
    found = {name: getattr(value, "dtype", type(value).__name__) for name, value in state.items()}
    if found != wanted or any(state[name].shape != weight.shape for name in _state_types(weight)):
        shown = ", ".join(
            f"{name} ({str(dtype).removeprefix('torch.')} {list(getattr(state[name], 'shape', ()))})"
            for name, dtype in found.items()
        )
        kind = f"{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
        raise _other_states(f"of a weight ({kind}) it has {shown or 'nothing'}")


def _other_states(what: str) -> ValueError:
    return ValueError(
        f"The checkpoint's optimizer has other states than AdamW with float32 masters: {what}. Set `dtype` and "
        "`optim` as they were, or start from the checkpoint's weights: `model_name_or_path` without "
        "`resume_from_checkpoint`."
    )

"""How many tokens a pass gathers where batches vary: the processes that share experts agree on it before each pass.

A gather (`gather`) needs one number in all processes: C, the most tokens of the pass in any of them. With packed rows
it is known from the start. Where batches vary, a hook before the forward of the model with the layers asks the other
processes by a group of the hosts, once for all layers: it waits until their hosts have come to the same pass, and for
no device.

C is the largest T itself, not rounded up: the process with the most tokens then pads nothing, and no kernel here is
compiled anew for another number of tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class AgreedCapacity:
    """C of the pass that runs, one object for all layers of a model.

    Args:
        group: Of the hosts of the processes that share the experts, see [`host_group`].

    Attributes:
        tokens: C; 0 before the first pass.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.tokens = group, 0
        self._hook: Any = None
        self._checkpointed: list[Any] = []

    def agree(self, tokens: int) -> None:
        """Sets C to the most tokens of any process; all processes of the group call it together.

        Args:
            tokens: T of this process, at least 0.
        """
        largest = torch.tensor(tokens, device="cpu")
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        self.tokens = int(largest)

    @contextmanager
    def held(self, tokens: int) -> Iterator[None]:
        """C of an earlier pass for a while."""
        before, self.tokens = self.tokens, tokens
        try:
            yield
        finally:
            self.tokens = before

    def follow(self, backbone: nn.Module) -> None:
        """Has each pass of a model agree on its C, and layers that run again in the backward keep that of their pass.

        Args:
            backbone: The model that calls the layers, with `input_ids` `(B, L)`, its first argument, or
                `inputs_embeds` `(B, L, D)`.
        """
        self._checkpointed = [module for module in backbone.modules() if hasattr(module, "gradient_checkpointing")]
        # No graph of `torch_compile` takes in what the processes say to each other.
        before_pass: Any = torch.compiler.disable(self._before_pass)
        self._hook = backbone.register_forward_pre_hook(before_pass, with_kwargs=True)

    def leave(self) -> None:
        """Ends what `follow` began."""
        self._hook.remove()
        for module in self._checkpointed:
            function = vars(module).get("_gradient_checkpointing_func")
            if isinstance(function, _Checkpoint):
                module._gradient_checkpointing_func = function.function

    def _before_pass(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.agree(tokens_of(args, kwargs))
        for module in self._checkpointed:  # each time: who switches checkpointing off and on sets the function anew
            function = vars(module).get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, _Checkpoint):
                module._gradient_checkpointing_func = _Checkpoint(function, self)


class _Checkpoint:
    """A function that keeps a layer's inputs alone; when the layer runs again, C is that of its own pass."""

    def __init__(self, function: Callable[..., Any], capacity: AgreedCapacity):
        self.function, self.capacity = function, capacity

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        tokens = self.capacity.tokens

        def run_with_own(*args: Any, **kwargs: Any) -> Any:
            with self.capacity.held(tokens):
                return run(*args, **kwargs)

        return self.function(run_with_own, *args, **kwargs)


def tokens_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """T of a model's arguments, B * L; 0 without rows, which the model itself refuses."""
    rows = kwargs.get("input_ids", args[0] if args else None)
    if rows is None:
        rows = kwargs.get("inputs_embeds")
    return 0 if rows is None else rows.size(0) * rows.size(1)


def host_group(group: dist.ProcessGroup, seconds: float) -> dist.ProcessGroup:
    """A group of the same processes that works on the CPU. All processes of the run call it together.

    Args:
        group: Of the devices.
        seconds: After which a process that waits gives up.
    """
    groups: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(groups, dist.get_process_group_ranks(group))
    distinct = sorted({tuple(ranks) for ranks in groups})
    mine, _ = dist.new_subgroups_by_enumeration(
        [list(ranks) for ranks in distinct], timeout=timedelta(seconds=seconds), backend="gloo"
    )
    assert isinstance(mine, dist.ProcessGroup)
    return mine

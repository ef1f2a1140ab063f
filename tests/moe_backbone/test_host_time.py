"""Launches and bytes of layers that are not compiled are those that PyTorch dispatches."""

import contextlib
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_backbone import CompassConfig, CompassForCausalLM
from moe_backbone.planning.host_time import eager_bytes, host_time
from moe_backbone.planning.setup import TrainingSetup

PRODUCTS = ("aten.mm", "_grouped_mm", "flash", "otpo")


class Counter(TorchDispatchMode):
    """Operations that launch something, and the bytes of their tensors; products' bytes are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read, written = (
            [leaf for leaf in tree_leaves(part) if isinstance(leaf, torch.Tensor)] for part in ((args, kwargs), out)
        )
        places = {tensor.untyped_storage().data_ptr() for tensor in read}
        is_view = bool(read) and all(tensor.untyped_storage().data_ptr() in places for tensor in written)
        if not written or "empty" in str(func) or (is_view and not func._schema.is_mutable):
            return out
        self.launches += 1
        if not any(name in str(func) for name in PRODUCTS):
            distinct = {(tensor.data_ptr(), tensor.shape): tensor.nbytes for tensor in read}
            self.bytes += sum(distinct.values()) + sum(tensor.nbytes for tensor in written)
        return out


def count(config: CompassConfig, setup: TrainingSetup) -> Counter:
    model = CompassForCausalLM._from_config(
        config, attn_implementation="sdpa", experts_implementation=setup.experts_implementation
    ).train()
    if setup.bytes_of.weights == 2:
        model = model.bfloat16()
    ids = torch.randint(config.vocab_size, (setup.micro_batch_size, setup.sequence_length))
    mixed = torch.autocast("cpu", torch.bfloat16) if setup.bytes_of.copies else contextlib.nullcontext()
    with Counter() as counter:
        with mixed:
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
    return counter


@pytest.mark.parametrize("experts", ["grouped_mm", "memcpy"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-pure"])
def test_a_layer_moves_what_is_counted(precision, experts):
    sizes = {"vocab_size": 50, "hidden_size": 144, "head_dim": 24, "num_attention_heads": 6, "num_key_value_heads": 2}
    sizes |= {"moe_intermediate_size": 112, "num_experts": 6, "num_experts_per_tok": 3}
    one, two = (CompassConfig(**sizes, num_hidden_layers=n) for n in (1, 2))
    interpreted = experts == "memcpy"  # its kernels run line by line on the CPU
    setup = TrainingSetup(
        gpus_per_node=1,
        micro_batch_size=1 if interpreted else 3,
        sequence_length=33 if interpreted else 65,
        precision=precision,
        compile_layers=False,
        experts_implementation=experts,
    )
    counts = [count(config, setup) for config in (one, two)]
    assert eager_bytes(one, setup) == pytest.approx(counts[1].bytes - counts[0].bytes, rel=0.05)
    layer = host_time(two, setup, 1.0)[0] - host_time(one, setup, 1.0)[0]
    assert layer == pytest.approx(counts[1].launches - counts[0].launches, rel=0.03)

"""Launches and bytes of layers that are not compiled are those that PyTorch dispatches."""

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_backbone import CompassConfig, CompassForCausalLM
from moe_backbone.planning.host_time import HostTime, eager_bytes, host_time, layer_launches
from moe_backbone.planning.setup import TrainingSetup

PRODUCTS = ("aten.mm", "_grouped_mm", "flash")
MOVES = ("otpo.route", "otpo.permute", "otpo.unpermute")


class Counter(TorchDispatchMode):
    """Operations that launch something, and the bytes of their tensors; those of products and moves are left out."""

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
        if not any(name in str(func) for name in (*PRODUCTS, *MOVES)):
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
    layer = sum(layer_launches(two, setup)) - sum(layer_launches(one, setup))
    assert layer == pytest.approx(counts[1].launches - counts[0].launches, rel=0.03)


def test_the_device_waits_for_what_the_host_has_not_launched():
    ahead = HostTime(forward=4.0, backward=1.0, alone=0.5, runs_ahead=True)
    # The forward is launched when 4 are over, 3 of them waited; the backward is launched beside heads and itself.
    assert ahead.waiting(1.0, 1.0, 2.0, micro_batches=1) == 3.5
    # The device has done the first after 7. The next forward is launched after 9, one later than it could be done.
    assert ahead.waiting(1.0, 1.0, 2.0, micro_batches=2) == 3.0 + 1.0 + 0.5
    # A device that is slower than the host waits for nothing but what is done alone.
    assert ahead.waiting(5.0, 1.0, 2.0, micro_batches=3) == 0.5
    # A host that waits for the device launches the second micro-batch when the first is done.
    behind = HostTime(forward=4.0, backward=1.0, alone=0.5, runs_ahead=False)
    assert behind.waiting(1.0, 1.0, 2.0, micro_batches=2) == 2 * 3.0 + 0.5


def test_what_the_host_does_by_the_setup():
    config = CompassConfig(num_hidden_layers=3, num_mtp_layers=0)
    plain = TrainingSetup(gpus_per_node=2, compile_layers=False, experts_implementation="grouped_mm")
    one = host_time(config, plain, 1.0)
    assert one.alone == 0 and one.runs_ahead and one.backward < one.forward
    # A checkpointed layer runs its forward again, by Python.
    twice = host_time(config, replace(plain, gradient_checkpointing=True), 1.0)
    assert twice.backward - one.backward == layer_launches(config, plain)[0] and twice.forward == one.forward
    # DeepSpeed's hooks are in the backward; its step is hidden by nothing.
    divided = host_time(config, replace(plain, strategy="zero2"), 1.0)
    assert divided.backward > one.backward and divided.alone > 0 and divided.forward == one.forward
    # Each layer, forward and micro-batch waits for the number of rows that are sent.
    sends = replace(plain, expert_parallel_size=2, expert_exchange="all_to_all")
    waits = [host_time(config, replace(sends, gradient_accumulation_steps=n), 1.0) for n in (1, 2)]
    assert waits[1].alone == 2 * waits[0].alone > 0 and not waits[0].runs_ahead

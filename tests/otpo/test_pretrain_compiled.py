"""`otpo pretrain --compile_layers`: what is compiled, what forbids it, and that the header says which."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType

from moe_backbone import CompassForCausalLM, preset
from otpo.cli.pretraining.compiling import compile_for_run


def run_of(engine: DistributedType = DistributedType.NO, **changes: Any) -> Any:
    """What of a trainer is read before a run, around a tiny model whose experts are grouped."""
    stage = changes.pop("stage", 3)
    model = CompassForCausalLM(preset("compass-tiny", vocab_size=64, num_mtp_layers=1))
    model.set_experts_implementation(changes.pop("experts", "grouped_mm"))
    return SimpleNamespace(
        model=model,
        args=SimpleNamespace(**{"torch_compile": False, "device": torch.device("cpu"), **changes}),
        accelerator=SimpleNamespace(
            distributed_type=engine,
            state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage)),
        ),
    )


def is_compiled(trainer: Any) -> bool:
    compiled = {layer._compiled_run is not None for layer in trainer.model.model.layers}
    assert len(compiled) == 1
    return compiled.pop()


@pytest.mark.parametrize(
    ("asked", "run", "says"),
    [
        (True, {}, "each layer, in the first steps"),
        (True, {"engine": DistributedType.MULTI_CPU}, "each layer"),
        (False, {"device": torch.device("cuda")}, "no (`compile_layers`)"),
        (None, {}, "no, since there is no GPU"),
        (None, {"device": torch.device("cuda")}, "each layer"),
        (True, {"engine": DistributedType.FSDP}, "FSDP gathers parameters while a layer runs"),
        (True, {"engine": DistributedType.DEEPSPEED}, "DEEPSPEED gathers parameters"),
        (True, {"engine": DistributedType.DEEPSPEED, "stage": 2}, "each layer"),
        (True, {"experts": "eager"}, "set grouped_mm or memcpy"),
        (True, {"torch_compile": True}, "the whole model, as `torch_compile` says"),
    ],
)
def test_what_is_compiled(asked, run, says):
    trainer = run_of(**run)
    assert says in compile_for_run(trainer, asked=asked)
    assert is_compiled(trainer) == says.startswith("each layer")


def test_a_quantized_model_is_not_compiled():
    trainer = run_of()
    trainer.model.quantization_method = "bitsandbytes"
    assert compile_for_run(trainer, asked=True) == "no, since the model is quantized"
    assert not is_compiled(trainer)

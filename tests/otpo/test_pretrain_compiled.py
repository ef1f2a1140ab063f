"""`otpo pretrain --compile_layers`: what is compiled, what forbids it, and that the header says which."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType

from moe_backbone import CompassForCausalLM, preset
from otpo.cli.pretraining.compiling import compile_for_run, micro_batches


def run_of(device: str = "cpu", engine: DistributedType = DistributedType.NO, **changes: Any) -> Any:
    """What of a trainer is read before a run, around a tiny model whose experts are grouped."""
    model = CompassForCausalLM(preset("compass-tiny", vocab_size=64, num_mtp_layers=1))
    model.set_experts_implementation(changes.pop("experts", "grouped_mm"))
    args = {"max_steps": 300, "gradient_accumulation_steps": 1, "num_train_epochs": 2.0, "train_batch_size": 4}
    args["torch_compile"] = False
    return SimpleNamespace(
        model=model,
        args=SimpleNamespace(**{**args, **changes}),
        train_dataset=[None] * 50,
        accelerator=SimpleNamespace(device=torch.device(device), distributed_type=engine, num_processes=2),
    )


def is_compiled(trainer: Any) -> bool:
    compiled = {layer._compiled_run is not None for layer in trainer.model.model.layers}
    assert len(compiled) == 1
    return compiled.pop()


@pytest.mark.parametrize(
    ("asked", "run", "says"),
    [
        (None, {"device": "cuda"}, "each layer, in the first steps"),
        (None, {"device": "cuda", "max_steps": 299}, "the run is short"),
        (None, {"device": "cuda", "max_steps": 150, "gradient_accumulation_steps": 2}, "each layer"),
        (None, {}, "no, unless `compile_layers` is set"),
        (True, {"max_steps": 1}, "each layer"),
        (True, {"engine": DistributedType.MULTI_CPU}, "each layer"),
        (False, {"device": "cuda"}, "no, as `compile_layers` says"),
        (True, {"engine": DistributedType.FSDP}, "FSDP gathers parameters while a layer runs"),
        (None, {"device": "cuda", "engine": DistributedType.DEEPSPEED}, "DEEPSPEED gathers parameters"),
        (True, {"experts": "eager"}, "set grouped_mm or memcpy"),
        (True, {"torch_compile": True}, "the whole model, as `torch_compile` says"),
    ],
)
def test_what_is_compiled(asked, run, says):
    trainer = run_of(**run)
    assert says in compile_for_run(trainer, asked)
    assert is_compiled(trainer) == says.startswith("each layer")


def test_a_quantized_model_is_not_compiled():
    trainer = run_of()
    trainer.model.quantization_method = "bitsandbytes"
    assert compile_for_run(trainer, True) == "no, since the model is quantized"
    assert not is_compiled(trainer)


def test_micro_batches_of_a_run():
    assert micro_batches(run_of(max_steps=7, gradient_accumulation_steps=3)) == 21
    assert micro_batches(run_of(max_steps=-1)) == 12  # 50 rows twice, 4 of them in each of two processes' batches

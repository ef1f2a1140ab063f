"""Which weights are rounded, and that nothing sums or steps in fewer bits than the header says."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from pretraining_helpers import pretrainer, tiny_compass
from torch import nn

from moe_backbone.pretraining import weight_types
from moe_backbone.pretraining.master_adamw import MasterAdamW
from moe_backbone.pretraining.weight_types import choose_optimizer, round_weights

ALONE, DDP, FSDP, DEEPSPEED = (DistributedType[name] for name in ("NO", "MULTI_GPU", "FSDP", "DEEPSPEED"))
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch):
    monkeypatch.setattr(weight_types.Trainer, "get_optimizer_cls_and_kwargs", lambda args, model: (None, {}))


def training(optim="adamw_torch_fused", micro_batches=1, engine=ALONE, model=None, mixed="no", **brought) -> Any:
    model = nn.Linear(2, 2).to(HALF) if model is None else model
    args = SimpleNamespace(optim=optim, mixed_precision=mixed, gradient_accumulation_steps=micro_batches)
    accelerator = SimpleNamespace(distributed_type=engine)
    brought = {"optimizer": None, "optimizer_cls_and_kwargs": None} | brought
    return SimpleNamespace(args=args, accelerator=accelerator, model=model, **brought)


OPTIMIZERS = ["adamw_torch", "sgd", "adafactor", "adamw_bnb_8bit"]


@pytest.mark.parametrize("engine", [DDP, DistributedType.MULTI_CPU, FSDP, DistributedType.MULTI_XPU], ids=str)
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_no_engine_sums_in_bfloat16(engine, optim):
    choose_optimizer(training(optim, 1, engine))
    with pytest.raises(ValueError, match=r"`gradient_accumulation_steps=4`.*`dtype` to float32"):
        choose_optimizer(training(optim, 4, engine))
    with pytest.raises(ValueError, match="`gradient_accumulation_steps=4`"):
        model = nn.Linear(2, 2).to(HALF)
        choose_optimizer(training(optim, 4, engine, model, optimizer=torch.optim.SGD(model.parameters())))
    assert choose_optimizer(training(optim, 4, engine, nn.Linear(2, 2))) == (None, optim)


@pytest.mark.parametrize(("optim", "sums"), [*zip(OPTIMIZERS, [True, True, True, False], strict=True)])
def test_one_process_sums_in_float32_or_refuses(optim, sums):
    trainer = training(optim, 4)
    if sums:
        choose_optimizer(trainer)
        assert {weight.grad_dtype for weight in trainer.model.parameters()} == {torch.float32}
    else:
        with pytest.raises(ValueError, match=f"`optim={optim}`.*`optim` to adamw_torch_fused"):
            choose_optimizer(trainer)


@pytest.mark.parametrize(("engine", "mixed"), [(DEEPSPEED, "no"), (DEEPSPEED, "fp16"), (FSDP, "bf16")])
@pytest.mark.parametrize("dtype", [torch.float16, HALF], ids=str)
def test_engines_keep_copies(engine, mixed, dtype):
    chosen = choose_optimizer(training("adamw_torch", 4, engine, nn.Linear(2, 2).to(dtype), mixed))
    assert chosen.made_of is None and "keeps float32 copies" in chosen.told


@pytest.mark.parametrize("engine", [ALONE, DDP, FSDP], ids=str)
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_float16_is_refused_where_nobody_keeps_copies(engine, optim):
    model = nn.Linear(2, 2).half()
    with pytest.raises(ValueError, match=r"`dtype=float16`.*Set `dtype` to bfloat16 or float32"):
        choose_optimizer(training(optim, 1, engine, model))
    assert choose_optimizer(training(optim, 1, engine, model.requires_grad_(False))).told == optim


def test_the_type_of_sums_is_of_this_training():
    model = nn.Linear(2, 2).to(HALF)
    for micro_batches, dtype in [(4, torch.float32), (1, HALF), (2, torch.float32)]:
        choose_optimizer(training(micro_batches=micro_batches, model=model))
        assert {weight.grad_dtype for weight in model.parameters()} == {dtype}
        model(torch.ones(1, 2, dtype=HALF)).sum().backward()  # leaves gradients of that type to the next
        assert model.weight.grad is not None and model.weight.grad.dtype == dtype
    choose_optimizer(training(model=model, engine=DEEPSPEED))
    assert model.weight.grad_dtype == HALF and model.weight.grad.dtype == HALF


def test_what_is_told():
    model = nn.Linear(2, 2).to(HALF)
    for optim in ("sgd", "adamw_bnb_8bit"):
        told = choose_optimizer(training(optim)).told
        assert told == f"{optim} on bfloat16 weights: steps below a weight's rounding are lost"
    assert "; DDP reduces in bfloat16" in choose_optimizer(training("sgd", engine=DDP)).told
    masters = MasterAdamW(model.parameters())
    for brought in ({"optimizer": masters}, {"optimizer_cls_and_kwargs": (MasterAdamW, {})}):
        made_of, told = choose_optimizer(training("sgd", 4, ALONE, model, **brought))
        assert made_of is None and told.startswith("the caller's MasterAdamW on float32 masters")
        assert "lost" not in told
    other = training(optimizer=torch.optim.AdamW(model.parameters()), model=model)
    assert choose_optimizer(other).told.startswith("the caller's AdamW on bfloat16 weights: steps")
    other.args.gradient_accumulation_steps = 2
    with pytest.raises(ValueError, match="and the caller's AdamW, which takes no"):
        choose_optimizer(other)


@pytest.mark.parametrize("optim", sorted(weight_types._TAKES_FLOAT32))
def test_optimizers_that_take_float32_gradients_do(tmp_path, monkeypatch, optim):
    monkeypatch.undo()
    model = tiny_compass()
    round_weights(model)
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "max_steps": 1, "warmup_steps": 0}
    trainer = pretrainer(tmp_path, model=model, optim=optim, **options)
    before = model.model.embed_tokens.weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, model.model.embed_tokens.weight)
    assert model.model.embed_tokens.weight.grad_dtype == torch.float32


class Patterned(nn.Module):
    _keep_in_fp32_modules: Any = None
    _keep_in_fp32_modules_strict: Any = None

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"gate": nn.Linear(2, 2), "up": nn.Linear(2, 2)}) for _ in range(2))


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("layers.0.gate", {"layers.0.gate.weight", "layers.0.gate.bias"}),
        ("layers.*.gate.bias", {"layers.0.gate.bias", "layers.1.gate.bias"}),
        (r"layers\.\d+\.up\.weight$", {"layers.0.up.weight", "layers.1.up.weight"}),
        ("up", {f"layers.{place}.up.{part}" for place in (0, 1) for part in ("weight", "bias")}),
        ("down", set()),
    ],
)
@pytest.mark.parametrize("name", ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"])
def test_what_a_model_keeps_in_float32_is_not_rounded(name, pattern, kept):
    model = Patterned()
    setattr(model, name, [pattern])
    round_weights(model)
    assert {each for each, weight in model.named_parameters() if weight.dtype == torch.float32} == kept

"""bfloat16 weights with float32 masters in two halves train as float32 weights do, bit for bit on the CPU."""

import math
from copy import deepcopy

import pytest
import torch
from accelerate import DistributedType
from operator_helpers import KERNEL_DEVICES
from pretraining_helpers import logged, pretrainer, tiny_compass
from torch import nn

from moe_backbone.pretraining import trainer as pretraining
from moe_backbone.pretraining.fused_clipping import clip_in_optimizer, takes_scales
from moe_backbone.pretraining.master_adamw import MasterAdamW
from moe_backbone.pretraining.weight_types import round_weights
from otpo_kernels import master_weights
from otpo_kernels.master_weights import first_remainder, join_master, split_master

EDGES = [0x0000, 0x0001, 0x007F, 0x0080, 0x3F7F, 0x3F80, 0x7F7F, 0x7F80, 0x7FFF]
SHAPES = [(10, 33), (7,), (1,), (16,), (0,), (8, 8), (), (3, 5, 7)]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


def master(optimizer: MasterAdamW, weight: torch.Tensor) -> torch.Tensor:
    state = optimizer.state[weight]
    return join_master(weight.detach().view(torch.int16), state["remainder"]) if "remainder" in state else weight


def weights_and_copies() -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape).bfloat16()) for shape in SHAPES]
    weights += [nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(1))]
    return weights, [nn.Parameter(first_master(weight.detach())) for weight in weights]


def first_master(weight: torch.Tensor) -> torch.Tensor:
    halved = weight.dtype == torch.bfloat16
    return join_master(weight.view(torch.int16), first_remainder(weight)) if halved else weight.clone()


def two_groups(weights: list[nn.Parameter]) -> list[dict]:
    return [{"params": weights[:5], "weight_decay": 0.1}, {"params": weights[5:], "weight_decay": 0.0}]


def same_gradients(weights, copies, none=()):
    for place, (weight, copy) in enumerate(zip(weights, copies, strict=True)):
        grad = torch.randn(copy.shape).bfloat16() * 10 ** torch.randn(()).item()
        weight.grad = None if place in none else grad.to(weight.dtype)
        copy.grad = None if place in none else grad.float()


def rounded_compass(**changes):
    model = tiny_compass(**changes)
    round_weights(model)
    return model


def test_masters_come_back_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    highs = [
        *EDGES,
        *(high | 0x8000 for high in EDGES),
        *torch.randint(0, 1 << 16, (150,), generator=generator).tolist(),
    ]
    low = torch.arange(1 << 16, dtype=torch.int64)
    for high in highs:
        whole = ((high << 16) + low).to(torch.int32).view(torch.float32)
        upper, remainder = split_master(whole)
        weight, back = upper.view(torch.bfloat16), join_master(upper, remainder)
        nan = whole.isnan()
        assert torch.equal(bits(back)[~nan], bits(whole)[~nan])
        assert back[nan].isnan().all() and weight[nan].isnan().all()
        ties = (low == 0x8000) & ~nan  # which alone go another way than `to`
        assert torch.equal(weight[~nan & ~ties], whole.to(torch.bfloat16)[~nan & ~ties])
        distance = (weight[ties].double() - whole[ties].double()).abs()
        assert (distance == (whole.to(torch.bfloat16)[ties].double() - whole[ties].double()).abs()).all()


def test_first_masters_are_spread_over_what_rounds_to_their_weights():
    edges = torch.tensor([*EDGES, *(high | 0x8000 for high in EDGES)]).to(torch.int16).view(torch.bfloat16)
    for weight in (
        edges,
        torch.randn(300, 1024).bfloat16(),
        torch.randn(5, 3).bfloat16().T,
        *weights_and_copies()[0][:8],
    ):
        masters = first_master(weight.detach())
        upper, _ = split_master(masters)
        back = upper.view(torch.bfloat16)
        assert masters.shape == weight.shape and torch.equal(back.isnan(), weight.isnan())
        assert torch.equal(back[~weight.isnan()], weight[~weight.isnan()])
    remainder = first_remainder(torch.ones(300, 1024, dtype=torch.bfloat16)).double()
    for mean in (remainder.mean(0), remainder.mean(1)):  # no row and no column lies on one side
        assert mean.abs().max() < 5 * 65536 / math.sqrt(12 * 300)
    assert remainder.abs().mean() == pytest.approx(16384, rel=0.01)


@pytest.mark.parametrize("value", [0.02, 1.0, -3.0])
def test_a_step_below_the_rounding_moves_the_mean(value):
    weight = nn.Parameter(torch.full((1000, 1000), value).bfloat16())
    start = weight.detach()[0, 0].item()
    size = abs(value) / 4000  # half of the distance to the next bfloat16 is 1/512 to 1/256 of the value
    optimizer = MasterAdamW([weight], lr=size, weight_decay=0)
    for step in range(1, 4):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert weight.detach().double().mean().item() == pytest.approx(start - step * size, abs=0.02 * size)


def test_steps_are_those_of_float32_adamw():
    weights, copies = weights_and_copies()
    optimizer = MasterAdamW(two_groups(weights), lr=3e-3, betas=(0.9, 0.95))
    expected = torch.optim.AdamW(two_groups(copies), lr=3e-3, betas=(0.9, 0.95), foreach=False)
    for step in range(50):
        for group in (*optimizer.param_groups, *expected.param_groups):
            group["lr"] = 3e-3 * (1 + math.cos(step / 50))
        same_gradients(weights, copies, none={step % 4})
        optimizer.step()
        expected.step()
    for weight, copy in zip(weights, copies, strict=True):
        assert torch.equal(master(optimizer, weight), copy)
        assert torch.equal(weight.detach().float(), split_whole(copy, weight.dtype))
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[weight][name], expected.state[copy][name]), name


def split_whole(copy: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    copy = copy.detach()
    return copy if dtype == torch.float32 else split_master(copy)[0].view(torch.bfloat16).float()


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_a_step_by_the_kernel_is_the_same(device, monkeypatch):
    weights = []
    for shape in [(64, 48), (32,), (7, 11), (16, 3), (), (0, 4), (900,)]:
        for dtype in (torch.bfloat16, torch.float32):
            weights.append(nn.Parameter(torch.randn(shape).to(device, dtype)))
    weights.append(nn.Parameter(torch.randn(9, 5).bfloat16().to(device).T))  # not contiguous
    weights.append(nn.Parameter(torch.randn(50).bfloat16().to(device)[1:]))  # at an odd address
    copies = [nn.Parameter(weight.detach().clone().cpu()) for weight in weights]
    optimizer, expected = (MasterAdamW(two_groups(each), lr=1e-2) for each in (weights, copies))
    for step in range(8):
        for place, (weight, copy) in enumerate(zip(weights, copies, strict=True)):
            dtype = torch.bfloat16 if weight.dtype == torch.bfloat16 and place % 4 else torch.float32
            weight.grad_dtype = copy.grad_dtype = dtype
            copy.grad = None if place % 3 == step else torch.randn(copy.shape).to(dtype)
            weight.grad = None if copy.grad is None else copy.grad.to(device)
        for each in (optimizer, expected):
            each.found_inf = torch.tensor(float(step == 5))
        if step == 4:  # all that the kernel was given lies elsewhere
            optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
            for weight in weights:
                weight.data = weight.data.clone()
        with monkeypatch.context() as patch:
            patch.setattr(master_weights, "_runs_in_triton", lambda tensor: True)
            optimizer.step()
        expected.step()
    for weight, copy in zip(weights, copies, strict=True):
        torch.testing.assert_close(master(optimizer, weight).cpu(), master(expected, copy), rtol=1e-5, atol=1e-6)
        assert optimizer.state[weight]["step"] == expected.state[copy]["step"] >= 6


def test_scales_and_left_out_steps_are_those_of_fused_adamw():
    weights, copies = weights_and_copies()
    optimizer = MasterAdamW(two_groups(weights), lr=1e-2)
    expected = torch.optim.AdamW(two_groups(copies), lr=1e-2, fused=True)
    for found in (0.0, 1.0, 0.0, 2.0):
        same_gradients(weights, copies)
        if found:
            weights[0].grad[0, 0] = copies[0].grad[0, 0] = torch.inf
        for each in (optimizer, expected):
            each.grad_scale, each.found_inf = torch.tensor(4.0), torch.tensor(found)
        expected.found_inf.clamp_(max=1.0)  # which torch takes from its steps as it is
        before = [master(optimizer, weight).detach().clone() for weight in weights]
        optimizer.step()
        expected.step()
        moved = [not torch.equal(old, master(optimizer, new)) for old, new in zip(before, weights, strict=True)]
        assert any(moved) == (not found)
    for weight, copy in zip(weights, copies, strict=True):
        assert optimizer.state[weight]["step"] == expected.state[copy]["step"] == 2
        torch.testing.assert_close(master(optimizer, weight), copy, rtol=1e-5, atol=1e-7)


def test_clipping_goes_into_the_step():
    weight = nn.Parameter(torch.full((300,), 0.5).bfloat16())
    optimizer = MasterAdamW([weight], lr=0.1)
    assert takes_scales(optimizer, DistributedType.NO) and not takes_scales(optimizer, DistributedType.FSDP)
    weight.grad = torch.linspace(0.1, 1.0, 300).bfloat16()
    norm = clip_in_optimizer(optimizer, 1.0)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(float(weight.grad.double().norm()), rel=1e-6)
    optimizer.step()
    assert float(optimizer.state[weight]["exp_avg"].norm()) == pytest.approx(0.1, rel=1e-4)
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


def test_states_load_as_they_were_saved(tmp_path):
    weights, copies = weights_and_copies()
    optimizer = MasterAdamW(two_groups(weights), lr=1e-2)
    same_gradients(weights, copies)
    optimizer.step()
    torch.save({"states": optimizer.state_dict(), "weights": weights}, tmp_path / "saved")
    saved = torch.load(tmp_path / "saved", weights_only=True)
    again = [nn.Parameter(weight) for weight in saved["weights"]]
    loaded = MasterAdamW(two_groups(again), lr=5.0)
    loaded.load_state_dict(saved["states"])
    assert loaded.param_groups[0]["lr"] == 1e-2
    same_gradients(weights, copies)
    for left, right in zip(weights, again, strict=True):
        right.grad = left.grad.clone()
    optimizer.step()
    loaded.step()
    for left, right in zip(weights, again, strict=True):
        assert torch.equal(left, right)
        assert optimizer.state[left].keys() == loaded.state[right].keys()
        for name, value in optimizer.state[left].items():
            assert torch.equal(value, loaded.state[right][name]) and value.dtype == loaded.state[right][name].dtype


def test_the_scaler_of_torch_works_with_it():
    weights, copies = weights_and_copies()
    optimizer, expected = MasterAdamW(weights, lr=1e-2), torch.optim.AdamW(copies, lr=1e-2, fused=True)
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0) for _ in range(2)]
    for unscaled in (False, True, False):
        same_gradients(weights, copies)
        for scaler, each in zip(scalers, (optimizer, expected), strict=True):
            scaler.scale(torch.ones(()))  # which makes its tensors
            if unscaled:
                scaler.unscale_(each)
            scaler.step(each)
            scaler.update()
    for weight, copy in zip(weights, copies, strict=True):
        torch.testing.assert_close(master(optimizer, weight), copy, rtol=1e-5, atol=1e-6)


def test_masters_begin_where_they_do_under_any_default_device():
    weight = torch.randn(70_000).bfloat16()
    expected = first_remainder(weight)
    with torch.device("meta"):
        assert torch.equal(first_remainder(weight), expected)


def test_routers_stay_in_float32():
    model = rounded_compass(router_bias_update_speed=0.01)
    types = {name: weight.dtype for name, weight in model.named_parameters()}
    assert {name for name, dtype in types.items() if dtype == torch.float32} == {
        name for name in types if name.endswith("gate.weight")
    }
    assert model.model.routers[0].e_score_correction_bias.dtype == torch.float32


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_which_optimizer_runs(tmp_path, optim):
    trainer = pretrainer(tmp_path, model=rounded_compass(), optim=optim)
    inner = trainer.create_optimizer()
    assert isinstance(inner, MasterAdamW) == (optim != "sgd")
    assert ("are lost" if optim == "sgd" else "float32 masters") in trainer.told_optimizer
    assert {group["weight_decay"] for group in inner.param_groups} == {0.0, 0.1}
    assert type(pretrainer(tmp_path, optim=optim).create_optimizer()) is not MasterAdamW


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_training_is_near_that_of_float32(tmp_path, micro_batches):
    options = {"max_steps": 6, "gradient_accumulation_steps": micro_batches}
    options["per_device_train_batch_size"] = 8 // micro_batches
    trainer = pretrainer(tmp_path / "rounded", model=rounded_compass(), **options)
    expected = pretrainer(tmp_path / "whole", **options)
    trainer.train()
    expected.train()
    assert logged(trainer, "loss") == pytest.approx(logged(expected, "loss"), rel=0.02)
    types = {weight.grad_dtype for weight in trainer.model.parameters() if weight.dtype == torch.bfloat16}
    assert types == {torch.float32 if micro_batches > 1 else torch.bfloat16}


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor"])
def test_a_resumed_training_is_the_whole_one(tmp_path, optim):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "optim": optim}
    whole = pretrainer(tmp_path, model=rounded_compass(), **options)
    whole.train()
    resumed = pretrainer(tmp_path, model=rounded_compass(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(resumed, "loss")[-2:] == logged(whole, "loss")[-2:]
    for left, right in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert left.dtype == right.dtype and torch.equal(left, right)
    states = [each.optimizer.state_dict()["state"] for each in (whole, resumed)]
    for left, right in zip(states[0].values(), states[1].values(), strict=True):
        for name, value in left.items():
            assert not isinstance(value, torch.Tensor) or torch.equal(value, right[name]), name
            assert getattr(value, "dtype", None) == getattr(right[name], "dtype", None), name

    if optim != "adamw_torch_fused":
        return
    other = pretrainer(tmp_path / "other", **options)
    with pytest.raises(ValueError, match="`dtype` to bfloat16"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_ddp_refuses_to_sum_micro_batches(tmp_path, monkeypatch):
    model = rounded_compass()
    trainer = pretrainer(tmp_path, model=model)
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", DistributedType.MULTI_CPU)
    trainer.optimizer_cls_and_kwargs = None  # as before it was chosen
    assert "DDP reduces in bfloat16" in pretraining.choose_optimizer(trainer).told
    trainer.args.gradient_accumulation_steps = 2
    with pytest.raises(ValueError, match="`gradient_accumulation_steps=2`"):
        pretraining.choose_optimizer(trainer)

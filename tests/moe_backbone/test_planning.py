"""A plan's memory is that of real training, and its traffic and time are what their formulas say."""

import contextlib
import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from moe_backbone import CompassConfig, CompassForCausalLM, preset
from moe_backbone.planning.activations import PRECISIONS, Batch, saved_activations
from moe_backbone.planning.counting import count_parameters
from moe_backbone.planning.hardware import GPUS, find_gpu
from moe_backbone.planning.memory import WORKSPACE, dense_parameters, plan_memory, routed_experts
from moe_backbone.planning.plan import load_config, make_plan
from moe_backbone.planning.setup import TrainingSetup
from moe_backbone.planning.step_time import Rates, all_to_all, row_move_bytes

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "moe_intermediate_size": 80,
    "num_experts": 8,
    "num_experts_per_tok": 3,
}
VARIANTS = {
    "plain": {},
    "mtp": {"num_mtp_layers": 2, "tie_word_embeddings": True},
    "detached": {"num_mtp_layers": 1, "mtp_detach_head": True, "mtp_detach_trunk": True},
    "idle": {"num_mtp_layers": 1, "mtp_loss_coef": 0.0},
    "shared": {"num_shared_experts": 2, "attention_bias": True},
    "lean": {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0, "norm_topk_prob": False},
    "no norms of queries and keys": {"use_qk_norm": False},
}
WIDE = {"vocab_size": 4000, "hidden_size": 128, "head_dim": 32, "moe_intermediate_size": 192, "num_hidden_layers": 4}


def make_model(config: CompassConfig, precision: str, checkpointing: bool) -> CompassForCausalLM:
    model = CompassForCausalLM._from_config(config, attn_implementation="sdpa", experts_implementation="grouped_mm")
    if PRECISIONS[precision].weights == 2:
        model = model.bfloat16()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def forward(model: CompassForCausalLM, ids: torch.Tensor, precision: str, packed: bool = False) -> torch.Tensor:
    mixed = torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()
    positions = torch.arange(ids.size(1)) % (ids.size(1) // 2) if packed else torch.arange(ids.size(1))
    with mixed:
        return model(ids, labels=ids, position_ids=positions.expand_as(ids), use_cache=False).loss


def saved_bytes(config: CompassConfig, batch: Batch, precision: str, checkpointing: bool) -> int:
    """Bytes of all storages that autograd saves in a forward, parameters left out."""
    model = make_model(config, precision, checkpointing)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(config.vocab_size, (batch.rows, batch.length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(model, ids, precision, batch.packed)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def dynamic_peak(config: CompassConfig, setup: TrainingSetup) -> int:
    """Most bytes that a training step has beside weights and moments, by the allocations that the profiler saw."""
    model = make_model(config, setup.precision, setup.gradient_checkpointing)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(config.vocab_size, (setup.micro_batch_size, setup.sequence_length))

    def step() -> None:
        for _ in range(setup.gradient_accumulation_steps):
            forward(model, ids, setup.precision).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


# Against real training


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", ["float32", "bf16-mixed", "bf16-pure"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointed"])
def test_saved_activations_are_those_of_autograd(variant, precision, checkpointing):
    config, batch = CompassConfig(**SIZES, **VARIANTS[variant]), Batch(rows=2, length=48)
    plan = saved_activations(config, batch, PRECISIONS[precision], gradient_checkpointing=checkpointing)
    assert plan.total == pytest.approx(saved_bytes(config, batch, precision, checkpointing), rel=0.03)


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ((1, 256), {"num_experts_per_tok": 1}),
        ((5, 33), {"num_experts": 5, "num_experts_per_tok": 5}),
        ((2, 64), {"num_attention_heads": 2, "hidden_size": 96}),
        ((1, 1), {}),
    ],
    ids=str,
)
def test_saved_activations_of_other_shapes(shape, changes):
    config, batch = CompassConfig(**{**SIZES, **changes}), Batch(*shape)
    for precision in ("float32", "bf16-mixed"):
        plan = saved_activations(config, batch, PRECISIONS[precision])
        assert plan.total == pytest.approx(saved_bytes(config, batch, precision, False), rel=0.03)


@pytest.mark.parametrize("precision", ["float32", "bf16-mixed"])
def test_saved_activations_of_packed_rows(precision):
    config, batch = CompassConfig(**SIZES), Batch(2, 128, packed=True)
    plan = saved_activations(config, batch, PRECISIONS[precision])
    assert plan.total == pytest.approx(saved_bytes(config, batch, precision, False), rel=0.03)


@pytest.mark.parametrize("tied", [False, True], ids=["plain", "mtp, tied"])
@pytest.mark.parametrize("precision", ["float32", "bf16-mixed", "bf16-pure"])
@pytest.mark.parametrize(
    ("rows", "length", "checkpointing", "accumulation"),
    [(2, 256, False, 1), (2, 256, True, 1), (1, 64, True, 1), (1, 64, False, 2)],
)
def test_peak_of_a_real_step(tied, precision, rows, length, checkpointing, accumulation):
    changes = {"num_mtp_layers": 1, "tie_word_embeddings": True} if tied else {}
    config = CompassConfig(**{**SIZES, **WIDE, **changes})
    setup = TrainingSetup(
        gpus_per_node=1,
        micro_batch_size=rows,
        sequence_length=length,
        gradient_checkpointing=checkpointing,
        gradient_accumulation_steps=accumulation,
        precision=precision,
    )
    plan = plan_memory(config, setup)
    dynamic = plan.allocated - plan.weights - plan.optimizer - WORKSPACE
    assert dynamic == pytest.approx(dynamic_peak(config, setup), rel=0.1), plan


@pytest.mark.parametrize("precision", ["float32", "bf16-pure"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_gradients_and_moments_exactly(precision, variant):
    config = CompassConfig(**SIZES, **VARIANTS[variant])
    model = make_model(config, precision, False)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    ids = torch.randint(config.vocab_size, (2, 32))
    forward(model, ids, precision).backward()
    optimizer.step()

    def size(tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    setup = TrainingSetup(
        gpus_per_node=1, sequence_length=32, precision=precision, gradient_accumulation_steps=2
    )  # of accumulated gradients all are there at the peak
    plan = plan_memory(config, setup)
    assert plan.weights == size(model.parameters())
    assert plan.optimizer == size(moments)
    assert plan.gradients == size(value.grad for value in model.parameters() if value.grad is not None)


# Many GPUs


def test_what_zero_divides():
    config = preset("compass-v2")
    parameters = count_parameters(config).trained
    setup = TrainingSetup(nodes=2, precision="bf16")
    plans = {name: plan_memory(config, replace(setup, strategy=name)) for name in ("ddp", "zero1", "zero2", "zero3")}
    assert plans["ddp"].optimizer == 12 * parameters
    for name in ("zero1", "zero2", "zero3"):
        assert plans[name].optimizer == pytest.approx(12 * parameters / 16)
    assert plans["zero1"].gradients == 2 * parameters
    assert plans["zero2"].gradients == plans["zero3"].gradients == pytest.approx(2 * parameters / 16)
    assert plans["zero2"].weights == 2 * parameters
    assert plans["zero3"].weights == pytest.approx(2 * parameters / 16)


def test_expert_parallelism_divides_the_experts_alone():
    config = preset("compass-v3")
    dense, experts = dense_parameters(config), routed_experts(config)
    assert dense + experts == count_parameters(config).trained
    setup = TrainingSetup(nodes=4, strategy="zero1", expert_parallel_size=8, precision="bf16")
    plan = plan_memory(config, setup)
    assert plan.weights == 2 * (dense + experts // 8)
    assert plan.optimizer == pytest.approx(12 * (dense / 32 + experts / 8 / 4))


def test_idle_mtp_layers_have_weights_alone():
    with_mtp, idle = preset("compass-small"), preset("compass-small", mtp_loss_coef=0.0)
    setup = TrainingSetup(gpus_per_node=1)
    learning, frozen = plan_memory(with_mtp, setup), plan_memory(idle, setup)
    assert learning.weights == frozen.weights
    assert learning.optimizer - frozen.optimizer == 8 * count_parameters(with_mtp).mtp
    assert frozen.loss < learning.loss


def test_all_to_all():
    config = preset("compass-v3")
    setup = TrainingSetup(expert_parallel_size=8, micro_batch_size=2, sequence_length=1024)
    rows = 2048 * 4
    assert all_to_all(config, setup).forward == 2 * rows * 8192 * 2 * 7 // 8
    assert all_to_all(config, setup).backward == all_to_all(config, setup).forward
    assert all_to_all(config, replace(setup, expert_parallel_size=1)).forward == 0
    assert all_to_all(config, replace(setup, precision="float32")).forward == 2 * rows * 8192 * 4 * 7 // 8


def test_row_moves_are_at_the_floor():
    """16384 tokens of 4096 numbers to 4 experts: 3.2 GB, 1.075 ms at 3 TB/s; compiled, experts' rows once less."""
    config = preset("compass-v3", hidden_size=4096)
    setup = TrainingSetup(micro_batch_size=4, sequence_length=4096, compile_layers=False)
    assert row_move_bytes(config, setup) / 3.0e12 == pytest.approx(1.075e-3, rel=2e-3)
    compiled = row_move_bytes(config, replace(setup, compile_layers=True))
    assert row_move_bytes(config, setup) - compiled == 4 * 16384 * 4096 * 2


def test_time_follows_the_rates():
    setup = TrainingSetup(nodes=2, strategy="zero2", expert_parallel_size=8, precision="bf16")
    plan = make_plan(preset("compass-v2"), find_gpu("h100"), setup)
    assert plan.tokens_per_second == pytest.approx(setup.tokens_per_step / plan.time.total)
    assert 0 < plan.mfu < plan.rates.matmul
    assert plan.days(86_400 * plan.tokens_per_second) == pytest.approx(1)
    half = make_plan(plan.config, plan.gpu, setup, Rates(matmul=0.36))
    assert half.time.matmul == pytest.approx(2 * plan.time.matmul)
    again = make_plan(plan.config, plan.gpu, replace(setup, gradient_checkpointing=True))
    assert 1.25 < again.time.matmul / plan.time.matmul < 4 / 3  # the head runs once
    assert again.flops == plan.flops
    alone = make_plan(plan.config, plan.gpu, TrainingSetup(gpus_per_node=1))
    assert alone.time.all_to_all == alone.time.gradients == 0
    assert json.loads(json.dumps(plan.as_dict()))["memory"]["total"] == plan.memory.total


@pytest.mark.parametrize(
    ("shape", "config", "rows"),
    [
        ("compass-small", {}, 4),
        (
            "compass-v3-width",
            {
                "num_hidden_layers": 2,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "num_mtp_layers": 0,
                "vocab_size": 32000,
            },
            2,
        ),
    ],
)
def test_time_is_near_the_default_step_that_was_measured(shape, config, rows):
    """`otpo pretrain` as typed, on one H100; memory is planned for layers that are not compiled, so it is more."""
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "pretraining_h100.csv"
    with path.open() as file:
        (measured,) = (row for row in csv.DictReader(file) if (row["shape"], row["variant"]) == (shape, "default"))
    of = preset("compass-v3" if shape == "compass-v3-width" else shape, **config)
    plan = make_plan(of, find_gpu("h100"), TrainingSetup(gpus_per_node=1, micro_batch_size=rows, packed=True))
    assert 1 / 1.1 < 1e3 * plan.time.total / float(measured["ms"]) < 1.1
    assert plan.memory.total > float(measured["peak_mib"]) * 2**20


def test_small_models_fit_and_large_ones_do_not():
    small = make_plan(preset("compass-small"), find_gpu("H100"), TrainingSetup(gpus_per_node=1))
    assert small.fit == "fits"
    assert small.remedy is None
    large = make_plan(preset("compass-v3"), find_gpu("h100"), TrainingSetup())
    assert large.fit == "does not fit"
    assert large.remedy == (
        "It does not fit. Most is optimizer: set `strategy` to a higher stage of ZeRO, or `expert_parallel_size` to "
        "more GPUs, or take more nodes."
    )
    wide = make_plan(preset("compass-small"), find_gpu("h100"), TrainingSetup(gpus_per_node=1, micro_batch_size=16))
    assert wide.remedy is not None and "Most is activations: set `gradient_checkpointing`, or" in wide.remedy
    used = small.memory.total
    assert replace(small, gpu=replace(small.gpu, memory=round(used / 0.95))).fit == "tight"


def test_rows_beyond_the_models_limit_raise_it():
    plans = [
        make_plan(preset("compass-small"), find_gpu("h100"), TrainingSetup(sequence_length=n)) for n in (4096, 9000)
    ]
    text = "As in pretraining, `max_position_embeddings` is raised from 4096 to 9000, the `sequence_length`."
    assert [text in plan.assumptions for plan in plans] == [False, True]


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 0}, "`nodes` must be at least 1, got 0"),
        ({"strategy": "fsdp"}, "`strategy=fsdp` is not known. Set one of: ddp, zero1, zero2, zero3"),
        ({"precision": "fp8"}, "`precision=fp8` is not known"),
        ({"optimizer": "lion"}, "`optimizer=lion` is not known"),
        ({"expert_parallel_size": 3}, r"does not divide `gpus_per_node=8`.*one of \[1, 2, 4, 8\]"),
        ({"expert_parallel_size": 6, "gpus_per_node": 6}, r"does not divide `num_experts=16`.*one of \[1, 2\]"),
    ],
    ids=str,
)
def test_setups_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        plan_memory(preset("compass-small"), TrainingSetup(**changes))


def test_unknown_gpus_and_rates():
    with pytest.raises(ValueError, match=f"`gpu=tpu` is not known. Set one of: {', '.join(GPUS)}"):
        find_gpu("tpu")
    with pytest.raises(ValueError, match="`matmul` is a share"):
        Rates(matmul=1.5)


def test_configurations_by_name_and_by_path(tmp_path):
    config = CompassConfig(**SIZES)
    config.save_pretrained(tmp_path)
    for name in (tmp_path, tmp_path / "config.json"):
        assert count_parameters(load_config(str(name))) == count_parameters(config)
    assert load_config("compass-v2").num_experts == 64
    with pytest.raises(ValueError, match=r"`model=compass-v9` is neither a preset \(compass-v3, .*Name one"):
        load_config("compass-v9")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="its `model_type` is 'llama'"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_config(str(tmp_path))
    for value, message in ((2.5, "'num_experts' expected int, got float"), (2, "`num_experts_per_tok=3` is above")):
        (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "num_experts": value}))
        with pytest.raises(ValueError, match=rf"^`model={tmp_path}`: .*{message}[^\n]*$"):
            load_config(str(tmp_path))

"""The MoE block against a double loop over tokens and experts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compass_helpers import GROUPED, IMPLEMENTATIONS, compass_config
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from moe_backbone.model.modeling_compass import CompassExperts, CompassMoeBlock

# The router computes in float32 whatever the model's dtype, and its gradient sums products of about 10: hence the
# block's tolerance. The experts alone, given weights, have nothing but float64 in them. torch's grouped_mm has no
# float64, so it is compared in float32.
FLOAT32 = {"rtol": 1e-3, "atol": 1e-4}
ROUTED = {"rtol": 1e-4, "atol": 3e-5}
EXACT = {"rtol": 1e-11, "atol": 1e-12}


def make_block(implementation, dtype, seed, **changes):
    config = compass_config(**changes)
    config._experts_implementation = implementation
    block = CompassMoeBlock(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return block, config


def parameter_dict(block):
    return {name: value.detach().double().clone().requires_grad_() for name, value in block.named_parameters()}


def swiglu(x, gate, up, down):
    inner = gate @ x
    return down @ (inner * torch.sigmoid(inner) * (up @ x))


def loop(weights, config, tokens):
    """The block's formula, token by token and expert by expert; the smallest gap between a taken and a left expert."""
    rows, gap = [], float("inf")
    for x in tokens:
        scores = torch.stack([(weights["gate.weight"][e] * x).sum() for e in range(config.num_experts)])
        probabilities = scores.exp() / scores.exp().sum()
        order = sorted(range(config.num_experts), key=lambda e: -probabilities[e].item())
        taken, left = order[: config.num_experts_per_tok], order[config.num_experts_per_tok :]
        if left:
            gap = min(gap, (probabilities[taken[-1]] - probabilities[left[0]]).item())
        total = sum(probabilities[e] for e in taken) if config.norm_topk_prob else 1.0
        row = torch.zeros_like(x)
        for e in taken:
            gate, up = weights["experts.gate_up_proj"][e].split(config.moe_intermediate_size)
            row = row + probabilities[e] / total * swiglu(x, gate, up, weights["experts.down_proj"][e])
        if config.num_shared_experts:
            row = row + swiglu(x, *(weights[f"shared_expert.{part}_proj.weight"] for part in ("gate", "up", "down")))
        rows.append(row)
    return torch.stack(rows), gap


def check_block(implementation, tokens, seed, **changes):
    """Compares outputs and gradients; False where two experts are too close to tell which the router should take."""
    dtype = torch.float32 if implementation in GROUPED else torch.float64
    block, config = make_block(implementation, dtype, seed, **changes)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(tokens, config.hidden_size, generator=generator, dtype=torch.float64)
    pull = torch.randn(tokens, config.hidden_size, generator=generator, dtype=torch.float64)
    weights, x_loop = parameter_dict(block), x.clone().requires_grad_()
    expected, gap = loop(weights, config, x_loop)
    if gap < 1e-5:  # float32 and float64 could choose differently
        return False
    (expected * pull).sum().backward()
    x_block = x.to(dtype).requires_grad_()
    got = block(x_block[None])
    (got * pull.to(dtype)).sum().backward()
    tolerance = FLOAT32 if dtype is torch.float32 else ROUTED
    torch.testing.assert_close(got[0].double(), expected, **tolerance)
    torch.testing.assert_close(x_block.grad.double(), x_loop.grad, **tolerance)
    assert {name for name, _ in block.named_parameters()} == weights.keys()
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(
            parameter.grad.double(),
            torch.zeros_like(weights[name]) if weights[name].grad is None else weights[name].grad,
            msg=lambda text, name=name: f"{name}: {text}",
            **tolerance,
        )
    return True


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@given(data=st.data(), seed=st.integers(0, 2**30))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_block_is_the_double_loop(implementation, data, seed):
    experts = data.draw(st.integers(1, 6), label="experts")
    compared = check_block(
        implementation,
        tokens=data.draw(st.integers(1, 9), label="tokens"),
        seed=seed,
        num_experts=experts,
        num_experts_per_tok=data.draw(st.integers(1, experts), label="k"),
        norm_topk_prob=data.draw(st.booleans(), label="norm"),
        num_shared_experts=data.draw(st.sampled_from([0, 2]), label="shared"),
        # grouped_mm wants rows of whole 16 bytes; the others take any width
        hidden_size=12 if implementation in GROUPED else data.draw(st.sampled_from([3, 8, 13]), label="hidden"),
        moe_intermediate_size=8 if implementation in GROUPED else data.draw(st.sampled_from([1, 5, 8])),
    )
    assume(compared)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 1, "num_experts": 16, "num_experts_per_tok": 4},  # twelve experts without a token
        {"tokens": 7, "num_experts": 4, "num_experts_per_tok": 4},
        {"tokens": 3, "num_experts": 1, "num_experts_per_tok": 1, "num_shared_experts": 2},
    ],
    ids=["one token", "k is all", "one expert"],
)
def test_the_block_at_the_ends_of_its_range(implementation, norm_topk_prob, sizes):
    assert check_block(implementation, seed=3, norm_topk_prob=norm_topk_prob, **sizes)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_experts_with_all_tokens_and_with_none(implementation, dtype):
    """Given choices and weights: one expert takes every token, two take none, and a token may take one alone."""
    if implementation in GROUPED and dtype is torch.float64:
        pytest.skip("torch's grouped_mm has no float64")
    config = compass_config(num_experts=5, hidden_size=16, moe_intermediate_size=8)
    config._experts_implementation = implementation
    experts = CompassExperts(config).to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    x = torch.randn(6, 16, generator=generator).to(dtype).requires_grad_()
    index = torch.tensor([[3, 0], [3, 1], [3, 0], [3, 1], [3, 0], [3, 0]])
    weights = torch.rand(6, 2, generator=generator).to(dtype)
    weights[2, 1] = 0
    weights.requires_grad_()
    pull = torch.randn(6, 16, generator=generator).to(dtype)

    exact = {name: value.detach().double().requires_grad_() for name, value in experts.named_parameters()}
    x64, w64 = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    rows = []
    for t in range(6):
        row = torch.zeros(16, dtype=torch.float64)
        for k in range(2):
            gate, up = exact["gate_up_proj"][index[t, k]].split(8)
            row = row + w64[t, k] * swiglu(x64[t], gate, up, exact["down_proj"][index[t, k]])
        rows.append(row)
    (torch.stack(rows) * pull.double()).sum().backward()

    got = experts(x, index, weights)
    assert got.dtype is dtype
    (got * pull).sum().backward()
    # bfloat16 has 8 bits, and three products in a row are rounded to it
    tolerance = {torch.float64: EXACT, torch.float32: FLOAT32, torch.bfloat16: {"rtol": 0.05, "atol": 0.05}}[dtype]
    torch.testing.assert_close(got.double(), torch.stack(rows), **tolerance)
    torch.testing.assert_close(x.grad.double(), x64.grad, **tolerance)
    torch.testing.assert_close(weights.grad.double(), w64.grad, **tolerance)
    for name, parameter in experts.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), exact[name].grad, **tolerance)
        assert parameter.grad[[2, 4]].eq(0).all(), name


def test_an_expert_of_another_process_is_left_out():
    """`num_experts` as an index is transformers' mark for an expert that this process does not hold."""
    config = compass_config()
    config._experts_implementation = "eager"
    experts = CompassExperts(config)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    x, weights = torch.randn(4, 32), torch.rand(4, 2)
    index = torch.tensor([[0, 5], [5, 1], [5, 5], [2, 3]])
    kept = experts(x, index.clamp(max=4), weights.masked_fill(index == 5, 0.0))
    torch.testing.assert_close(experts(x, index, weights), kept)
    assert experts(x, index, weights)[2].eq(0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_one_expert_is_a_dense_mlp(implementation, norm_topk_prob):
    block, config = make_block(
        implementation, torch.float32, 0, num_experts=1, num_experts_per_tok=1, norm_topk_prob=norm_topk_prob
    )
    x = torch.randn(2, 5, config.hidden_size, requires_grad=True)
    pull = torch.randn(2, 5, config.hidden_size)
    (block(x) * pull).sum().backward()
    x_dense = x.detach().clone().requires_grad_()
    gate_up = block.experts.gate_up_proj[0].detach().clone().requires_grad_()
    down = block.experts.down_proj[0].detach().clone().requires_grad_()
    gate, up = F.linear(x_dense, gate_up).chunk(2, dim=-1)
    dense = F.linear(F.silu(gate) * up, down)
    (dense * pull).sum().backward()
    torch.testing.assert_close(block(x), dense)
    torch.testing.assert_close(x.grad, x_dense.grad, **FLOAT32)
    torch.testing.assert_close(block.experts.gate_up_proj.grad[0], gate_up.grad, **FLOAT32)
    torch.testing.assert_close(block.experts.down_proj.grad[0], down.grad, **FLOAT32)
    assert block.gate.weight.grad.abs().max() < 1e-5  # there is nothing to choose


def test_two_shared_experts_are_two_mlps():
    block, config = make_block("eager", torch.float64, 0, num_shared_experts=2)
    shared, width = block.shared_expert, config.moe_intermediate_size
    assert shared.gate_proj.weight.shape == (2 * width, config.hidden_size)
    x = torch.randn(6, config.hidden_size, dtype=torch.float64)
    expected = sum(
        F.linear(
            F.silu(F.linear(x, shared.gate_proj.weight[part])) * F.linear(x, shared.up_proj.weight[part]),
            shared.down_proj.weight[:, part],
        )
        for part in (slice(0, width), slice(width, None))
    )
    torch.testing.assert_close(shared(x), expected, **EXACT)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_runs_experts_of_the_cast_weights(implementation):
    """And a compiled module stays one graph there."""
    config = compass_config()
    config._experts_implementation = implementation
    experts = CompassExperts(config)
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.3)
    cast = copy.deepcopy(experts).bfloat16()
    x, index, weights = torch.randn(6, config.hidden_size), torch.rand(6, 5).argsort(1)[:, :2], torch.rand(6, 2)
    pull = torch.randn(6, config.hidden_size).bfloat16()
    want = cast(x.bfloat16(), index, weights.bfloat16())
    want.backward(pull)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = experts(x, index, weights)
        got.backward(pull)
        assert torch.equal(got, want)
        if implementation == "memcpy":
            torch._dynamo.reset()
            compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(x, index, weights), want)
    for name, parameter in experts.named_parameters():
        assert torch.equal(parameter.grad, cast.get_parameter(name).grad.float()), name

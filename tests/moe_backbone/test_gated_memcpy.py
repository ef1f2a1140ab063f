"""experts_implementation="memcpy" of SwiGLU experts as one operator: who takes it, and that it is the same layer.

The operator needs bfloat16 on a GPU. `-m gpu` runs it so; on the CPU, tests say that its kernels are there.
"""

import copy

import pytest
import torch
from compass_helpers import TINY, assert_gradients_close, gradients
from experts_helpers import CONFIGS, EXPERTS, make_experts, make_model, prompts
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moe_backbone import CompassConfig, memcpy_experts
from moe_backbone.memcpy_experts import ADAPTERS, is_swiglu
from moe_backbone.model.moe_block import CompassExperts

SWIGLU = {
    "mixtral": (MixtralExperts, MixtralConfig(**TINY, intermediate_size=24, num_local_experts=6)),
    "qwen3": (Qwen3MoeExperts, Qwen3MoeConfig(**TINY, moe_intermediate_size=24, num_experts=6)),
    "compass": (CompassExperts, CompassConfig(hidden_size=32, moe_intermediate_size=24, num_experts=6)),
}
GATED_BY_SWIGLU = {"norm after": {"swiglu"}, "transposed": {"sources_of_rows", "weighted_swiglu"}}
"""Of the experts of other kinds, those whose gate is plain SwiGLU, and the operators that they have for it: routers'
weights go through a product, and not through a norm."""
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def kernels(monkeypatch):
    """The CPU counts as a device of the operator, whose kernels are interpreted there."""
    monkeypatch.setattr(memcpy_experts, "_has_kernels", lambda *weights: True)


class Operators(TorchDispatchMode):
    """Names of our operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "otpo":
            self.names.add(func._schema.name.removeprefix("otpo::"))
        return func(*args, **(kwargs or {}))


def swiglu_experts(name, seed=0):
    of_class, config = SWIGLU[name]
    module = of_class(copy.deepcopy(config))
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * weight.size(-1) ** -0.5
    module.config._experts_implementation = "memcpy"
    return module


def operators_of(module, *inputs):
    with Operators() as found:
        module(*inputs)
    return found.names


def run(module, implementation, x, index, weights, grad):
    """Output and every gradient by name."""
    module.config._experts_implementation = implementation
    leaves = {"x": x.clone().requires_grad_(), "router": weights.clone().requires_grad_()}
    leaves |= dict(module.named_parameters())
    output = module(leaves["x"], index, leaves["router"])
    return {"output": output} | dict(
        zip(leaves, torch.autograd.grad(output, list(leaves.values()), grad), strict=True)
    )


@pytest.mark.parametrize("tokens", [1, 19])
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("name", SWIGLU)
def test_equals_eager(name, elsewhere, tokens, kernels):
    """Also with experts that other processes hold, which add nothing."""
    module, index = swiglu_experts(name), torch.rand(tokens, 6).argsort(1)[:, :3]
    held = torch.rand(tokens, 3) < 0.6 if elsewhere else torch.ones(tokens, 3, dtype=torch.bool)
    x, grad, weights = torch.randn(tokens, 32), torch.randn(tokens, 32), torch.rand(tokens, 3)
    eager = run(module, "eager", x, index, weights * held, grad)
    eager["router"] = eager["router"] * held
    got = run(module, "memcpy", x, index.masked_fill(~held, 6), weights, grad)
    assert "gated_experts" in operators_of(module, x, index, weights)
    for tensor, value in eager.items():
        torch.testing.assert_close(got[tensor], value, **CLOSE, msg=tensor)


def test_no_tokens(kernels):
    module = swiglu_experts("qwen3")
    x = torch.randn(0, 32, requires_grad=True)
    output = module(x, torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    output.sum().backward()
    assert output.shape == (0, 32) and all(weight.grad.eq(0).all() for weight in module.parameters())


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "compass"])
def test_models_train_as_with_separate_passes_and_with_checkpointing(name, monkeypatch):
    ids, found = prompts(), []
    for kernels, checkpointing in ((False, False), (True, False), (True, True)):
        monkeypatch.setattr(memcpy_experts, "_has_kernels", lambda *weights, kernels=kernels: kernels)
        model = make_model(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with Operators() as operators:
            model(ids, labels=ids, use_cache=False).loss.backward()
        assert ("gated_experts" in operators.names) == kernels and ("permute" in operators.names) != kernels
        found.append(gradients(model))
    assert_gradients_close(found[1], found[0], **CLOSE)
    assert_gradients_close(found[2], found[1], rtol=0.0, atol=0.0)


def test_compass_takes_it_under_autocast(kernels):
    model, ids = make_model("compass"), prompts()
    with Operators() as operators, torch.autocast("cpu", torch.bfloat16):
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert {"gated_experts", "gated_experts_backward"} <= operators.names


def test_compiled_layers_keep_separate_passes(kernels):
    """Moves, products and weighted SwiGLU, an operator each; the graph has no break."""
    torch._dynamo.reset()
    module, index, weights = swiglu_experts("qwen3").bfloat16(), torch.rand(9, 6).argsort(1)[:, :2], torch.rand(9, 2)
    x, graphs = torch.randn(9, 32).bfloat16(), []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    got = torch.compile(module, fullgraph=True, backend=backend)(x, index, weights)
    assert len(graphs) == 1 and "gated_experts" not in graphs[0]
    assert all(f"otpo.{name}" in graphs[0] for name in ("permute", "weighted_swiglu", "unpermute"))
    torch.testing.assert_close(got, module(x, index, weights), rtol=0.05, atol=0.05)


def test_separate_passes_keep_no_output_of_an_expert():
    """Rows as they come, twice the width, and weighted SwiGLU of them: each once."""
    module, index = swiglu_experts("qwen3"), torch.rand(9, 6).argsort(1)[:, :2]
    x, weights, kept = torch.randn(9, 32, requires_grad=True), torch.rand(9, 2, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x, index, weights)
    of_rows = {tensor.data_ptr(): tensor.size(1) for tensor in kept if tensor.dim() == 2 and len(tensor) == 18}
    assert sorted(of_rows.values()) == [24, 32, 48]


class _LowRank:
    """An adapter as spread experts carry it, of factors `(E, inputs, 3)` and `(E, 3, outputs)`."""

    def __init__(self, tensor, weight):
        self.tensor = tensor
        self.down, self.up = torch.randn(6, weight.size(2), 3) * 0.2, torch.randn(6, 3, weight.size(1)) * 0.2

    def __call__(self, rows, ends):
        groups = torch.tensor_split(rows, ends[:-1].tolist())
        return torch.cat([group @ a @ b for group, a, b in zip(groups, self.down, self.up, strict=True)])


def test_adapters_add_what_merged_weights_would():
    """With routers' weights that are not 1, so that what multiplies a row before its product shows."""
    module, index = swiglu_experts("qwen3"), torch.rand(9, 6).argsort(1)[:, :2]
    x, weights, grad = torch.randn(9, 32), torch.rand(9, 2), torch.randn(9, 32)
    adapters = [_LowRank(name, weight) for name, weight in module.named_parameters()]
    vars(module)[ADAPTERS] = adapters
    got = run(module, "memcpy", x, index, weights, grad)
    for adapter in adapters:
        getattr(module, adapter.tensor).data += (adapter.down @ adapter.up).transpose(1, 2)
    want = run(module, "eager", x, index, weights, grad)
    for tensor in ("output", "x", "router"):
        torch.testing.assert_close(got[tensor], want[tensor], **CLOSE, msg=tensor)


def test_rows_of_float16_are_weighted_in_the_sum():
    """An activation within float16's range leaves it where a router's weight of 2.5 multiplies it."""
    module = swiglu_experts("qwen3").half()
    module.gate_up_proj.data.zero_()
    module.gate_up_proj.data[:, :24, 0], module.gate_up_proj.data[:, 24:, 0] = 60.0, 1000.0
    module.down_proj.data.fill_(1e-4)
    x = torch.zeros(1, 32, dtype=torch.float16)
    x[0, 0] = 1.0
    output = module(x, torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), 2.5, dtype=torch.float16))
    torch.testing.assert_close(output, torch.full_like(output, 24 * 60_000 * 1e-4 * 2.5), rtol=5e-3, atol=0.0)


def test_weights_that_have_products_of_their_own_see_unweighted_rows():
    """As a quantized weight does, which may scale all rows by the largest."""

    class Quantized(torch.Tensor):
        pass

    module = swiglu_experts("qwen3")
    inputs = torch.randn(4, 32), torch.zeros(4, 1, dtype=torch.long), torch.rand(4, 1)
    assert "weighted_swiglu" in operators_of(module, *inputs)
    module.down_proj = torch.nn.Parameter(module.down_proj.data.as_subclass(Quantized))
    assert "swiglu" in operators_of(module, *inputs) and "weighted_swiglu" not in operators_of(module, *inputs)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_of_other_kinds_keep_separate_passes(name, kernels):
    module = make_experts(name)
    assert not is_swiglu(module)
    inputs = torch.randn(4, 32), torch.zeros(4, 2, dtype=torch.long), torch.rand(4, 2)
    assert operators_of(module, *inputs) == {"route", "permute", "unpermute"} | GATED_BY_SWIGLU.get(name, set())


def test_adapters_on_spread_experts_keep_separate_passes():
    module = swiglu_experts("qwen3")
    assert is_swiglu(module)
    vars(module)[ADAPTERS] = ()
    assert is_swiglu(module)
    vars(module)[ADAPTERS] = (object(),)
    assert not is_swiglu(module)


def test_every_model_of_the_tests_is_of_one_kind_or_the_other():
    """So that a class of transformers that changes its activation shows."""
    for name in CONFIGS:
        kinds = {
            is_swiglu(module) for module in make_model(name).modules() if type(module).__name__.endswith("Experts")
        }
        assert kinds == {name != "gpt_oss"}, name


def test_what_has_kernels():
    """Neither the CPU, nor float32, nor weights that only look like a plain tensor."""
    module = swiglu_experts("qwen3")
    assert not memcpy_experts._has_kernels(module.gate_up_proj.bfloat16(), module.down_proj.bfloat16())
    assert not memcpy_experts._has_kernels(module.gate_up_proj.to("meta"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", SWIGLU)
def test_bfloat16_on_a_gpu(name):
    """One operator runs, and its numbers are as near to float32 eager's as those of separate passes."""
    module, index = swiglu_experts(name).cuda(), torch.rand(300, 6).argsort(1)[:, :3].cuda()
    x, grad, weights = (torch.randn(300, 32).cuda(), torch.randn(300, 32).cuda(), torch.rand(300, 3).cuda())
    want = run(module, "eager", x, index, weights, grad)
    module, inputs = module.bfloat16(), (x.bfloat16(), index, weights.bfloat16(), grad.bfloat16())
    got = run(module, "memcpy", *inputs)
    assert operators_of(module, *inputs[:3]) >= {"gated_experts"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memcpy_experts, "_has_kernels", lambda *weights: False)
        separate = run(module, "memcpy", *inputs)
        assert "gated_experts" not in operators_of(module, *inputs[:3])
    for tensor, exact in want.items():
        ours, theirs = ((found[tensor].float() - exact).norm() / exact.norm() for found in (got, separate))
        assert ours < 2e-2 and ours <= 1.5 * theirs, tensor


@pytest.mark.gpu
def test_float16_and_float32_on_a_gpu_keep_separate_passes():
    for dtype in (torch.float16, torch.float32):
        module = swiglu_experts("qwen3").to("cuda", dtype)
        assert not memcpy_experts._has_kernels(module.gate_up_proj, module.down_proj)
    assert memcpy_experts._has_kernels(module.gate_up_proj.bfloat16())

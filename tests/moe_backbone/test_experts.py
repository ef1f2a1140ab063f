"""experts_implementation="memcpy": any MoE model of transformers against its own eager experts."""

import pytest
import torch
from compass_helpers import assert_gradients_close, gradients
from experts_helpers import CONFIGS, EXPERTS, make_experts, make_model, prompts
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("name", CONFIGS)
def test_models_agree_with_their_eager_experts(name):
    ids = prompts()
    results = {}
    for implementation in ("eager", "memcpy"):
        model = make_model(name, implementation)
        assert model.config._experts_implementation == implementation
        output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        results[implementation] = output, gradients(model)
    torch.testing.assert_close(results["memcpy"][0].logits, results["eager"][0].logits, **CLOSE)
    torch.testing.assert_close(results["memcpy"][0].loss, results["eager"][0].loss, **CLOSE)
    assert_gradients_close(results["memcpy"][1], results["eager"][1], **CLOSE)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "olmoe", "compass"])
def test_autocast_over_float32_weights_is_that_of_grouped_mm(name):
    """As the training commands run it by default; router weights come in bfloat16, or in float32."""
    ids = prompts()
    results = {}
    for implementation in ("grouped_mm", "memcpy"):
        model = make_model(name, implementation)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        results[implementation] = output, gradients(model)
    torch.testing.assert_close(results["memcpy"][0].logits, results["grouped_mm"][0].logits, rtol=0.05, atol=0.05)
    assert_gradients_close(results["memcpy"][1], results["grouped_mm"][1], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_used_from_from_pretrained_and_not_saved(name, tmp_path, monkeypatch):
    make_model(name).save_pretrained(tmp_path)
    assert "memcpy" not in (tmp_path / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="memcpy").eval()
    calls = []
    ours = ALL_EXPERTS_FUNCTIONS["memcpy"]
    monkeypatch.setitem(
        ALL_EXPERTS_FUNCTIONS._global_mapping, "memcpy", lambda *a: calls.append(type(a[0]).__name__) or ours(*a)
    )
    with torch.no_grad():
        model(prompts())
    assert len(calls) == (1 if name == "glm4_moe" else 2)


@pytest.mark.lengthy
@pytest.mark.parametrize("name", CONFIGS)
def test_generation_is_that_of_eager_experts(name):
    ids = prompts(2, 12)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    model = make_model(name).eval()
    got = model.generate(ids, **options)
    model.set_experts_implementation("eager")
    assert torch.equal(got, model.generate(ids, **options))


@pytest.mark.lengthy
@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointing_changes_nothing(name):
    ids, model = prompts(), make_model(name).train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(ids, labels=ids, use_cache=False).loss.backward()
    for parameter, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[parameter]), parameter


@pytest.mark.lengthy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_they_compile_as_one_graph(name, dtype):
    if dtype is torch.float32 and not hasattr(torch.ops.transformers, "grouped_mm_fallback_backward"):
        pytest.skip("this transformers' fallback for float32 does not compile")
    torch._dynamo.reset()
    ids, model = prompts(), make_model(name, dtype=dtype)
    expected = model(ids, labels=ids, use_cache=False)
    expected.loss.backward()
    want = gradients(model)
    model.zero_grad()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids, use_cache=False)
    got.loss.backward()
    limits = CLOSE if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(got.logits, expected.logits, **limits)
    assert_gradients_close(gradients(model), want, **limits)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("name", EXPERTS)
def test_every_flag_of_experts(name, elsewhere, tokens):
    """Output and every gradient; with experts of other processes, the same as if their weights were zero."""
    index = torch.rand(tokens, 6).argsort(1)[:, :3]
    index[index == 4] = 3  # an expert with no token; a token may take an expert twice
    held = torch.rand(tokens, 3) < 0.6 if elsewhere else torch.ones(tokens, 3, dtype=torch.bool)
    held[7:8] = False
    x, weights, grad = torch.randn(tokens, 32), torch.rand(tokens, 3), torch.randn(tokens, 32)
    results = {}
    for implementation in ("eager", "memcpy"):
        module = make_experts(name, implementation)
        leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
        if implementation == "eager":
            output = module(leaves[0], index, leaves[1] * held)
        else:
            output = module(leaves[0], index.masked_fill(~held, 6), leaves[1])
        output.backward(grad)
        found = {"x": leaves[0].grad, "weights": leaves[1].grad}
        results[implementation] = output, found | {key: p.grad for key, p in module.named_parameters()}
    torch.testing.assert_close(results["memcpy"][0], results["eager"][0], **CLOSE)
    assert_gradients_close(results["memcpy"][1], results["eager"][1], **CLOSE)


def test_no_tokens():
    module = make_experts("interleaved, transposed, biases")
    x = torch.randn(0, 32, requires_grad=True)
    output = module(x, torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert output.shape == (0, 32)
    output.sum().backward()
    assert all(parameter.grad.eq(0).all() for parameter in module.parameters())


def test_quantized_experts_are_refused():
    module = make_experts("gated")
    module.gate_up_proj = torch.nn.Parameter(module.gate_up_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TypeError, match=r"MixtralExperts holds torch.float8_e4m3fn; load the model without quantiz"):
        module(torch.randn(4, 32), torch.zeros(4, 2, dtype=torch.long), torch.rand(4, 2))

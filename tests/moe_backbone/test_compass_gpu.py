"""The model on a CUDA device: attention and experts' implementations, compilation, generation, device maps."""

import pytest
import torch
from compass_helpers import compass_model, gradients, pack, token_ids
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available

pytestmark = pytest.mark.gpu
SIZES = {"hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 48, "num_mtp_layers": 1, "initializer_range": 0.1}
DOCUMENTS = [token_ids(1, length, seed=length)[0] for length in (17, 40, 71)]


def gpu_model(dtype=torch.float32, **changes):
    return compass_model(**{**SIZES, "max_position_embeddings": 256, **changes}).to("cuda", dtype)


def on_gpu(row):
    return {name: value.cuda() for name, value in row.items()}


def relative_error(left, right):
    left, right = left.detach(), right.detach()
    return float((left.float() - right.float()).norm() / right.float().norm())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (SDPBackend.FLASH_ATTENTION, torch.bfloat16),
        (SDPBackend.EFFICIENT_ATTENTION, torch.bfloat16),
        (SDPBackend.EFFICIENT_ATTENTION, torch.float32),
        (SDPBackend.MATH, torch.float32),
    ],
)
def test_sdpa_agrees_with_eager(backend, dtype, packed):
    if packed and backend == SDPBackend.FLASH_ATTENTION:
        pytest.skip("torch's flash backend takes no mask")
    row = on_gpu(pack(DOCUMENTS)) if packed else {"input_ids": token_ids(3, 65).cuda()}
    row.setdefault("labels", row["input_ids"])
    # One key and value head for each query head: with fewer, transformers asks for a grouped form of its own.
    # In the same dtype, since a token whose experts change by rounding changes the logits by far more than rounding.
    reference = gpu_model(dtype, attention="eager", num_key_value_heads=4)
    tested = gpu_model(dtype, attention="sdpa", num_key_value_heads=4)
    expected = reference(**row)
    with sdpa_kernel(backend):
        output = tested(**row)
        output.loss.backward()
    expected.loss.backward()
    limit = 1e-1 if dtype == torch.bfloat16 else 1e-4
    assert relative_error(output.logits, expected.logits) < limit
    assert output.mtp_loss.item() == pytest.approx(expected.mtp_loss.item(), rel=1e-2)
    if dtype == torch.float32:
        for name, gradient in gradients(tested).items():
            assert relative_error(gradient, gradients(reference)[name]) < 1e-3, name


def test_flex_attention_agrees_on_packed_rows():
    row = on_gpu(pack(DOCUMENTS))
    expected = gpu_model(attention="eager")(**row)
    output = gpu_model(attention="flex_attention")(**row)
    assert relative_error(output.logits, expected.logits) < 1e-3


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs flash-attn, which flash-attn-4 is not")
def test_flash_attention_agrees():
    row = on_gpu(pack(DOCUMENTS))
    expected = gpu_model(attention="eager")(**row)
    output = gpu_model(torch.bfloat16, attention="flash_attention_2")(**row)
    assert relative_error(output.logits, expected.logits) < 3e-2


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "memcpy"])
@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
def test_experts_agree_with_float32(implementation, mode):
    ids = token_ids(4, 64).cuda()
    reference = gpu_model(implementation="eager")
    reference(ids, labels=ids).loss.backward()
    tested = gpu_model(torch.bfloat16 if mode == "bfloat16" else torch.float32, implementation=implementation)
    with torch.autocast("cuda", torch.bfloat16, enabled=mode == "autocast"):
        loss = tested(ids, labels=ids).loss
    loss.backward()
    for name, gradient in gradients(tested).items():
        # A token whose experts change by rounding changes a gradient by far more than rounding itself.
        assert relative_error(gradient, gradients(reference)[name]) < 0.25, name
    assert loss.item() == pytest.approx(reference(ids, labels=ids).loss.item(), rel=1e-2)


@pytest.mark.lengthy
def test_checkpointing_changes_nothing():
    ids = token_ids(2, 64).cuda()
    results = []
    for checkpointing in (False, True):
        model = gpu_model(torch.bfloat16)
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append((loss.item(), gradients(model)))
    assert results[0][0] == results[1][0]
    for name, gradient in results[0][1].items():
        assert relative_error(results[1][1][name], gradient) < 2e-2, name


@pytest.mark.parametrize("mtp_layers", [1, 2])
def test_generation(mtp_layers):
    model = gpu_model(num_mtp_layers=mtp_layers).eval()
    ids = token_ids(1, 9).cuda()
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, use_cache=False, **options), plain)
    assert torch.equal(model.generate(ids, use_mtp=True, **options), plain)


@pytest.mark.parametrize(
    ("implementation", "dtype", "slots", "limit"),
    [
        ("batched_mm", torch.float32, {}, 1e-3),
        ("grouped_mm", torch.bfloat16, {}, 0.5),
        ("memcpy", torch.bfloat16, {}, 0.5),
        ("grouped_mm", torch.bfloat16, {"num_experts": 4, "num_experts_per_tok": 4}, 0.1),
        ("memcpy", torch.bfloat16, {"num_experts": 4, "num_experts_per_tok": 4}, 0.1),
    ],
)
def test_compiled_training_step(implementation, dtype, slots, limit):
    """In bfloat16 another order of sums changes some tokens' experts, but not where each token takes all of them."""
    ids = token_ids(2, 64).cuda()
    model = gpu_model(dtype, implementation=implementation, **slots)
    expected = model(ids, labels=ids)
    expected.loss.backward()
    reference = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True)(ids, labels=ids)
    compiled.loss.backward()
    assert compiled.loss.item() == pytest.approx(expected.loss.item(), rel=1e-2)
    for name, gradient in gradients(model).items():
        assert relative_error(gradient, reference[name]) < limit, name


def test_device_map_auto(tmp_path):
    model = gpu_model().eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto").eval()
    assert next(loaded.parameters()).is_cuda
    ids = token_ids(2, 17).cuda()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)

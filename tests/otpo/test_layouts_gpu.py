"""Rows without padding on a CUDA device: kernels against a mask in float64, whole trainers. Run with `-m gpu`."""

import pytest
import torch
from helpers import history, make_pairs, option_dict, random_batch

from otpo import OTPOConfig, OTPOTrainer
from otpo.layouts.attention import lengths_arguments
from otpo.layouts.lengths_attention import lengths_attention, masked_attention, row_mask
from otpo.layouts.plan import plan_rows

pytestmark = pytest.mark.gpu

SHAPES = {
    "ragged": ([40, 3, 200, 1], [5, 90, 129, 1], [64, 1, 7, 300]),
    "no prefix": ([0, 0, 30], [4, 9, 128], [5, 1, 127]),
    "only prefixes": ([17], [1], [1]),
    "one answer is the other's beginning": ([12, 5], [4, 2], [4, 6]),
}


def cosine(left: torch.Tensor, right: torch.Tensor) -> float:
    left, right = left.double().flatten(), right.double().flatten()
    return float(left @ right / (left.norm() * right.norm()).clamp(min=1e-30))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("heads", [(4, 4, 64), (16, 8, 128), (6, 2, 72)], ids=str)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_by_lengths_is_attention_by_a_mask(name, heads, share, dtype):
    batch = random_batch(*SHAPES[name], answers_begin_alike=name.startswith("one"))
    plan = plan_rows(**batch, share=share).to("cuda")
    query_heads, key_heads, dim = heads
    tokens = plan.ids.size(1)
    generator = torch.Generator("cuda").manual_seed(0)
    parts = [
        torch.randn(tokens, count, dim, generator=generator, device="cuda", dtype=dtype).requires_grad_()
        for count in (query_heads, key_heads, key_heads)
    ]
    exact = [part.detach().double().requires_grad_() for part in parts]
    scale = dim**-0.5
    found = lengths_attention(*parts, lengths_arguments(plan)["row_lengths"], scale)
    expected = masked_attention(*exact, row_mask(plan.pairs, plan.branches), scale)
    noise = torch.randn(found.shape, generator=generator, device="cuda", dtype=dtype)
    found.backward(noise)
    expected.backward(noise.double())
    tolerance = 2e-2 if dtype == torch.bfloat16 else 3e-3
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    for part, of in zip(parts, exact, strict=True):
        bound = tolerance * float(of.grad.abs().max())
        torch.testing.assert_close(part.grad.double(), of.grad, rtol=0, atol=bound)


@pytest.mark.parametrize("window", [1, 7, 64])
def test_a_sliding_window_is_told_by_lengths(window):
    batch = random_batch([40, 3, 100], [5, 90, 29], [64, 1, 7])
    plan = plan_rows(**batch, share=False).to("cuda")
    parts = [torch.randn(plan.ids.size(1), 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    sees = row_mask(plan.pairs, plan.branches)
    near = plan.positions[0][:, None] - plan.positions[0] < window
    found = lengths_attention(*parts, lengths_arguments(plan)["row_lengths"], 0.125, window)
    expected = masked_attention(*(part.double() for part in parts), sees & near, 0.125)
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)


def gradients(folder, tmp_path, **changes) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a batch, in bf16 autocast unless changed."""
    options = {**option_dict(tmp_path, **{"bf16": True, "ot_reg": 0.1, **changes}), "use_cpu": False}
    trainer = OTPOTrainer(folder, args=OTPOConfig(**options), train_dataset=make_pairs(8))
    inputs = trainer.collate([trainer.train_dataset[row] for row in range(8)])
    trainer.state.max_steps = 1
    trainer.model.train()
    with trainer.accelerator.autocast():  # which is around the model's own call once `train` has prepared it
        loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    assert changes.get("row_layout") in (trainer.layout.name, "auto")
    return loss.item(), {name: each.grad for name, each in trainer.model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("changes", [{}, {"compile_layers": True}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("folder", ["model_folder", "moe_folder", "compass_folder"])
@pytest.mark.parametrize("layout", ["packed", "shared_prompt"])
def test_layouts_agree_in_half_precision(layout, folder, changes, request, tmp_path):
    folder = request.getfixturevalue(folder)
    loss, grads = gradients(folder, tmp_path, row_layout="padded")
    other_loss, other = gradients(folder, tmp_path, row_layout=layout, **changes)
    assert other_loss == pytest.approx(loss, rel=1e-3)
    whole = sum(float(each.double().norm()) for each in grads.values())
    for name, each in grads.items():
        if float(each.double().norm()) > 1e-3 * whole:
            assert cosine(each, other[name]) > 0.98, name


def test_auto_shares_prompts_and_trains(model_folder, tmp_path):
    options = {**option_dict(tmp_path, bf16=True, max_steps=6), "use_cpu": False}
    trainer = OTPOTrainer(
        model_folder, args=OTPOConfig(**options), train_dataset=make_pairs(), eval_dataset=make_pairs(6, 3)
    )
    assert (trainer.layout.name, trainer.layout.way) == ("shared_prompt", "lengths")
    trainer.train()
    trainer.evaluate()
    losses = [loss for (loss,) in history(trainer, "loss")]
    assert losses[-1] < losses[0]
    # Calls that are no preference steps see padded rows as before.
    ids = torch.randint(5, 300, (2, 9), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    logits = trainer.model(input_ids=ids, attention_mask=mask).logits
    trainer.model.set_attn_implementation("sdpa")
    torch.testing.assert_close(logits, trainer.model(input_ids=ids, attention_mask=mask).logits, rtol=0, atol=0)


def test_float32_stays_padded_and_says_so(model_folder, tmp_path):
    options = {**option_dict(tmp_path), "use_cpu": False}
    trainer = OTPOTrainer(model_folder, args=OTPOConfig(**options), train_dataset=make_pairs())
    assert trainer.layout.name == "padded" and "float32 without autocast" in trainer.layout.reason

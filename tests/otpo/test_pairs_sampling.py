"""How `otpo pairs` draws answers: by random numbers of their own, whatever else is in the batch."""

import math

import pytest
import torch
from helpers import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from otpo.pairs.any_length import attend_at_any_length
from otpo.pairs.sampling import (
    SamplingOptions,
    SeededDraw,
    TransformersSampler,
    answer_seed,
    end_tokens,
    longest_prompt,
    uniform_table,
)


def test_draws_have_the_probabilities_of_the_logits():
    logits = torch.tensor([2.0, 0.0, -math.inf, 1.0, -1.0])
    count = 20_000
    uniforms = torch.rand(count, 1, dtype=torch.float64)
    drawn = SeededDraw(uniforms, 3)(torch.zeros(count, 3), logits.expand(count, -1)).argmax(-1)
    shares = torch.bincount(drawn, minlength=5) / count
    # Three standard errors of the likeliest.
    torch.testing.assert_close(shares, logits.softmax(-1), atol=0.011, rtol=0)
    assert shares[2] == 0


@given(st.integers(0, 2**32), st.integers(2, 40))
def test_a_draw_is_never_a_token_that_was_ruled_out(seed, size):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, size, generator=generator) * 20
    ruled_out = torch.rand(4, size, generator=generator) < 0.6
    ruled_out[:, int(torch.randint(size, (), generator=generator))] = False
    logits = logits.masked_fill(ruled_out, -math.inf)
    uniforms = torch.tensor([[0.0], [1 - 2**-24], [0.5], [1e-9]], dtype=torch.float64)
    left = SeededDraw(uniforms, 1)(torch.zeros(4, 1), logits)
    assert (left.isfinite().sum(-1) == 1).all()
    assert not ruled_out.gather(1, left.argmax(-1, keepdim=True)).any()


def test_logits_that_are_not_finite_are_told():
    with pytest.raises(ValueError, match=r"logits are not finite.*Set `dtype`"):
        SeededDraw(torch.rand(1, 1), 1)(torch.zeros(1, 1), torch.tensor([[math.nan, 1.0]]))


def test_seeds_and_tables():
    seeds = {answer_seed(*key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 10, 0), (0, 1, 0)]}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)
    assert answer_seed(42, 3, 1) == 5975240523722772735  # a changed one would change every run
    short, long = uniform_table([5, 6], 3), uniform_table([5, 6, 7], 9)
    assert short.dtype == torch.float64 and torch.equal(short, long[:2, :3])
    assert not torch.equal(long[0], long[1]) and long.max() < 1


@pytest.fixture(scope="module")
def model(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64).eval()


def sampler(model, **changes) -> TransformersSampler:
    options = {"num_samples": 3, "max_new_tokens": 12, "seed": 1, **changes}
    return TransformersSampler(model, make_tokenizer(), SamplingOptions(**options))


PROMPTS = [[5, 6, 7], [9], [20, 21, 22, 23, 24, 25, 26], [30, 31]]


def test_answers_do_not_depend_on_the_batch_nor_on_their_neighbours(model):
    draw = sampler(model)
    together = draw(PROMPTS, [0, 1, 2, 3])
    assert [len(answers) for answers in together] == [3, 3, 3, 3]
    assert [draw([prompt], [row])[0] for row, prompt in enumerate(PROMPTS)] == together
    assert draw(PROMPTS[::-1], [3, 2, 1, 0]) == together[::-1]
    assert len({answer.text for answers in together for answer in answers}) > 9
    assert draw(PROMPTS, [0, 1, 2, 4])[3] != together[3]  # another row, other numbers
    assert sampler(model, seed=2)(PROMPTS, [0, 1, 2, 3]) != together
    more = sampler(model, num_samples=5)(PROMPTS, [0, 1, 2, 3])
    assert [answers[:3] for answers in more] == together  # more answers are the same ones, and others


def test_answers_end_where_the_model_ends_them(model):
    found = [answer for answers in sampler(model, num_samples=40)(PROMPTS, [0, 1, 2, 3]) for answer in answers]
    assert any(answer.ended for answer in found) and not all(answer.ended for answer in found)
    assert all("<|end|>" not in answer.text and "<|pad|>" not in answer.text for answer in found)
    tokenizer = make_tokenizer()
    cut = [len(tokenizer(answer.text)["input_ids"]) for answer in found if not answer.ended]
    assert min(cut) >= 6  # twelve tokens, some of them parts of a character, which the text shows as one sign


def test_top_p_and_temperature_narrow_the_draw(model):
    likeliest = {answer.text for answers in sampler(model, top_p=1e-6)(PROMPTS[:1], [0]) for answer in answers}
    cold = {answer.text for answers in sampler(model, temperature=1e-6)(PROMPTS[:1], [0]) for answer in answers}
    assert len(likeliest) == 1 and cold == likeliest


def test_the_models_own_sampling_options_play_no_part(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64).eval()
    plain = sampler(model)(PROMPTS, [0, 1, 2, 3])
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.temperature, model.generation_config.do_sample = 0.1, True
    assert sampler(model)(PROMPTS, [0, 1, 2, 3]) == plain


def test_end_tokens_are_the_models_and_the_tokenizers(model_folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), make_tokenizer()
    assert end_tokens(model, tokenizer) == [tokenizer.eos_token_id]
    model.generation_config.eos_token_id = [7, 3]
    assert end_tokens(model, tokenizer) == sorted({3, 7, tokenizer.eos_token_id})
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"names a token that ends an answer. Set `eos_token`"):
        TransformersSampler(model, tokenizer, SamplingOptions())
    assert longest_prompt(model.config, 100) == model.config.max_position_embeddings - 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 1}, "`num_samples` must be at least 2"),
        ({"temperature": 0.0}, "`temperature` must be above 0, got 0.0: without chance"),
        ({"temperature": math.nan}, "`temperature` must be above 0"),
        ({"top_p": 0.0}, "`top_p` must be within"),
        ({"top_p": 1.5}, "`top_p` must be within"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
    ],
)
def test_options_that_cannot_be_drawn_with(changes, message):
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**changes)


@pytest.mark.parametrize("before", [True, False])
def test_answers_are_written_without_cudnns_attention(before):
    kernels = torch.backends.cuda
    kept = kernels.cudnn_sdp_enabled(), kernels.flash_sdp_enabled()
    kernels.enable_cudnn_sdp(before)
    kernels.enable_flash_sdp(False)  # what is off stays off
    try:
        with pytest.raises(RuntimeError, match="stop"), attend_at_any_length():
            assert not kernels.cudnn_sdp_enabled() and not kernels.flash_sdp_enabled()
            raise RuntimeError("stop")
        assert kernels.cudnn_sdp_enabled() == before
        first, second = attend_at_any_length(), attend_at_any_length()  # two that overlap, as threads' do
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert not kernels.cudnn_sdp_enabled()
        second.__exit__(None, None, None)
        assert kernels.cudnn_sdp_enabled() == before and not kernels.flash_sdp_enabled()
    finally:
        kernels.enable_cudnn_sdp(kept[0])
        kernels.enable_flash_sdp(kept[1])

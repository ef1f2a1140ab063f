"""Multi-token prediction in `generate`: drafts save calls and change no token."""

from types import SimpleNamespace

import pytest
import torch
from compass_helpers import ahead, compass_config, compass_model, overfit, token_ids
from transformers import AutoModelForCausalLM
from transformers.cache_utils import MtpCache
from transformers.generation.candidate_generator import MTPCandidateGenerator
from transformers.modeling_layers import MtpModel

from moe_backbone import CompassForCausalLM
from moe_backbone.model.mtp import LiveMtpCandidateGenerator, LiveMtpModel


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [1, 2, 3])
@torch.no_grad()
def test_training_and_drafting_compute_the_same_logits(layers, attention):
    """At the end of each prefix, with the tokens that the drafting loop itself has drafted filled in behind it.

    Depth d of the loop over tokens 1..n pairs state t with token t + d, of which the last d - 1 are its own drafts.
    """
    model = compass_model(num_mtp_layers=layers, attention=attention).eval()
    for length in (2, 5, 11):
        ids = token_ids(1, length, seed=length)
        hidden = model.model(ids).last_hidden_state
        following = model.lm_head(hidden[:, -1]).argmax(-1, keepdim=True)
        full = torch.cat([ids, following], dim=1)
        drafter = LiveMtpModel(model).eval()
        cache = MtpCache(config=model.config.get_mtp_config())
        tokens, logits, _ = drafter(
            input_ids=full[:, 1:],
            last_hidden_states=hidden,
            attention_mask=None,
            position_ids=torch.arange(1, length + 1)[None],
            mtp_cache=cache,
        )
        states = ahead(model, torch.cat([full, tokens], dim=1))
        for depth, state in enumerate(states):
            torch.testing.assert_close(
                model.lm_head(state[:, length - 1]), logits[:, depth], rtol=1e-4, atol=1e-4,
                msg=lambda text, depth=depth: f"layer {depth + 1}: {text}",
            )  # fmt: skip


@torch.no_grad()
def test_transformers_own_layers_read_the_checkpoint_and_draft_the_same(tmp_path):
    """`MtpModel` puts layers of its own before a model without any and fills them from the files."""
    model = compass_model(num_mtp_layers=2, num_shared_experts=1, router_bias_update_speed=1e-3).eval()
    model.save_pretrained(tmp_path)
    without = CompassForCausalLM.from_pretrained(tmp_path, num_mtp_layers=0)
    without.config.num_mtp_layers = 2
    ids = token_ids(1, 8)
    inputs = {
        "input_ids": ids[:, 1:],
        "last_hidden_states": model.model(ids).last_hidden_state[:, :-1],
        "attention_mask": None,
        "position_ids": torch.arange(1, 8)[None],
    }
    results = []
    for drafter in (LiveMtpModel(model), MtpModel.from_pretrained(without)):
        cache = MtpCache(config=model.config.get_mtp_config())
        results.append(drafter.eval()(**inputs, mtp_cache=cache)[:2])
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def greedy(model, prompt, **options):
    calls = []
    hook = model.model.register_forward_hook(lambda *_: calls.append(1))
    out = model.generate(prompt, do_sample=False, max_new_tokens=20, pad_token_id=0, **options)
    hook.remove()
    return out, len(calls)


@pytest.fixture(scope="module", params=[1, 2], ids=["one layer", "two layers"])
def trained(request):
    """A model that knows two rows by heart, so that it drafts them."""
    model = compass_model(num_mtp_layers=request.param, mtp_loss_coef=1.0, router_aux_loss_coef=0.0)
    rows = token_ids(2, 26, seed=3)
    overfit(model, rows, steps=80, learning_rate=1e-2)
    return model.eval(), rows


def test_drafts_that_are_right_save_calls_and_change_no_token(trained):
    model, rows = trained
    for row in rows:
        plain, calls = greedy(model, row[None, :4])
        drafted, drafted_calls = greedy(model, row[None, :4], use_mtp=True)
        assert torch.equal(plain, drafted)
        assert plain[0, 4:].eq(row[4:24]).float().mean() > 0.8  # it does know the row
        assert calls == 20 and drafted_calls < 15


def test_drafts_that_are_wrong_change_no_token(trained):
    model, _ = trained
    wrong = 0
    for seed in range(4):
        prompt = token_ids(1, 3 + seed, seed=100 + seed)
        plain, _ = greedy(model, prompt)
        drafted, calls = greedy(model, prompt, use_mtp=True)
        assert torch.equal(plain, drafted)
        wrong += calls > 20 / (1 + model.config.num_mtp_layers) + 2
    assert wrong  # some drafts were refused on the way


def test_an_untrained_model_drafts_the_same_tokens_too():
    model = compass_model(num_mtp_layers=2).eval()
    prompt = token_ids(1, 5)
    plain, _ = greedy(model, prompt)
    drafted, calls = greedy(model, prompt, use_mtp=True)
    assert torch.equal(plain, drafted) and calls > 12


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("length", [1, 2])
def test_a_prompt_shorter_than_the_layers_draft_at_once_changes_no_token(layers, length):
    model = compass_model(num_mtp_layers=layers, seed=layers).eval()
    prompt = token_ids(1, length)
    plain, _ = greedy(model, prompt)
    drafted, _ = greedy(model, prompt, use_mtp=True)
    assert torch.equal(plain, drafted)


def test_a_saved_model_drafts_like_the_one_in_memory(trained, tmp_path):
    model, rows = trained
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompt = rows[:1, :4]
    ours, theirs = greedy(model, prompt, use_mtp=True), greedy(loaded, prompt, use_mtp=True)
    assert torch.equal(ours[0], theirs[0]) and ours[1] == theirs[1]


def test_drafting_stops_at_the_end_of_the_sequence(trained):
    model, rows = trained
    plain, _ = greedy(model, rows[:1, :4])
    end = plain[0, 12].item()
    first = 4 + plain[0, 4:].tolist().index(end)
    drafted, _ = greedy(model, rows[:1, :4], use_mtp=True, eos_token_id=end)
    assert torch.equal(drafted[0], plain[0, : first + 1])


def test_sampling_with_drafts_draws_from_the_vocabulary(trained):
    model, rows = trained
    torch.manual_seed(0)
    out = model.generate(rows[:1, :4], do_sample=True, max_new_tokens=12, use_mtp=True, pad_token_id=0)
    assert out.shape == (1, 16) and out.max() < 61


def test_drafting_without_layers_says_so():
    model = compass_model().eval()
    with pytest.raises(ValueError, match="no MTP layers"):
        LiveMtpCandidateGenerator(model, SimpleNamespace(do_sample=False), {})
    with pytest.raises(ValueError, match=r"no MTP layers \(`num_mtp_layers=0`\). Leave it out"):
        model.generate(token_ids(1, 4), use_mtp=True, max_new_tokens=4)


def test_drafting_leaves_the_model_as_it_was(trained):
    model, rows = trained
    before = {name: value.clone() for name, value in model.state_dict().items()}
    greedy(model, rows[:1, :4], use_mtp=True)
    assert not model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_drafting_keeps_one_state_of_a_call(trained):
    model, rows = trained
    kept = []
    hook = model.register_forward_hook(lambda _module, _inputs, output: kept.append(output.hidden_states))
    greedy(model, rows[:1, :4], use_mtp=True)
    hook.remove()
    assert kept and all(sum(state is not None for state in states) == 1 for states in kept)


def test_the_drafter_has_all_that_transformers_own_has(tmp_path):
    """Its `__init__` can't call the parent's, which reads the layers from files."""
    compass_model(num_mtp_layers=1).save_pretrained(tmp_path)
    model = CompassForCausalLM.from_pretrained(tmp_path)
    without = CompassForCausalLM.from_pretrained(tmp_path, num_mtp_layers=0)
    without.config.num_mtp_layers = 1
    options = {"generation_config": model.generation_config, "model_kwargs": {}, "logits_processor": None}
    parent = MTPCandidateGenerator(without, **options)
    own = LiveMtpCandidateGenerator(model, **options)
    for name, value in vars(parent).items():
        assert hasattr(own, name), name
        if isinstance(value, bool | int | str | dict | torch.device):
            assert getattr(own, name) == value, name
    for name, value in vars(parent.mtp_model).items():
        if isinstance(value, bool | int | str) and name != "training":
            assert getattr(own.mtp_model, name) == value, name


def test_configurations_for_drafting_have_the_models_sizes():
    assert compass_config(num_mtp_layers=2).get_mtp_config().num_mtp_layers == 2

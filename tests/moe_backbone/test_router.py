import math

import pytest
import torch
from compass_helpers import compass_config, compass_model, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moe_backbone import CompassForCausalLM
from moe_backbone.model.modeling_compass import CompassModel
from moe_backbone.model.router import (
    CompassRouter,
    expert_load,
    load_balancing_loss,
    router_health,
    router_z_loss,
    update_router_biases,
)


def make_router(**changes):
    router = CompassRouter(compass_config(**changes))
    with torch.no_grad():
        router.weight.normal_(std=0.3)
    return router


def random_routing(layers, tokens, experts, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = [2 * torch.randn(tokens, experts, generator=generator) for _ in range(layers)]
    return logits, [layer.topk(k, dim=-1).indices for layer in logits]


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_weights_are_the_largest_probabilities(norm_topk_prob):
    router = make_router(norm_topk_prob=norm_topk_prob)
    x = torch.randn(40, 32)
    logits, weights, experts = router(x)
    probabilities = (x.double() @ router.weight.double().T).softmax(-1)
    expected = probabilities.sort(descending=True)
    chosen = expected.values[:, :2]
    if norm_topk_prob:
        chosen = chosen / chosen.sum(-1, keepdim=True)
    torch.testing.assert_close(logits.double(), x.double() @ router.weight.double().T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights.double(), chosen, rtol=1e-5, atol=1e-6)
    assert torch.equal(experts, expected.indices[:, :2])


@pytest.mark.parametrize("bias", [0.0, 1e-3])
@pytest.mark.parametrize("autocast", [True, False])
def test_the_router_computes_in_float32_of_bfloat16(autocast, bias):
    """Logits that bfloat16 cannot tell apart must still be told apart, with autocast and without."""
    router = make_router(num_experts_per_tok=2, router_bias_update_speed=bias)
    x = torch.randn(200, 32).bfloat16()
    if not autocast:
        router = router.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits, weights, experts = router(x)
    exact = x.double() @ router.weight.double().T
    assert logits.dtype is torch.float32 and weights.dtype is torch.bfloat16 and experts.dtype is torch.int64
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    assert (exact.bfloat16().double() - exact).abs().max() > 1e-3  # which bfloat16 would have missed
    assert torch.equal(experts, exact.topk(2).indices)
    chosen = exact.softmax(-1).topk(2).values
    expected = (chosen / chosen.sum(-1, keepdim=True)).float().bfloat16()
    assert (
        weights != expected
    ).float().mean() < 0.01  # one rounding, at the end; a tie of float32 may fall either way


def written_out_balance(logits, experts, mask):
    """Equations 4 to 6 of arXiv 2101.03961 for each layer, in Python floats."""
    total = 0.0
    for layer_logits, layer_experts in zip(logits, experts, strict=True):
        count = sum(1 for kept in mask if kept)
        number = layer_logits.size(1)
        loss = 0.0
        for e in range(number):
            fraction = probability = 0.0
            for t, kept in enumerate(mask):
                if kept:
                    row = [math.exp(value) for value in layer_logits[t].double().tolist()]
                    probability += row[e] / sum(row)
                    fraction += sum(1 for choice in layer_experts[t].tolist() if choice == e)
            loss += fraction / count * probability / count
        total += number * loss
    return total / len(logits)


@given(seed=st.integers(0, 2**30), layers=st.integers(1, 3), tokens=st.integers(1, 9), data=st.data())
@settings(max_examples=25, deadline=None)
def test_the_load_balancing_loss_is_its_formula(seed, layers, tokens, data):
    experts = data.draw(st.integers(1, 6))
    k = data.draw(st.integers(1, experts))
    mask = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens).filter(any))
    logits, choices = random_routing(layers, tokens, experts, k, seed)
    got = load_balancing_loss(logits, choices, torch.tensor(mask).long())
    assert got.item() == pytest.approx(written_out_balance(logits, choices, mask), rel=1e-5)
    everything = load_balancing_loss(logits, choices)
    assert everything.item() == pytest.approx(written_out_balance(logits, choices, [True] * tokens), rel=1e-5)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_load_balancing_loss_of_an_even_load_is_k(k):
    choices = torch.stack([(torch.arange(8) + slot) % 4 for slot in range(k)], dim=1)
    assert load_balancing_loss([torch.zeros(8, 4)] * 3, [choices] * 3).item() == pytest.approx(k)


def test_layers_that_even_each_other_out_are_not_even():
    """Layer 0 sends all to expert 0, layer 1 all to expert 1: transformers' function over all layers sees balance."""
    logits = [torch.tensor([[9.0, -9.0]] * 4), torch.tensor([[-9.0, 9.0]] * 4)]
    choices = [torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1, dtype=torch.int64)]
    assert load_balancing_loss(logits, choices).item() == pytest.approx(2.0)
    assert load_balancing_loss_func(tuple(logits), 2, 1).item() == pytest.approx(1.0)


@pytest.mark.parametrize("padded", [False, True])
def test_with_one_layer_it_is_that_of_transformers(padded):
    logits, choices = random_routing(1, 12, 6, 3)
    attention_mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]) if padded else None
    ours = load_balancing_loss(logits, choices, attention_mask)
    theirs = load_balancing_loss_func(tuple(logits), 6, 3, attention_mask)
    torch.testing.assert_close(ours, theirs)


def test_the_gradient_of_the_load_balancing_loss_evens_the_load():
    torch.manual_seed(1)
    router, x = make_router(num_experts_per_tok=1), torch.randn(400, 32)
    with torch.no_grad():
        router.weight[0] += x.mean(0) * 5 + 0.5

    def busiest():
        return router_health(expert_load([router(x + 1)[2]], 5))["max_load"]

    before = busiest()
    optimizer = torch.optim.SGD(router.parameters(), lr=0.1)
    for _ in range(100):
        logits, _, experts = router(x + 1)
        load_balancing_loss([logits], [experts]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before > 2.5 and busiest() < 1.7


@given(seed=st.integers(0, 2**30), layers=st.integers(1, 3), tokens=st.integers(1, 9), data=st.data())
@settings(max_examples=25, deadline=None)
def test_the_z_loss_is_its_formula(seed, layers, tokens, data):
    mask = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens).filter(any))
    logits, _ = random_routing(layers, tokens, 5, 1, seed)
    squares = [
        [math.log(sum(math.exp(value) for value in row)) ** 2 for row in layer.double().tolist()] for layer in logits
    ]
    kept = [value for layer in squares for value, keep in zip(layer, mask, strict=True) if keep]
    assert router_z_loss(logits, torch.tensor(mask)).item() == pytest.approx(sum(kept) / len(kept), rel=1e-5)
    every = [value for layer in squares for value in layer]
    assert router_z_loss(logits).item() == pytest.approx(sum(every) / len(every), rel=1e-5)


def test_a_mask_of_nothing_gives_zeros():
    logits, choices = random_routing(2, 4, 5, 2)
    mask = torch.zeros(4)
    assert load_balancing_loss(logits, choices, mask).item() == 0
    assert router_z_loss(logits, mask).item() == 0
    assert expert_load(choices, 5, mask).sum() == 0


@pytest.mark.parametrize("masked", [False, True])
def test_losses_take_layers_as_one_tensor_and_a_load_that_is_known(masked):
    logits, choices = random_routing(3, 12, 5, 2)
    mask = torch.tensor([1, 0, 1, 1, 0, 1] * 2) if masked else None
    known = load_balancing_loss(torch.stack(logits), choices, mask, expert_load(choices, 5, mask))
    assert torch.equal(known, load_balancing_loss(logits, choices, mask))
    assert torch.equal(router_z_loss(torch.stack(logits), mask), router_z_loss(logits, mask))


def test_the_losses_stay_in_float32_under_autocast():
    """bfloat16 would round each expert's share and probability to three digits."""
    logits, choices = random_routing(2, 50, 5, 2)
    mask = torch.ones(50).index_fill(0, torch.arange(9), 0)
    expected = load_balancing_loss(logits, choices, mask), router_z_loss(logits, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = load_balancing_loss(logits, choices, mask), router_z_loss(logits, mask)
    assert torch.equal(torch.stack(got), torch.stack(expected))


def test_layers_add_no_operations_to_the_losses():
    """An operation costs the host more to start than its work on a layer's logits takes a GPU."""

    def operations(layers: int) -> int:
        logits, choices = random_routing(layers, 12, 5, 2)
        logits = [layer.requires_grad_() for layer in logits]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            loss = load_balancing_loss(logits, choices, torch.ones(12)) + router_z_loss(logits, torch.ones(12))
        assert loss.requires_grad
        outermost = [event for event in profiler.events() if event.cpu_parent is None]
        return sum(event.name.startswith("aten::") for event in outermost)

    assert operations(9) == operations(2)


@given(seed=st.integers(0, 2**30), layers=st.integers(1, 3), tokens=st.integers(1, 9), masked=st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_load_counts_tokens(seed, layers, tokens, masked):
    generator = torch.Generator().manual_seed(seed)
    choices = [torch.rand(tokens, 6, generator=generator).topk(2).indices for _ in range(layers)]
    mask = torch.randint(0, 2, (tokens,), generator=generator) if masked else torch.ones(tokens, dtype=torch.int64)
    load = expert_load(choices, 6, mask if masked else None)
    expected = [
        [sum(e in row for row, keep in zip(c.tolist(), mask.tolist(), strict=True) if keep) for e in range(6)]
        for c in choices
    ]
    assert load.dtype is torch.int64 and load.tolist() == expected


@pytest.mark.parametrize(
    ("load", "entropy", "busiest", "dead"),
    [
        ([[3, 3, 3, 3], [5, 5, 5, 5]], 1.0, 1.0, 0),
        ([[4, 4, 4, 0]], math.log(3) / math.log(4), 4 / 3, 1),
        ([[8, 0, 0, 0]], 0.0, 4.0, 3),
        ([[8, 0, 0, 0], [2, 2, 2, 2]], 0.5, 4.0, 3),
        ([[7]], 1.0, 1.0, 0),
    ],
    ids=["even", "one dead", "all on one", "two layers", "one expert"],
)
def test_health_in_closed_form(load, entropy, busiest, dead):
    got = router_health(torch.tensor(load))
    assert got == {"load_entropy": pytest.approx(entropy), "max_load": pytest.approx(busiest), "dead_experts": dead}


def test_padding_is_left_out_of_losses_and_load():
    """Rows padded on the left have the router's losses and load of the rows alone."""
    model = compass_model(num_mtp_layers=0)
    ids, row = token_ids(2, 8), token_ids(1, 5, seed=1)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), row], dim=1)
    mask = torch.ones(3, 8, dtype=torch.int64)
    mask[2, :3] = 0
    both = model(torch.cat([ids, padded]), attention_mask=mask, output_router_logits=True)
    alone = [model(part, output_router_logits=True) for part in (ids, row)]
    assert torch.equal(both.expert_load, alone[0].expert_load + alone[1].expert_load)
    tokens = torch.tensor([16.0, 5.0])
    z = torch.stack([out.z_loss for out in alone])
    torch.testing.assert_close(both.z_loss, (z * tokens).sum() / 21)
    logits = [torch.cat([out.router_logits[layer] for out in alone]) for layer in range(2)]
    choices = [layer.topk(2).indices for layer in logits]
    torch.testing.assert_close(both.aux_loss, load_balancing_loss(logits, choices))


def test_biases_change_the_choice_and_never_the_weights():
    router = make_router(router_bias_update_speed=0.1, norm_topk_prob=False)
    x = torch.randn(50, 32)
    logits, weights, experts = router(x)
    router.e_score_correction_bias[3] = 2.0
    _, biased_weights, biased_experts = router(x)
    assert biased_experts[:, 0].eq(3).all() and not experts[:, 0].eq(3).all()
    probabilities = logits.softmax(-1)
    torch.testing.assert_close(biased_weights, probabilities.gather(-1, biased_experts), rtol=0, atol=0)
    assert torch.equal(biased_experts[:, 1], probabilities.index_fill(1, torch.tensor([3]), 0).argmax(-1))
    router.e_score_correction_bias.zero_()
    assert torch.equal(router(x)[2], experts) and torch.equal(router(x)[1], weights)


def test_updates_move_each_bias_by_the_step_toward_the_mean():
    routers = [make_router(router_bias_update_speed=0.1) for _ in range(2)]
    update_router_biases(routers, torch.tensor([[10, 0, 5, 5, 5], [1, 1, 1, 1, 1]]), 0.25)
    assert routers[0].e_score_correction_bias.tolist() == [-0.25, 0.25, 0, 0, 0]
    assert routers[1].e_score_correction_bias.tolist() == [0] * 5


def test_updates_want_a_load_for_each_router():
    with pytest.raises(ValueError, match="argument"):
        update_router_biases([make_router(router_bias_update_speed=0.1)], torch.ones(2, 5), 0.1)


def test_routers_of_layers_that_did_not_run_stay_as_they_are():
    """Those of MTP layers whose loss weighs nothing, as in a checkpoint of SFT."""
    model = compass_model(router_bias_update_speed=0.1, num_mtp_layers=2, mtp_loss_coef=0.0)
    before = [router.e_score_correction_bias.clone() for router in model.model.routers]
    ids = token_ids(2, 9)
    load = model(ids, labels=ids).expert_load
    update_router_biases(model.model.routers, load, 0.1)
    moved = [
        not torch.equal(router.e_score_correction_bias, old)
        for router, old in zip(model.model.routers, before, strict=True)
    ]
    assert moved == [True, True, False, False]


def test_updates_even_a_skewed_router():
    router = make_router(num_experts=8, router_bias_update_speed=0.01)
    with torch.no_grad():
        router.weight.mul_(0.3)
        router.weight[0] += 0.1
    history = []
    for step in range(400):
        x = torch.randn(256, 32, generator=torch.Generator().manual_seed(step)) + 0.5
        load = expert_load([router(x)[2]], 8)
        history.append(router_health(load)["max_load"])
        update_router_biases([router], load, 0.001)
    assert history[0] > 3 and max(history[-20:]) < 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_are_saved_and_stay_float32(tmp_path, dtype):
    model = compass_model(router_bias_update_speed=1e-3, num_mtp_layers=1)
    biases = [router.e_score_correction_bias.clone() for router in model.model.routers]
    assert len(biases) == 3 and all(bias.abs().max() > 0.01 for bias in biases)
    model.to(dtype).save_pretrained(tmp_path)
    loaded = CompassForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for router, before, bias in zip(loaded.model.routers, model.model.routers, biases, strict=True):
        assert router.weight.dtype is dtype and router.e_score_correction_bias.dtype is torch.float32
        assert torch.equal(router.e_score_correction_bias, before.e_score_correction_bias.float())
        if dtype is torch.float32:
            assert torch.equal(router.e_score_correction_bias, bias)


def test_biases_loaded_in_bfloat16_keep_every_bit(tmp_path):
    model = compass_model(router_bias_update_speed=1e-3)
    model.save_pretrained(tmp_path)
    loaded = CompassForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for router, before in zip(loaded.model.routers, model.model.routers, strict=True):
        assert torch.equal(router.e_score_correction_bias, before.e_score_correction_bias)


def test_a_cast_of_the_model_leaves_the_biases_in_float32():
    """In bfloat16 a step of 0.001 from 0.3 on would change nothing."""
    model = compass_model(router_bias_update_speed=1e-3)
    router = model.model.routers[0]
    before = router.e_score_correction_bias.clone()
    model.bfloat16()
    assert router.weight.dtype is torch.bfloat16 and torch.equal(router.e_score_correction_bias, before)
    for _ in range(1000):
        update_router_biases([router], torch.tensor([[0, 1, 2, 3, 4]]), 1e-3)
    moved = router.e_score_correction_bias - before
    torch.testing.assert_close(moved, torch.tensor([1.0, 1.0, 0.0, -1.0, -1.0]), rtol=0, atol=1e-3)


def test_without_a_speed_there_are_no_biases():
    model = compass_model()
    assert not [name for name in model.state_dict() if "bias" in name]


def test_a_new_model_starts_with_biases_of_zero():
    model = CompassModel(compass_config(router_bias_update_speed=0.1))
    assert all(router.e_score_correction_bias.eq(0).all() for router in model.routers)

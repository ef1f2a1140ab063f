"""What documents bring to experts and linear layers, against hooks and loops that are written out."""

from functools import partial

import pytest
import torch
from compass_helpers import compass_model, token_ids
from quantization_helpers import VARIANTS, documents, exported_model
from transformers import LlamaConfig, LlamaForCausalLM

from moe_backbone.quantization.observing import observe, padded
from moe_backbone.quantization.staying import is_ignored
from moe_backbone.quantization.tapping import find_places, tapped


class Passing:
    """A tap that changes nothing and keeps what it saw."""

    def __init__(self):
        self.seen = []

    def keeps(self):
        return None

    def gate_up(self, layer, rows):
        self.seen.append((layer, "gate_up", rows))
        return rows.values_RX

    def down(self, layer, rows):
        self.seen.append((layer, "down", rows))
        return rows.values_RX

    def linear(self, name, values):
        self.seen.append((name, "linear", values))
        return values


def keep(found, name, module, inputs, output):
    found[name] = inputs


def by_hand(experts, hidden, index):
    """The rows into both products of each expert, by a loop over tokens and slots."""
    found = {expert: ([], []) for expert in range(experts.num_experts)}
    for token, chosen in enumerate(index.tolist()):
        for expert in chosen:
            row = hidden[token]
            gate, up = (experts.gate_up_proj[expert] @ row).chunk(2)
            found[expert][0].append(row)
            found[expert][1].append(torch.nn.functional.silu(gate) * up)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tapped_model_answers_as_before(tmp_path, variant):
    model = exported_model(tmp_path, **VARIANTS[variant])
    places = find_places(model)
    before = model.config._experts_implementation
    ids = token_ids(2, 7)
    with torch.no_grad():
        want = model(ids).logits
        with tapped(model, places, tap := Passing()):
            torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)
            model(ids[:1, :1])  # one token
        assert model.config._experts_implementation == before
        torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=0)
    assert {name for name, kind, _ in tap.seen if kind == "linear"} == set(places.linears)
    assert not any(is_ignored(name) for name in places.linears)
    rows = [rows for layer, kind, rows in tap.seen if layer == 1 and kind == "down"]
    assert [len(it.values_RX) for it in rows] == [28, 2]  # K = 2 rows of each token
    assert all((it.experts_R.diff() >= 0).all() for it in rows)


def test_the_tap_goes_when_a_forward_fails(tmp_path):
    model = exported_model(tmp_path)
    places = find_places(model)
    before = model.config._experts_implementation
    with pytest.raises(IndexError), tapped(model, places, Passing()):
        model(torch.tensor([[10_000]]))
    assert model.config._experts_implementation == before
    model(token_ids(1, 3))


@torch.no_grad()
def test_rows_and_largest_values_are_those_of_a_loop_over_tokens(tmp_path):
    model = exported_model(tmp_path)
    places = find_places(model)
    found = documents(5, 1, 12, 3, 2)
    observed = observe(model, places, [found[:2], found[2:]])
    assert observed.tokens_N.tolist() == [5, 1, 12, 3, 2]
    assert (observed.rows_NLE.sum(2) == 2 * observed.tokens_N[:, None]).all()

    for number, document in enumerate(found):
        inputs, linears = {}, {}
        hooks = [
            module.register_forward_hook(partial(keep, inputs, place)) for place, module in enumerate(places.experts)
        ]
        hooks += [
            module.register_forward_hook(partial(keep, linears, name)) for name, module in places.linears.items()
        ]
        model(torch.tensor([document]))
        for hook in hooks:
            hook.remove()
        for place, experts in enumerate(places.experts):
            hidden, index, _ = inputs[place]
            for expert, rows in by_hand(experts, hidden, index).items():
                assert observed.rows_NLE[number, place, expert] == len(rows[0])
                for product, values in zip(("gate_up", "down"), rows, strict=True):
                    each = torch.stack(values).abs().amax(1) if values else torch.zeros(1)
                    got = (
                        observed.largest[product][number, place, expert],
                        observed.sums[product][number, place, expert],
                    )
                    torch.testing.assert_close(torch.stack(got), torch.stack([each.max(), each.sum()]))
        want = torch.stack([linears[name][0].abs().max() for name in observed.linears])
        torch.testing.assert_close(observed.linear_NS[number], want)


def test_batches_of_other_sizes_observe_the_same(tmp_path):
    model = exported_model(tmp_path, num_shared_experts=1)
    places = find_places(model)
    found, told = documents(5, 1, 12, 3, 2), []
    one = observe(model, places, [[document] for document in found], told.append)
    all_at_once = observe(model, places, [found])
    assert told == [1] * 5
    assert one.rows_NLE.equal(all_at_once.rows_NLE)
    torch.testing.assert_close(one.largest, all_at_once.largest)
    torch.testing.assert_close(one.linear_NS, all_at_once.linear_NS)


def test_values_that_are_not_finite_name_a_document(tmp_path):
    model = exported_model(tmp_path)
    places = find_places(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.inf
    with pytest.raises(ValueError, match=r"Document 1 .*not finite"):
        observe(model, places, [[[1, 2], [3, 7]]])
    with pytest.raises(ValueError, match="no documents"):
        observe(model, places, [])


def test_padding_stands_behind_documents():
    ids, mask = padded([[3, 4, 5], [6]], "cpu")
    assert ids.tolist() == [[3, 4, 5], [6, 0, 0]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_what_is_not_covered_is_refused(tmp_path):
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts"):
        find_places(LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)))
    with pytest.raises(ValueError, match=r"moe_intermediate_size=3.*multiple of 4"):
        find_places(compass_model(moe_intermediate_size=3))
    model = compass_model()
    model.model.layers[0].mlp.experts.has_bias = True
    with pytest.raises(ValueError, match="its experts have biases"):
        find_places(model)

"""Compiled layers of Compass: one graph for all decoder layers, one for all MTP layers, and the numbers stay the same.

The graphs are those that `torch.compile` traces; they run as they are (`aot_eager`), without code being generated.
"""

import copy
import logging
from typing import Any

import pytest
import torch
from compass_helpers import FULL, compass_model, gradients, pack, token_ids
from pretraining_helpers import chain_documents, pretrainer, tiny_compass
from torch._dynamo.utils import counters

from moe_backbone.pretraining.packing import pack_documents

pytestmark = pytest.mark.lengthy
LOSSES = ("loss", "lm_loss", "mtp_loss", "aux_loss", "z_loss")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    # pytest keeps thousands of records of what is traced, which takes as long as the tracing.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)


def compile_layers(model: Any) -> None:
    for layer in model.model.layers:
        layer.compile(dynamic=True, backend="aot_eager")


def packed_batch(seed: int, *lengths: int) -> dict[str, Any]:
    """One row of documents, then three places of padding, which count for no loss and no router."""
    batch = pack([token_ids(1, length, seed=seed + length)[0] for length in (*lengths, 3)])
    batch["router_mask"] = torch.ones_like(batch["input_ids"])
    batch["router_mask"][:, -3:], batch["labels"][:, -3:] = 0, -100
    return batch


def train(compiled: bool, checkpointing: bool = False, autocast: bool = False, **changes: Any) -> tuple[Any, Any]:
    """Parts of the loss, logits and loads of accumulated micro-batches of other lengths, and every gradient."""
    model = compass_model(**{**FULL, "num_hidden_layers": 3, "num_mtp_layers": 2, **changes})
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if compiled:
        compile_layers(model)
    outputs = []
    for seed, lengths in enumerate([(5, 9, 11), (4, 2, 17, 1), (30,)]):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(**packed_batch(seed, *lengths), num_items_in_batch=70, output_router_logits=seed == 1)
        assert (out.router_logits is not None) == (seed == 1)
        out.loss.backward()
        outputs.append(out)
    return outputs, gradients(model)


CASES: dict[str, dict[str, Any]] = {
    "memcpy": {"implementation": "memcpy"},
    "grouped_mm, checkpointed": {"implementation": "grouped_mm", "checkpointing": True},
    "batched_mm, detached": {"implementation": "batched_mm", "mtp_detach_trunk": True, "mtp_detach_head": True},
    "memcpy, checkpointed, no shared expert": {
        "implementation": "memcpy",
        "checkpointing": True,
        "num_shared_experts": 0,
        "router_bias_update_speed": 0.0,
    },
    "idle MTP layers": {"implementation": "grouped_mm", "mtp_loss_coef": 0.0},
    "eager attention": {"implementation": "grouped_mm", "attention": "eager"},
}


@pytest.mark.parametrize("name", CASES)
def test_one_graph_for_all_layers_and_lengths(name):
    expected, expected_gradients = train(False, **CASES[name])
    assert not counters["stats"]
    got, got_gradients = train(True, **CASES[name])
    assert not counters["graph_break"]
    # Layers that nothing runs have none. With head and trunk detached, the first MTP layer's inputs need no gradient.
    assert counters["stats"]["unique_graphs"] == {"idle MTP layers": 1, "batched_mm, detached": 3}.get(name, 2)
    for left, right in zip(got, expected, strict=True):
        for part in LOSSES:
            found, wanted = getattr(left, part), getattr(right, part)
            assert (wanted is None) == (part == "mtp_loss" and "idle" in name)
            assert found == wanted or found.item() == pytest.approx(wanted.item(), rel=1e-6), part
        assert left.expert_load.equal(right.expert_load)
    for left, right in zip(got[1].router_logits, expected[1].router_logits, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    assert got_gradients.keys() == expected_gradients.keys()
    for parameter, gradient in expected_gradients.items():
        assert (got_gradients[parameter] - gradient).norm() <= 1e-6 * gradient.norm() + 1e-9, parameter


@pytest.mark.parametrize("implementation", ["grouped_mm", "memcpy"])
def test_one_graph_for_any_number_of_rows(implementation):
    model = compass_model(**FULL, implementation=implementation)
    compile_layers(model)
    for rows, length in ((7, 13), (3, 9), (2, 27)):
        ids = token_ids(rows, length, seed=length)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        model(ids, attention_mask=mask, labels=ids).loss.backward()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2


def test_autocast_breaks_nothing():
    """Experts of the cast weights are made in the layer."""
    expected, _ = train(False, implementation="grouped_mm", autocast=True)
    got, _ = train(True, implementation="grouped_mm", autocast=True)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 2
    for left, right in zip(got, expected, strict=True):
        assert left.loss.item() == pytest.approx(right.loss.item(), rel=1e-3)


def test_all_that_transformers_records_is_there():
    """Hidden states, attentions and router logits of compiled layers, asked for after they were compiled."""
    model, ids = compass_model(**FULL, attention="eager", implementation="grouped_mm").eval(), token_ids(2, 9)
    asked = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True, "use_cache": False}
    with torch.no_grad():
        expected = model(ids, **asked)
        compile_layers(model)
        model(ids, use_cache=False)
        got = model(ids, **asked)
    assert not counters["graph_break"]
    for name, count in (("hidden_states", 3), ("attentions", 2), ("router_logits", 2)):
        assert len(got[name]) == len(expected[name]) == count
        for left, right in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_a_trained_model_is_the_same(tmp_path):
    """The trainer's log, its moved biases and its weights; an evaluation has a graph of its own."""
    seen, held_out = [], pack_documents(chain_documents(30, seed=3), 32)
    for compiled in (False, True):
        model = tiny_compass(num_mtp_layers=1, router_bias_update_speed=0.01)
        model.set_experts_implementation("grouped_mm")
        if compiled:
            compile_layers(model)
        options = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "optim": "sgd"}
        trainer = pretrainer(tmp_path, model=model, eval_rows=held_out, max_steps=3, **options)
        trainer.train()
        seen.append((trainer.state.log_history, trainer.evaluate()["eval_loss"], model))
    assert not counters["graph_break"]
    # Of the decoder's layers and of MTP layers; in an evaluation of the decoder's, and for a last batch of one row.
    assert counters["stats"]["unique_graphs"] <= 4
    for left, right in zip(seen[0][0], seen[1][0], strict=True):
        timed = ("runtime", "per_second", "mfu")
        for name in (each for each in left if not each.endswith(timed)):
            assert right[name] == pytest.approx(left[name], rel=1e-6), name
    assert seen[1][1] == pytest.approx(seen[0][1], rel=1e-6)
    for left, right in zip(seen[0][2].model.routers, seen[1][2].model.routers, strict=True):
        assert left.e_score_correction_bias.any()
        assert left.e_score_correction_bias.equal(right.e_score_correction_bias)
    for name, value in seen[0][2].named_parameters():
        torch.testing.assert_close(seen[1][2].get_parameter(name), value, rtol=1e-5, atol=1e-7, msg=name)


def test_copies_of_a_compiled_layer_are_not_compiled():
    model, ids = compass_model(**FULL).eval(), token_ids(1, 5)
    compile_layers(model)
    twin = copy.deepcopy(model)
    expected = twin(ids, use_cache=False).logits
    assert not counters["stats"]
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1
    assert model.state_dict().keys() == compass_model(**FULL).state_dict().keys()

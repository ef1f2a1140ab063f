"""Compiled decoder layers: one graph serves all layers and all lengths, nothing breaks it, and numbers stay the same.

The graphs are those that `torch.compile` traces; they run as they are (`aot_eager`), without code being generated.
"""

from functools import partial
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from helpers import history, lora, make_pairs, options
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from otpo import OTPOTrainer
from otpo.layouts.compiled import compile_by_default, compile_layers, why_not_compile


@pytest.fixture
def traced(monkeypatch):
    """The option traces without generating code."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr("otpo.layouts.models.compile_layers", partial(compile_layers, backend="aot_eager"))


def losses(folder: Any, tmp_path: Any, **changes: Any) -> list[float]:
    """Of six steps and an evaluation, each batch of another length."""
    adapter = {"peft_config": lora(init_lora_weights=False)} if changes.pop("lora", False) else {}
    torch.manual_seed(0)
    args = options(tmp_path, **{"max_steps": 6, "learning_rate": 1e-3, "row_layout": "shared_prompt", **changes})
    data = {"train_dataset": make_pairs(24), "eval_dataset": make_pairs(6, 3)}
    trainer = OTPOTrainer(folder, args=args, **data, **adapter)
    trainer.train()
    return [loss for (loss,) in history(trainer, "loss")] + [trainer.evaluate()["eval_loss"]]


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "packed": {"row_layout": "packed"},
    "adapters": {"lora": True},
    "an earlier layer": {"weighting": "contrast", "hidden_layer": 1},  # the layer that it enters is left as it is
}


@pytest.mark.parametrize("name", CASES)
def test_one_graph_for_all_layers_and_lengths(name, model_folder, tmp_path, traced):
    expected = losses(model_folder, tmp_path, **CASES[name])
    found = losses(model_folder, tmp_path, compile_layers=True, **CASES[name])
    assert found == pytest.approx(expected, rel=1e-6)
    assert not counters["graph_break"]
    # Of the policy in training and in evaluation, and of the reference. Layers that are run again for their gradients,
    # and a first layer whose input needs none, are graphs of their own.
    more = {"checkpointing": 1, "adapters": 2}
    assert counters["stats"]["unique_graphs"] <= 3 + more.get(name, 0)


@pytest.mark.lengthy
@pytest.mark.parametrize("checkpointing", [False, True])
def test_experts_of_compass_are_compiled_where_asked(checkpointing, compass_folder, tmp_path, traced):
    """Its layers keep what transformers records out of the graph; the routers' loss is on."""
    changes = {"row_layout": "padded", "gradient_checkpointing": checkpointing, "max_steps": 3}
    changes["model_init_kwargs"] = {"output_router_logits": True, "dtype": "float32"}
    expected = losses(str(compass_folder), tmp_path, **changes)
    found = losses(str(compass_folder), tmp_path, compile_layers=True, **changes)
    assert found == pytest.approx(expected, rel=1e-6)
    assert not counters["graph_break"]
    # As for a dense model, and two more for batches whose size happens to be a width of this tiny model. Checkpointing
    # has embeddings require gradients, so that in evaluations a first layer is a graph of its own, for two such sizes.
    assert 1 <= counters["stats"]["unique_graphs"] <= (7 if checkpointing else 5)


@pytest.mark.lengthy
def test_the_option_compiles(model_folder, tmp_path):
    """With code that is generated, for the CPU."""
    torch._dynamo.reset()
    counters.clear()
    expected = losses(model_folder, tmp_path, max_steps=2)
    found = losses(model_folder, tmp_path, max_steps=2, compile_layers=True)
    assert found == pytest.approx(expected, rel=1e-4)
    assert counters["stats"]["unique_graphs"] >= 2


def test_what_is_not_compiled(model_folder, moe_folder, compass_folder, tmp_path):
    dense, experts = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model_folder, moe_folder))
    whole = DistributedType.NO
    assert why_not_compile(dense, whole) is None
    assert "records what routers return" in str(why_not_compile(experts, whole))
    compass = AutoModelForCausalLM.from_pretrained(compass_folder)
    assert why_not_compile(compass, whole) is None
    compass.set_experts_implementation("eager")
    assert "set grouped_mm or memcpy" in str(why_not_compile(compass, whole))
    assert "gathers parameters" in str(why_not_compile(dense, DistributedType.FSDP))
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert compile_by_default(dense, gpu, 300)
    assert not compile_by_default(dense, gpu, 299)
    assert not compile_by_default(dense, cpu, 300)
    assert not compile_by_default(experts, gpu, 300)
    assert not compile_by_default(compass, gpu, 300)
    trainer = OTPOTrainer(moe_folder, args=options(tmp_path, compile_layers=True), train_dataset=make_pairs(8))
    trainer.train()
    assert all(layer._compiled_call_impl is None for layer in trainer.model.base_model.layers)

"""ZeRO-3 gathers whole layers, and trains as TRL's trainer does: two processes on the CPU with DeepSpeed's engine."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from cli_helpers import python, two_processes
from deepspeed.utils import set_z3_leaf_module, z3_leaf_module
from transformers import AutoModelForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from zero3_worker import CASES

from otpo.training.whole_layers import gather_whole_layers

LAYERS = 2
# Layers of policy and reference that are gathered whole. Adapters and stored log-probabilities need no other model.
WHOLE = {"adapter": (0, 0), "frozen": (0, LAYERS), "precomputed": (LAYERS, 0)}


def test_losses_are_trl_s(model_folder, tmp_path):
    """All cases in one start of the processes, which takes longer than training in them."""
    ended = python(*two_processes("zero3_worker.py"), str(model_folder), str(tmp_path), TRITON_INTERPRET="0")
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for name in CASES:
        trl, otpo = found[name]["trl"], found[name]["otpo"]
        assert otpo["losses"] == pytest.approx(trl["losses"], rel=2e-5), name
        assert len(set(otpo["losses"])) > 1, name
        assert trl["leaves"] == [0, 0], name
        assert tuple(otpo["leaves"]) == WHOLE.get(name, (LAYERS, LAYERS)), name
    assert "was frozen after the trainer was made" in found["frozen"]["late"]


def test_layers_of_experts_and_frozen_or_shared_ones_keep_their_hooks(model_folder, moe_folder):
    dense, experts = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model_folder, moe_folder))
    assert gather_whole_layers(experts, trained=False) == 0
    assert gather_whole_layers(dense, trained=True) == LAYERS
    dense.base_model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    assert gather_whole_layers(dense, trained=True) == 0
    assert gather_whole_layers(dense, trained=False) == LAYERS
    # A trainer's marks are gone with the next one's decision, a user's stay.
    dense.requires_grad_(True)
    layers = dense.base_model.layers
    assert gather_whole_layers(dense, trained=True) == LAYERS and all(map(z3_leaf_module, layers))
    layers[1].mlp = layers[0].mlp  # shared
    set_z3_leaf_module(dense.lm_head, True)
    assert gather_whole_layers(dense, trained=True) == 0
    assert not any(map(z3_leaf_module, layers)) and z3_leaf_module(dense.lm_head)


def test_layers_of_others_and_models_without_a_list_keep_their_hooks(model_folder):
    class Remote(Qwen3DecoderLayer):
        pass

    dense: Any = AutoModelForCausalLM.from_pretrained(model_folder)
    dense.base_model.layers[1].__class__ = Remote
    assert gather_whole_layers(dense, trained=False) == 0
    encoder = SimpleNamespace(get_decoder=lambda: SimpleNamespace(h=[]))
    assert (
        gather_whole_layers(
            SimpleNamespace(base_model=encoder, config=dense.config, named_modules=list), trained=False
        )
        == 0
    )

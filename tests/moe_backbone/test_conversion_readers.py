"""What other readers of an exported model look for, by the sources that were read; nothing of theirs runs here."""

import pytest
from compass_helpers import compass_model
from conversion_helpers import exported
from safetensors import safe_open


@pytest.mark.parametrize("tied", [False, True])
def test_each_key_is_one_that_vllms_loader_maps(tmp_path, tied):
    """Its `qwen3_moe.py` joins q, k and v, and gate and up of an expert, by these names, and takes others as is."""
    model = compass_model(tie_word_embeddings=tied, num_mtp_layers=1)
    model.save_pretrained(tmp_path / "compass")
    exported(tmp_path / "compass", tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    of_layer = [f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    of_layer += ["input_layernorm", "post_attention_layernorm", "mlp.gate"]
    of_layer += [
        f"mlp.experts.{expert}.{part}" for expert in range(5) for part in ("gate_proj", "up_proj", "down_proj")
    ]
    layers = range(model.config.num_hidden_layers)
    wanted = {f"model.layers.{layer}.{part}.weight" for layer in layers for part in of_layer}
    wanted |= {"model.embed_tokens.weight", "model.norm.weight"} | (set() if tied else {"lm_head.weight"})
    assert keys == wanted

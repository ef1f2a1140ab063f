"""Checkpoints that carry their code, loaded where no package of ours can be imported."""

import json
import os
import subprocess
import sys

import pytest
import torch
from cli_helpers import ROOT
from compass_helpers import compass_config, compass_model, token_ids
from transformers import AutoModelForCausalLM

from moe_backbone import CompassConfig, CompassForCausalLM, CompassForSequenceClassification, save_code
from moe_backbone.model.saved_code import AUTO_MAP

FULL = {"num_mtp_layers": 1, "num_shared_experts": 1, "router_bias_update_speed": 1e-3}
ELSEWHERE = """
import json, sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("moe_backbone", "otpo", "otpo_kernels"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Nothing())
import torch
import transformers

ids, found = torch.tensor(json.loads(sys.argv[3])), {}
for name in sys.argv[2].split(","):
    model, info = getattr(transformers, name).from_pretrained(
        sys.argv[1], trust_remote_code=True, output_loading_info=True
    )
    model.eval()
    found[name] = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys")}
    with torch.no_grad():
        found[name]["output"] = model(ids)[0].flatten().tolist()
    if name == "AutoModel":
        model.save_pretrained(sys.argv[1] + "-decoder")
    if name == "AutoModelForCausalLM":
        options = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "use_mtp": True}
        found["drafted"] = model.generate(ids[:1], **options).tolist()
        model.save_pretrained(sys.argv[1] + "-again")
print(json.dumps(found))
"""


def elsewhere(folder, autos, ids, cache):
    """What Auto classes find in a process of its own, without our packages."""
    ours = (str(ROOT), str(ROOT / "kernels"))
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ours]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_MODULES_CACHE": str(cache)}
    command = [sys.executable, "-c", ELSEWHERE, str(folder), ",".join(autos), json.dumps(ids.tolist())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=cache.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.lengthy
def test_a_checkpoint_with_its_code_loads_elsewhere(tmp_path):
    model, ids = compass_model(pad_token_id=0, **FULL).eval(), token_ids(2, 9)
    model.save_pretrained(tmp_path / "model")
    save_code(tmp_path / "model")
    autos = [name for name in AUTO_MAP if name != "AutoConfig"]
    found = elsewhere(tmp_path / "model", autos, ids, tmp_path / "cache")
    with torch.no_grad():
        assert found["AutoModelForCausalLM"]["output"] == model(ids).logits.flatten().tolist()
        assert found["AutoModel"]["output"] == model.model(ids).last_hidden_state.flatten().tolist()
    assert found["AutoModelForCausalLM"]["missing_keys"] == found["AutoModelForCausalLM"]["unexpected_keys"] == []
    for name in autos[1:]:  # but for their heads they have all weights
        assert all(key.startswith(("score", "qa_outputs")) for key in found[name]["missing_keys"])
    options = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    assert found["drafted"] == model.generate(ids[:1], **options).tolist()
    again = elsewhere(tmp_path / "model-again", ["AutoModelForCausalLM"], ids, tmp_path / "cache")
    assert again["AutoModelForCausalLM"] == found["AutoModelForCausalLM"]
    decoder = elsewhere(tmp_path / "model-decoder", autos, ids, tmp_path / "cache")
    assert decoder["AutoModel"]["output"] == found["AutoModel"]["output"]


@pytest.mark.lengthy
def test_a_head_with_its_code_loads_elsewhere(tmp_path):
    model = compass_model(model_class=CompassForSequenceClassification, num_labels=3, pad_token_id=0, **FULL).eval()
    model.save_pretrained(tmp_path / "model")
    save_code(tmp_path / "model")
    name, ids = "AutoModelForSequenceClassification", token_ids(2, 9)
    found = elsewhere(tmp_path / "model", [name], ids, tmp_path / "cache")[name]
    with torch.no_grad():
        assert found == {"missing_keys": [], "unexpected_keys": [], "output": model(ids).logits.flatten().tolist()}


@pytest.mark.lengthy
def test_transformers_own_registration_saves_code_too(tmp_path, monkeypatch):
    monkeypatch.setattr(CompassConfig, "_auto_class", None)
    monkeypatch.setattr(CompassForCausalLM, "_auto_class", None)
    CompassConfig.register_for_auto_class()
    CompassForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    model, ids = compass_model(**FULL).eval(), token_ids(2, 9)
    model.save_pretrained(tmp_path / "model")
    stored = json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"]
    assert stored == {name: AUTO_MAP[name] for name in ("AutoConfig", "AutoModelForCausalLM")}
    assert compass_config().auto_map == {}  # of another model
    found = elsewhere(tmp_path / "model", ["AutoModelForCausalLM"], ids, tmp_path / "cache")
    with torch.no_grad():
        assert found["AutoModelForCausalLM"]["output"] == model(ids).logits.flatten().tolist()


def test_what_is_saved_without_code_names_none(tmp_path):
    compass_model().save_pretrained(tmp_path / "with")
    save_code(tmp_path / "with")
    here = AutoModelForCausalLM.from_pretrained(tmp_path / "with")
    assert type(here) is CompassForCausalLM and here.config.auto_map == {}
    here.save_pretrained(tmp_path / "without")
    assert "auto_map" not in json.loads((tmp_path / "without" / "config.json").read_text())
    assert not list((tmp_path / "without").glob("*.py"))
    of_the_hub = CompassConfig(auto_map={"AutoConfig": "owner/model--configuration_compass.CompassConfig"})
    assert of_the_hub.to_dict()["auto_map"] == of_the_hub.auto_map != {}


@pytest.mark.parametrize("config", [None, {"model_type": "qwen3_moe"}])
def test_code_stands_beside_compass_alone(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"holds (no config.json|qwen3_moe). Name the folder of a whole model"):
        save_code(tmp_path)
    assert not list(tmp_path.glob("*.py"))

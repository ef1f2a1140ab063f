"""The short examples run as they are typed, on random models."""

import importlib
import re

import pytest
from cli_helpers import ROOT
from safetensors.torch import load_file
from transformers import Qwen3MoeForCausalLM

pytestmark = pytest.mark.usefixtures("own_process")
SHORT = ("quickstart", "own_weighting", "inspect_weights", "memcpy_on_qwen3_moe", "export_and_serve", "iterate")


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Imports an example of a name, in a folder of its own."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(tmp_path)
    return importlib.import_module


@pytest.mark.parametrize("name", SHORT)
def test_it_is_short_and_says_how_it_is_run(name):
    text = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 40
    assert re.search(rf"^ *python examples/{name}\.py ", text, re.MULTILINE)
    assert f"(examples/{name}.py)" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.lengthy
def test_quickstart(example, model_folder, tmp_path, capsys):
    example("quickstart").main(model_folder, "run")
    assert "right answer preferred: " in capsys.readouterr().out
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (model_folder, tmp_path / "run"))
    assert before.keys() == after.keys()
    assert any(not before[name].equal(after[name]) for name in before)


@pytest.mark.lengthy
def test_own_weighting(example, model_folder, capsys):
    example("own_weighting").main(model_folder, "run")
    lines = [line for line in capsys.readouterr().out.splitlines() if "mean loss" in line]
    assert [line.split(",")[0] for line in lines] == ["OTPOTrainer", "LastTokensTrainer"]
    assert all(float(line.split()[-1]) > 0 for line in lines)


def test_inspect_weights(example, model_folder, tmp_path, capsys):
    example("inspect_weights").main(model_folder, "weights.html")
    told = capsys.readouterr().out
    assert "row 0: " in told and "row 3: " in told
    assert told.count("otpo  contrast      diff") == 4
    page = (tmp_path / "weights.html").read_text(encoding="utf-8")
    assert model_folder in page and "contrast" in page


def test_memcpy(example, moe_folder, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # as a user has it
    example("memcpy_on_qwen3_moe").main(moe_folder)
    (other, loss), (name, same) = (line.split()[0:3:2] for line in capsys.readouterr().out.splitlines())
    assert (other, name) == ("grouped_mm", "memcpy")
    assert float(same) == pytest.approx(float(loss), abs=2e-5)


def test_export_and_serve(example, compass_folder, tmp_path, capsys):
    example("export_and_serve").main(compass_folder, "served")
    told = capsys.readouterr().out
    assert "Qwen3MoeForCausalLM answers '" in told and "vllm serve served" in told
    assert Qwen3MoeForCausalLM.from_pretrained(tmp_path / "served").config.num_experts == 4
    with pytest.raises(SystemExit):  # the folder is there
        example("export_and_serve").main(compass_folder, "served")

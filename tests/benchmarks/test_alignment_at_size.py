"""`benchmarks.alignment_at_size`: its counts beside real models, its arithmetic by hand, and one tiny training."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks import alignment_at_size
from benchmarks.harness import read_rows
from benchmarks.sized_alignment.sizes import (
    LAYERS,
    LORA_RANK,
    Case,
    bytes_of,
    config_of,
    count,
    fitting_layers,
    peak_of,
)
from benchmarks.sized_alignment.yardsticks import arithmetic, plan_lines

CASE = Case("lora", LAYERS, gpus=2, pairs=8, prompt=512, response=512, tiny=False)
H100 = 79.1 * 2**30
RESULTS = Path(alignment_at_size.__file__).parent / "results"


@pytest.mark.parametrize("tiny", [True, False])
def test_parameters_are_those_of_the_model(tiny):
    counted = count(tiny)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(2, tiny))
    sizes = {name: p.numel() for name, p in model.named_parameters() if "norm" not in name}
    assert sum(size for name, size in sizes.items() if ".experts." in name) == 2 * counted.experts
    ends = sum(size for name, size in sizes.items() if "embed" in name or "lm_head" in name)
    assert ends == counted.ends and sum(sizes.values()) == 2 * (counted.experts + counted.rest) + counted.ends
    if not tiny:
        assert round((LAYERS * (counted.experts + counted.rest) + counted.ends) / 1e9, 1) == 30.5


def test_adapters_are_those_of_peft():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(1, True))
        targets = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
        targets["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        adapted = get_peft_model(model, LoraConfig(r=LORA_RANK, lora_dropout=0.0, **targets))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == count(True).adapters


def test_what_fits_is_counted():
    assert CASE.tokens == 2 * 8 * 2 * 1024 == 32_768
    parts = bytes_of(CASE)
    # A half of the experts and adapters is kept.
    assert round(parts["made"] / 1e9) == 64 and round(parts["weights"] / 1e9) == 33
    assert fitting_layers(CASE, H100) == LAYERS
    full = CASE._replace(adapter="full")
    most = fitting_layers(full, H100)
    assert 6 <= most <= 12
    assert fitting_layers(full, 141e9) > most > fitting_layers(full, 40e9) and fitting_layers(full, 4e9) == 0
    assert fitting_layers(full._replace(gpus=8), H100) > 3 * most
    assert set(bytes_of(full)) == {"made", "weights", "reference", "states", "backward", "update"}


def test_what_a_gpu_holds_by_hand():
    """An update copies the gradients of all experts of a GPU, and takes more than a backward."""
    counted, case = count(), CASE._replace(adapter="full", layers=9)
    parts = bytes_of(case)
    spread, others = 9 * counted.experts / 2, (9 * counted.rest + counted.ends) / 2
    assert spread + 2 * others == pytest.approx(3_512_508_672, rel=1e-4)  # `trained_here` of that run, with norms
    assert parts["weights"] == parts["reference"] == 2 * (spread + 2 * others)
    assert parts["states"] == 12 * (spread + others) and parts["update"] == 8 * spread + 2 * others
    assert parts["backward"] < parts["update"] < bytes_of(case._replace(layers=19))["update"] / 2
    assert peak_of(case) == sum(parts.values()) - parts["made"] - parts["backward"]


def test_the_layers_that_are_chosen_are_the_most_that_fit_and_half_of_them(monkeypatch):
    monkeypatch.setattr(alignment_at_size, "memory_of_gpu", lambda: 140 * 2**30)
    args = alignment_at_size.parse(["--tiny", "--gpus", "2"])
    args.tiny = False
    found = [(case.adapter, case.layers) for case in alignment_at_size.chosen_cases(args)]
    most = fitting_layers(CASE._replace(adapter="full"), 140 * 2**30)
    assert found == [("lora", LAYERS), ("full", most), ("full", most // 2)] and 9 < most < 19


def test_what_is_counted_is_near_what_a_run_took():
    """The counts of the committed run are of its day; those of today are beside its peaks."""
    rows = {(row["adapter"], row["layers"]): row for row in read_rows(RESULTS / "alignment_at_size_h200_x2.csv")}
    full = CASE._replace(adapter="full")
    took = float(rows["full", "9"]["peak_gib"])
    assert peak_of(full._replace(layers=9)) / 2**30 == pytest.approx(took, rel=0.1)
    assert "OutOfMemoryError" in rows["full", "19"]["status"] and fitting_layers(full, 140 * 2**30) < 19
    assert peak_of(CASE) / 2**30 == pytest.approx(float(rows["lora", "48"]["made_gib"]), rel=0.01)
    parts = bytes_of(CASE)
    trained = sum(parts[name] for name in ("weights", "reference", "states", "backward")) / 2**30
    assert trained == pytest.approx(float(rows["lora", "48"]["peak_gib"]), rel=0.1)


def row(layers, seconds, **changes):
    return {"layers": layers, "s_per_step": seconds, "gpus": 2, "tokens_per_step": 32_768, **changes}


def test_the_arithmetic_by_hand():
    lines = arithmetic([row(8, 1.0), row(4, 0.6)])
    assert lines[0] == "a layer takes (1.000 - 0.600) / (8 - 4) = 0.1000 s, all else 1.000 - 8 x 0.1000 = 0.200 s"
    assert "(1.000 - 0.200) x 48 / 8 + 0.200 = 5.000 s a step of 32,768 tokens on 2 GPUs" in lines[1]
    assert "13 s on 8 GPUs" in lines[2] and "not scaled" in lines[2]
    assert "16,384 tokens a GPU; ours has 16,384: 5.000 x 1 = 5.000 s" in lines[3]
    half = arithmetic([row("48", "3.5", tokens_per_step="16384")])
    assert half[0].startswith("48 layers were measured: 3.500 s") and "3.500 x 2 = 7.000 s" in half[2]
    alone = arithmetic([row(8, 1.0)])
    assert "a second number of them" in alone[0] and "1.000 x 48 / 8 = 6.000 s at most a step" in alone[1]
    assert "not scaled" in alone[2] and "6.000 x 1 = 6.000 s at most, were 8 GPUs" in alone[3]
    assert "at most" not in "".join(lines + half)
    assert arithmetic([row(8, 0.5), row(4, 0.6)]) == ["8 layers took no longer than 4, so nothing is scaled"]


def test_the_plan_of_the_whole_model():
    first, second = plan_lines(CASE)
    assert "48 layers, every weight, 8 h100 with expert parallelism of 8" in first and "16 rows of 1024" in first
    assert "GiB a GPU" in first and "reference" in second


@pytest.mark.lengthy
def test_a_tiny_training(tmp_path, capsys):
    sizes = ["--tiny", "--pairs", "1", "--prompt", "5", "--response", "6", "--warmup", "1", "--steps", "1"]
    output = tmp_path / "rows.csv"
    code = alignment_at_size.main([*sizes, "--adapters", "lora", "--layers", "1", "--output", str(output)])
    (found,) = read_rows(output)
    assert code == 0 and found["status"] == "ok" and set(alignment_at_size.COLUMNS) <= set(found)
    assert found["tokens_per_step"] == "44" and float(found["first_loss"]) == pytest.approx(0.6931, abs=1e-3)
    assert float(found["s_per_step"]) > 0 and 0 <= float(found["idle_share"]) < 1
    assert int(found["trained_here"]) < count(True).adapters  # a half of the experts' adapters
    assert "a second number of them" in capsys.readouterr().out


def test_a_training_that_fails_says_why(tmp_path, monkeypatch, capsys):
    log = tmp_path / "log"
    log.write_text("Traceback\ntorch.OutOfMemoryError: CUDA out of memory\nraise ChildFailedError(\n")
    assert alignment_at_size.reason_of(log) == "torch.OutOfMemoryError: CUDA out of memory"
    # Torch's message is longer than what a row keeps, and each process prints its number before it.
    message = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 21.4 GiB. " + 40 * "Of the memory "
    log.write_text(f"Traceback\n[rank1]: {message}\ntorch.multiprocessing.errors.ChildFailedError:\n")
    assert alignment_at_size.reason_of(log) == message[:300]
    log.write_text("loading\nKilled\n")
    assert alignment_at_size.reason_of(log) == "Killed"
    monkeypatch.setattr(alignment_at_size, "measure", lambda *_: {"status": "failed: out of memory"})
    output = tmp_path / "rows.csv"
    assert alignment_at_size.main(["--tiny", "--adapters", "full", "--output", str(output)]) == 1
    assert [r["status"] for r in read_rows(output)] == ["failed: out of memory"] * 2
    assert "full, 2 layers, 2 GPUs: failed: out of memory" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--steps", "0"], ["--layers", "0"], ["--response", "1"]])
def test_what_means_nothing_is_refused(wrong):
    with pytest.raises(SystemExit):
        alignment_at_size.main(["--tiny", *wrong])

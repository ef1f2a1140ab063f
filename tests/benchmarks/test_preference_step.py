import io
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks import harness
from benchmarks.kernel_trace import busy_time
from benchmarks.preference_step import agreement, cases, report
from benchmarks.preference_step.__main__ import main
from benchmarks.preference_step.agreement import EXACT, Step, WrongResult

ROOT = Path(__file__).parents[2]
OTHER_BETA = "otpo-other-beta"
ONE_CASE = ["--shapes", "qwen3-1.7b", "--adapters", "full", "--checkpointing", "yes"]
SHORT = ["--tiny", "--steps", "2", "--warmup", "1", "--profiled", "1", "--pairs", "2"]


@pytest.fixture
def other_beta(monkeypatch):
    """One contender more, whose loss is another one."""
    monkeypatch.setitem(cases.CONTENDERS, OTHER_BETA, cases.Contender(options={"beta": 0.3}))


def run(path, *arguments):
    code = main([*SHORT, *arguments, "--output", str(path)])
    return code, {(row["lengths"], row["contender"]): row for row in harness.read_rows(path)}


def test_only_who_agrees_gets_a_time(other_beta, tmp_path, capsys):
    path = tmp_path / "steps.csv"
    contenders = ["--contenders", cases.TRL, cases.PADDED, OTHER_BETA]
    code, rows = run(path, *ONE_CASE, "--lengths", "ragged", *contenders, "--profile", cases.PADDED)
    trl, ours, wrong = (rows["ragged", name] for name in contenders[1:])
    assert code == 1
    # What is right has every number that the CPU can give, and agrees to the last bit in this layout.
    for row in (trl, ours):
        assert row["status"] == "ok" and float(row["loss_error"]) == float(row["parameter_error"]) == 0
        assert float(row["ms"]) > 0 and len(row["step_ms"].split()) == 2 and 0 < float(row["idle_share"]) < 1
        assert float(row["first_step_s"]) > 0 and row["mfu"] == row["peak_mib"] == ""
    assert trl["real_tokens"] == ours["real_tokens"] and abs(float(trl["loss"]) - math.log(2)) > 1e-3
    # What is wrong has numbers that say so, and no time.
    assert wrong["status"].startswith("wrong: the loss is off by") and "the gradient's norm is off" in wrong["status"]
    assert float(wrong["loss_error"]) > 1e-5 and wrong["ms"] == wrong["tokens_per_s"] == wrong["step_ms"] == ""
    printed = capsys.readouterr().out
    assert "no time (1 rows)" in printed and "first step" in printed
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    profiled = (tmp_path / f"steps_qwen3-1.7b_ragged_full_single_{cases.PADDED}_checkpointing.txt").read_text()
    assert len(profiled.splitlines()) == 13 and "aten::mm" in profiled
    # Another comparison of the file stays, the same one is replaced.
    code, more = run(path, *ONE_CASE, "--lengths", "full", "--contenders", cases.PADDED)
    assert code == 0 and more["full", cases.PADDED]["speedup"] == ""  # TRL was compared with, and not timed
    assert {key: more[key] for key in rows} == rows
    _, again = run(path, *ONE_CASE, "--lengths", "ragged", "--contenders", cases.TRL)
    assert again.keys() == {("ragged", cases.TRL), ("full", cases.PADDED)}


@pytest.mark.parametrize("shape", ["compass-small", "qwen3-30b-a3b-4-layers"])
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_experts_and_adapters(shape, adapter, tmp_path):
    arguments = ["--shapes", shape, "--adapters", adapter, "--checkpointing", "no", "--lengths", "ragged"]
    code, rows = run(tmp_path / "steps.csv", *arguments, "--contenders", cases.TRL, cases.PADDED)
    assert code == 0 and len(rows) == 2


def test_nobody_is_timed_where_trl_does_not_run(monkeypatch, tmp_path):
    monkeypatch.setitem(cases.CONTENDERS, cases.TRL, cases.Contender(is_trl=True, options={"beta": "no number"}))
    code, rows = run(tmp_path / "steps.csv", *ONE_CASE, "--lengths", "full", "--contenders", cases.TRL, cases.PADDED)
    trl, ours = (rows["full", name]["status"] for name in (cases.TRL, cases.PADDED))
    assert code == 1 and trl.startswith("TypeError") and ours == f"nothing to compare with, trl: {trl}"


@pytest.mark.lengthy
def test_two_processes_agree(tmp_path):
    path = tmp_path / "steps.csv"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "localhost:0", "-m", "benchmarks.preference_step", *SHORT, *ONE_CASE]
    command += ["--lengths", "ragged", "--engine", "ddp", "--contenders", cases.TRL, cases.PADDED]
    command += ["--output", str(path)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("first step") == 2  # of two contenders, by one process
    rows = harness.read_rows(path)
    assert [row["status"] for row in rows] == ["ok", "ok"] and rows[0]["gpus"] == "2"
    assert float(rows[1]["parameter_error"]) < 1e-5


def step(loss=0.7, **gradients):
    return Step(loss, {name: torch.tensor(values) for name, values in gradients.items()}, 0.0)


def test_differences_are_of_each_parameter():
    expected = step(a=[3.0, 4.0], b=[0.0, 12.0], tiny=[1e-5, 0.0])
    # A gradient of under a thousandth of the whole is not looked at alone.
    found = agreement.differences(step(0.7007, a=[3.0, 4.0], b=[0.0, 12.0], tiny=[-1e-5, 0.0]), expected, CPU)
    assert found["loss_error"] == pytest.approx(1e-3) and found["cosine"] == pytest.approx(1)
    # Turned by a right angle, of the same length: the norm of all is the same.
    turned = agreement.differences(step(a=[-4.0, 3.0], b=[0.0, 12.0], tiny=[1e-5, 0.0]), expected, CPU)
    assert turned["worst_parameter"] == "a" and turned["cosine"] == pytest.approx(0)
    assert turned["parameter_error"] == pytest.approx(math.sqrt(2)) and turned["norm_error"] == pytest.approx(0)
    with pytest.raises(WrongResult, match=r"cosine is 0.0000 \(a\)"):
        agreement.require_agreement(turned, HALF)
    # Three times as long, in the same direction.
    longer = agreement.differences(step(a=[9.0, 12.0], b=[0.0, 36.0], tiny=[3e-5, 0.0]), expected, CPU)
    assert longer["norm_error"] == pytest.approx(2)
    with pytest.raises(WrongResult, match=r"gradient's norm is off by 2.0e\+00$"):
        agreement.require_agreement(longer, HALF)


CPU = torch.device("cpu")


def test_gradients_that_cannot_be_compared():
    expected = step(a=[1.0], b=[1.0])
    with pytest.raises(WrongResult, match="1 parameters have a gradient on one side alone, b first"):
        agreement.differences(step(a=[1.0]), expected, CPU)
    with pytest.raises(WrongResult, match="norm nan"):
        agreement.differences(step(a=[1.0], b=[math.nan]), expected, CPU)


HALF = agreement.gate_of({"loss_error": 0.04, "norm_error": 0.001, "cosine": 0.97})


def test_gates_in_half_precision_are_trls_own_errors():
    assert (3 * 0.04, 5e-2, math.inf, 0.96) == HALF
    assert agreement.gate_of({"loss_error": 0.0, "norm_error": 0.1, "cosine": 1.0}) == pytest.approx(
        (5e-2, 0.3, math.inf, 0.99)
    )
    assert agreement.gate_of(None) is EXACT


@pytest.mark.parametrize(("gate", "error", "passes"), [
    (EXACT, 0.9e-5, True), (EXACT, 1.1e-5, False), (HALF, 0.11, True), (HALF, 0.13, False),
    (HALF, math.nan, False),
])  # fmt: skip
def test_gates(gate, error, passes):
    found = {"loss_error": error, "norm_error": 0.0, "parameter_error": 0.0, "cosine": 1.0, "worst_parameter": "a"}
    if passes:
        agreement.require_agreement(found, gate)
    else:
        with pytest.raises(WrongResult, match="the loss is off"):
            agreement.require_agreement(found, gate)


def test_pairs_have_the_lengths_that_are_told():
    """Tokens as TRL makes them: a word each, and the end of a response."""
    data = cases.make_pairs("ragged", 400, tiny=False)
    assert data.to_list() == cases.make_pairs("ragged", 400, tiny=False).to_list()
    sizes = {name: sorted(len(text.split()) for text in data[name]) for name in ("prompt", "chosen", "rejected")}
    assert sizes["prompt"][0] >= 32 and sizes["prompt"][-1] <= 512 and 250 < sizes["prompt"][200] < 295
    for side in ("chosen", "rejected"):
        assert sizes[side][-1] <= 510 and 165 < sizes[side][200] < 210
    ids = {"prompt_ids": [[0] * 242] * 16, "chosen_ids": [[0] * 769] * 16, "rejected_ids": [[0] * 769] * 16}
    assert cases.real_tokens(ids, 8) == [16 * 1011, 16 * 1011]
    full = cases.make_pairs("full", 1, tiny=False)[0]
    assert [len(full[name].split()) for name in sizes] == [242, 768, 768]


def test_active_parameters_are_those_that_a_token_meets():
    d, heads, kv, size, vocabulary, layers = 32, 4 * 8, 2 * 8, 64, cases.TINY["vocab_size"], 2
    attention = 2 * d * heads + 2 * d * kv + 2 * 8 + 2 * d  # with the norms of heads and of the layer
    counts = {shape: cases.active_parameters(cases.make_model(cases.make_config(shape, tiny=True), CPU))
              for shape in cases.SHAPES}  # fmt: skip
    dense = layers * (attention + 3 * d * size) + d
    assert counts["qwen3-1.7b"] == dense + vocabulary * d  # one matrix for embeddings and head
    experts = layers * (attention + 4 * d + 2 * 3 * d * 16) + d  # two of four
    assert counts["qwen3-30b-a3b-4-layers"] == experts + vocabulary * d  # the head, and not the embeddings
    with torch.device("meta"):
        whole = cases.AutoModelForCausalLM.from_config(cases.make_config("qwen3-1.7b", tiny=False))
    assert cases.active_parameters(whole) == pytest.approx(1.72e9, rel=2e-3)


def test_time_with_a_kernel_counts_overlaps_once():
    events = [{"ts": 10, "dur": 5}, {"ts": 0, "dur": 4}, {"ts": 12, "dur": 1}, {"ts": 14, "dur": 4}]
    assert busy_time(events) == 4 + 8


def made_up(contender, ms, **changes):
    row = dict.fromkeys(report.COLUMNS, "") | {"shape": "qwen3-1.7b", "lengths": "full", "adapter": "full"}
    row |= {"checkpointing": "yes", "engine": "single", "gpus": 1, "pairs": 8, "contender": contender}
    row |= {"status": "ok", "ms": ms, "tokens_per_s": 1e5 / ms, "speedup": round(800 / ms, 2), "peak_mib": 2048}
    return row | changes


def test_what_is_quoted():
    rows = [made_up(cases.TRL, 800), made_up(cases.PADDED, 806), made_up("otpo-packed", 400)]
    rows += [made_up(cases.PADDED, 5, lengths="ragged", status="wrong: x"), made_up(cases.TRL, 5, lengths="ragged")]
    assert report.overhead(rows) == "+0.75% (full rows)"
    assert report.overhead([*rows, made_up(cases.AGAIN, 804)]) == "+0.50% (full rows)"
    assert report.overhead(rows[:1]) == report.markdown([]) == report.markdown(rows[:1]) == "not measured"
    table = report.markdown(rows).splitlines()
    assert table[0] == "| model | rows and training | TRL, ms | `otpo-padded` | `otpo-packed` |"
    assert table[2] == "| qwen3-1.7b | full rows, every weight, checkpointing | 800 | 0.99 | 2.0 |"


@pytest.mark.parametrize(("packed", "memory", "met"), [(600, 2048, ["yes", "yes"]), (700, 2049, ["NO", "NO"])])
def test_verdict(packed, memory, met):
    rows = [made_up(cases.TRL, 800), made_up("otpo-packed", packed, peak_mib=memory)]
    console = Console(width=200, file=io.StringIO())
    report.verdict(rows, console)
    lines = console.file.getvalue().splitlines()
    assert [line.split("│")[-2].strip() for line in lines if "qwen3" in line] == met


@pytest.mark.parametrize("status", ["ok", "out of memory"])
def test_any_part_of_a_run_is_drawn(status, tmp_path):
    path = tmp_path / "steps.csv"
    numbers = {} if status == "ok" else dict.fromkeys(("ms", "tokens_per_s", "speedup", "peak_mib"), "")
    machine = {"gpu": "none", "torch": "2", "transformers": "5", "trl": "1", "date": "2026-01-01"}
    some, everyone = [[], ["compass-small"], list(cases.SHAPES)], [[cases.TRL], cases.CONTENDERS]
    for shapes, names in itertools.product(some, everyone):
        of_all = itertools.product(shapes, names)
        rows = [made_up(name, 5, shape=shape, status=status) | numbers | machine for shape, name in of_all]
        harness.write_rows(path, rows, (*report.COLUMNS, *machine))
        report.verdict(harness.read_rows(path), Console(quiet=True))
        assert report.draw(path).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("arguments", [["--warmup", "0"], ["--profile", "otpo", "--contenders", "trl"]], ids=str)
def test_what_cannot_be_run_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--tiny", *arguments])
    assert ended.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_an_engine_starts_by_its_configuration(monkeypatch):
    started = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(
        "subprocess.run", lambda command, check: started.append(command) or SimpleNamespace(returncode=7)
    )
    assert main(["--tiny", "--engine", "zero3", "--gpus", "4"]) == 7
    words = started[0]
    config = Path(words[words.index("--config_file") + 1])
    assert config.name == "zero3.yaml" and config.exists() and words[words.index("--num_processes") + 1] == "4"
    assert words[-6:] == ["benchmarks.preference_step", "--tiny", "--engine", "zero3", "--gpus", "4"]

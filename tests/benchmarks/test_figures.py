"""Whatever part of a benchmark was run, its figure and its verdict are made of what there is."""

import itertools

import matplotlib

matplotlib.use("Agg")  # before anything imports pyplot
import pytest
from rich.console import Console

from benchmarks import expert_parallel, harness, memcpy, moe_layer, transport
from benchmarks.ablation import report as ablation
from benchmarks.weight_quality import report as quality

MACHINE = {"gpu": "none", "torch": "2", "triton": "3", "transformers": "5", "deepspeed": "0", "date": "2026-01-01"}
MACHINE |= {"liger-kernel": "0", "liger_tiles": "fixed"}
FAILED = "out of memory"


def subsets(names, sizes=(0, 1, 2)):
    return [chosen for size in (*sizes, len(names)) for chosen in itertools.combinations(names, size)]


def write(path, columns, rows):
    harness.write_rows(path, [dict.fromkeys(columns, "") | row | MACHINE for row in rows], (*columns, *MACHINE))
    return path


def drawn(draw, path):
    target = draw(path)
    assert target == path.with_suffix(".png") and target.read_bytes()[:4] == b"\x89PNG"


def layer_rows(shapes, contenders, status="ok"):
    layers = [layer for layer in moe_layer.LAYERS if layer.name in shapes]
    for layer in layers:
        for name in (name for name in layer.contenders if name in contenders):
            row = {**layer.columns, "contender": name, "status": status}
            if status == "ok":
                row |= {"forward_ms": 1.5, "forward_peak_mib": 2.0}
                training = {"forward_backward_ms": 3.0, "forward_backward_peak_mib": 9.0}
                row |= training | {"forward_backward_speedup": 1.0} if layer.backward else {"host_ms": 2.0}
            yield row


SHAPES = [layer.name for layer in moe_layer.LAYERS]


@pytest.mark.parametrize("shapes", subsets(SHAPES, sizes=(0, 1)), ids=str)
def test_layers_of_experts(shapes, tmp_path):
    for contenders in (("memcpy",), ("liger",), moe_layer.TRAINING):
        path = write(tmp_path / "layers.csv", moe_layer.COLUMNS, layer_rows(shapes, contenders))
        moe_layer.verdict(harness.read_rows(path), Console(quiet=True))
        drawn(moe_layer.draw, path)


@pytest.mark.parametrize("shapes", [("qwen3-30b-a3b", "compass"), tuple(SHAPES[:4]), (SHAPES[2], SHAPES[-1])], ids=str)
def test_pairs_of_layers_and_contenders(shapes, tmp_path):
    """The case that ended in a traceback, two training shapes and nothing on the logarithmic panel, is the first."""
    for contenders in [("memcpy", "grouped_mm"), ("eager",), ("batched_mm",), ("batched_mm", "liger")]:
        drawn(moe_layer.draw, write(tmp_path / "a.csv", moe_layer.COLUMNS, layer_rows(shapes, contenders)))
    drawn(moe_layer.draw, write(tmp_path / "b.csv", moe_layer.COLUMNS, layer_rows(shapes, ["memcpy"], FAILED)))


def test_the_stand_in_runs_beside_the_version_that_lacks_it_alone():
    import transformers
    from packaging.version import Version

    stands_in = moe_layer.UNMASKED in moe_layer.TRAINING and moe_layer.UNMASKED in moe_layer.DECODING
    assert stands_in == (Version(transformers.__version__) < Version("5.18"))


@pytest.mark.parametrize("arguments", [["--shapes", "qwen3-30b-a3b, 4 tokens", "--contenders", "eager", "liger"]])
def test_what_nothing_runs_is_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["moe_layer", *arguments])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(moe_layer, "name_of_gpu", lambda: "none")
    with pytest.raises(SystemExit) as ended:
        moe_layer.main()
    assert ended.value.code == 2 and "none of ['eager', 'liger'] runs" in capsys.readouterr().err


def move_rows(shapes, contenders, operations, status):
    for shape, operation, name in itertools.product(shapes, operations, contenders):
        row = {"shape": shape, "operation": operation, "contender": name, "status": status}
        yield row | ({"ms": 1.0, "share_of_roof": 0.9, "speedup_over_torch": 2.0} if status == "ok" else {})


@pytest.mark.parametrize("status", ["ok", FAILED])
def test_row_moves(status, tmp_path):
    shapes = [shape.name for shape in memcpy.SHAPES]
    for some, names in itertools.product(
        [(), shapes[:1], shapes[1:2], shapes], [("memcpy",), (*memcpy.NAMES, "copy_")]
    ):
        rows = move_rows(some, names, memcpy.OPERATIONS, status)
        path = write(tmp_path / "moves.csv", memcpy.COLUMNS, rows)
        memcpy.verdict(harness.read_rows(path), Console(quiet=True))
        drawn(memcpy.draw, path)


@pytest.mark.parametrize("lengths", [(), (256,), (256, 1024)], ids=str)
def test_transport(lengths, tmp_path):
    for sizes, regs in (([(8, 4096)], transport.REGS[:1]), ([(1, 2048)], transport.REGS[1:])):
        for names, ms in ((tuple(transport.METHODS), 3.0), (("triton",), "")):
            rows = [
                {"pairs": b, "hidden": d, "length": n, "reg": reg, "reg_m": reg_m, "method": name, "ms": ms}
                for (b, d), n, (reg, reg_m), name in itertools.product(sizes, lengths, regs, names)
            ]
            drawn(transport.draw, write(tmp_path / "transport.csv", transport.COLUMNS, rows))


@pytest.mark.lengthy
def test_experts_spread_over_gpus(tmp_path):
    cases = (expert_parallel.SMALL, expert_parallel.BLOCK, expert_parallel.FITS)
    contenders = tuple(expert_parallel.contenders.CONTENDERS)
    shares = {f"{kind}_share": 0.1 for kind in expert_parallel.KINDS}
    for some, names, status in itertools.product(
        [(), cases[:1], cases[2:], cases], [contenders[:1], contenders], ("ok", FAILED)
    ):
        measured = {"tokens_per_s": 10, "peak_mib": 5} if status == "ok" else {}
        rows = [
            {"case": case, "contender": name, "gpus": 2, "layers": 1, "status": status, **measured}
            | (shares if measured and case != expert_parallel.FITS else {})
            for case, name in itertools.product(some, names)
        ]
        path = write(tmp_path / "spread.csv", expert_parallel.COLUMNS, rows)
        expert_parallel.verdict(harness.read_rows(path), Console(quiet=True))
        drawn(expert_parallel.draw, path)


def ablation_row(weighting, **changes):
    row = {"data": "a.jsonl", "weighting": weighting, "seeds": 1, "failed": 0}
    for measure in ablation.MEASURES:
        row |= {measure: 1.0, f"{measure}_std": 0.0}
    return row | changes


def test_ablation_whose_judge_failed_for_some(tmp_path):
    nobody = dict.fromkeys(("win_rate", "win_rate_std", "lc_win_rate", "lc_win_rate_std"), "")
    for rows in (
        [ablation_row("dpo", **nobody), ablation_row("otpo")],
        [ablation_row("dpo"), ablation_row("b", **nobody)],
    ):
        ablation.draw(rows, [], tmp_path)
        assert (tmp_path / "win_rate_length.png").exists() and (tmp_path / "margins.png").exists()
        (tmp_path / "win_rate_length.png").unlink()
    ablation.draw([ablation_row("dpo", **nobody)], [], tmp_path)
    assert not (tmp_path / "win_rate_length.png").exists()


def test_ablation_marks_chosen_answers_that_fell():
    rows = [ablation_row("dpo", chosen_change=-1.0), ablation_row("otpo", chosen_change=-0.9)]
    table = ablation.markdown([*rows, ablation_row("sft", chosen_change=4.0)]).splitlines()
    place = [cell.strip() for cell in table[0].split("|")].index("chosen change")
    cells = [line.split("|")[place].strip() for line in table[2:]]
    assert cells == ["-1.0 ± 0.0 ↓", "-0.9 ± 0.0", "4.0 ± 0.0"] and "\n".join(table).count("↓") == 1
    older = [{name: value for name, value in row.items() if not name.startswith("chosen_change")} for row in rows]
    assert "chosen change" not in ablation.markdown(older)  # of a table that was written before


def test_ablation_compares_chosen_answers_with_the_start():
    def record(*chosen):
        split = {"chosen": chosen, "rejected": [-9.0, -9.0], "tokens": [1, 1], "answers": ["a", "b"]}
        return {"held_out": {"test": split}, "wins": None}

    columns = ablation.columns_of(record(-4.0, -6.0), record(-1.0, -5.0))
    assert ablation.MEASURES["chosen_change"](columns) == -2.0


def quality_rows(scheme, score, auroc, layers=("",)):
    for layer, side, kind in itertools.product(layers, ("chosen", "rejected", "both"), ("all",)):
        row = {"scheme": scheme, "layer": layer, "score": score, "last": layer == 2, "side": side, "kind": kind}
        yield row | {"responses": 1, "left_out": 0, "auroc": auroc, "low": auroc, "high": auroc}


@pytest.mark.parametrize("auroc", [0.7, ""])
def test_weight_quality_of_any_scheme_alone(auroc, tmp_path):
    for scheme, layers in (("uniform", ("",)), (next(iter(quality.LAYERED)), (1, 2))):
        for score in ("weight", "contribution"):
            rows = list(quality_rows(scheme, score, auroc, layers))
            quality.report(rows, tmp_path, Console(quiet=True))
            assert (tmp_path / "weight_quality.png").exists()
            (tmp_path / "weight_quality.png").unlink()

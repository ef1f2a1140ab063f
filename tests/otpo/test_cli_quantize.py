"""`otpo quantize`: what it writes, says and refuses."""

import json
import re
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from cli_helpers import python, refusal
from compass_helpers import compass_model, token_ids
from datasets import Dataset
from helpers import make_tokenizer, save_model
from peft import LoraConfig, get_peft_model
from quantization_helpers import needs_compressed_tensors
from transformers import AutoModelForCausalLM, AutoTokenizer

from otpo.cli import quantize
from otpo.cli.main import COMMANDS, main
from otpo.cli.quantizing.documents import batches, encode, longest_document
from otpo.cli.quantizing.measuring import change, losses, mean_loss
from otpo.cli.quantizing.options import make_parser
from otpo.cli.quantizing.report import draw_lines, markdown, table

needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is an extra: pip install 'otpo[eval]'"
)
WORDS = ("the blue shirt", "a red hat of silk", "two pairs of shoes and a bag", "price")


@pytest.fixture
def folder(tmp_path):
    """A Compass model with an MTP layer and its tokenizer."""
    tokenizer = make_tokenizer()
    model = compass_model(
        vocab_size=len(tokenizer), num_mtp_layers=1, max_position_embeddings=128, eos_token_id=tokenizer.eos_token_id
    )
    return save_model(model.eval(), tmp_path / "compass", tokenizer)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": WORDS[n % 4] + f" {n}"}) + "\n" for n in range(40)))
    return str(path)


def options(data, **changes):
    chosen = {"dataset_name": data, "test_split_size": 8, "device": "cpu", "min_rows_per_expert": 12}
    return [
        word
        for name, value in {**chosen, **changes}.items()
        if value is not None
        for word in (f"--{name}", str(value))
    ]


def test_the_command_is_listed():
    assert COMMANDS["quantize"].module == quantize.__name__


def test_help_needs_neither_torch_nor_a_library():
    code = "import sys; from otpo.cli.main import main\n"
    code += "try: main(['quantize', '--help'])\nexcept SystemExit: pass\n"
    code += "print({'torch', 'transformers', 'compressed_tensors'} & set(sys.modules), file=sys.stderr)"
    done = python("-c", code)
    assert "--min_rows_per_expert" in done.stdout and done.stderr.strip() == "set()"


@needs_compressed_tensors
def test_a_compass_model_becomes_fp8_with_a_report(folder, data, tmp_path, capsys):
    out = tmp_path / "fp8"
    given = options(data, calibration_tokens=150)
    assert main(["quantize", folder, str(out), *given, "--max_shard_size", "60KB"]) == 0
    text = capsys.readouterr().out
    assert "Qwen3MoeForCausalLM, exported from CompassForCausalLM, 38 matrices become FP8" in text
    assert {path.name for path in tmp_path.iterdir()} == {"compass", "documents.jsonl", "fp8"}

    report = json.loads((out / "quantization_report.json").read_text())
    names = [row["name"] for row in report["models"]]
    assert names[0] == "full precision" and "FP8, expert_aware (written)" in names and "FP8, uniform" in names
    assert report["held_out"]["documents"] == 8 and all(row["loss"] > 0 for row in report["models"])
    assert set(report["draws"]) == {"expert_aware", "uniform"} and report["bytes"]["after"] < report["bytes"]["before"]
    rows = report["draws"]["expert_aware"]["layers"][1]["rows"]
    assert len(rows) == 5 and sum(rows) == 2 * report["draws"]["expert_aware"]["tokens"]
    assert min(map(min, (it["rows"] for it in report["draws"]["expert_aware"]["layers"]))) >= 12
    page = (out / "quantization_report.md").read_text()
    assert page == markdown(report) and f"{report['models'][1]['loss']:.4f}" in page
    assert not re.search("not asked|None|nan", page)

    # It loads with its tokenizer, and its loss is near that of the report, whose experts' inputs are rounded too.
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert AutoTokenizer.from_pretrained(out)("blue")["input_ids"]
    assert model(token_ids(1, 5)).logits.isfinite().all()


@needs_compressed_tensors
def test_the_same_seed_writes_the_same_bits_and_both_draws_can_be_written(folder, data, tmp_path):
    written = []
    changes = {"calibration_tokens": 60, "min_rows_per_expert": 20}
    for name, kind in (("a", "expert_aware"), ("b", "expert_aware"), ("c", "uniform")):
        assert main(["quantize", folder, str(tmp_path / name), *options(data, calibration=kind, **changes)]) == 0
        report = json.loads((tmp_path / name / "quantization_report.json").read_text())
        written.append(((tmp_path / name / "model.safetensors").read_bytes(), report["models"]))
    assert written[0] == written[1] and written[0][0] != written[2][0]
    losses_of = [{row["name"].replace(" (written)", ""): row["loss"] for row in models} for _, models in written]
    assert losses_of[0] == losses_of[2]


@needs_compressed_tensors
def test_dynamic_scales_need_no_documents_and_an_exported_model_is_read_as_it_is(folder, tmp_path, capsys):
    served, out = tmp_path / "served", tmp_path / "fp8"
    assert main(["export", folder, str(served)]) == 0
    given = ["--input_scales", "dynamic", "--skip_report", "--device", "cpu", "--dtype", "bfloat16"]
    assert main(["quantize", str(served), str(out), *given]) == 0
    assert "nothing is measured" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    report = json.loads((out / "quantization_report.json").read_text())
    assert report["models"] == [] and report["draws"] == {}
    unread = ("calibration", "min_rows_per_expert", "calibration_tokens", "max_train_rows", "max_length")
    assert {report["options"][name] for name in unread} == {None}


@needs_compressed_tensors
def test_documents_of_dynamic_scales_are_the_reports(folder, data, tmp_path):
    out = tmp_path / "fp8"
    given = options(data, input_scales="dynamic", min_rows_per_expert=None)
    assert main(["quantize", folder, str(out), *given]) == 0
    report = json.loads((out / "quantization_report.json").read_text())
    assert [row["name"] for row in report["models"]] == ["full precision", "FP8"]
    assert report["held_out"]["documents"] == 8 and report["draws"] == {}
    chosen = [report["options"][name] for name in ("calibration", "max_train_rows", "max_eval_rows", "max_length")]
    assert chosen == [None, None, 256, 128]


@needs_compressed_tensors
def test_draws_that_take_all_documents_are_not_compared(folder, data, tmp_path, capsys):
    out = tmp_path / "fp8"
    assert main(["quantize", folder, str(out), *options(data, calibration="uniform")]) == 0
    report = json.loads((out / "quantization_report.json").read_text())
    assert [row["name"] for row in report["models"]] == [
        *("full precision", "FP8 (written)", "FP8, a scale an expert"),
    ]
    assert set(report["draws"]) == {"uniform"}
    for text in (capsys.readouterr().out, (out / "quantization_report.md").read_text()):
        assert "both draws take all 32 documents" in text and "aware" not in text


@needs_compressed_tensors
def test_documents_end_where_the_model_has_no_positions(folder, tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"input_ids": [3 + n, *[4, 5] * 80]}) + "\n" for n in range(4)))
    out, given = tmp_path / "fp8", options(path, test_split_size=1, min_rows_per_expert=1)
    refused = refusal(quantize.main, capsys, [folder, str(out), *given, "--max_length", "129"])
    assert "`--max_length 129`: the model has 128 positions" in refused and "Set `--max_length 128`" in refused
    assert main(["quantize", folder, str(out), *given, "--skip_report"]) == 0
    report = json.loads((out / "quantization_report.json").read_text())
    assert report["options"]["max_length"] == 128
    assert report["draws"]["expert_aware"]["tokens"] == report["draws"]["expert_aware"]["documents"] * 128


def test_the_longest_document_is_what_the_model_has_positions_for():
    def config(positions):
        found = SimpleNamespace(max_position_embeddings=positions)
        return SimpleNamespace(get_text_config=lambda: found)

    assert longest_document(config(128), None) == 128 and longest_document(config(128), 128) == 128
    assert longest_document(config(4096), None) == 2048 and longest_document(config(4096), 4096) == 4096
    assert longest_document(config(None), None) == 2048 and longest_document(config(None), 9999) == 9999


@needs_compressed_tensors
def test_experts_that_are_left_short_are_told_by_layer_and_expert(folder, data, tmp_path, capsys):
    out = tmp_path / "fp8"
    given = options(data, calibration_tokens=3, min_rows_per_expert=9, calibration="uniform")
    assert main(["quantize", folder, str(out), *given]) == 0
    text = capsys.readouterr().out
    assert re.search(r"layer \d expert \d: 0 of 9 rows; all candidates have \d+, so its scales are its layer's", text)
    found = json.loads((out / "quantization_report.json").read_text())["draws"]["uniform"]
    assert found["never_seen"] and {"layer", "expert", "rows", "candidates"} == set(found["unfilled"][0])


@needs_compressed_tensors
def test_an_adapter_of_a_compass_model_is_merged(folder, data, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder, mtp_loss_coef=0.0)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    given = [*options(data), "--skip_report"]
    for name, model in (("plain", folder), ("merged", str(tmp_path / "adapter"))):
        assert main(["quantize", model, str(tmp_path / name), *given]) == 0
    plain, merged = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "merged"))
    assert plain != merged


@needs_compressed_tensors
@needs_lm_eval
@pytest.mark.lengthy
def test_right_answers_are_counted_before_and_after(folder, data, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    prompts = tmp_path / "asked.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{it}?", "answer": it}) + "\n" for it in WORDS))
    out = tmp_path / "fp8"
    asked = {"prompts": prompts, "judge": "exact_match", "max_new_tokens": 3, "calibration_tokens": 100}
    assert main(["quantize", folder, str(out), *options(data, **asked)]) == 0
    report = json.loads((out / "quantization_report.json").read_text())
    answered = {row["name"]: row["answers"] for row in report["models"] if "answers" in row}
    assert set(answered) == {"full precision", "FP8, expert_aware (written)", "FP8, uniform"}
    assert all(0 <= found["score"]["value"] <= 1 for found in answered.values())
    assert "not asked" in (out / "quantization_report.md").read_text()


@needs_compressed_tensors
def test_what_cannot_be_used_is_refused_in_a_line(folder, data, tmp_path, capsys):
    out = tmp_path / "fp8"

    def refused(*words, model=folder):
        return refusal(quantize.main, capsys, [model, str(out), *words])

    assert "Set `--dataset_name`, or `--input_scales dynamic`" in refused()
    assert "Set `--dataset_name`, or `--skip_report`" in refused("--input_scales", "dynamic")
    assert "`--min_rows_per_expert 0`" in refused(*options(data, min_rows_per_expert=0))
    dynamic = ("--input_scales", "dynamic", "--skip_report")
    for name, value in (
        *(("calibration", "uniform"), ("min_rows_per_expert", 256), ("calibration_tokens", 9), ("max_train_rows", 3)),
        *(("dataset_name", data), ("dataset_train_split", "train"), ("max_length", 5), ("max_eval_rows", 2)),
    ):
        told = refused(*dynamic, f"--{name}", str(value))
        assert f"`--{name} {value}` means nothing with `--input_scales dynamic" in told and "Drop it" in told
    told = refused(*options(data, max_eval_rows=2), "--skip_report")
    assert "`--max_eval_rows 2` means nothing with `--skip_report`" in told
    assert "`--max_shard_size=5XB`" in refused(*options(data, max_shard_size="5XB"))
    assert "no column 'body'" in refused(*options(data, text_column="body")).replace("has no a", "has no")
    assert "`--prompts a.txt`" in refused(*options(data, prompts="a.txt"))
    assert "Drop one" in refused(*options(data, prompts="a.jsonl"), "--skip_report")
    assert "there is no such folder" in refused(*options(data), model="./nowhere")
    assert "`--prompts" in refused(*options(data, prompts=data, judge="exact_match"))
    dense = tmp_path / "dense"
    assert not out.exists() and not dense.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"compass", "documents.jsonl"}

    assert main(["quantize", folder, str(out), *options(data), "--skip_report"]) == 0
    assert "is there already" in refused(*options(data))
    again = refusal(quantize.main, capsys, [str(out), str(dense), *options(data)])
    assert "quantized weights can't be converted" in again and not dense.exists()


@needs_compressed_tensors
def test_a_run_that_fails_leaves_nothing(folder, data, tmp_path, monkeypatch, capsys):
    def broken(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr("otpo.cli.quantizing.run.write_folder", broken)
    assert "No space left" in refusal(quantize.main, capsys, [folder, str(tmp_path / "fp8"), *options(data)])
    assert {path.name for path in tmp_path.iterdir()} == {"compass", "documents.jsonl"}


def test_without_the_library_the_extra_is_named(folder, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("moe_backbone.quantization.scheme.find_spec", lambda name: None)
    assert "pip install 'otpo[fp8]'" in refusal(quantize.main, capsys, [folder, str(tmp_path / "o"), *options(data)])


def test_rows_of_every_kind_become_documents():
    tokenizer = make_tokenizer()

    def ids(rows, column=None, length=100):
        return encode(Dataset.from_list(rows), "rows", tokenizer, len(tokenizer), column, length)

    assert ids([{"text": "the blue shirt"}]) == [[*tokenizer("the blue shirt")["input_ids"], tokenizer.eos_token_id]]
    assert ids([{"input_ids": [5, 6, 7]}, {"input_ids": [5]}]) == [[5, 6, 7]]  # one of a single token is left out
    assert ids([{"input_ids": [5, 6, 7]}], length=2) == [[5, 6]]
    assert ids([{"prompt": "the blue", "completion": " shirt"}]) == ids([{"text": "the blue shirt"}])
    assert ids([{"body": "the blue", "text": "x"}], "body") == ids([{"text": "the blue"}])
    user, assistant = {"role": "user", "content": "blue?"}, {"role": "assistant", "content": "shirt"}
    told = ids([{"messages": [user, assistant]}])
    assert (
        told
        == ids([{"prompt": [user], "completion": [assistant]}])
        == ids([{"prompt": [user], "chosen": [assistant]}])
    )
    assert "shirt" in tokenizer.decode(told[0]) and "blue?" in tokenizer.decode(told[0])
    with pytest.raises(ValueError, match="no column of documents; it has"):
        ids([{"body": "x"}])
    with pytest.raises(ValueError, match="two tokens or more"):
        ids([{"input_ids": [4]}])
    with pytest.raises(ValueError, match="no tokenizer"):
        encode(Dataset.from_list([{"text": "x y"}]), "rows", None, 9, None, 5)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        ids([{"messages": [user, assistant]}])


def test_losses_are_those_of_each_document_alone():
    model = compass_model().eval()
    rows = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12]]
    told = []
    found = losses(model, rows, 2, told.append)
    assert [count for _, count in found] == [4, 1, 2] and told == [2, 1]
    for row, (loss, _) in zip(rows, found, strict=True):
        ids = torch.tensor([row])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        want = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        assert loss == pytest.approx(want.item(), rel=1e-4)
    assert mean_loss(found) == pytest.approx(sum(loss for loss, _ in found) / 7)
    assert list(batches(rows, 2)) == [rows[:2], rows[2:]]


def test_a_change_is_the_ratio_of_sums_with_its_error():
    before, after = [(1.0, 1), (4.0, 2), (9.0, 3)], [(1.2, 1), (4.8, 2), (9.2, 3)]
    mean, error = change(before, after)
    assert mean == pytest.approx(1.2 / 6)
    residuals = [0.2 - 0.2, 0.8 - 0.4, 0.2 - 0.6]
    assert error == pytest.approx((sum(it**2 for it in residuals) * 3 / 2) ** 0.5 / 6)
    assert change(before[:1], after[:1]) == (pytest.approx(0.2), None)


def test_the_table_says_what_was_not_measured():
    row = {"name": "full precision", "loss": None, "answers": {"all": {"value": 0.5, "low": None, "high": None}}}
    other = {"name": "FP8", "loss": 1.25, "change": 0.5, "change_error": None}
    titles, rows = table({"models": [row, other]})
    assert titles == ["model", "loss", "change", "all"]
    assert rows == [["full precision", "not measured", "", "0.500"], ["FP8", "1.2500", "+0.50000", "not asked"]]
    many = [{"layer": 1, "expert": number, "rows": number, "candidates": 9} for number in range(8)]
    found = {"documents": 1, "tokens": 2, "experts": 10, "fewest_rows": 0, "unfilled": many}
    found |= {"candidates": 3, "zeros": []}
    lines = draw_lines({"draws": {"uniform": found}, "options": {"min_rows_per_expert": 8}})
    assert "2 of 10 experts have seen 8 rows or more, the least 0" in lines[0][1]
    assert "so its scales are its layer's largest" in lines[1][1] and "scales" not in lines[2][1]
    assert lines[-1][1] == "and 3 more, in quantization_report.json" and len(lines) == 7
    assert lines[0][0] == "draws" and lines[0][1].startswith("both draws take the same 1 documents, 2 tokens")
    zeros = [{"what": f"layer {number}", "scale": "1"} for number in range(6)]
    both = {"uniform": found, "expert_aware": found | {"unfilled": [], "zeros": zeros}}
    lines = draw_lines({"draws": both, "options": {"min_rows_per_expert": 8}})
    assert lines[0][0] == "uniform" and "both" not in lines[0][1] and lines[7][0] == "expert_aware"
    assert lines[8][1] == "layer 0: nothing but zeros goes in, so its scale is 1"
    assert lines[-1][1] == "and 1 more of zeros, in quantization_report.json" and len(lines) == 14


def test_the_parser_knows_what_the_library_has():
    from moe_backbone.quantization.drawing import DRAWS
    from moe_backbone.quantization.scheme import INPUT_SCALES

    choices = {action.dest: action.choices for action in make_parser()._actions if action.choices}
    assert choices["calibration"] == DRAWS and choices["input_scales"] == INPUT_SCALES

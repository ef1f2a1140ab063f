"""`otpo plan`: its help is light, its numbers are the plan's, and what is refused has one message."""

import json
import re

import pytest
from cli_helpers import python

from moe_backbone import PRESETS, preset
from moe_backbone.planning.counting import count_parameters
from moe_backbone.planning.hardware import GPUS
from moe_backbone.planning.setup import OPTIMIZERS, PRECISIONS, STRATEGIES, TrainingSetup
from otpo.cli import plan


@pytest.mark.lengthy
def test_help_is_light_and_names_every_choice():
    code = (
        "import sys\nfrom otpo.cli.main import main\n"
        "try: main(['plan', '--help'])\nexcept SystemExit: pass\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = python("-c", code, COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert not {"torch", "transformers", "numpy", "rich", "moe_backbone"} & set(done.stderr.split())
    words = set(re.findall(r"[\w-]+", done.stdout))
    assert {*PRESETS, *GPUS, *STRATEGIES, *PRECISIONS, *OPTIMIZERS} <= words
    assert {f"--{name}" for name in TrainingSetup.__dataclass_fields__} <= words


def test_tables(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "119")
    argv = ["compass-v3", "--nodes", "64", "--strategy", "zero3", "--expert_parallel_size", "8", "--tokens", "12e12"]
    assert plan.main([*argv, "--precision", "bf16", "--gradient_checkpointing"]) == 0
    text = capsys.readouterr().out
    assert "compass-v3 on 64 x 8 NVIDIA H100 SXM 80GB" in text
    counts = count_parameters(preset("compass-v3"))
    for number in (counts.total, counts.active, counts.mtp, counts.experts):
        assert f"{number:,}" in text
    for line in ("optimizer", "activations", "of 80 GiB: fits", "MFU", "all to all", "12,000,000,000,000 tokens"):
        assert line in text
    assert "448.0 MiB" in text  # 2 x 4096 tokens x 4 experts x 8192 numbers x 2 bytes x 7/8
    assert "Time is an estimate." in text and "[bold]" not in text


def test_json(capsys):
    argv = ["compass-small", "--gpus_per_node", "1", "--micro_batch_size", "2", "--efficiency", "0.5", "--json"]
    assert plan.main([*argv, "--tokens", "1e9"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"]["total"] == count_parameters(preset("compass-small")).total
    assert report["setup"]["tokens_per_step"] == 2 * 4096
    assert report["rates"]["matmul"] == 0.5 and report["rates"]["attention"] == 0.25
    assert report["days"] == pytest.approx(1e9 / report["tokens_per_second"] / 86_400)
    assert report["memory"]["fit"] == "fits"


def test_a_folder_and_its_limit_of_tokens(capsys, tmp_path):
    preset("compass-tiny").save_pretrained(tmp_path)
    assert plan.main([str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["setup"]["sequence_length"] == 1024
    assert plan.main([str(tmp_path), "--sequence_length", "2048"]) == 0
    assert "`max_position_embeddings` is raised from 1024 to 2048" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: MODEL"),
        (["compass-v9"], "`model=compass-v9` is neither a preset"),
        (["compass-v3", "--gpu", "tpu"], "`gpu=tpu` is not known. Set one of: h100"),
        (["compass-v3", "--expert_parallel_size", "3"], r"`expert_parallel_size=3` does not divide .*\[1, 2, 4, 8\]"),
        (["compass-v3", "--strategy", "zero4"], "`strategy=zero4` is not known. Set one of: ddp"),
        (["compass-v3", "--nodes", "0"], "`nodes` must be at least 1, got 0"),
        (["compass-v3", "--nodes", "two"], "argument --nodes: invalid int value: 'two'"),
        (["compass-v3", "--efficiency", "1.5"], "`efficiency` is a share .* got 1.5"),
        (["compass-v3", "--tokens", "0"], "`tokens` must be above 0, got 0"),
        (["compass-v3", "--node", "2"], "unrecognized arguments: --node 2"),
    ],
    ids=str,
)
def test_what_is_refused(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        plan.main(argv)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert re.search(message, text)
    assert text.count("error:") == 1 and "Traceback" not in text

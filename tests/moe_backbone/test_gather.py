"""All tokens gathered in place of rows sent: what is refused, when it is taken, and that a command trains the same."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer

from moe_backbone.expert_parallel.deepspeed_trainer import EXCHANGES, ExpertParallelMixin, with_expert_parallelism
from moe_backbone.expert_parallel.gather import Gathering, gather_pays, run_gathered_experts
from moe_backbone.pretraining.trainer import PretrainingTrainer
from otpo.cli import pretrain
from otpo.cli.options.run_options import EXPERT_EXCHANGES


def test_a_batch_that_is_larger_than_what_is_reserved():
    gathering = Gathering("nobody", 2, 0, 2, 3)
    x, index, weights = torch.zeros(4, 8), torch.zeros(4, 2, dtype=torch.long), torch.zeros(4, 2)
    with pytest.raises(ValueError, match="A batch of 4 tokens, where each process reserves 3"):
        run_gathered_experts(x, index, weights, gathering, lambda rows, ends: rows)


@pytest.mark.parametrize(("processes", "slots", "pays"), [(1, 4, False), (2, 1, False), (2, 2, True), (8, 4, False)])
def test_it_pays_where_it_moves_no_more(processes, slots, pays):
    assert gather_pays(processes, slots) == pays


@pytest.mark.parametrize(
    ("trainer_class", "exchange", "slots", "gathers"),
    [
        (PretrainingTrainer, "auto", 2, True),
        (PretrainingTrainer, "auto", 1, False),
        (PretrainingTrainer, "all_to_all", 2, False),
        (PretrainingTrainer, "gather", 1, True),
        (Trainer, "auto", 2, False),
        (Trainer, "gather", 2, True),
    ],
)
def test_who_gathers(trainer_class, exchange, slots, gathers):
    of_class = with_expert_parallelism(trainer_class, 2, exchange)
    config = SimpleNamespace(num_experts_per_tok=slots)
    trainer = object.__new__(of_class)
    trainer.model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    trainer.args = SimpleNamespace(sequence_length=8)
    trainer.accelerator = SimpleNamespace(split_batches=False)
    trainer._train_batch_size = 3
    assert isinstance(trainer, ExpertParallelMixin) and trainer.gathers is gathers
    assert trainer.batches_vary == (trainer_class is Trainer)
    if trainer_class is PretrainingTrainer:
        assert trainer.tokens_in_batch == 24


def test_an_exchange_that_is_not_known():
    with pytest.raises(ValueError, match="`expert_exchange=send` is not known"):
        with_expert_parallelism(Trainer, 2, "send")


def test_an_exchange_of_nothing_is_refused(tmp_path, capsys):
    words = [
        "--preset",
        "compass-tiny",
        "--dataset_name",
        "x.jsonl",
        "--output_dir",
        str(tmp_path),
        "--use_cpu",
        "true",
    ]
    assert pretrain.main([*words, "--expert_exchange", "gather"]) == 2
    assert "`expert_exchange=gather` is of experts that DeepSpeed spreads" in capsys.readouterr().err


@pytest.mark.lengthy
def test_a_command_trains_and_evaluates_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [{"input_ids": [3 + (7 * row + place) % 60 for place in range(9 + row % 5)]} for row in range(90)]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for exchange, more in (("all_to_all", []), ("gather", ["--gradient_checkpointing", "true"])):
        out = tmp_path / exchange
        words = ["--preset", "compass-tiny", "--tokenizer_name_or_path", f"{tmp_path}/tokenizer", "--use_cpu", "true"]
        words += ["--dataset_name", f"{tmp_path}/documents.jsonl", "--output_dir", str(out), "--num_processes", "2"]
        words += ["--dataset_test_split", "train", "--sequence_length", "16", "--per_device_train_batch_size", "2"]
        words += ["--max_steps", "3", "--logging_steps", "1", "--eval_strategy", "steps", "--eval_steps", "3"]
        words += ["--save_strategy", "no", "--report_to", "none", "--expert_parallel_size", "2", "--bf16", "false"]
        words += ["--expert_exchange", exchange, "--verbose", *more]
        done = subprocess.run([sys.executable, "-m", "otpo", "pretrain", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert ("gathering all tokens" in done.stdout) == (exchange == "gather")
        found[exchange] = [float(loss) for loss in re.findall(r"'(?:eval_)?loss': '?([\d.]+)", done.stdout)]
    assert len(found["gather"]) == 4
    assert found["gather"] == pytest.approx(found["all_to_all"], rel=2e-4)


def test_the_command_offers_what_there_is():
    assert EXPERT_EXCHANGES == EXCHANGES

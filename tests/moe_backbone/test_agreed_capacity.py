"""Gathers of batches that vary: processes agree on the largest before each pass, and train as if rows were sent."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from cli_helpers import LORA, arguments, launched, python
from compass_helpers import compass_model
from expert_parallel_helpers import ENVIRONMENT, result
from helpers import make_pairs
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer
from transformers.modeling_layers import GradientCheckpointingLayer

from moe_backbone.expert_parallel.capacity import AgreedCapacity, _Checkpoint, tokens_of
from moe_backbone.expert_parallel.deepspeed_trainer import with_expert_parallelism
from otpo.cli.pretraining.compiling import compile_for_run


class Layer(GradientCheckpointingLayer):
    def __init__(self, capacity: AgreedCapacity, seen: list[tuple[int, int]]):
        super().__init__()
        self.linear, self.capacity, self.seen = nn.Linear(4, 4), capacity, seen

    def forward(self, x):
        self.seen.append((x.size(0) * x.size(1), self.capacity.tokens))
        return self.linear(x).tanh()


class Backbone(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, input_ids=None, inputs_embeds=None):
        x = inputs_embeds if input_ids is None else nn.functional.one_hot(input_ids, 4).float()
        for layer in self.layers:
            x = layer(x)
        return x.sum()


@pytest.fixture
def others(monkeypatch):
    """Tokens of another process in the passes to come, in place of a process that has them."""
    tokens = []

    def largest(tensor, op, group):
        assert op == dist.ReduceOp.MAX and group == "hosts" and tensor.device.type == "cpu"
        tensor.fill_(max(int(tensor), tokens.pop(0)))

    monkeypatch.setattr(dist, "all_reduce", largest)
    return tokens


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_that_runs_again_keeps_the_number_of_its_pass(others, reentrant):
    """Two passes before a backward, and checkpointing switched off and on between them, as for a reference."""
    capacity, seen = AgreedCapacity("hosts"), []  # pyright: ignore[reportArgumentType]
    model = Backbone([Layer(capacity, seen) for _ in range(2)]).train()

    def switch(on: bool) -> None:
        for layer in model.layers:
            layer.gradient_checkpointing = on
            layer._gradient_checkpointing_func = lambda run, *args: checkpoint(run, *args, use_reentrant=reentrant)

    capacity.follow(model)
    others += [5, 9, 2, 4]
    switch(True)
    first = model(inputs_embeds=torch.randn(2, 3, 4, requires_grad=True))
    switch(False)
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))
    switch(True)
    second = model(inputs_embeds=torch.randn(1, 3, 4, requires_grad=True))
    assert seen == [(6, 6)] * 2 + [(4, 9)] * 2 + [(3, 3)] * 2
    seen.clear()
    (first + second).backward()
    assert sorted(seen) == [(3, 3)] * 2 + [(6, 6)] * 2
    assert capacity.tokens == 3

    # The largest batch of all, so none is above it.
    model.eval()(torch.zeros(3, 1, dtype=torch.long))
    assert seen[-2:] == [(3, 4)] * 2 and not others

    # Nothing is left behind: no pass asks the others, and no layer keeps a number.
    capacity.leave()
    model.train()(inputs_embeds=torch.randn(1, 5, 4, requires_grad=True)).backward()
    assert seen[-1] == (5, 4) and not isinstance(model.layers[0]._gradient_checkpointing_func, _Checkpoint)


def test_the_tokens_of_a_pass():
    ids, embedded = torch.zeros(2, 3), torch.zeros(2, 5, 8)
    assert tokens_of((ids,), {}) == tokens_of((), {"input_ids": ids, "inputs_embeds": None}) == 6
    assert tokens_of((), {"input_ids": None, "inputs_embeds": embedded}) == tokens_of(
        (None,), {"inputs_embeds": embedded}
    )
    assert tokens_of((), {}) == 0


def test_batches_that_vary_are_not_compiled():
    trainer = object.__new__(with_expert_parallelism(Trainer, 2, "gather"))
    assert trainer.gathers and trainer.batches_vary
    trainer.model = compass_model(num_experts=4, experts_implementation="grouped_mm")
    trainer.args = SimpleNamespace(torch_compile=False)
    trainer.accelerator = SimpleNamespace(distributed_type="MULTI_CPU")
    assert "gather another number of tokens in each batch" in compile_for_run(trainer, asked=True)


@pytest.mark.lengthy
@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its operator for the CPU")
def test_three_processes_of_two_groups_agree(tmp_path):
    """Each group on its own largest, in every pass."""
    assert result("agreement", tmp_path, processes=3) == [[4, 5], [4, 5], [6, 6]]


@pytest.fixture(scope="module")
def answers_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("answers") / "rows.jsonl"
    make_pairs(24).rename_column("chosen", "completion").remove_columns("rejected").to_json(path)
    return str(path)


@pytest.mark.lengthy
@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its operator for the CPU")
@pytest.mark.parametrize(
    ("command", "model", "stage", "changes"),
    [
        ("align", "compass_folder", 2, {"eval_strategy": "steps", "eval_steps": 2, "dataset_test_split": "train"}),
        ("align", "moe_folder", 3, {**LORA, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
        ("sft", "moe_folder", 1, {"gradient_checkpointing": True}),
    ],
)
def test_a_command_trains_as_with_rows_that_are_sent(
    request, pairs_file, answers_file, tmp_path, command, model, stage, changes
):
    pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
    data, found, metrics = pairs_file if command == "align" else answers_file, {}, {}
    for exchange in ("all_to_all", "gather"):
        out = tmp_path / exchange
        options = {"max_steps": 3, "expert_parallel_size": 2, "expert_exchange": exchange, "verbose": True, **changes}
        words = arguments(request.getfixturevalue(model), data, out, report=out / "report.json", **options)
        environment = {**ENVIRONMENT, "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
        done = python(*launched(f"otpo.cli.{command}", *words), **environment)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        agreed = "gathering all tokens, of a number that the processes agree on before each pass" in done.stdout
        assert agreed == (exchange == "gather")
        found[exchange] = [float(loss) for loss in re.findall(r"'(?:eval_)?loss': '?([\d.]+)", done.stdout)]
        metrics[exchange] = json.loads((out / "report.json").read_text())["metrics"]["train"]
    assert len(found["gather"]) == 3 + 2 * ("eval_steps" in changes)
    assert found["gather"] == pytest.approx(found["all_to_all"], rel=2e-4, abs=1e-4)  # of four digits
    for name in {"loss", "aux_loss", "rewards/margins"} & metrics["gather"].keys():
        assert metrics["gather"][name] == pytest.approx(metrics["all_to_all"][name], rel=2e-4, abs=1e-6), name

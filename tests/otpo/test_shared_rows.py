"""Rows whose tokens two processes share train as those of one process, where they are not refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command
from cli_helpers import arguments, refusal
from fsdp_helpers import FSDP2, PLAIN, STEPS, farthest, history, start, words, worst_gradient
from fsdp_worker import Record
from helpers import make_pairs
from transformers import trainer

from otpo.cli import align, sft
from otpo.cli.launching.launch import bundled_configs, parse_launch
from otpo.cli.launching.shared_rows import describe_sharing, require_right_gradients, require_whole_rows, rows_in_step

pytestmark = pytest.mark.usefixtures("own_process")
CLOSE = 1e-5
RING = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"}
ULYSSES = {
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_SP_SIZE": "2",
    "PARALLELISM_CONFIG_SP_ATTN_IMPLEMENTATION": "sdpa",
}
ZERO3 = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
ZERO3["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] = "true"  # the whole model, in its own type
NO_BALANCE = {"router_aux_loss_coef": 0}  # which is of each process's part of the rows where they are shared
EVALUATED = {"eval_strategy": "steps", "eval_steps": STEPS, "dataset_test_split": "train[:5]"}
CASES = {
    "steps": ("model_folder", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, **EVALUATED}),
    "odd parts": ("model_folder", {"pad_to_multiple_of": 2}),  # which torch leaves in their order
    "compass": ("compass_folder", NO_BALANCE),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    make_pairs(24).rename_column("chosen", "completion").remove_columns("rejected").to_json(path)
    return str(path)


def options(model: str, rows: str, folder: Any, **changes: Any) -> list[str]:
    return words(model, rows, folder, **{"per_device_train_batch_size": 4, "pad_to_multiple_of": 4, **changes})


def run_alone(argv: list[str], monkeypatch) -> None:
    monkeypatch.setattr(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS, Record])
    assert sft.main([*argv, "--use_cpu", "true"]) == 0


@pytest.mark.lengthy
def test_context_parallelism_is_one_process(request, rows, tmp_path, monkeypatch):
    models = {name: request.getfixturevalue(model) for name, (model, _) in CASES.items()}
    argvs = {name: options(models[name], rows, tmp_path / "two" / name, **CASES[name][1]) for name in CASES}
    done = start(tmp_path / "two", [{"command": "sft", "argv": argv} for argv in argvs.values()], FSDP2, **RING)
    assert done.returncode == 0, (done.stdout + done.stderr)[-9000:]
    assert done.stdout.count("the tokens of each row shared by 2 processes, by torch's ring attention") == len(CASES)
    assert done.stdout.count("4 in a step") == len(CASES)
    for name, (_, changes) in CASES.items():
        two, one = tmp_path / "two" / name, tmp_path / "one" / name
        run_alone(options(models[name], rows, one, **changes), monkeypatch)
        for logged in ("loss", "grad_norm", "eval_loss", "num_tokens"):
            assert history(two, logged) == pytest.approx(history(one, logged), rel=CLOSE), (name, logged)
        assert bool(history(two, "eval_loss")) == ("eval_steps" in changes)
        for step in range(STEPS):
            error, worst = worst_gradient(two, one, step)
            assert error < 1e-3, (name, step, worst)
        assert farthest(two, one) < CLOSE < farthest(two, models[name])


@pytest.mark.lengthy
def test_sequence_parallelism_under_zero3_is_one_process(compass_folder, rows, tmp_path, monkeypatch):
    """gloo gathers rows of one length alone, so all are padded to the same; NCCL takes others too."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
    changes = {**NO_BALANCE, "pad_to_multiple_of": 64}
    argv = options(compass_folder, rows, tmp_path / "two", **changes)
    done = start(tmp_path / "two", [{"command": "sft", "argv": argv}], PLAIN, **ULYSSES, **ZERO3)
    assert done.returncode == 0, (done.stdout + done.stderr)[-9000:]
    assert "shared by 2 processes, by DeepSpeed's Ulysses" in done.stdout and "4 in a step" in done.stdout
    run_alone(options(compass_folder, rows, tmp_path / "one", **changes), monkeypatch)
    for logged in ("loss", "grad_norm", "num_tokens"):
        assert history(tmp_path / "two", logged) == pytest.approx(history(tmp_path / "one", logged), rel=1e-4), logged
    assert farthest(tmp_path / "two", tmp_path / "one") < CLOSE < farthest(tmp_path / "two", compass_folder)


@pytest.mark.parametrize(
    ("command", "size", "engine", "values", "message"),
    [
        ("align", {"CP": "2"}, "FSDP", {}, "cp_size=2` with `otpo align`: the preference loss .*Set it to 1"),
        ("align", {"SP": "4"}, "DEEPSPEED", {}, "sp_size=4` with `otpo align`"),
        ("pretrain", {"CP": "2"}, "FSDP", {}, "a row holds several documents"),
        ("sft", {"CP": "2"}, "DEEPSPEED", {}, "cp_size=2` works beside FSDP alone. Set `--accelerate_config fsdp2`"),
        ("sft", {"SP": "2"}, "FSDP", {}, "sp_size=2` works beside DEEPSPEED alone. Set `--accelerate_config zero3`"),
        ("sft", {"CP": "2"}, "FSDP", {"packing": True}, "`packing=True` with .*cp_size=2`.*Leave `packing` out"),
        ("sft", {"SP": "2"}, "DEEPSPEED", {"padding_free": True}, "`padding_free=True` with .*sp_size=2`"),
        (
            "sft",
            {"CP": "2"},
            "FSDP",
            {"pad_to_multiple_of": None},
            "`pad_to_multiple_of=None` .*to 4, .*multiple of 2",
        ),
        ("sft", {"CP": "2"}, "FSDP", {"pad_to_multiple_of": "0"}, "`pad_to_multiple_of=0` .*to 4"),
        ("sft", {"CP": "4"}, "FSDP", {"pad_to_multiple_of": "6"}, "`pad_to_multiple_of=6` .*to 8, .*multiple of 4"),
        ("sft", {"CP": "2"}, "FSDP", {"attn_implementation": "eager"}, "`attn_implementation=eager` .*to sdpa"),
        ("sft", {"SP": "2"}, "DEEPSPEED", {}, "sp_attn_implementation=None` .*sp_attn_implementation sdpa`"),
        ("sft", {"SP": "2"}, "DEEPSPEED", {"expert_parallel_size": 2}, "`expert_parallel_size=2`.*one of them to 1"),
    ],
)
def test_what_is_refused(command, size, engine, values, message):
    given = {"pad_to_multiple_of": 4, **values}
    environ = {f"PARALLELISM_CONFIG_{name}_SIZE": value for name, value in size.items()}
    require_whole_rows(command, {engine: ""}, environ, given)  # which accelerate reads where this is set alone
    environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
    with pytest.raises(ValueError, match=message):
        require_whole_rows(command, {engine: ""}, environ, given)
    ones = dict.fromkeys(environ, "1") | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
    require_whole_rows(command, {}, ones, given)


def test_what_is_not_refused():
    require_whole_rows("sft", {"FSDP": ""}, RING, {"pad_to_multiple_of": "2", "packing": False})
    require_whole_rows("sft", {"DEEPSPEED": ""}, ULYSSES, {"pad_to_multiple_of": 64, "attn_implementation": "sdpa"})
    flash = {"pad_to_multiple_of": 2, "attn_implementation": "flash_attention_2"}
    with pytest.raises(ValueError, match=r"sp_attn_implementation=sdpa` .*sp_attn_implementation flash_attention_2`"):
        require_whole_rows("sft", {"DEEPSPEED": ""}, ULYSSES, flash)


CONFIGS = {"fsdp2": "parallelism_config_cp_size", "zero3": "parallelism_config_sp_size"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--accelerate_config", "fsdp2", "--parallelism_config_cp_size", "2"], "cp_size 2`.*fsdp2 .*_cp_size: 2}"),
        (["--accelerate_config", "zero3", "--parallelism_config_sp_size", "4"], "sp_size 4`.*zero3 .*_sp_size: 4}"),
        (["--accelerate_config", "zero3", "--use_parallelism_config"], "`--use_parallelism_config`: .*a block"),
        (["--use_fsdp", "--fsdp_version", "2", "--parallelism_config_cp_size", "2"], "cp_size 2`.*_cp_size: 2}"),
    ],
)
def test_sizes_that_the_launcher_would_not_read_are_refused(words, told):
    """accelerate leaves them out without a word, or asks for FSDP where FSDP is set."""
    with pytest.raises(ValueError, match=told):
        parse_launch([*words, "--num_processes", "2"], "sft", [])


@pytest.mark.parametrize(("name", "size"), CONFIGS.items())
def test_a_configuration_with_a_size_is_read(name, size, tmp_path):
    file = tmp_path / "shared.yaml"
    plain = bundled_configs()[name].read_text().replace("num_processes: -1", "num_processes: 4")
    file.write_text(f"{plain}\nparallelism_config:\n  {size}: 2\n  parallelism_config_sp_attn_implementation: sdpa\n")
    args = parse_launch(["--accelerate_config", str(file), f"--{size}", "4"], "sft", [])
    args, *_ = _validate_launch_command(args)
    assert args.use_parallelism_config and getattr(args, size) == 4
    assert args.parallelism_config_sp_attn_implementation == "sdpa"
    parse_launch(["--use_fsdp", "--fsdp_version", "2", "--use_parallelism_config", f"--{size}", "2"], "sft", [])
    parse_launch(["--accelerate_config", name, "--num_processes", "2"], "sft", [])


def accelerator(cp: int = 1, sp: int = 1, stage: int = 3, processes: int = 4, **zero: Any) -> Any:
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config={"zero_optimization": zero})
    sizes = SimpleNamespace(cp_size=cp, sp_size=sp)
    state = SimpleNamespace(deepspeed_plugin=plugin)
    return SimpleNamespace(parallelism_config=sizes, num_processes=processes, state=state)


def test_reductions_that_would_multiply_gradients_are_refused():
    require_right_gradients(accelerator(sp=2))
    require_right_gradients(accelerator(sp=2, reduce_scatter=True))
    require_right_gradients(accelerator(cp=2, stage=0))
    require_right_gradients(accelerator(stage=2))
    require_right_gradients(SimpleNamespace(parallelism_config=None))
    for found, told in ((accelerator(sp=2, stage=2), "ZeRO-2"), (accelerator(sp=4, reduce_scatter=False), "ZeRO-3")):
        with pytest.raises(ValueError, match=rf"sp_size=[24]` with {told} .*times that of one process.*zero3"):
            require_right_gradients(found)


def test_rows_of_a_step_are_counted_once():
    args = SimpleNamespace(train_batch_size=3, gradient_accumulation_steps=2)
    for found, count in ((accelerator(), 24), (accelerator(cp=2), 12), (accelerator(sp=4), 6)):
        assert rows_in_step(SimpleNamespace(args=args, accelerator=found)) == count
        assert bool(describe_sharing(found)) == (count != 24)


def test_commands_refuse_it_before_they_load_anything(capsys, monkeypatch, pairs_file, tmp_path):
    for name, value in RING.items():
        monkeypatch.setenv(name, value)
    argv = arguments("nowhere", pairs_file, tmp_path)
    assert "`parallelism_config_cp_size=2` with `otpo align`" in refusal(align.main, capsys, argv)
    assert "`parallelism_config_cp_size=2` works beside FSDP alone" in refusal(sft.main, capsys, argv)


def test_attention_for_the_cpu_is_torch_s(monkeypatch):
    """The operator that the ring gets on the CPU: output, the logarithm of its sums, and gradients."""
    import ring_on_cpu

    query, key, value = (torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(3))
    out, log_sum, *rest = ring_on_cpu.flash_attention(query, key, value, is_causal=True)
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    scores = (query @ key.mT / 2).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    torch.testing.assert_close((out, log_sum), (want, scores.logsumexp(-1)))
    grad = torch.randn_like(out)
    found = ring_on_cpu.flash_attention_backward(
        grad, query.detach(), key.detach(), value.detach(), out.detach(), log_sum.detach(), *rest[:4], 0.0, True, 0, 0
    )
    torch.testing.assert_close(found, torch.autograd.grad(want, (query, key, value), grad))

"""Experts spread over processes: two of them, over gloo, against one with the whole model.

The file is over 350 lines because its cases share one launched worker and what it reports.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from cli_helpers import arguments, launched, python, refusal
from compass_helpers import TINY, compass_model
from expert_parallel_helpers import CLOSE, ENVIRONMENT, assert_saved, by_step, result, start
from expert_parallel_worker import STEPS, losses, rows
from expert_parallel_worker import arguments as training_arguments
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextForCausalLM,
    Trainer,
)

from moe_backbone.conversion.exporting import export_model
from moe_backbone.conversion.tensors import read_tensors
from moe_backbone.expert_parallel.deepspeed_config import expert_parallel_config
from moe_backbone.expert_parallel.deepspeed_patch import KNOWN_VERSIONS, UNTESTED, patch_deepspeed, require_deepspeed
from moe_backbone.expert_parallel.deepspeed_trainer import separate_experts
from moe_backbone.expert_parallel.resume import LAYOUT_FILE, Layout, fit_checkpoint
from moe_backbone.expert_parallel.sizes import check_expert_parallel
from moe_backbone.model.saved_code import AUTO_MAP
from otpo.cli import align, pretrain
from otpo.cli.launching import expert_parallel
from otpo.cli.running.command import find_checkpoint

pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its operator for the CPU")
SIZES = {**TINY, "router_aux_loss_coef": 0.1}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    qwen = Qwen3MoeConfig(**SIZES, moe_intermediate_size=24, num_experts=4)
    mixtral = MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=4)
    compass_model(num_experts=4, num_mtp_layers=1, num_shared_experts=1, router_aux_loss_coef=0.1).save_pretrained(
        folder / "compass"
    )
    compass_model(num_experts=4, num_mtp_layers=1, mtp_detach_head=True).save_pretrained(folder / "compass_detached")
    Qwen3MoeForCausalLM(qwen).save_pretrained(folder / "qwen3_moe")
    MixtralForCausalLM(mixtral).save_pretrained(folder / "mixtral")
    return {name: str(folder / name) for name in ("compass", "compass_detached", "qwen3_moe", "mixtral")}


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    """Losses of one process that takes the rows of both, one after the other."""
    model = AutoModelForCausalLM.from_pretrained(models["compass"])
    args = training_arguments(tmp_path_factory.mktemp("alone"), gradient_accumulation_steps=2, save_strategy="no")
    trainer = Trainer(model=model, args=args, train_dataset=rows())
    trainer.train()
    return losses(trainer)


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """A run of ZeRO-2 in two processes that share the experts, with its checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    return folder, result("train", folder, model=models["compass"])


@pytest.mark.lengthy
@pytest.mark.parametrize("gathers", [False, True], ids=["all_to_all", "gather"])
def test_the_layer_is_the_whole_experts(tmp_path, gathers):
    """Uneven tokens, none, an expert without any, all of them in one process or expert; every gradient."""
    errors = result("layers", tmp_path, gathers=gathers)
    assert len(errors) == 4 * 5 * 6
    assert max(errors.values()) < 1e-5, max(errors, key=errors.__getitem__)


@pytest.mark.lengthy
@pytest.mark.parametrize(
    ("name", "stage"),
    [("compass", 1), ("compass", 2), ("compass", 3), ("compass_detached", 3), ("qwen3_moe", 2), ("mixtral", 3)],
)
def test_five_steps_are_those_of_the_whole_model(models, tmp_path, name, stage):
    errors = result("engine", tmp_path, model=models[name], stage=stage)
    assert sum(part.startswith("gradient") for part in errors) > 20
    assert {"loss", "aux_loss"} <= errors.keys()
    assert max(errors.values()) < 1e-3, max(errors, key=errors.__getitem__)


@pytest.mark.lengthy
@pytest.mark.slow
def test_sixteen_experts_over_eight_processes(tmp_path):
    """Compass-v3's own setting, two experts in each process, at a tiny size."""
    model = compass_model(num_experts=16, num_experts_per_tok=4, router_aux_loss_coef=0.1)
    model.save_pretrained(tmp_path / "model")
    errors = result("engine", tmp_path, processes=8, model=str(tmp_path / "model"), stage=2)
    assert max(errors.values()) < 1e-3, max(errors, key=errors.__getitem__)


@pytest.mark.lengthy
def test_the_trainer_is_that_of_one_process(run, alone):
    folder, found = run
    assert found["engine"] == "DeepSpeedEngine"
    assert by_step(found) == pytest.approx(alone, abs=CLOSE)
    assert_saved(folder, found)
    index = json.loads((folder / "final" / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in index
    assert not any(".w1" in name or ".experts.experts" in name for name in index)


@pytest.mark.lengthy
@pytest.mark.parametrize("name", ["final", "checkpoint-4"])
def test_a_checkpoint_of_spread_experts_is_exported(run, tmp_path, name):
    """It has a shared expert, so transformers' Qwen3-Next answers as the trained model."""
    folder, found = run
    export_model(AutoConfig.from_pretrained(folder / name), read_tensors(folder / name), tmp_path / "final")
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert type(twin) is Qwen3NextForCausalLM
    ids = torch.stack([row["input_ids"] for row in rows()[:2]])
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(folder / name)(ids).logits
        torch.testing.assert_close(twin(ids).logits, want, rtol=0, atol=1e-5)
    if name == "final":
        assert_saved(tmp_path, found)


@pytest.mark.lengthy
@pytest.mark.parametrize("stage", [1, 3])
def test_other_stages_of_the_trainer(models, tmp_path, alone, stage):
    """And on from the middle with another size."""
    found = result("train", tmp_path, model=models["compass"], stage=stage)
    assert by_step(found) == pytest.approx(alone, abs=CLOSE)
    assert_saved(tmp_path, found)
    options = {"stage": stage, "ep_size": 1, "resume": str(tmp_path / "checkpoint-2")}
    found = result("train", tmp_path / "resumed", model=models["compass"], **options)
    assert by_step(found) == pytest.approx(alone, abs=CLOSE)


@pytest.mark.lengthy
@pytest.mark.parametrize("ep_size", [2, 1])
def test_a_checkpoint_resumes_in_this_and_another_size(run, models, tmp_path, alone, ep_size):
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(run[0] / "checkpoint-2", folder)
    found = result("train", tmp_path, model=models["compass"], ep_size=ep_size, resume=str(folder))
    assert by_step(found) == pytest.approx(alone, abs=CLOSE)
    assert_saved(tmp_path, found)


@pytest.mark.lengthy
@pytest.mark.parametrize("detach", [False, True])
def test_tensor_parallelism_of_transformers(tmp_path, detach):
    """With MTP layers, whose head is split like the model's."""
    sizes = {"vocab_size": 64, "num_experts": 4, "num_mtp_layers": 1, "num_shared_experts": 1}
    compass_model(**sizes).save_pretrained(tmp_path / "model")
    errors = result("tensor_parallel", tmp_path, model=str(tmp_path / "model"), mtp_detach_head=detach)
    assert "gradient of model.layers.2.eh_proj.weight" in errors and errors["expert_load"] == 0
    assert max(errors.values()) < 1e-4, max(errors, key=errors.__getitem__)


@pytest.mark.lengthy
def test_a_run_killed_while_saving_goes_on_from_the_last_good_checkpoint(models, tmp_path, alone):
    found, done = start("train", tmp_path, model=models["compass"], die_saving=True)
    assert found is None
    assert done.returncode
    assert (tmp_path / "checkpoint-4").is_dir()
    checkpoint = find_checkpoint("true", str(tmp_path))
    assert checkpoint == str(tmp_path / "checkpoint-2")
    found = result("train", tmp_path, model=models["compass"], resume=checkpoint)
    assert by_step(found) == pytest.approx(alone, abs=CLOSE)


@pytest.mark.lengthy
def test_a_process_that_dies_ends_the_run_and_is_named(models, tmp_path):
    found, done = start("train", tmp_path, model=models["compass"], die_at=1)
    assert found is None
    assert done.returncode
    assert "rank      : 1 (local_rank: 1)" in done.stderr
    assert "exitcode  : 17" in done.stderr


@pytest.mark.lengthy
def test_the_native_backend_is_that_of_one_process(models, tmp_path, alone):
    pytest.importorskip("transformers.distributed.expert_parallel", reason="transformers 5.21 or later")
    found = result("native", tmp_path, model=models["compass"])
    assert found["running"].startswith("2 of 4 in each process, over 2 process(es), in 3 layers; transformers' own")
    assert by_step(found) == pytest.approx(alone, abs=CLOSE)
    assert_saved(tmp_path, found)


@pytest.mark.lengthy
@pytest.mark.parametrize("backend", ["deepspeed", "transformers"])
def test_alignment_from_the_command_line(compass_folder, pairs_file, tmp_path, backend):
    """OTPO with its reference; the same losses whatever spreads the experts, and without spreading them."""
    found = {}
    for size in (1, 2):
        out = tmp_path / str(size)
        options = arguments(compass_folder, pairs_file, out, report=out / "report.json", expert_parallel_size=size)
        options += [
            "--expert_parallel_backend",
            backend,
            "--ddp_find_unused_parameters",
            "true",
            "--save_code",
            "true",
        ]
        done = python(*launched("otpo.cli.align", *options), **ENVIRONMENT)
        assert done.returncode == 0, done.stderr[-4000:]
        found[size] = json.loads((out / "report.json").read_text())["metrics"]["train"]
        assert ("parallel   2 of 4 in each process" in done.stdout) == (size == 2)
        spread = "the layers of expert parallelism, whose rows memcpy moves" if backend == "deepspeed" else "memcpy"
        running = spread if size == 2 else "grouped_mm"
        assert f"experts    run by {running}, the reference's too" in done.stdout
        AutoModelForCausalLM.from_pretrained(out)
        assert (out / "modeling_compass.py").is_file()
        assert json.loads((out / "config.json").read_text())["auto_map"] == AUTO_MAP
    for name in ("loss", "aux_loss", "rewards/margins"):
        assert found[2][name] == pytest.approx(found[1][name], rel=1e-3, abs=1e-5), name


@pytest.mark.lengthy
def test_a_bfloat16_reference(compass_folder, pairs_file, tmp_path):
    """The engine of a reference trains nothing, and has spread experts."""
    options = arguments(compass_folder, pairs_file, tmp_path, expert_parallel_size=2, bf16=True)
    done = python(*launched("otpo.cli.align", *options), **ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "parallel   2 of 4 in each process" in done.stdout


def test_the_optimizer_keeps_its_groups():
    model = compass_model(num_experts=4)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}])
    separate_experts(optimizer, model, 4)
    assert [group.get("moe", False) for group in optimizer.param_groups] == [False, True, False]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3, 0.0]
    assert optimizer.param_groups[1]["name"] == "ep_size_4"
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decayed) + len(others)
    assert {p.dim() for p in optimizer.param_groups[1]["params"]} == {3}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 16, 8, 8), r"does not divide the 16 experts. Set `expert_parallel_size` to one of \[1, 2, 4, 8\]"),
        ((16, 16, 16, 8), r"does not divide the 8 process\(es\) of a machine.*one of \[1, 2, 4, 8\]"),
        ((0, 16, 8, 8), "must be at least 1, got 0"),
        ((4, 16, 6, 6), r"does not divide the 6 process\(es\).*one of \[1, 2\]"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        check_expert_parallel(*sizes)


def test_the_configuration_and_its_errors(monkeypatch):
    config = expert_parallel_config("compass", 8, 1, base={"gradient_clipping": 0.5})
    assert config["expert_parallel"] == {"enabled": True, "autoep_size": 8, "preset_model": "otpo_compass"}
    assert config["zero_optimization"]["stage"] == 1
    assert config["gradient_clipping"] == 0.5
    assert (
        expert_parallel_config("compass", 8, 1, base={"zero_optimization": {"stage": 3}})["zero_optimization"]["stage"]
        == 3
    )
    with pytest.raises(
        ValueError,
        match=r"of type 'llama' can't be spread.*compass, .*qwen3_next can.*needs one entry in moe_backbone/",
    ):
        expert_parallel_config("llama", 2)
    with pytest.raises(ValueError, match=r"ZeRO stage 0 can't be trained and saved.*one of 1, 2, 3"):
        expert_parallel_config("compass", 2, 0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs DeepSpeed: `pip install 'otpo\[deepspeed\]'`"):
        expert_parallel_config("compass", 2)


@pytest.mark.parametrize(("version", "known"), [("0.19.8", True), ("0.19.9+cu130", True), ("0.20.0", False)])
def test_deepspeed_of_another_version_is_refused(monkeypatch, version, known):
    require_deepspeed()  # the installed one is known
    monkeypatch.delenv(UNTESTED, raising=False)
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    if known:
        return require_deepspeed()
    remedy = re.escape(f"pip install 'deepspeed{KNOWN_VERSIONS}'")
    for refused in (require_deepspeed, patch_deepspeed, lambda: expert_parallel_config("compass", 2)):
        with pytest.raises(ImportError, match=f"does not know the installed version {version}.*{remedy}"):
            refused()
    monkeypatch.setenv(UNTESTED, "1")
    require_deepspeed()


@pytest.mark.lengthy
def test_deepspeed_is_patched_by_the_call_alone_and_once():
    """Imports and configurations change nothing of it; the first call does, and a second one nothing more."""
    code = """
import deepspeed
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_presets import registry
def state():
    engine = deepspeed.DeepSpeedEngine._configure_bf16_optimizer
    return AutoEP._replace_moe_layer_without_retarget, AutoEP.ep_parser, engine, set(registry.PRESET_MODELS)
own = state()
from moe_backbone.expert_parallel import deepspeed_layer, deepspeed_trainer, expert_parallel_config, patch_deepspeed
expert_parallel_config("compass", 2)
assert state() == own
patch_deepspeed()
patched = state()
assert not any(new is old for new, old in zip(patched, own))
from moe_backbone.expert_parallel.presets import PRESETS
assert patched[3] - own[3] == set(PRESETS.values())
patch_deepspeed()
assert state() == patched
"""
    done = python("-c", code, **ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-4000:]


def test_checkpoints_that_cannot_be_resumed_exactly(tmp_path):
    with pytest.raises(ValueError, match=r"has no expert_parallel.json.*Start from its weights"):
        fit_checkpoint(tmp_path, Layout(2, 2, 2), {})
    (tmp_path / LAYOUT_FILE).write_text(json.dumps(Layout(2, 2, 2)._asdict()))
    with pytest.raises(ValueError, match="another `ep_size` or `world_size` can, another ZeRO stage can't"):
        fit_checkpoint(tmp_path, Layout(2, 2, 3), {})
    with pytest.raises(
        ValueError, match=r"frozen experts.*with `expert_parallel_size=2` on 2 process\(es\), or start"
    ):
        fit_checkpoint(tmp_path, Layout(1, 2, 2), {}, frozen=True)
    assert fit_checkpoint(tmp_path, Layout(2, 2, 2), {}, frozen=True) is False


def make_checkpoint(folder, file, layout):
    """What tells a checkpoint of DeepSpeed's, without its states."""
    (folder / "global_step1").mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    torch.save({}, folder / "scheduler.pt")
    (folder / file).parent.mkdir(exist_ok=True)
    if file == "pytorch_model_fsdp.bin":
        torch.save({}, folder / file)
        torch.save({}, folder / "optimizer.bin")
    else:
        (folder / file).write_text(json.dumps(layout._asdict()))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            LAYOUT_FILE,
            "experts spread over 2 process.*Set `expert_parallel_size` as it was.*`model_name_or_path=.*ckpt`",
        ),
        (
            "latest",
            "has the optimizer's states of DeepSpeed, and this run is without it. Run as the checkpoint was saved",
        ),
        (
            "optimizer/.metadata",
            "has the optimizer's states of transformers' expert parallelism, and this run is without it. Run as the",
        ),
        (
            "pytorch_model_fsdp.bin",
            "has the optimizer's states of FSDP, and this run is without it. Run as the checkpoint was saved",
        ),
    ],
)
def test_states_of_the_optimizer_are_not_lost_quietly(
    capsys, compass_folder, pairs_file, tmp_path, own_process, file, message
):
    make_checkpoint(tmp_path / "ckpt", file, Layout(2, 2, 2))
    argv = arguments(compass_folder, pairs_file, tmp_path, resume_from_checkpoint=tmp_path / "ckpt")
    assert re.search(message, refusal(align.main, capsys, argv))


@pytest.mark.lengthy
def test_frozen_experts_resume_in_their_own_layout_alone(compass_folder, pairs_file, tmp_path):
    """One line from the command, before anything is trained."""
    make_checkpoint(tmp_path / "ckpt", LAYOUT_FILE, Layout(2, 4, 2))
    changes = {"resume_from_checkpoint": tmp_path / "ckpt", "expert_parallel_size": 2}
    done = python(
        *launched("otpo.cli.align", *arguments(compass_folder, pairs_file, tmp_path, **changes)), **ENVIRONMENT
    )
    assert done.returncode
    message = [line for line in done.stderr.splitlines() if "error: `resume" in line]
    assert len(message) == 1 and "Resume it with `expert_parallel_size=2` on 4 process(es)" in message[0]


def options(**changes):
    values = {
        "expert_parallel_size": 2,
        "expert_parallel_backend": "deepspeed",
        "model_name_or_path": None,
        "use_cpu": False,
        "save_only_model": False,
        "save_strategy": "steps",
    }
    return {**values, **changes}


@pytest.mark.parametrize(
    ("changes", "environ", "message"),
    [
        (
            {"expert_parallel_backend": "megatron"},
            {},
            "`expert_parallel_backend=megatron` is not known.*deepspeed,",
        ),
        (
            {"load_in_4bit": True},
            {},
            "`load_in_4bit=true`.*quantized weights can't be spread.*Leave `load_in_4bit` out",
        ),
        ({}, {}, "needs several processes. Add `--num_processes N`, a multiple of 2"),
        ({}, {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, "with FSDP.*Use zero2, zero3 or ddp"),
        (
            {},
            {"WORLD_SIZE": "2", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            "`offload_optimizer_device: cpu` of the accelerate configuration would be lost",
        ),
        ({"deepspeed": "{wrong"}, {"WORLD_SIZE": "2"}, "`deepspeed={wrong` is not JSON"),
    ],
)
def test_options_that_contradict_each_other(changes, environ, message):
    with pytest.raises(ValueError, match=message):
        expert_parallel.prepare(options(**changes), environ)


def test_transformers_without_expert_parallelism_is_refused(monkeypatch):
    given = options(expert_parallel_backend="transformers")
    assert expert_parallel.prepare(given, {"WORLD_SIZE": "2"}) == []
    monkeypatch.setattr(expert_parallel, "find_spec", lambda name: None if "checkpoint" in name else name)
    with pytest.raises(ValueError, match=r"needs transformers with `transformers.distributed.checkpoint`.*deepspeed"):
        expert_parallel.prepare(given, {"WORLD_SIZE": "2"})


def test_the_stage_is_that_of_the_accelerate_configuration():
    environ = {"WORLD_SIZE": "2", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_CONFIG_DS_FIELDS": "zero_stage"}
    name, config = expert_parallel.prepare(options(), environ)
    assert name == "--deepspeed"
    assert "ACCELERATE_CONFIG_DS_FIELDS" not in environ
    assert json.loads(config)["zero_optimization"]["stage"] == 3


def test_one_process_is_refused(capsys, compass_folder, pairs_file, tmp_path, own_process):
    argv = arguments(compass_folder, pairs_file, tmp_path, expert_parallel_size=2)
    assert "needs several processes" in refusal(align.main, capsys, argv)
    argv = [
        "--preset",
        "compass-tiny",
        "--tokenizer_name_or_path",
        compass_folder,
        "--dataset_name",
        "otpo/demo-corpus",
    ]
    argv += ["--expert_parallel_size", "2", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    assert "needs several processes" in refusal(pretrain.main, capsys, argv)
    assert Path(tmp_path).is_dir()
    assert STEPS == 4

"""The console script: its help is light, recipes and configurations say what they should, and `align` runs.

The file is over 350 lines because its runs are compared with one another.
"""

import argparse
import dataclasses
import json
import os
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config import load_config_from_file
from cli_helpers import ROOT, arguments, launched, python, refusal
from datasets import DatasetDict
from helpers import make_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

import otpo
from otpo.cli import align, env
from otpo.cli.align import make_parser
from otpo.cli.launching.engine import (
    cpu_request,
    requested_engines,
    require_accelerator,
    require_deepspeed,
    require_engine,
)
from otpo.cli.launching.launch import bundled_configs, is_launched, parse_launch, resolve_config
from otpo.cli.main import COMMANDS, main
from otpo.cli.options import short_help
from otpo.cli.options.run_options import changed_options, read_command_line
from otpo.data.loading import DataArguments, RowArguments, load_pairs, load_rows

pytestmark = pytest.mark.usefixtures("own_process")
RECIPES = ROOT / "examples/recipes"
HEAVY = {"torch", "trl", "transformers", "datasets", "accelerate", "peft", "numpy", "rich"}
OFFICIAL = {  # weights of the plan's two terms, beta, accumulation, GPUs, model, dataset
    "llama3-8b-ultrafeedback": (1.0, 0.2, 0.01, 16, 4, "Meta-Llama-3-8B-Instruct", "llama3-8b-instruct-uf"),
    "llama3-8b-helpsteer2": (1.0, 0.2, 0.01, 16, 4, "Meta-Llama-3-8B-Instruct", "llama3-8b-instruct-helpsteer2"),
    "llama3.2-3b-ultrafeedback": (0.1, 0.2, 0.1, 32, 2, "Llama-3.2-3B-Instruct", "llama3.2-3b-instruct-uf"),
    "llama3.2-3b-helpsteer2": (0.1, 0.2, 0.1, 32, 2, "Llama-3.2-3B-Instruct", "llama3.2-3b-instruct-helpsteer2"),
}


# The console script


@pytest.mark.lengthy
@pytest.mark.parametrize("word", ["", "--help", "--version"])
def test_help_and_version_import_nothing_heavy(word):
    code = (
        "import sys; before = set(sys.modules)\n"
        "from otpo.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}), file=sys.stderr)"
    )
    done = python("-c", code, *filter(None, [word]))
    modules = set(done.stderr.split())
    assert not HEAVY & modules
    assert modules - sys.stdlib_module_names == {"otpo"}  # so it takes no time
    if word == "--version":
        assert done.stdout.strip() == f"otpo {otpo.__version__}"
    else:
        assert all(name in done.stdout for name in COMMANDS)


def test_unknown_command_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train"])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "'train'" in message and all(name in message for name in COMMANDS)


@pytest.mark.parametrize("command", ["align", "pretrain", "sft"])
def test_the_short_help_is_that_of_the_parser(command, capsys):
    """Else run `python -m otpo.cli.options.short_help`."""
    assert short_help.make(command) == short_help.read(command)
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text == short_help.read(command) and len(text.splitlines()) < 200
    assert "--help-all" in text and "--output_dir TEXT" in text and "%%" not in text


@pytest.mark.parametrize("command", ["align", "pretrain", "sft"])
def test_the_short_help_has_all_options_of_our_own(command):
    arguments = import_module(f"otpo.cli.{command}").make_parser().dataclass_types
    ours = [of_class for of_class in arguments if of_class.__module__.startswith("otpo.")]
    names = {
        one.name
        for of_class in ours
        for base in of_class.__mro__
        if base.__module__.startswith(("otpo.", "moe_backbone."))
        for one in dataclasses.fields(base)
        if one.init and one.name in base.__annotations__ and one.metadata["help"] != argparse.SUPPRESS
    }
    names -= {"max_train_pairs", "max_eval_pairs", *short_help._HIDDEN}  # older names, and what nobody needs to set
    assert len(names) > 10
    text = short_help.read(command)
    assert not [name for name in sorted(names) if f"  --{name} " not in text]


def test_the_short_help_needs_no_torch():
    code = "import sys; from otpo.cli.main import main; main(['align', '-h']); print(*sys.modules, file=sys.stderr)"
    assert not HEAVY & set(python("-c", code).stderr.split())


def test_align_help_groups_the_options(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["align", "--help-all"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    places = [text.index(f"\n{title}") for title in ("token weights", "data and run", "model and", "preference loss")]
    assert places == sorted(places)
    assert places[0] < text.index("--ot_reg_m X") < places[1] < text.index("--report") < places[2]
    assert "%%" not in text
    assert re.search(r"trust_remote_code \[BOOL\].*?\(default: False\)", text, re.DOTALL)


def test_env_reports_versions_and_devices(capsys):
    assert main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["otpo"] == otpo.__version__
    assert set(report["packages"]) == set(env.PACKAGES)
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert f"torch: {report['packages']['torch']}" in text
    assert "HF_HUB_CACHE: " in text and str(Path.home()) not in text


def test_env_checks_the_supported_ranges():
    lines = ["torch>=2.11", 'triton>=3.6; extra == "triton"', "trl>=1.16", "rich>=13", 'POT>=0.9.5; extra == "dev"']
    versions = {"torch": "2.13.0+cpu", "triton": None, "trl": "1.15.0", "POT": "0.9.7.post1"}
    assert env.check_ranges(lines, versions) == {
        "torch": ">=2.11: met",
        "triton": ">=3.6: not installed",
        "trl": ">=1.16: not met",
        "pot": ">=0.9.5: met",
    }


# Recipes and configurations


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_recipes(name):
    reg, reg_m, beta, accumulation, gpus, model_name, dataset = OFFICIAL[name]
    path = RECIPES / f"{name}.yaml"
    parser = make_parser()
    given = read_command_line(parser, ["--config", str(path), "--use_cpu"])
    run, args, model, _ = parser.parse_args_into_dataclasses(given.arguments, look_for_args_file=False)
    assert (args.weighting, args.ot_cost_scale, args.ot_reg, args.ot_reg_m) == ("otpo", "release", reg, reg_m)
    assert (args.beta, args.learning_rate, args.max_grad_norm, args.seed) == (beta, 5e-7, 20.0, 42)
    assert (args.lr_scheduler_type.value, args.warmup_steps, args.num_train_epochs) == ("cosine", 0.1, 1)
    assert (args.max_length, args.bf16, args.optim, args.loss_type) == (2048, True, "adamw_torch", ["sigmoid"])
    assert args.get_warmup_steps(1000) == 100
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, accumulation)
    assert given.recipe_launcher == ["--accelerate_config", "zero3", "--num_processes", str(gpus)]
    assert 2 * accumulation * gpus == 128
    assert model.model_name_or_path == f"meta-llama/{model_name}"
    assert run.dataset_name == f"mimasss/{dataset}"
    assert f"otpo align --config examples/recipes/{name}.yaml" in path.read_text()


def test_no_recipe_is_left_untested():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*OFFICIAL, "demo"}


@pytest.mark.parametrize(
    ("name", "engine"),
    [("single_gpu", "NO"), ("ddp", "MULTI_GPU"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED"), ("fsdp2", "FSDP")],
)
def test_bundled_configurations(name, engine, monkeypatch):
    monkeypatch.setattr("otpo.cli.launching.launch.find_spec", lambda _: object())
    path = resolve_config(name)
    assert path == str(bundled_configs()[name])
    config = load_config_from_file(path)
    assert config.distributed_type.value == engine
    assert config.mixed_precision == "bf16"
    processes = 1 if engine == "NO" else 3
    args = parse_launch(["--num_processes", str(processes), "--accelerate_config", name], "align", ["--ot_reg", "0.1"])
    assert (args.num_processes, args.config_file) == (processes, path)
    assert (args.module, args.training_script) == (True, "otpo.cli.align")
    assert args.training_script_args == ["--ot_reg", "0.1"]
    assert parse_launch([f"--accelerate-config={name}"], "align", []).num_processes in (None, 1)


def test_configurations_by_path_and_of_trl(tmp_path):
    copy = tmp_path / "mine.yaml"
    copy.write_text(bundled_configs()["ddp"].read_text())
    assert resolve_config(str(copy)) == str(copy)
    assert resolve_config("multi_gpu").endswith("trl/accelerate_configs/multi_gpu.yaml")
    with pytest.raises(ValueError, match=r"`accelerate_config='zero9'` is neither .*'zero3'"):
        resolve_config("zero9")


def test_launcher_options_are_told_from_ours(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("ot_reg: 0.5\nnum_processes: 2\nmulti_gpu: true\ntpu: false\nenv: {OTPO_TEST_VARIABLE: 3}\n")
    given = read_command_line(
        make_parser(), [f"--config={recipe}", "--beta", "2", "--num_processes", "2", "--bf16", "false", "--tee=3"]
    )
    assert os.environ.pop("OTPO_TEST_VARIABLE") == "3"
    assert given.arguments == ["--beta", "2", "--bf16", "false"]
    assert given.launcher == ["--num_processes", "2", "--tee=3"]
    assert given.recipe_launcher == ["--num_processes", "2", "--multi_gpu"]
    assert changed_options(given) == {"ot_reg": 0.5, "beta": 2.0, "bf16": False}


def test_tokens_stay_out_of_reports():
    given = read_command_line(make_parser(), ["--hub_token", "secret", "--seed", "1"])
    assert changed_options(given) == {"hub_token": "left out", "seed": 1}


def test_processes_on_a_machine_without_gpus():
    assert parse_launch(["--num_processes", "2"], "align", []).multi_gpu
    with pytest.raises(ValueError, match=r"`--cpu` with `--num_processes 2` starts one process.*`--use_cpu`"):
        parse_launch(["--num_processes", "2", "--cpu"], "align", [])
    with pytest.raises(ValueError, match="`num_processes=2` with `accelerate_config=single_gpu`, which starts one"):
        parse_launch(["--num_processes", "2", "--accelerate_config", "single_gpu"], "align", [])


# The engine that was asked for is the engine that runs


def test_sharding_on_the_cpu_is_an_error_that_names_both_options():
    engines = requested_engines("zero3.json", None, {})
    require_accelerator(engines, None)
    with pytest.raises(ValueError, match=r"`deepspeed=zero3.json` asks for DEEPSPEED and `use_cpu=True`"):
        require_accelerator(engines, cpu_request(True, {}))
    engines = requested_engines(None, None, {"ACCELERATE_USE_FSDP": "true"})
    with pytest.raises(ValueError, match=r"ACCELERATE_USE_FSDP.*asks for FSDP and ACCELERATE_USE_CPU"):
        require_accelerator(engines, cpu_request(False, {"ACCELERATE_USE_CPU": "True"}))


@pytest.mark.parametrize("running", ["NO", "MULTI_GPU", "MULTI_CPU", "FSDP"])
def test_another_engine_than_asked_for(running):
    environ = {"ACCELERATE_USE_DEEPSPEED": "true"}
    engines = requested_engines(environ=environ)
    with pytest.raises(ValueError, match=f"asks for DEEPSPEED, but accelerate runs {running} with 4 process"):
        require_engine(engines, running, 4)
    require_engine(engines, "DEEPSPEED", 4)
    require_engine({}, running, 4)


def test_missing_deepspeed_is_named():
    with pytest.raises(ValueError, match=r"`deepspeed=a.json` needs DeepSpeed: `pip install 'otpo\[deepspeed\]'`"):
        require_deepspeed({"DEEPSPEED": "`deepspeed=a.json`"}, installed=False)


def test_the_trap_is_caught_before_anything_is_launched(capsys, model_folder, pairs_file, tmp_path):
    argv = arguments(model_folder, pairs_file, tmp_path)
    message = refusal(align.main, capsys, [*argv, "--accelerate_config", "fsdp2"])
    assert "`accelerate_config=fsdp2` asks for FSDP and `use_cpu=True`" in message


def test_the_trap_is_caught_in_launched_processes(capsys, monkeypatch, model_folder, pairs_file, tmp_path):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    message = refusal(align.main, capsys, arguments(model_folder, pairs_file, tmp_path))
    assert "ACCELERATE_USE_DEEPSPEED" in message and "`use_cpu=True`" in message


# Data


def test_sources_of_pairs(tmp_path, pairs_file):
    pairs = make_pairs(12)
    mixture = make_parser().parse_args_into_dataclasses(["--use_cpu"], look_for_args_file=False)[3]
    pairs.save_to_disk(tmp_path / "one")
    DatasetDict({"train": pairs, "test": pairs.select(range(5))}).save_to_disk(tmp_path / "both")
    pairs.to_parquet(tmp_path / "pairs.parquet")
    pairs.to_json(tmp_path / "pairs.jsonl.gz", compression="gzip")
    for name in ("one", "both", "pairs.parquet", "pairs.jsonl.gz"):
        data = DataArguments(dataset_name=str(tmp_path / name))
        train, test = load_pairs(data, mixture, seed=0, evaluate=name == "both")
        assert train["prompt"][:] == pairs["prompt"][:]
        assert (test is None) == (name != "both")

    first = DataArguments(dataset_name=pairs_file, max_train_pairs=4, max_eval_pairs=2)
    mixture.test_split_size = 3.0
    train, test = load_pairs(first, mixture, seed=0, evaluate=True)
    again, _ = load_pairs(first, mixture, seed=0, evaluate=True)
    assert (len(train), len(test)) == (4, 2)
    assert train["chosen"][:] == again["chosen"][:]
    demo = DataArguments(dataset_name="otpo/demo", max_train_pairs=7, dataset_test_split="test_templates")
    train, test = load_pairs(demo, mixture, seed=0, evaluate=True)
    assert len(train) == 7 and len(test) > 100


def test_bundled_instructions_and_documents_by_name():
    mixture = make_parser().parse_args_into_dataclasses(["--use_cpu"], look_for_args_file=False)[3]
    named = RowArguments(dataset_name="otpo/demo-instructions", dataset_config="1600")
    train, test = load_rows(named, mixture, (None, 9), seed=0, evaluate=True)
    assert (len(train), len(test)) == (1600, 9) and "messages" in train.column_names
    named = RowArguments(dataset_name="otpo/demo-corpus", dataset_config="3", dataset_streaming=True)
    train, test = load_rows(named, mixture, seed=0, evaluate=True)
    assert len(list(train)) == 3 and len(test) == 500 and "text" in test.column_names
    for wrong in ("many", "0", "-4"):
        with pytest.raises(ValueError, match=f"`dataset_config='{wrong}'`: of `otpo/demo-corpus` it is the number"):
            load_rows(
                RowArguments(dataset_name="otpo/demo-corpus", dataset_config=wrong), mixture, seed=0, evaluate=False
            )


def test_a_mixture_from_a_recipe(tmp_path, pairs_file):
    recipe = tmp_path / "recipe.yaml"
    source = {"path": "json", "data_files": pairs_file}
    recipe.write_text(yaml.safe_dump({"datasets": [source, source], "test_split_size": 6, "use_cpu": True}))
    parser = make_parser()
    given = read_command_line(parser, ["--config", str(recipe)])
    data, _, _, mixture = parser.parse_args_into_dataclasses(given.arguments, look_for_args_file=False)
    train, test = load_pairs(data, mixture, seed=0, evaluate=True)
    assert (len(train), len(test)) == (18, 6)


# What is refused, with one message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": None}, "Set `dataset_name` to a name on the Hub.*`datasets`"),
        ({"dataset_name": "/nowhere/pairs.jsonl"}, "`dataset_name`: the file /nowhere/pairs.jsonl does not exist"),
        ({"dataset_name": "nobody/nothing"}, "`dataset_name='nobody/nothing'` is no local file or folder"),
        ({"model_name_or_path": None}, "Set `model_name_or_path`"),
        ({"model_name_or_path": "/nowhere"}, "`model_name_or_path=/nowhere`: there is no such folder"),
        ({"weighting": "otop"}, "argument --weighting: invalid choice: 'otop'"),
        ({"ot_reg": 0}, r"`ot_reg` must be a positive finite number, got 0\.0"),
        ({"adam_beta2": 1.0}, r"`adam_beta2` must be at least 0 and below 1, got 1\.0"),
        ({"adam_epsilon": -1}, r"`adam_epsilon` must be a finite number of at least 0, got -1"),
        ({"ot_reg": "much"}, "argument --ot_reg/--ot-reg: invalid float value"),
        ({"max_train_pairs": 0}, "`max_train_pairs` must be at least 1, got 0"),
        ({"dataset_train_split": "training", "dataset_name": "otpo/demo"}, "`dataset_train_split='training'`"),
        ({"do_eval": True}, r"`dataset_test_split='test'`: the dataset has the split\(s\) \['train'\]"),
        ({"resume_from_checkpoint": True}, "`resume_from_checkpoint=true`: there is no checkpoint in `output_dir="),
        ({"resume_from_checkpoint": "/nowhere"}, "`resume_from_checkpoint=/nowhere`: there is no such folder"),
        ({"config": "/nowhere.yaml"}, "`--config /nowhere.yaml`: there is no such file"),
        ({"ot_rge": 3}, r"Unknown option among \['--ot_rge', '3'\]"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_refused(capsys, model_folder, pairs_file, tmp_path, changes, message):
    assert re.search(
        message, refusal(align.main, capsys, arguments(model_folder, pairs_file, tmp_path / "out", **changes))
    )


def test_typos_in_a_recipe_are_refused(capsys, model_folder, pairs_file, tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("ot_rge: 3\n")
    argv = [*arguments(model_folder, pairs_file, tmp_path), "--config", str(recipe)]
    assert "--ot_rge" in refusal(align.main, capsys, argv)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert is_launched(os.environ)
    assert "--ot_rge" in refusal(align.main, capsys, argv)


def test_the_trace_of_a_refusal_can_be_asked_for(monkeypatch, pairs_file, tmp_path):
    monkeypatch.setenv("OTPO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="there is no such folder"):
        align.main(arguments("/nowhere", pairs_file, tmp_path))


def test_a_fault_in_training_keeps_its_trace(monkeypatch, model_folder, pairs_file, tmp_path):
    def fail(*_args, **_kwargs):
        raise ValueError("not an option's fault")

    monkeypatch.setattr("otpo.OTPOTrainer.train", fail)
    with pytest.raises(ValueError, match="not an option's fault"):
        align.main(arguments(model_folder, pairs_file, tmp_path))


# Runs


@pytest.mark.lengthy
def test_a_run_in_a_process_of_its_own(model_folder, pairs_file, tmp_path):
    report = tmp_path / "reports/run.json"
    changes = {"do_eval": True, "test_split_size": 4, "report": report, "weighting": "budget"}
    changes |= {"row_layout": "shared_prompt"}
    done = python("-m", "otpo.cli.align", *arguments(model_folder, pairs_file, tmp_path / "out", **changes))
    assert done.returncode == 0, done.stderr
    rows = "rows       shared_prompt (attention by a mask over all tokens of a batch; row_layout=shared_prompt)"
    for line in ("engine     NO, 1 process", "weighting  budget", rows, "pairs      8 to train on, 4 to evaluate on"):
        assert line in done.stdout
    assert f"saved      model and tokenizer in {tmp_path / 'out'}" in done.stdout
    AutoTokenizer.from_pretrained(tmp_path / "out")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(model_folder)
    assert not trained.lm_head.weight.equal(before.lm_head.weight)

    written = json.loads(report.read_text())
    assert written["metrics"]["train"]["step"] == 2 and "rewards/margins" in written["metrics"]["train"]
    assert written["metrics"]["eval"]["step"] == 2 and "eval_loss" in written["metrics"]["eval"]
    assert written["options"]["weighting"] == "budget" and written["options"]["learning_rate"] == 0.01
    assert "ot_reg" not in written["options"]
    assert written["device"] == "cpu" and written["seconds"] > 0
    assert {"torch", "transformers", "trl", "otpo"} <= set(written["versions"])


def test_adapters(model_folder, pairs_file, tmp_path, capsys):
    argv = arguments(model_folder, pairs_file, tmp_path, use_peft=True, lora_r=1, lora_target_modules="all-linear")
    assert align.main(argv) == 0
    line = re.search(r"([\d,]+) parameters, ([\d,]+) trainable", capsys.readouterr().out)
    total, trainable = (int(number.replace(",", "")) for number in line.groups())
    assert 0 < trainable < total / 5
    assert (tmp_path / "adapter_model.safetensors").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("adapters", [None, "all-linear"])
def test_compass_models(compass_folder, pairs_file, tmp_path, capsys, adapters):
    changes = {} if adapters is None else {"use_peft": True, "lora_target_modules": adapters}
    assert align.main(arguments(compass_folder, pairs_file, tmp_path, **changes)) == 0
    printed = capsys.readouterr().out
    assert "mtp        1 layer(s) frozen: their loss is left out, `mtp_loss_coef` is set to 0" in printed
    if adapters is None:
        trained, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path, compass_folder))
        names = dict(before.named_parameters())
        moved = {name for name, value in trained.named_parameters() if not value.equal(names[name])}
        assert "model.layers.1.mlp.experts.down_proj" in moved
        assert not [name for name in moved if name.startswith("model.layers.2.")]


def test_resuming(model_folder, pairs_file, tmp_path, capsys):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    straight, other = tmp_path / "straight", tmp_path / "other"
    assert align.main(arguments(model_folder, pairs_file, straight, **saving)) == 0
    capsys.readouterr()
    last = straight / "checkpoint-2"
    argv = arguments(model_folder, pairs_file, other, **saving, resume_from_checkpoint=last)
    assert align.main(argv) == 0
    assert f"resuming   from {last}" in capsys.readouterr().out
    weights = [AutoModelForCausalLM.from_pretrained(folder).lm_head.weight for folder in (straight, other)]
    assert weights[0].equal(weights[1])
    argv = arguments(model_folder, pairs_file, straight, **{**saving, "max_steps": 4}, resume_from_checkpoint=True)
    assert align.main(argv) == 0
    assert f"resuming   from {straight / 'checkpoint-3'}" in capsys.readouterr().out


@pytest.mark.lengthy
def test_two_processes_under_accelerate(model_folder, pairs_file, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_processes: 7\nweighting: otpo\n")  # the launcher's line stands back
    launch = launched("otpo.cli.align", "--config", str(recipe))
    done = python(*launch, *arguments(model_folder, pairs_file, tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("engine     MULTI_CPU, 2 processes") == 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.lengthy
def test_launching_itself_passes_the_exit_code_on(model_folder, pairs_file, tmp_path):
    argv = arguments(model_folder, pairs_file, tmp_path, ot_reg=0)
    done = python("-m", "otpo.cli.main", "align", *argv, "--num_processes", "1")
    assert done.returncode == 2
    assert done.stderr.count("`ot_reg` must be a positive finite number, got 0.0") == 1
    assert "Traceback" not in done.stderr

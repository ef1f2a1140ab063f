"""The rows of the launching table: command, model and adapter, under each engine, as their users type them."""

import json
import sys
from pathlib import Path
from typing import NamedTuple

SINGLE = "single"
"""One process, which every other engine is compared with."""
ADAPTERS = ("full", "lora")


class Case(NamedTuple):
    """What is trained, and on what."""

    command: str  # pretrain, sft or align
    model: str  # one of `materials.MODELS`
    adapter: str  # one of `ADAPTERS`


class Engine(NamedTuple):
    """How processes are started and what trains in them.

    Attributes:
        on_gpus: The options that a user adds on GPUs.
        on_cpu: The same on CPU processes; None where the engine does not run there.
        processes: How many there are.
        experts: Whether it spreads experts, so that a dense model has no use for it.
    """

    on_gpus: tuple[str, ...]
    on_cpu: tuple[str, ...] | None
    processes: int = 2
    experts: bool = False


_TWO = ("--num_processes", "2")
_SPREAD = ("--expert_parallel_size", "2")
_NATIVE = (*_TWO, *_SPREAD, "--expert_parallel_backend", "transformers")


def _config(name: str) -> tuple[str, ...]:
    return ("--accelerate_config", name, *_TWO)


def _stage(stage: int) -> tuple[str, ...]:
    return (*_TWO, *_SPREAD, "--deepspeed", json.dumps({"zero_optimization": {"stage": stage}}))


_ZERO1 = ("--use_deepspeed", "--zero_stage", "1", *_TWO)
ENGINES: dict[str, Engine] = {
    SINGLE: Engine((), (), processes=1),
    "ddp": Engine(_config("ddp"), _TWO),
    "accelerate-launch-ddp": Engine(("--multi_gpu", *_TWO), ("--multi_gpu", *_TWO)),
    "zero1": Engine(_ZERO1, None),
    "zero2": Engine(_config("zero2"), None),
    "zero3": Engine(_config("zero3"), None),
    "fsdp2": Engine(_config("fsdp2"), None),
    "experts-zero1": Engine((*_ZERO1, *_SPREAD), _stage(1), experts=True),
    "experts-zero2": Engine((*_config("zero2"), *_SPREAD), _stage(2), experts=True),
    "experts-zero3": Engine((*_config("zero3"), *_SPREAD), _stage(3), experts=True),
    "experts-transformers": Engine(_NATIVE, _NATIVE, experts=True),
    "device-map": Engine(("--model_init_kwargs", '{"device_map": "balanced"}'), None),
}
"""By name. Without expert parallelism accelerate leaves DeepSpeed and FSDP out on the CPU, and `otpo` refuses them."""
_OF_ONE_CASE = {
    "accelerate-launch-ddp": Case("align", "compass", "full"),
    "device-map": Case("align", "qwen3", "full"),
}

CASES = (
    Case("pretrain", "compass", "full"),
    Case("sft", "compass", "full"),
    *(Case("align", name, "full") for name in ("compass", "mixtral", "qwen3_moe", "qwen3")),
    *(Case("align", name, "lora") for name in ("compass", "qwen3_moe")),
)


class Row(NamedTuple):
    """A row of the table."""

    case: Case
    engine: str

    @property
    def name(self) -> str:
        """Command, model, adapter and engine."""
        return "/".join((*self.case, self.engine))


def all_rows() -> list[Row]:
    """The whole table, the single processes first, since all others are compared with them."""
    rows = [Row(case, name) for name in ENGINES for case in CASES if _belongs(case, name)]
    return sorted(rows, key=lambda row: row.engine != SINGLE)


def _belongs(case: Case, engine: str) -> bool:
    if engine in _OF_ONE_CASE:
        return _OF_ONE_CASE[engine] == case
    return case.model != "qwen3" or not ENGINES[engine].experts


class Setting(NamedTuple):
    """What holds for all rows.

    Attributes:
        materials: Folder of models and data.
        on_gpus: Whether GPUs are used.
        bf16: Whether the trainings compute in bfloat16, in float32 otherwise.
        steps: Of each training.
        save_steps: Steps between checkpoints; the last step has one.
        schedule: Of the learning rate. One that stands still hides whether a resumed run has its schedule's.
    """

    materials: Path
    on_gpus: bool
    bf16: bool
    steps: int
    save_steps: int
    schedule: str = "constant"


def command_line(row: Row, setting: Setting, output: Path, port: int = 0, rank_batch: int = 2) -> list[str]:
    """The words that start a row.

    One process takes as many micro-batches a step as another engine has processes, so that each step has the same rows
    in the same micro-batches.

    Args:
        row: Of the table.
        setting: Of all rows.
        output: Folder of the run.
        port: Of the processes' meeting, where there are several.
        rank_batch: Rows of a micro-batch.
    """
    engine = ENGINES[row.engine]
    options = [*_options_of(row.case, setting.materials), "--output_dir", str(output)]
    options += ["--per_device_train_batch_size", str(rank_batch), "--max_steps", str(setting.steps)]
    options += ["--save_strategy", "steps", "--save_steps", str(setting.save_steps), "--logging_steps", "1"]
    options += ["--learning_rate", "0.01", "--lr_scheduler_type", setting.schedule, "--adam_epsilon", "1e-4"]
    options += ["--report_to", "none", "--disable_tqdm", "true", "--bf16", str(setting.bf16).lower(), "--seed", "7"]
    if engine.processes == 1:
        options += ["--gradient_accumulation_steps", "2"]
    if not setting.on_gpus:
        options += ["--use_cpu", "true"]
    own = engine.on_gpus if setting.on_gpus else engine.on_cpu
    if own is None:
        raise ValueError(f"{row.engine} does not run on CPU processes.")
    launcher = list(own)
    if engine.processes > 1:
        launcher += ["--main_process_port", str(port)]
        if not setting.bf16:
            launcher += ["--mixed_precision", "no"]
    if row.engine.startswith("accelerate-launch"):
        launcher += ["--num_machines", "1", "--dynamo_backend", "no"]
        module = f"otpo.cli.{row.case.command}"
        return [sys.executable, "-m", "accelerate.commands.launch", *launcher, "-m", module, *options]
    return [sys.executable, "-m", "otpo", row.case.command, *options, *launcher]


def as_typed(words: list[str], setting: Setting, output: Path) -> str:
    """A command line as its user would type it, without this machine's folders."""
    shown = " ".join(words[1:]).replace("-m accelerate.commands.launch", "accelerate launch")
    shown = shown.removeprefix("-m ")
    return shown.replace(str(output), "OUTPUT").replace(str(setting.materials), "MATERIALS")


def _options_of(case: Case, materials: Path) -> list[str]:
    files = {"pretrain": "tokens.parquet", "sft": "completions.jsonl", "align": "pairs.jsonl"}
    options = [
        "--model_name_or_path",
        str(materials / case.model),
        "--dataset_name",
        str(materials / files[case.command]),
    ]
    if case.command == "pretrain":
        options += ["--sequence_length", "16", "--compile_layers", "false"]
    if case.command == "align":
        options += ["--ot_reg", "0.1", "--beta", "0.5"]
    if case.adapter == "lora":
        options += ["--use_peft", "true", "--lora_r", "4", "--lora_dropout", "0"]
        options += ["--lora_target_modules", "q_proj", "v_proj"]
        if case.model != "qwen3":
            options += ["--lora_target_parameters", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return options

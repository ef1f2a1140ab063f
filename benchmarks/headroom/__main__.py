"""Weightings on a task that leaves something to gain: own pairs, alignment, right answers; weightings x seeds, rounds.

    python -m benchmarks.headroom --task constraints --gguf SmolLM2.gguf --sft_steps 30 --output runs/constraints
    python -m benchmarks.headroom --task constraints --model FOLDER --only start --output runs/trial
    python -m benchmarks.headroom --task shop --model runs/demo_small/sft --output runs/shop

For each seed the start answers prompts several times, checkers judge, and the best and the worst make pairs. Every
weighting aligns the start on these same pairs, then on pairs of its own, round by round. After each round, greedy
answers to held-out prompts are counted. `dpo` is the same loss without weights. Jobs run on all visible GPUs; run the
command again to go on where it stopped. A seed's pairs and a weighting's rounds are kept whole or not at all.

The start of `shop` is the SFT model of `python examples/demo.py --scale small`; that of `questions` is the tiny one's,
`runs/demo/sft`, with `--languages en id pt`.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import yaml
from rich.console import Console

from benchmarks.ablation.cells import METHODS, NAMED, weightings_of
from otpo.cli.pairing.contents import model_digest
from otpo.data.constraints.checks import CONSTRAINTS
from otpo.data.demo import LANGUAGES

from .plan import OF_TASK, SHARED, TASKS, Job, Plan, jobs_of
from .processes import devices_of, run_jobs
from .report import write_report

WEIGHTINGS = ("dpo", "budget", "otpo", "contrast", "diff", "confpo", "surprisal")
_OWN = {"seed", "data_seed", "output_dir", "weighting", "bf16", "use_cpu"}


def read_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Plan]:
    """The command line and the plan; raises `ValueError` with what is wrong with it."""
    parser = argparse.ArgumentParser(
        "benchmarks.headroom", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--model", help="folder of a chat model: the start, or what --sft_steps make it of")
    parser.add_argument("--gguf", type=Path, help="GGUF file that is converted into OUTPUT/base, in place of --model")
    parser.add_argument("--weightings", nargs="+", default=list(WEIGHTINGS), metavar="NAME", help=" ".join(NAMED))
    parser.add_argument("--seeds", type=int, default=5, help="how many (default: 5)")
    parser.add_argument("--rounds", type=int, default=2, help="of pairs and alignment (default: 2)")
    parser.add_argument("--prompts", type=int, default=640, help="of a round (default: 640)")
    parser.add_argument("--samples", type=int, default=6, help="answers to each (default: 6)")
    parser.add_argument("--held_out", type=int, default=500, help="held-out prompts (default: 500)")
    parser.add_argument("--tokens", type=int, help="most tokens of an answer (default: 48, 80 or 24)")
    parser.add_argument("--batch", type=int, default=768, help="answers that are written at a time (default: 768)")
    parser.add_argument("--sft_steps", type=int, default=0, help="of constraints: the start's, of 16 (default: 0)")
    parser.add_argument("--sft_learning_rate", type=float, default=1e-4, help="(default: 1e-4)")
    parser.add_argument("--languages", nargs="+", choices=LANGUAGES, default=list(LANGUAGES), help="of the shop")
    shares = " ".join(f"{name}=SHARE" for name in CONSTRAINTS)
    parser.add_argument("--mix", nargs="+", metavar="NAME=SHARE", help=f"how often a prompt sets each: {shares}")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="options of OTPOConfig, for all")
    parser.add_argument("--only", choices=["start"], help="make and check the start alone")
    parser.add_argument("--report", action="store_true", help="run nothing, write the table of what is there")
    parser.add_argument("--per_gpu", type=int, default=3, help="processes that share a GPU (default: 3)")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no further job after these (default: 60)")
    parser.add_argument("--use_cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    least = {"seeds": 1, "rounds": 1, "prompts": 1, "samples": 2, "held_out": 2, "batch": 1, "per_gpu": 1}
    for name, low in least.items():
        if getattr(args, name) < low:
            raise ValueError(f"`--{name}` must be at least {low}, got {getattr(args, name)}.")
    if (args.model is None) == (args.gguf is None):
        raise ValueError(f"`--model {args.model}` and `--gguf {args.gguf}`: name one of the two.")
    if args.sft_steps and args.task != "constraints":
        raise ValueError(f"`--sft_steps {args.sft_steps}` is of `--task constraints`. Name a fine-tuned `--model`.")
    named = weightings_of(args.weightings)
    rivals = [name for name, options in named.items() if options.get("method", METHODS[0]) != METHODS[0]]
    if rivals:
        raise ValueError(f"`--weightings` has {rivals}, which are no weightings. Leave them out.")
    own = dict(OF_TASK[args.task])
    tokens = own.pop("tokens")
    training = {**SHARED, **own, **_pairs_of("set", args.set)}
    if taken := sorted(_OWN & set(training)):
        raise ValueError(f"`--set` has {taken}, which the command sets itself. Leave them out.")
    mix = None if args.mix is None else {name: float(share) for name, share in _pairs_of("mix", args.mix).items()}
    plan = Plan(
        task=args.task,
        model=str(args.model or args.output / "base"),
        output=str(args.output),
        weightings=named,
        seeds=tuple(range(args.seeds)),
        rounds=args.rounds,
        prompts=args.prompts,
        samples=args.samples,
        held_out=args.held_out,
        tokens=args.tokens or tokens,
        batch=args.batch,
        sft_steps=args.sft_steps,
        sft_learning_rate=args.sft_learning_rate,
        languages=tuple(args.languages),
        mix=mix,
        training=training,
        use_cpu=args.use_cpu,
    )
    return args, plan


def _pairs_of(option: str, words: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` as YAML reads the values."""
    if wrong := [word for word in words if "=" not in word]:
        raise ValueError(f"`--{option} {' '.join(wrong)}`: write NAME=VALUE.")
    return {name: _value(text) for name, text in (word.split("=", 1) for word in words)}


def _value(text: str) -> Any:
    """A value as YAML reads it, but that `2e-5` is a number here, which YAML takes for a word."""
    value = yaml.safe_load(text)
    with contextlib.suppress(TypeError, ValueError):
        return float(value) if isinstance(value, str) else value
    return value


_CONTENTS = "what is in `model`"


def require_same_plan(plan: Plan) -> None:
    """Notes the plan in its folder; raises a `ValueError` where results of another plan are there."""
    file = plan.folder / "plan.json"
    told = {**plan.identity(), "weightings": json.loads(json.dumps(plan.weightings)), "rounds": plan.rounds}
    if Path(plan.model).is_dir():  # not where only the report of a model is wanted that is gone
        told[_CONTENTS] = model_digest("model", plan.model)
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if told.get(_CONTENTS) is None or before.get(_CONTENTS) is None:  # as older plans, which did not note it
            told[_CONTENTS] = before[_CONTENTS] = told.get(_CONTENTS) or before.get(_CONTENTS)
        weightings = before["weightings"]
        other = [name for name in told if name != "weightings" and before.get(name) != told[name]]
        other += [name for name, own in told["weightings"].items() if weightings.get(name, own) != own]
        if other:
            raise ValueError(
                f"`--output {plan.output}` has results of another plan, which differs in {other}. Name another "
                f"folder, or remove {plan.output} to start anew."
            )
        told["weightings"] = {**weightings, **told["weightings"]}
    file.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison; 1 if a job failed, 2 if there is something wrong with what was asked."""
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    begin = time.monotonic()
    try:
        args, plan = read_arguments(argv)
        plan.folder.mkdir(parents=True, exist_ok=True)
        if args.report:
            require_same_plan(plan)
            console.print(write_report(plan))
            return 0
        if args.gguf is not None and not (Path(plan.model) / "config.json").is_file():
            from benchmarks.smollm2_hh.prepare import convert_model

            convert_model(args.gguf, Path(plan.model))
        if not (Path(plan.model) / "config.json").is_file():
            raise ValueError(f"`--model {plan.model}` is no folder of a model: it has no config.json.")
        require_same_plan(plan)
    except (ValueError, OSError) as error:
        console.print(str(error), style="red")
        return 2
    jobs = [Job("start")] if args.only == "start" else jobs_of(plan)
    devices = devices_of(plan, args.per_gpu)
    failures = run_jobs(plan, jobs, devices, lambda line: console.print(line), 60 * args.minutes)
    late = sum(failure.reason == "not reached in time" for failure in failures)
    if late:
        console.print(f"{late} jobs were not reached in time: give the same command again.", style="red")
    gpus = 0 if devices == [""] else len(set(devices))
    run = {"seconds": round(time.monotonic() - begin, 1), "gpus": gpus, "processes": len(devices)}
    run["device"] = torch.cuda.get_device_name(0) if gpus else "CPU"
    with (plan.folder / "runs.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(run) + "\n")
    try:
        console.print(write_report(plan))
    except ValueError as error:
        console.print(str(error), style="red")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

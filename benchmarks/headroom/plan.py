"""What a comparison is: its options, its tasks with their prompts and checks, its jobs and what each waits for."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from otpo.data import load_demo_constraints, load_demo_instructions, load_demo_preferences, load_demo_questions
from otpo.data.constraints.checks import check_constraints
from otpo.data.demo import LANGUAGES
from otpo.data.ecommerce.answers import check_answer

Rows = list[dict[str, Any]]
TASKS = ("constraints", "shop", "questions")
"""Instructions with constraints, the bundled shop's instructions (short and medium answers), its short questions."""
HELD_OUT = ("test", "test_templates")
SHARED: dict[str, Any] = {
    "loss_type": ["sigmoid", "sft"],
    "loss_weights": [1.0, 1.0],
    "beta": 0.1,
    "learning_rate": 2.0e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "per_device_train_batch_size": 16,
    "max_steps": 60,
    "gradient_checkpointing": False,
}
"""Options of `OTPOConfig` that all weightings share; `--set` changes them."""
OF_TASK: dict[str, dict[str, Any]] = {
    "constraints": {"tokens": 48},
    "shop": {"tokens": 80, "learning_rate": 1.0e-5},
    "questions": {"tokens": 24, "beta": 0.5, "learning_rate": 1.0e-3},
}
"""What a task has of its own: most tokens of an answer, options of the training."""
_SFT_SEED = 0
_HOW_IT_RUNS = ("output", "weightings", "seeds", "rounds")


@dataclass(frozen=True)
class Plan:
    """The options of a comparison.

    Attributes:
        task: One of [`TASKS`].
        model: Folder of a chat model: what `sft_steps` make the start of, or the start itself where they are 0.
        output: Folder.
        weightings: Options of `OTPOConfig` by name.
        seeds: Of prompts, answers and training.
        rounds: Of pairs and alignment, >= 1.
        prompts: Answered in a round, >= 1.
        samples: Answers to each, >= 2.
        held_out: Held-out prompts, half of them in wordings that no training has seen, >= 2.
        tokens: Most tokens of an answer.
        batch: Answers that are written at a time.
        sft_steps: Steps of 16 checked reference answers before anything else, 0 for none; of `constraints` alone.
        sft_learning_rate: Of these.
        languages: Of the shop.
        mix: How often a prompt sets each constraint; None for the task's default.
        training: Options of `OTPOConfig` that all weightings share.
        use_cpu: Whether GPUs are left alone.
    """

    task: str
    model: str
    output: str
    weightings: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    rounds: int = 2
    prompts: int = 640
    samples: int = 6
    held_out: int = 500
    tokens: int = 48
    batch: int = 768
    sft_steps: int = 0
    sft_learning_rate: float = 1.0e-4
    languages: tuple[str, ...] = tuple(LANGUAGES)
    mix: Mapping[str, float] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    use_cpu: bool = False

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.output)

    @property
    def start(self) -> Path:
        """The model that all weightings start from."""
        return self.folder / "start" if self.sft_steps else Path(self.model)

    def identity(self) -> dict[str, Any]:
        """What makes the results what they are, as JSON values; further seeds, weightings and rounds may be added."""
        told = json.loads(json.dumps(asdict(self)))
        return {name: value for name, value in told.items() if name not in _HOW_IT_RUNS}


class Job(NamedTuple):
    """What one process does at a time; its result is a file, which tells that it is done.

    Attributes:
        kind: `"start"` (make and check the model), `"pairs"` (of the first round) or `"cell"` (all rounds).
        seed: None of the start.
        weighting: Of a cell.
    """

    kind: str
    seed: int | None = None
    weighting: str = ""

    @property
    def name(self) -> str:
        """A file's name."""
        return {
            "start": "start",
            "pairs": f"pairs_seed{self.seed}",
            "cell": f"{self.weighting}_seed{self.seed}",
        }[self.kind]

    @property
    def needs(self) -> "Job | None":
        """The job whose result has to be there."""
        return {"start": None, "pairs": Job("start"), "cell": Job("pairs", self.seed)}[self.kind]


def jobs_of(plan: Plan) -> list[Job]:
    """All jobs, seed by seed, so that a run which is stopped early has compared something."""
    cells = [Job("cell", seed, name) for seed in plan.seeds for name in plan.weightings]
    return [Job("start"), *(Job("pairs", seed) for seed in plan.seeds), *cells]


def result_path(plan: Plan, job: Job) -> Path:
    """Where a job's result is, once it is done."""
    return plan.folder / "cells" / f"{job.name}.json"


def training_prompts(plan: Plan, seed: int, number: int) -> Rows:
    """The prompts of a round, others in each round and seed; none of them is held out."""
    drawn = 100 * (seed + 1) + number
    if plan.task == "constraints":
        rows: Any = load_demo_constraints("train", plan.prompts, drawn, mix=plan.mix)
    elif plan.task == "questions":
        rows = load_demo_questions("train", plan.languages, plan.prompts, drawn)
    else:
        # The bundled ones come first, and a model has been fine-tuned on them; a third of all are long.
        bundled = len(load_demo_instructions("train", plan.languages))
        rows = load_demo_instructions("train", plan.languages, bundled + 2 * plan.prompts, drawn)
        rows = rows.select(range(bundled, len(rows))).filter(lambda row: row["length"] != "long")
    return list(rows.take(plan.prompts))


def held_out_prompts(plan: Plan) -> dict[str, Rows]:
    """The held-out prompts of each split, the same for all."""
    half = plan.held_out // 2
    found: dict[str, Rows] = {}
    for split in HELD_OUT:
        if plan.task == "constraints":
            rows: Any = load_demo_constraints(split, half, mix=plan.mix)
        elif plan.task == "questions":
            rows = load_demo_questions(split, plan.languages, half)
        else:
            rows = load_demo_preferences(split, plan.languages, count=max(3 * half, 252))
            rows = rows.filter(lambda row: row["length"] != "long").shuffle(seed=0)
        found[split] = list(rows.take(half))
    return found


def is_right(row: Mapping[str, Any], answer: str) -> bool:
    """Whether an answer is right in everything."""
    return (check_constraints if "constraints" in row else check_answer)(row, answer)["all"]


def sft_rows(plan: Plan) -> Any:
    """Prompts with checked reference answers for the start."""
    rows = load_demo_constraints("train", max(16 * plan.sft_steps, 16), _SFT_SEED, mix=plan.mix)
    return rows.select_columns(["prompt", "completion"])

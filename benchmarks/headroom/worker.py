"""What a process does: makes the start, draws and judges answers, aligns, counts right answers; models stay loaded.

One process runs many jobs, one after the other. It imports, loads the start and tokenizes the held-out prompts once.
Weights are float32 where they are trained, under bfloat16 autocast on a GPU, where answers are of a bfloat16 copy.
"""

import copy
import gc
import json
import tempfile
import time
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import datasets
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from transformers.utils import logging

import moe_backbone  # noqa: F401 - makes Compass known to transformers
from otpo import OTPOConfig, OTPOTrainer
from otpo.cli.iterating.steps import greedy_tokens
from otpo.cli.main import main as otpo
from otpo.cli.models.experts import set_answering_experts
from otpo.pairs.judges import load_judge
from otpo.pairs.ledger import ledger_path, open_ledger
from otpo.pairs.pairing import PairingRule
from otpo.pairs.prompts import find_prompt, prompt_tokens
from otpo.pairs.run import PairMaker, summarise
from otpo.pairs.sampling import SamplingOptions, TransformersSampler

from .plan import Job, Plan, Rows, held_out_prompts, is_right, result_path, sft_rows, training_prompts

State = Mapping[str, Tensor]


def run_job(worker: "Worker", job: Job) -> None:
    """Does a job and writes its result, which is whole where it is there."""
    begin = time.monotonic()
    if job.kind == "start":
        result = worker.make_start()
    elif job.kind == "pairs":
        result = worker.first_pairs(int(job.seed or 0))
    else:
        result = worker.cell(int(job.seed or 0), job.weighting)
    result = {**job._asdict(), **result, "seconds": round(time.monotonic() - begin, 2), "device": worker.device_name}
    path = result_path(worker.plan, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(result) + "\n", encoding="utf-8")
    part.replace(path)


class Worker:
    """A plan's models on one device.

    Args:
        plan: The options.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        on_gpu = not plan.use_cpu and torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        self.device_name = torch.cuda.get_device_name(0) if on_gpu else "cpu"
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        datasets.disable_progress_bars()

    @cached_property
    def tokenizer(self) -> Any:
        """The start's."""
        return AutoTokenizer.from_pretrained(self.plan.start)

    @cached_property
    def template(self) -> Any:
        """The start, in float32; it is copied and never written to."""
        model: Any = AutoModelForCausalLM.from_pretrained(self.plan.start, dtype=torch.float32)
        return model.to(self.device).eval()

    @cached_property
    def answerer(self) -> Any:
        """The model that answers; weights are copied into it."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        model = copy.deepcopy(self.template).to(dtype)
        set_answering_experts(model)
        return model

    @cached_property
    def held_out(self) -> dict[str, tuple[Rows, list[list[int]]]]:
        """By split, the held-out rows and the tokens of their prompts."""
        found = held_out_prompts(self.plan)
        return {
            split: (rows, [prompt_tokens(self.tokenizer, find_prompt(row), row) for row in rows])
            for split, rows in found.items()
        }

    def make_start(self) -> dict[str, Any]:
        """Fine-tunes the start where that is asked for, and counts what it gets right."""
        plan = self.plan
        if plan.sft_steps:
            rows = plan.folder / "start.jsonl"
            sft_rows(plan).to_json(rows)
            options: dict[str, Any] = {
                "model_name_or_path": plan.model,
                "dataset_name": rows,
                "output_dir": plan.start,
                "max_steps": plan.sft_steps,
                "per_device_train_batch_size": 16,
                "learning_rate": plan.sft_learning_rate,
                "lr_scheduler_type": "cosine",
                "warmup_steps": min(5, plan.sft_steps),
                "dtype": "float32",
                "bf16": self.device.type == "cuda",
                "use_cpu": self.device.type == "cpu",
                "gradient_checkpointing": False,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
            }
            code = otpo(["sft", *(word for name, value in options.items() for word in (f"--{name}", str(value)))])
            if code:
                raise RuntimeError(f"`otpo sft` of the start ended with {code}; its message stands above.")
        return {"rounds": [self.count_right(self.template.state_dict())]}

    def first_pairs(self, seed: int) -> dict[str, Any]:
        """The pairs of the first round, which all weightings of a seed share."""
        pairs, told = self.draw_pairs(self.template.state_dict(), seed, 1, f"pairs_seed{seed}")
        return {"pairs": pairs, "drawn": told}

    def cell(self, seed: int, weighting: str) -> dict[str, Any]:
        """All rounds of a weighting: each aligns on the own pairs of the model that it starts from."""
        stored = json.loads(result_path(self.plan, Job("pairs", seed)).read_text(encoding="utf-8"))
        pairs, told = stored["pairs"], stored["drawn"]
        state: State = self.template.state_dict()
        rounds = []
        for number in range(1, self.plan.rounds + 1):
            if number > 1:
                pairs, told = self.draw_pairs(state, seed, number, f"{weighting}_seed{seed}_round{number}")
            state, trained = self.align(state, pairs, weighting, seed, number)
            rounds.append({**told, **trained, **self.count_right(state)})
        return {"rounds": rounds}

    def draw_pairs(self, state: State, seed: int, number: int, name: str) -> tuple[Rows, dict[str, Any]]:
        """A model's own pairs, and how many prompts had which outcome."""
        plan, begin = self.plan, time.monotonic()
        model = self.load(state)
        rows = training_prompts(plan, seed, number)
        drawing = SamplingOptions(plan.samples, max_new_tokens=plan.tokens, seed=1000 * seed + number)
        maker = PairMaker(
            TransformersSampler(model, self.tokenizer, drawing),
            self.tokenizer,
            load_judge("checkers"),
            PairingRule(min_score_chosen=1.0),
            max(1, plan.batch // plan.samples),
        )
        path = ledger_path(plan.folder / "ledgers" / f"{name}.jsonl")
        if number > 1:  # where a cell was killed, its model is trained again, on a GPU not to the last bit
            path.unlink(missing_ok=True)
        with open_ledger(path, {"plan": plan.identity(), "cell": name}) as ledger:
            maker.run(rows, range(len(rows)), ledger, lambda _done: None)
            entries = ledger.entries
        pairs = [entry["pair"] for _, entry in sorted(entries.items()) if "pair" in entry]
        summary = summarise(entries)
        told = {"outcomes": summary.counts, "cut": round(summary.cut, 4)}
        return pairs, {**told, "pair_seconds": round(time.monotonic() - begin, 2)}

    def align(self, state: State, pairs: Rows, weighting: str, seed: int, number: int) -> tuple[State, dict[str, Any]]:
        """The weights after a round on its pairs, measured against the model as the round began."""
        plan, begin = self.plan, time.monotonic()
        least = int({**plan.training}.get("per_device_train_batch_size", 8))
        if len(pairs) < least:
            raise ValueError(
                f"{weighting}, seed {seed}, round {number}: {len(pairs)} pairs are fewer than a batch of {least}. "
                "Raise `--prompts`, or take a task that the model gets right more often."
            )
        policy, reference = copy.deepcopy(self.template), copy.deepcopy(self.template)
        options = {**plan.training, **plan.weightings[weighting]}
        policy.load_state_dict(state)
        # Nothing writes to the reference, so that it needs no copy of its own, unless it follows the policy.
        reference.load_state_dict(state, assign=not options.get("sync_ref_model"))
        data = Dataset.from_list([{side: pair[side] for side in ("prompt", "chosen", "rejected")} for pair in pairs])
        on_gpu = self.device.type == "cuda"
        with tempfile.TemporaryDirectory() as folder:
            shared = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 10}
            args = OTPOConfig(
                folder,
                use_cpu=not on_gpu,
                bf16=on_gpu,
                seed=seed + number,
                data_seed=seed + number,
                drop_identical_pairs=True,
                **{**shared, **options},
            )
            trainer = OTPOTrainer(policy, reference, args, train_dataset=data, processing_class=self.tokenizer)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            last = [entry for entry in trainer.state.log_history if "rewards/margins" in entry][-1]
            steps = trainer.state.global_step
        trained = policy.state_dict()
        del trainer, policy, reference
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        kept = {name.replace("/", "_"): last[name] for name in ("rewards/margins", "logps/chosen") if name in last}
        return trained, {"steps": steps, **kept, "align_seconds": round(time.monotonic() - begin, 2)}

    def count_right(self, state: State) -> dict[str, Any]:
        """Greedy answers to the held-out prompts: for each, whether it is right, and its tokens."""
        begin = time.monotonic()
        model = self.load(state)
        found: dict[str, Any] = {}
        for split, (rows, prompts) in self.held_out.items():
            written = greedy_tokens(model, self.tokenizer, prompts, self.plan.tokens, self.plan.batch)
            answers = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in written]
            right = [int(is_right(row, answer)) for row, answer in zip(rows, answers, strict=True)]
            kinds = [row["kind"] for row in rows]
            found[split] = {
                "right": right,
                "tokens": [len(tokens) for tokens in written],
                "kinds": kinds,
                "example": answers[0],
            }
        return {"held_out": found, "check_seconds": round(time.monotonic() - begin, 2)}

    def load(self, state: State) -> Any:
        """The model that answers, with these weights."""
        self.answerer.load_state_dict(state)
        self.answerer.generation_config.max_length = None  # or `generate` warns of two limits
        return self.answerer

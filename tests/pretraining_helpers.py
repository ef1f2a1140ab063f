"""A language small enough to be learnt in seconds, and short pretraining runs of the tiny preset on it."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from moe_backbone import CompassForCausalLM, preset
from moe_backbone.pretraining.packing import pack_documents
from moe_backbone.pretraining.trainer import PretrainingConfig, PretrainingTrainer

VOCABULARY = 64
SUCCESSORS = 4
"""After each token one of so many others is equally likely, so no loss goes below log(4) for long."""


def chain_documents(count: int, seed: int = 0) -> Dataset:
    """Documents of 4 to 40 tokens of one Markov chain; `seed` picks the documents, not the chain."""
    chain = torch.randint(1, VOCABULARY, (VOCABULARY, SUCCESSORS), generator=torch.Generator().manual_seed(1234))
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for _ in range(count):
        token = int(torch.randint(1, VOCABULARY, (1,), generator=generator))
        document = [token]
        for turn in torch.randint(
            SUCCESSORS, (int(torch.randint(3, 40, (1,), generator=generator)),), generator=generator
        ):
            document.append(int(chain[document[-1], int(turn)]))
        documents.append(document)
    return Dataset.from_dict({"input_ids": documents})


def tiny_compass(**changes: Any) -> CompassForCausalLM:
    torch.manual_seed(0)
    return CompassForCausalLM(preset("compass-tiny", vocab_size=VOCABULARY, pad_token_id=0, **changes))


def pretrainer(
    folder: Path,
    *,
    model: CompassForCausalLM | None = None,
    rows: Any = None,
    eval_rows: Any = None,
    **changes: Any,
) -> PretrainingTrainer:
    """A trainer of 8 rows of 32 tokens a step, in float32 on the CPU."""
    options = {
        "output_dir": str(folder),
        "sequence_length": 32,
        "per_device_train_batch_size": 8,
        "max_steps": 8,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 7,
        **changes,
    }
    rows = pack_documents(chain_documents(400), options["sequence_length"]) if rows is None else rows
    return PretrainingTrainer(model or tiny_compass(), PretrainingConfig(**options), rows, eval_rows)


def logged(trainer: PretrainingTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry and "loss" in entry]

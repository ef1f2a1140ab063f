"""Trains a reward model on the pairs of `prepare.py` and says how often it agrees with the people on held-out ones.

    python benchmarks/smollm2_hh/reward_model.py --folder runs/smollm2_hh --output runs/smollm2_hh/reward

It starts from the same SmolLM2-135M-Instruct as the policies and sees their training pairs. A judge of this size is
weak: read its win rates beside the agreement that is written to `agreement.json` in its folder.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from benchmarks.ablation.reward_judge import RewardJudge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder of model/, train.jsonl and test.jsonl")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max-steps", type=int, default=-1, help="default: two epochs")
    args = parser.parse_args()

    files = {split: str(args.folder / f"{split}.jsonl") for split in ("train", "test")}
    pairs: Any = load_dataset("json", data_files=files)
    tokenizer = AutoTokenizer.from_pretrained(args.folder / "model")
    model = AutoModelForSequenceClassification.from_pretrained(
        args.folder / "model", num_labels=1, dtype=torch.float32
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    config = RewardConfig(
        output_dir=str(args.output),
        per_device_train_batch_size=16,
        num_train_epochs=2,
        max_steps=args.max_steps,
        learning_rate=1e-5,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        max_length=512,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=20,
    )
    trainer = RewardTrainer(model, args=config, train_dataset=pairs["train"], processing_class=tokenizer)
    trainer.train()
    trainer.save_model()

    judge = RewardJudge(args.output)
    rows = pairs["test"]
    rewards = [
        judge.rewards(list(rows["prompt"]), [answer[-1]["content"] for answer in rows[side]])
        for side in ("chosen", "rejected")
    ]
    agreement = float((rewards[0] > rewards[1]).double().mean())
    result = {"held_out_pairs": len(rows), "agreement": round(agreement, 4)}
    (args.output / "agreement.json").write_text(json.dumps(result))
    print(result)


if __name__ == "__main__":
    main()

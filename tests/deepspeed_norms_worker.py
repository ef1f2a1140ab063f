"""What the processes run that `test_deepspeed_norms` starts; the first one writes a JSON result.

torchrun --nproc_per_node 2 deepspeed_norms_worker.py FOLDER STAGE
"""

import json
import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.append(str(Path(__file__).parent / "moe_backbone"))

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from no_waits import NoWaits, Waited
from test_pretraining_waits import STEPS, train

from moe_backbone.expert_parallel.deepspeed_norms import spare_waits

NUMBERS = {"plain": 1.0, "tiny": 1e-12, "large": 1e12, "inf": torch.inf, "nan": torch.nan}


def norms(optimizer: Any, rank: int) -> dict[str, list[float]]:
    """Of groups of gradients, by ours and by DeepSpeed's own."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, number in NUMBERS.items():
            torch.manual_seed(rank)
            size_of = number if math.isfinite(number) else 1.0
            gradients = [torch.randn(size).mul(size_of).to(dtype) for size in ((5, 3), (7,), (1,), (0,), (2,))]
            if name in ("inf", "nan") and rank == 1:
                gradients[1][2] = number
            pads = [torch.full((4,), 3.0, dtype=dtype) for _ in range(2)]
            for pad in pads:
                pad._zero_padding = True  # pyright: ignore - as DeepSpeed marks them
            padded = [pads[0], *gradients[:2], pads[1], *gradients[2:]]
            surplus = [*gradients, torch.full((4,), 3.0, dtype=dtype)]  # beyond what the weights are
            cases = {name: gradients, f"{name}, padded": padded, f"{name}, surplus": surplus, "empty": []}
            for case, group in cases.items():
                of = (group, list(gradients))
                ours = optimizer.get_grad_norm_direct(*of)
                theirs = type(optimizer).get_grad_norm_direct(optimizer, *of)
                assert ours.dtype == theirs.dtype == torch.float32 and ours.shape == theirs.shape == ()
                found[f"{case}, {dtype}"] = [float(ours), float(theirs)]
    return found


def clipped(optimizer: Any) -> dict[str, list[list[float]]]:
    """Gradients after clipping, by ours and by DeepSpeed's own."""
    found = {}
    for limit, scaled in ((0.0, 1.0), (1.0, 1.0), (1.0, 1024.0), (0.0, 1024.0)):
        optimizer.clip_grad, optimizer.loss_scaler.cur_scale = limit, scaled
        for norm in (0.5, 1.0, 4.0, torch.inf, torch.nan, -1.0):
            pair = []
            for clip in (optimizer.unscale_and_clip_grads, None):
                gradients = [torch.tensor([3.0, -1.0, 0.25]), [torch.tensor([2.0])]]
                total = torch.tensor(norm)
                clip(gradients, total) if clip else type(optimizer).unscale_and_clip_grads(optimizer, gradients, total)
                pair.append([*gradients[0].tolist(), *gradients[1][0].tolist()])
            found[f"{limit}, {norm}, {scaled}"] = pair
    return found


def waited(watch: NoWaits, *_: Any) -> None:
    """What a GPU does in `synchronize`, of which the CPU's says nothing."""
    if watch.on:
        raise Waited("synchronize")


def main(folder: Path, stage: int) -> None:
    config = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}, "zero_allow_untested_optimizer": True}
    config |= dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_clipping"), "auto")
    config["gradient_accumulation_steps"] = "auto"
    watch = NoWaits()
    get_accelerator().synchronize = partial(waited, watch)
    trainer = train(folder / "out", watch, torch.bfloat16, bf16=True, deepspeed=config, max_grad_norm=0.1)
    optimizer, rank = trainer.model_wrapped.optimizer, dist.get_rank()
    result = {"steps": trainer.state.global_step, "wanted": STEPS, "looked_at": len(watch.looked_at)}
    result |= {"spared": spare_waits(optimizer), "clip": optimizer.clip_grad}
    result |= {"norms": norms(optimizer, rank), "clipped": clipped(optimizer)}
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

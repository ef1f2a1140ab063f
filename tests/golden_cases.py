"""The committed transport problems with their weights in float64, and the tools to compare with them."""

from pathlib import Path

import numpy as np
import torch

GOLDEN = np.load(Path(__file__).parent / "otpo" / "golden_otpo_weights.npz")
CASES = sorted({key.split("/")[0] for key in GOLDEN})


def golden(case: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], dict[str, float], list[torch.Tensor]]:
    tensors = {key.split("/")[1]: torch.from_numpy(GOLDEN[key]) for key in GOLDEN if key.startswith(case)}
    states = [tensors["chosen_hidden"].to(dtype), tensors["rejected_hidden"].to(dtype)]
    masks = [tensors["chosen_mask"], tensors["rejected_mask"]]
    regs = {name: float(tensors[name]) for name in ("reg", "reg_m")}
    return states + masks, regs, [tensors["chosen_weights"], tensors["rejected_weights"]]


def relative_error(got: torch.Tensor, want: torch.Tensor, mask: torch.Tensor) -> float:
    return ((got.double() - want).abs() / want)[mask].max().item()


def problem(generator: torch.Generator, b: int, m: int, n: int, d: int = 8, scale: float = 3.0):
    chosen = scale * torch.randn(b, m, d, generator=generator, dtype=torch.float64)
    rejected = scale * torch.randn(b, n, d, generator=generator, dtype=torch.float64)
    return chosen, rejected

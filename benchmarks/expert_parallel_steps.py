"""Steps of `benchmarks.expert_parallel`: what processes tell each other, what is compared, timed and profiled."""

import contextlib
import datetime
import itertools
import re
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import harness
from benchmarks.kernel_trace import kernels_of
from benchmarks.step_clock import idle_of

GATES = {"nll_error": 0.05, "loss": 0.002, "dense_grad_norm": 0.03, "expert_grad_norm": 0.05}
"""Of tokens' losses the median difference, by their spread: bfloat16 leaves 0.01, and two experts exchanged in each
layer of compass-small make 0.23. Of the others the relative difference."""

KINDS = {
    "all_to_all": r"nccl.*(sendrecv|all_?to_?all)|gloo:all_to_all|alltoall_base_",
    "other_nccl": r"nccl|gloo:",
    "memcpy": r"_(permute|unpermute|unpermute_backward|place|count|scan|chunk)_kernel"
    r"|_(gather_rows|fill_indices|invert_index|weighted_restore_\w+|row_weighting_\w+)_kernel",
    "attention": r"flash|fmha|sdpa|attention",
    "gemm": r"gemm|cutlass|nvjet|grouped|sm90|splitk|aten::(mm|bmm|addmm)$",
    "optimizer": r"multi_tensor|adam|sgd",
    "rest": r"",
}
"""Kernels by name, the first that fits: collectives, row moves (ours, then AutoEP's; torch's own are in the rest)."""


class PeerFailed(Exception):
    """Another process could not go on; the message says why."""


class WrongResult(Exception):
    """Not what data parallelism computes."""


class Ranks:
    """The processes of the run; what they tell each other goes over the host, whatever happened on the GPUs."""

    def __init__(self, device: torch.device):
        self.device, self.rank, self.world = device, dist.get_rank(), dist.get_world_size()
        self.group: Any = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=5))

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value, or `PeerFailed`."""
        answers = self._exchange((True, value))
        for well, answer in answers:
            if not well:
                raise PeerFailed(answer)
        return [answer for _, answer in answers]

    def fail(self, why: str) -> None:
        """In place of the next `gather`."""
        self._exchange((False, why))

    def worst(self, values: dict[str, float]) -> dict[str, float]:
        """The largest of each value."""
        everyones = self.gather(values)
        return {name: max(values[name] for values in everyones) for name in values}

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def mib(self, what: str) -> float:
        """`memory_allocated` or `max_memory_allocated`, in MiB."""
        return getattr(torch.cuda, what)() / harness.MIB if self.device.type == "cuda" else 0.0

    def reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _exchange(self, message: tuple[bool, Any]) -> list[tuple[bool, Any]]:
        answers: list[Any] = [None] * self.world
        dist.all_gather_object(answers, message, group=self.group)
        return answers


def step(engine: Any, ids: Tensor) -> Tensor:
    """The loss of one training step."""
    loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
    engine.backward(loss)
    engine.step()
    return loss.detach()


def first_step(engine: Any, ids: Tensor, ranks: Ranks) -> dict[str, Any]:
    """What is compared: each token's loss, theirs, and the gradients' norms over all GPUs."""
    outputs = engine(input_ids=ids, labels=ids, use_cache=False)
    with torch.no_grad():
        logits = outputs.logits[:, :-1].float().flatten(0, 1)
        nll = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none").cpu()
        del logits
    loss = outputs.loss
    del outputs
    engine.backward(loss)
    ranks.synchronize()
    squares = torch.zeros(2, device=ids.device)
    groups = engine.optimizer.optimizer.param_groups
    for number, gradients in engine.optimizer.averaged_gradients.items():  # of each this GPU's part alone
        for gradient in gradients:
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
            squares[int(groups[number]["experts"])] += norm.square()
    dist.all_reduce(squares)
    engine.step()
    dense, experts = squares.sqrt().tolist()
    mean = statistics.fmean(ranks.gather(loss.item()))
    return {"nll": nll, "loss": mean, "dense_grad_norm": dense, "expert_grad_norm": experts}


def compare(found: dict[str, Any], expected: dict[str, Any], ranks: Ranks) -> dict[str, float]:
    """The differences that `GATES` bounds."""
    spread = expected["nll"].std()
    errors = {"nll_error": ((found["nll"] - expected["nll"]).abs().median() / spread).item()}
    for name in tuple(GATES)[1:]:
        errors[name] = abs(found[name] / expected[name] - 1)
    return ranks.worst(errors)


def measure_steps(engine: Any, ids: Tensor, steps: int, ranks: Ranks) -> float:
    """Median ms of a step on this GPU, host ahead where it can be."""
    on_gpu = ids.is_cuda
    ranks.synchronize()
    ranks.gather("here")
    marks: list[Any] = []
    for number in range(steps + 1):
        marks.append(torch.cuda.Event(enable_timing=True) if on_gpu else time.perf_counter())
        if on_gpu:
            marks[-1].record()
        if number < steps:
            step(engine, ids)
    ranks.synchronize()
    between = itertools.pairwise(marks)
    return statistics.median(a.elapsed_time(b) if on_gpu else 1e3 * (b - a) for a, b in between)


def profile_steps(engine: Any, ids: Tensor, ranks: Ranks, ms: float, steps: int = 2) -> dict[str, float]:
    """Shares of the kernels' time by kind, and of a step of `ms` without any, on the first GPU; all take part.

    The profiler slows the first GPU's host alone, so its collectives wait less for other GPUs than in a timed step.
    """
    activity = torch.profiler.ProfilerActivity.CUDA if ids.is_cuda else torch.profiler.ProfilerActivity.CPU
    first = ranks.rank == 0
    with torch.profiler.profile(activities=[activity]) if first else contextlib.nullcontext() as profile:
        for _ in range(steps):
            step(engine, ids)
        ranks.synchronize()
    if profile is None:
        return {}
    return shares_of(kernels_of(profile, on_gpu=ids.is_cuda), steps, ms / 1e3)


def shares_of(events: list[dict[str, Any]], steps: int, seconds: float) -> dict[str, float]:
    """Of kernels `{name, ts, dur}` of profiled steps: each kind's share of their time, and a step's without any.

    Args:
        events: The kernels.
        steps: Profiled.
        seconds: Of a step that nobody profiles, above 0.
    """
    spent = dict.fromkeys(KINDS, 0.0)
    for event in events:
        kind = next(kind for kind, names in KINDS.items() if re.search(names, event["name"], re.IGNORECASE))
        spent[kind] += event["dur"]
    total = sum(spent.values())
    shares = {f"{kind}_share": round(time_ / total, 4) for kind, time_ in spent.items()}
    return {**shares, "idle_share": round(idle_of(events, steps, seconds), 4)}

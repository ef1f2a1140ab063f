"""What a cut model's step says of the whole one, beside what others have published, with all arithmetic shown."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from moe_backbone.planning.hardware import find_gpu
from moe_backbone.planning.plan import make_plan
from moe_backbone.planning.setup import TrainingSetup

from .sizes import LAYERS, Case, plan_config


class Yardstick(NamedTuple):
    """A published time of a preference step of Qwen3-30B-A3B.

    Attributes:
        source: Who published it, and of what.
        seconds: Of a step; for a gate, what it has to be under.
        gpus: How many.
        tokens: Of a step, both rows of a pair; None where we know no number.
    """

    source: str
    seconds: float
    gpus: int
    tokens: int | None


YARDSTICKS = (
    Yardstick("ms-swift, DPO, TP 4 and EP 8, 46 GiB a GPU, rows packed to 8,192 tokens", 13, 8, None),
    Yardstick("NeMo-RL's gate, DPO, EP 8, 16 pairs of up to 4,096 tokens", 5, 8, 16 * 2 * 4096),
)


class Step(NamedTuple):
    """A measured step: seconds of so many layers."""

    layers: int
    seconds: float


def split(steps: Sequence[Step]) -> tuple[float, float] | None:
    """Seconds of a layer and of all else, from the fewest and the most layers; None of one number of layers."""
    first, last = min(steps), max(steps)
    if first.layers == last.layers:
        return None
    layer = (last.seconds - first.seconds) / (last.layers - first.layers)
    return layer, last.seconds - last.layers * layer


def arithmetic(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines that scale the rows of one adapter to 48 layers, and their tokens to each yardstick's.

    Rows of one number of layers give an upper bound: what does not grow with the layers is scaled too.

    Args:
        rows: Measured, of one adapter and the same GPUs and pairs, of one or several numbers of layers.
    """
    steps = [Step(int(row["layers"]), float(row["s_per_step"])) for row in rows]
    last = max(steps)
    gpus, tokens = int(rows[0]["gpus"]), int(rows[0]["tokens_per_step"])
    parts, bound = split(steps), ""
    if last.layers == LAYERS:
        whole = last.seconds
        lines = [f"{LAYERS} layers were measured: {whole:.3f} s a step of {tokens:,} tokens on {gpus} GPUs"]
    elif parts is None:
        whole, bound = last.seconds * LAYERS / last.layers, " at most"
        lines = [
            f"{last.layers} layers alone were measured; a second number of them tells what a layer takes",
            f"{LAYERS} layers, were all of a step in them: {last.seconds:.3f} x {LAYERS} / {last.layers} = "
            f"{whole:.3f} s at most a step of {tokens:,} tokens on {gpus} GPUs, since embeddings and head do not grow",
        ]
    else:
        layer, head = parts
        if layer <= 0:
            return [f"{last.layers} layers took no longer than {min(steps).layers}, so nothing is scaled"]
        # What is left for zero layers is the head, the weighting and the optimizer of embeddings and head.
        whole = (last.seconds - head) * LAYERS / last.layers + head
        first = min(steps)
        lines = [
            f"a layer takes ({last.seconds:.3f} - {first.seconds:.3f}) / ({last.layers} - {first.layers}) = "
            f"{layer:.4f} s, all else {last.seconds:.3f} - {last.layers} x {layer:.4f} = {head:.3f} s",
            f"{LAYERS} layers: ({last.seconds:.3f} - {head:.3f}) x {LAYERS} / {last.layers} + {head:.3f} = "
            f"{whole:.3f} s a step of {tokens:,} tokens on {gpus} GPUs",
        ]
    for yardstick in YARDSTICKS:
        of_kind = f"{yardstick.source}: {yardstick.seconds:g} s on {yardstick.gpus} GPUs"
        if yardstick.tokens is None:
            lines.append(f"{of_kind}; its tokens an iteration are not known to us, so it is not scaled")
            continue
        share = yardstick.tokens / yardstick.gpus / (tokens / gpus)
        lines.append(
            f"{of_kind}, {yardstick.tokens / yardstick.gpus:,.0f} tokens a GPU; ours has {tokens / gpus:,.0f}: "
            f"{whole:.3f} x {share:.3g} = {whole * share:.3f} s{bound}, were {yardstick.gpus} GPUs as fast "
            f"each as {gpus}; attention of longer rows and exchanges among more GPUs are not in it"
        )
    return lines


def plan_lines(case: Case, gpu: str = "h100", gpus: int = 8) -> list[str]:
    """What `otpo plan` says of a pretraining step of the whole model on 8 GPUs with as many tokens on each."""
    length = case.prompt + case.response
    setup = TrainingSetup(
        gpus_per_node=gpus,
        strategy="zero2",
        expert_parallel_size=gpus,
        micro_batch_size=2 * case.pairs,
        sequence_length=length,
        precision="bf16",
        gradient_checkpointing=True,
    )
    plan = make_plan(plan_config(), find_gpu(gpu), setup)
    return [
        f"`otpo plan`, {LAYERS} layers, every weight, {gpus} {gpu} with expert parallelism of {gpus}, ZeRO-2, "
        f"{2 * case.pairs} rows of {length} tokens a GPU: {plan.memory.allocated / 2**30:.1f} GiB a GPU, "
        f"{plan.time.total:.3f} s a step, all-to-all {plan.time.all_to_all:.3f} s",
        "  it plans a training step of the policy alone: alignment has a reference's forward pass beside it, and of "
        "every weight's training its weights",
    ]

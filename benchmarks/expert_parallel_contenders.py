"""Models, contenders and DeepSpeed engines of `benchmarks.expert_parallel`.

All contenders of a case start from the same weights: parameters have the same names in transformers' Qwen3-MoE and in
Compass, and are filled by name order from one seed. What is replaced afterwards takes its values from there.
"""

import contextlib
import gc
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_backbone.model.presets import PRESETS

BASE, NATIVE, AUTOEP = "data parallel", "deepspeed.moe.MoE", "AutoEP as it comes"
OURS, COMPASS, GATHERED = "ours", "ours, Compass", "ours, gathered"
COMPILED, BASE_COMPILED = "ours, as pretrain runs it", "data parallel, as pretrain runs it"
SMALL, BLOCK, FITS = "compass-small", "compass-v3 block", "only fits spread"
LARGEST_GROUP = 178_956_971
"""Numbers in a group of parameters, unless one tensor has more: DeepSpeed's own bound for experts. The step's
temporaries are of one group, so here it holds for data parallelism too."""


class Case(NamedTuple):
    """A model, its batch on each GPU, and who trains it. `sizes` are options of both configurations."""

    name: str
    sizes: dict[str, Any]
    rows: int
    length: int
    optimizer: str
    contenders: tuple[str, ...]

    def config(self, family: str) -> Any:
        """Of the losses the language model's alone, so that both families have the same."""
        if family == "compass":
            from moe_backbone import CompassConfig

            return CompassConfig(**self.sizes, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
        from transformers import Qwen3MoeConfig

        return Qwen3MoeConfig(**self.sizes, norm_topk_prob=True, router_aux_loss_coef=0.0)


def cases(world: int, memory: int, *, tiny: bool = False) -> list[Case]:
    """All cases.

    Args:
        world: GPUs.
        memory: Bytes of each.
        tiny: Sizes for the CPU.
    """
    contenders = (BASE, NATIVE, AUTOEP, OURS, GATHERED, BASE_COMPILED, COMPILED)
    if tiny:
        small, block = _sizes("compass-tiny"), _sizes("compass-tiny", hidden_size=192, num_hidden_layers=1)
        return [
            Case(SMALL, small, 2, 64, "adamw", (*contenders, COMPASS)),
            Case(BLOCK, block, 1, 96, "adamw", contenders),
            Case(FITS, block, 1, 96, "sgd", (OURS, BASE)),
        ]
    wide = {"vocab_size": 8192, "max_position_embeddings": 8192}
    block = _sizes("compass-v3", **wide, num_hidden_layers=1)
    deep = _sizes("compass-v3", **wide, num_hidden_layers=most_layers(block, world, memory))
    return [
        Case(SMALL, _sizes("compass-small"), 4, 4096, "adamw", (*contenders, COMPASS)),
        Case(BLOCK, block, 1, 4096, "adamw", contenders),
        Case(FITS, deep, 1, 4096, "sgd", (OURS, BASE)),  # ours first: it needs a GPU that nothing has filled before
    ]


def most_layers(sizes: dict[str, Any], world: int, memory: int) -> int:
    """Layers of which ours still trains with SGD.

    Its peak comes when DeepSpeed makes its optimizer: weights, their float32 copies and float32 zeros for gradients,
    10 bytes a number; all of them of an expert are divided, of other parameters all but the weights. Before that each
    GPU holds the whole model in bfloat16.
    """
    names = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    vocab, hidden, heads, groups, width = (sizes[name] for name in names)
    experts = 3 * sizes["num_experts"] * hidden * sizes["moe_intermediate_size"]
    dense = 2 * hidden * width * (heads + groups)
    layer = 10 / world * experts + (2 + 8 / world) * dense
    room = 0.94 * memory - (2 + 8 / world) * 2 * vocab * hidden
    return max(1, min(int(room / layer), int(0.75 * memory / (2 * (experts + dense)))))


def _sizes(preset: str, **changes: Any) -> dict[str, Any]:
    sizes = {name: value for name, value in PRESETS[preset].items() if name != "num_mtp_layers"}
    return {**sizes, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, **changes}


def make_model(case: Case, family: str, device: torch.device) -> Any:
    """In bfloat16 on the device, filled from the seed; the same on every GPU."""
    from transformers import Qwen3MoeForCausalLM

    from moe_backbone import CompassForCausalLM

    model_class: Any = CompassForCausalLM if family == "compass" else Qwen3MoeForCausalLM
    options = {"attn_implementation": "sdpa", "experts_implementation": "grouped_mm"}
    with torch.device(device):
        model = model_class._from_config(case.config(family), dtype=torch.bfloat16, **options)
    generator = torch.Generator(device).manual_seed(0)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.dim() > 1:  # norms stay at one
            parameter.data.normal_(std=0.02, generator=generator)
    return model.train()


def make_batch(case: Case, rank: int, device: torch.device) -> Tensor:
    """Token ids `[rows, length]`, others on every GPU."""
    generator = torch.Generator().manual_seed(1 + rank)
    return torch.randint(case.sizes["vocab_size"], (case.rows, case.length), generator=generator).to(device)


class SwiGLU(nn.Module):
    """An expert as `deepspeed.moe` wants it."""

    def __init__(self, hidden: int, width: int, dtype: torch.dtype):
        super().__init__()
        self.gate, self.up = (nn.Linear(hidden, width, bias=False, dtype=dtype) for _ in range(2))
        self.down = nn.Linear(width, hidden, bias=False, dtype=dtype)

    def forward(self, rows: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(rows)) * self.up(rows))


class NativeBlock(nn.Module):
    """`deepspeed.moe.MoE` in place of a block of transformers, with its weights; no token is dropped."""

    def __init__(self, block: Any, slots: int, world: int, rank: int):
        super().__init__()
        from deepspeed.moe.layer import MoE

        count, hidden, width = block.experts.down_proj.shape
        expert = SwiGLU(hidden, width, block.experts.down_proj.dtype)
        self.moe = MoE(hidden, expert, num_experts=count, ep_size=world, k=slots, drop_tokens=False)
        layer: Any = self.moe.deepspeed_moe
        layer.gate.wg.weight.data.copy_(block.gate.weight)
        for local, own in enumerate(layer.experts.deepspeed_experts, start=rank * count // world):
            gate, up = block.experts.gate_up_proj.data[local].chunk(2)
            for linear, weight in ((own.gate, gate), (own.up, up), (own.down, block.experts.down_proj.data[local])):
                linear.weight.data.copy_(weight)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.moe(hidden_states)[0]


def _nothing(model: Any, world: int, rank: int) -> dict[str, Any]:
    return {}


def _native(model: Any, world: int, rank: int) -> dict[str, Any]:
    for layer in model.model.layers:
        with torch.device(model.device):
            layer.mlp = NativeBlock(layer.mlp, model.config.num_experts_per_tok, world, rank)
    return {}


def _autoep(model: Any, world: int, rank: int) -> dict[str, Any]:
    _let_autoep_read_the_recorders()
    return {"expert_parallel": {"enabled": True, "autoep_size": world, "preset_model": "qwen3_moe"}}


def _ours(model: Any, world: int, rank: int) -> dict[str, Any]:
    from moe_backbone.expert_parallel.deepspeed_config import expert_parallel_config
    from moe_backbone.expert_parallel.deepspeed_patch import patch_deepspeed

    patch_deepspeed()
    config = expert_parallel_config(model.config.model_type, world)
    return {name: config[name] for name in ("expert_parallel", "timers")}


def _norms_alone(model: Any, world: int, rank: int) -> dict[str, Any]:
    """As `otpo pretrain` has it: no gradient is looked at by itself, and no clock waits for the device."""
    looks = {"enabled": True, "check_grad_overflow": False}
    return {"bf16": looks, "timers": {"throughput": {"synchronized": False}}}


def _ours_as_pretrain(model: Any, world: int, rank: int) -> dict[str, Any]:
    """The few gradients that all have are reduced when the backward pass is done, besides."""
    options = {**_norms_alone(model, world, rank), "zero_optimization": {"stage": 2}}
    return {**_ours(model, world, rank), **options}


def _gather(engine: Any, case: Case) -> None:
    from moe_backbone.expert_parallel.deepspeed_trainer import gather_tokens

    gather_tokens(engine.module, case.rows * case.length)


def _compile(engine: Any, case: Case) -> None:
    """As `otpo pretrain` has it: memcpy experts in compiled layers, and norms that no host waits for."""
    from moe_backbone.expert_parallel.deepspeed_norms import spare_waits
    from otpo.layouts.compiled import compile_layers

    if not spare_waits(engine.optimizer):
        raise RuntimeError("DeepSpeed's optimizer is not the one whose norms can be computed without a wait.")
    engine.module.set_experts_implementation("memcpy")
    compile_layers(engine.module, dynamic=None)


def _gather_and_compile(engine: Any, case: Case) -> None:
    _gather(engine, case)
    _compile(engine, case)


class Contender(NamedTuple):
    """The model's family, what turns the model and DeepSpeed's configuration into the contender's, and its engine."""

    family: str
    prepare: Callable[[Any, int, int], dict[str, Any]]
    finish: Callable[[Any, Case], None] = lambda engine, case: None


CONTENDERS = {
    BASE: Contender("qwen3_moe", _nothing),
    NATIVE: Contender("qwen3_moe", _native),
    AUTOEP: Contender("qwen3_moe", _autoep),
    OURS: Contender("qwen3_moe", _ours),
    GATHERED: Contender("qwen3_moe", _ours, _gather),
    COMPASS: Contender("compass", _ours),
    BASE_COMPILED: Contender("compass", _norms_alone, _compile),
    COMPILED: Contender("compass", _ours_as_pretrain, _gather_and_compile),
}


@contextlib.contextmanager
def engine_of(case: Case, name: str, world: int, rank: int, device: torch.device) -> Iterator[Any]:
    """DeepSpeed's engine of a contender: ZeRO-2 in bfloat16, gradients reduced beside the backward but for
    [`COMPILED`], all else as it comes; gone afterwards."""
    import deepspeed

    contender = CONTENDERS[name]
    model = make_model(case, contender.family, device)
    config = {
        "train_micro_batch_size_per_gpu": case.rows,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "overlap_comm": True},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        **contender.prepare(model, world, rank),
    }
    optimizer: Any = _optimizer(case.optimizer, model)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    del model
    contender.finish(engine, case)
    try:
        yield engine
    finally:
        engine.destroy()


def clear(device: torch.device) -> None:
    """Gives back what an engine left, cycles included: those through DeepSpeed's hooks go in the second round."""
    for _ in range(3):
        gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _optimizer(kind: str, model: Any) -> Callable[[Any], torch.optim.Optimizer]:
    """To be called when the experts are replaced, which is when DeepSpeed does."""

    def make(_: Any) -> torch.optim.Optimizer:
        groups = parameter_groups(model)
        fused = next(model.parameters()).is_cuda
        if kind == "sgd":
            return torch.optim.SGD(groups, lr=1e-3, fused=fused)
        return torch.optim.AdamW(groups, lr=1e-4, fused=fused)

    return make


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Experts apart from the rest, in groups of at most `LARGEST_GROUP` numbers, marked as DeepSpeed asks for."""
    groups: list[dict[str, Any]] = []
    sizes = {False: math.inf, True: math.inf}
    for name, parameter in sorted(model.named_parameters(), key=lambda item: ".experts." in item[0]):
        experts = ".experts." in name
        sizes[experts] += parameter.numel()
        if sizes[experts] > LARGEST_GROUP:
            group: dict[str, Any] = {"params": [], "experts": experts, "name": "experts" if experts else "dense"}
            if not getattr(parameter, "allreduce", True):  # DeepSpeed's mark of a parameter that others don't have
                group |= {"moe": True, "name": parameter.group_name}  # pyright: ignore[reportAttributeAccessIssue]
            groups.append(group)
            sizes[experts] = parameter.numel()
        groups[-1]["params"].append(parameter)
    return groups


def _let_autoep_read_the_recorders() -> None:
    """DeepSpeed 0.19.8 looks recorders up by the class's name; transformers' registry takes models alone from 5.23."""
    import transformers
    from packaging.version import Version

    if Version(transformers.__version__) < Version("5.23"):
        return
    from transformers.utils import output_capturing

    registry: Any = type(output_capturing._CAN_RECORD_REGISTRY)
    if registry.__dict__.get("takes_names"):
        return
    get_of_model, set_of_model = registry.get, registry.__setitem__

    def get(self: Any, key: Any, *default: Any) -> Any:
        return dict.get(self, key, *default) if isinstance(key, str) else get_of_model(self, key)

    def set_item(self: Any, key: Any, value: Any) -> None:
        (dict.__setitem__ if isinstance(key, str) else set_of_model)(self, key, value)

    registry.get, registry.__setitem__, registry.takes_names = get, set_item, True

"""The options of a run that its plan depends on, and their checks."""

from dataclasses import dataclass, replace

from moe_backbone.model.configuration_compass import CompassConfig

from .activations import FLOAT, MASTERS, PRECISIONS, Batch, Precision

STRATEGIES = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3}
"""DeepSpeed's ZeRO stage of each strategy; plain data parallelism has 0. GPUs divide optimizer states from stage 1 on,
gradients from 2 on, and weights at 3 (arXiv 1910.02054)."""


@dataclass(frozen=True)
class Optimizer:
    """Memory that an optimizer takes.

    Attributes:
        moment: Bytes of each of Adam's two moments for a parameter; None for the precision's own.
        temporaries: Number of copies of a moment that exist during its step.
    """

    moment: float | None = None
    temporaries: int = 0


OPTIMIZERS = {
    "adamw": Optimizer(),
    "adamw_foreach": Optimizer(temporaries=1),
    "adamw_8bit": Optimizer(moment=1 + 4 / 256),
}
"""`adamw` is the fused one, the Trainer's default; `adamw_foreach` is `torch.optim.AdamW`'s default. `adamw_8bit` is
bitsandbytes', which stores a byte for each number and a float32 scale for each block of 256 (arXiv 2110.02861)."""


EXCHANGES = ("auto", "gather", "all_to_all")
"""How rows reach spread experts, as in `otpo pretrain`."""

ATTENTION_KERNELS = ("torch", "flash4")
"""Kernels of attention by lengths: torch's own, or FlashAttention-4's."""


@dataclass(frozen=True)
class TrainingSetup:
    """The options of a run that its memory and time depend on.

    Attributes:
        nodes: Number of machines.
        gpus_per_node: Number of GPUs in each machine.
        strategy: One of [`STRATEGIES`].
        expert_parallel_size: Number of GPUs in a node that share the experts; each GPU holds an equal part of them.
        expert_exchange: One of [`EXCHANGES`]: `gather` gives all tokens to all GPUs that share the experts,
            `all_to_all` sends each row to its expert, `auto` gathers where that moves no more bytes, as
            `otpo pretrain` does.
        compile_layers: Whether layers are compiled; None for `otpo pretrain`'s default, which compiles them where it
            can. Time alone knows it.
        experts_implementation: `memcpy` or `grouped_mm`, which moves rows by several operations. Time alone knows it.
        attention_kernels: One of [`ATTENTION_KERNELS`]. Time alone knows it.
        micro_batch_size: Rows that a GPU takes at a time.
        sequence_length: Tokens of a row.
        packed: Whether rows hold several documents; see [`Batch`].
        gradient_accumulation_steps: Number of micro-batches in a step.
        gradient_checkpointing: Whether each layer keeps only its input, and runs again in the backward.
        precision: One of [`PRECISIONS`].
        optimizer: One of [`OPTIMIZERS`].

    Raises:
        ValueError: An option is out of its range; the message says what to set.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    strategy: str = "ddp"
    expert_parallel_size: int = 1
    expert_exchange: str = "auto"
    compile_layers: bool | None = None
    experts_implementation: str = "memcpy"
    attention_kernels: str = "torch"
    micro_batch_size: int = 1
    sequence_length: int = 4096
    packed: bool = False
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    precision: str = "bf16-mixed"
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        for name in (
            "nodes",
            "gpus_per_node",
            "expert_parallel_size",
            "micro_batch_size",
            "sequence_length",
            "gradient_accumulation_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name, known in (
            ("strategy", STRATEGIES),
            ("expert_exchange", EXCHANGES),
            ("attention_kernels", ATTENTION_KERNELS),
            ("experts_implementation", ("memcpy", "grouped_mm")),
            ("precision", PRECISIONS),
            ("optimizer", OPTIMIZERS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}={getattr(self, name)}` is not known. Set one of: {', '.join(known)}.")
        if self.precision == MASTERS:
            self._check_masters()
        if self.gpus_per_node % self.expert_parallel_size:
            raise ValueError(
                f"`expert_parallel_size={self.expert_parallel_size}` does not divide `gpus_per_node="
                f"{self.gpus_per_node}`: experts are shared inside a node, whose links are fast. Set "
                f"`expert_parallel_size` to one of {_divisors(self.gpus_per_node)}."
            )

    def _check_masters(self) -> None:
        """Refuses masters in halves where no training has them."""
        summed = self.world > 1 and self.gradient_accumulation_steps > 1
        for clashes, other, value in (
            (self.strategy != "ddp", f"strategy={self.strategy}", "`precision` to bf16, as DeepSpeed trains"),
            (
                self.expert_parallel_size > 1,
                f"expert_parallel_size={self.expert_parallel_size}",
                "`precision` to bf16",
            ),
            (self.optimizer == "adamw_8bit", "optimizer=adamw_8bit", "`optimizer` to adamw"),
            (
                summed,
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}",
                "it to 1, since DDP would sum micro-batches in bfloat16",
            ),
        ):
            if clashes:
                raise ValueError(f"`precision={MASTERS}` and `{other}` do not go together. Set {value}.")

    @property
    def world(self) -> int:
        """Number of all GPUs."""
        return self.nodes * self.gpus_per_node

    @property
    def stage(self) -> int:
        """ZeRO's stage; 0 for `ddp`."""
        return STRATEGIES[self.strategy]

    @property
    def expert_replicas(self) -> int:
        """Number of GPUs that hold the same experts."""
        return self.world // self.expert_parallel_size

    def gathers(self, config: CompassConfig) -> bool:
        """Whether all tokens go to all GPUs that share the experts, by the rule of `expert_parallel.gather`."""
        if self.expert_parallel_size == 1 or self.expert_exchange == "all_to_all":
            return False
        return self.expert_exchange == "gather" or self.expert_parallel_size <= config.num_experts_per_tok

    def why_not_compile(self, config: CompassConfig) -> str | None:
        """What keeps `otpo pretrain` from compiling layers in such a run; None if nothing does."""
        if self.stage == 3:
            return "ZeRO-3 gathers parameters while a layer runs; take `strategy=zero2`"
        if self.expert_parallel_size > 1 and not self.gathers(config):
            return (
                "rows are sent to spread experts by numbers that a graph would wait for; take `expert_exchange=gather`"
            )
        return None

    def compiles(self, config: CompassConfig) -> bool:
        """Whether layers are compiled, by the option or where it is None by the default of `otpo pretrain`."""
        return self.why_not_compile(config) is None if self.compile_layers is None else self.compile_layers

    @property
    def batch(self) -> Batch:
        """Rows that a GPU takes at a time."""
        return Batch(self.micro_batch_size, self.sequence_length, self.packed)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all GPUs between two steps of the optimizer."""
        return self.world * self.batch.tokens * self.gradient_accumulation_steps

    @property
    def bytes_of(self) -> Precision:
        """Bytes of a number in each role, as the precision has them."""
        size = PRECISIONS[self.precision]
        summed = self.precision == MASTERS and self.gradient_accumulation_steps > 1  # in float32
        return replace(size, gradients=FLOAT) if summed else size

    @property
    def moment(self) -> float:
        """Bytes of each of Adam's two moments for a parameter."""
        own = OPTIMIZERS[self.optimizer].moment
        return self.bytes_of.moments if own is None else own

    def check(self, config: CompassConfig) -> None:
        """Raises a `ValueError` if this setup cannot train the model."""
        if config.num_experts % self.expert_parallel_size:
            both = [n for n in _divisors(self.gpus_per_node) if config.num_experts % n == 0]
            raise ValueError(
                f"`expert_parallel_size={self.expert_parallel_size}` does not divide `num_experts="
                f"{config.num_experts}`. Set `expert_parallel_size` to one of {both}."
            )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]

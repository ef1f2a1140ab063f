"""A model of Qwen3-30B-A3B's shape, and how many of its layers fit the GPUs, by arithmetic."""

from typing import Any, NamedTuple

from transformers import Qwen3MoeConfig

from moe_backbone import CompassConfig

LAYERS = 48
"""Of Qwen3-30B-A3B."""
SHAPE: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
}
TINY: dict[str, Any] = {
    **{"vocab_size": 104, "hidden_size": 32, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2},
}
LORA_RANK = 16
_ROOM = 0.92  # of a GPU's memory; the rest is the context's, NCCL's, and gaps between tensors, and is not counted
_SPARE = 8e9  # bytes of a layer's rows of experts, run again in its backward, and of the logits of a chunk of tokens


class Case(NamedTuple):
    """A training: what is trained of how many layers, on how many GPUs, with how many pairs on each."""

    adapter: str  # "full" or "lora"
    layers: int
    gpus: int
    pairs: int
    prompt: int
    response: int
    tiny: bool

    @property
    def tokens(self) -> int:
        """Tokens of a step on all GPUs: both rows of a pair, prompts included."""
        return self.gpus * self.pairs * 2 * (self.prompt + self.response)


def shape(tiny: bool) -> dict[str, Any]:
    """The sizes of a model, all but its layers."""
    return TINY if tiny else SHAPE


def config_of(layers: int, tiny: bool) -> Qwen3MoeConfig:
    """The model that is trained; its routers have no loss, so that the first loss is known."""
    ends = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None, "use_cache": False}
    fixed = {"norm_topk_prob": True, "tie_word_embeddings": False, "max_position_embeddings": 4096}
    fixed |= {"router_aux_loss_coef": 0.0, "output_router_logits": False}
    return Qwen3MoeConfig(**shape(tiny), **ends, **fixed, num_hidden_layers=layers)


def plan_config(layers: int = LAYERS, tiny: bool = False) -> CompassConfig:
    """The same sizes as a Compass, which `otpo plan` takes."""
    return CompassConfig(**shape(tiny), num_hidden_layers=layers, num_mtp_layers=0, max_position_embeddings=4096)


class Parameters(NamedTuple):
    """Numbers of a layer's experts, of all else in a layer, of embeddings and head, and of a layer's adapters."""

    experts: int
    rest: int
    ends: int
    adapters: int


def count(tiny: bool = False) -> Parameters:
    """Those of the shape, norms left out."""
    s = shape(tiny)
    hidden, width, experts = s["hidden_size"], s["moe_intermediate_size"], s["num_experts"]
    heads, groups = s["num_attention_heads"] * s["head_dim"], s["num_key_value_heads"] * s["head_dim"]
    # LoRA's two factors of r columns and rows: of the four linear layers of attention, and of each expert's matrices.
    attention = 2 * (hidden + heads) + 2 * (hidden + groups)
    of_experts = experts * ((hidden + 2 * width) + (width + hidden))
    return Parameters(
        experts=3 * experts * hidden * width,
        rest=2 * hidden * (heads + groups) + experts * hidden,
        ends=2 * s["vocab_size"] * hidden,
        adapters=LORA_RANK * (attention + of_experts),
    )


def bytes_of(case: Case) -> dict[str, float]:
    """Bytes on a GPU, by part.

    `made` is whole models, before experts are spread. Then each GPU holds `weights` in bfloat16, a `reference` as
    large beside what is trained whole, and `states`, 12 bytes a trained weight, float32 copy and moments, which ZeRO-2
    divides among the GPUs. A step adds `backward`, gradients and activations, and after it `update`: DeepSpeed updates
    all experts of a GPU as one group, copies their gradients into one tensor and that to float32, and a weight of
    them takes 2 + 2 + 4 bytes then. A gradient of what is not in the group takes 2. This is read in DeepSpeed 0.19.8's
    `stage_1_and_2.py`, and its sums agree with the peaks of one run; the parts of a peak were not measured.
    """
    experts, rest, ends, adapters = count(case.tiny)
    n, layers = case.gpus, case.layers
    held = 2 * (experts / n + rest) * layers + 2 * ends
    rows = 2 * case.pairs * (case.prompt + case.response)
    kept = 2 * rows * shape(case.tiny)["hidden_size"] * layers + (0 if case.tiny else _SPARE)
    if case.adapter == "full":
        group, others = experts / n * layers, (rest * layers + ends) / n
        made, reference, gradients = 4 * ((experts + rest) * layers + ends), held, held
    else:
        # Those of attention, 2% of all, are counted as if they were divided too. They are made in float32.
        group, others = adapters / n * layers, 0.0
        made, reference, gradients = 2 * ((experts + rest) * layers + ends) + 4 * adapters * layers, 0.0, 2 * group
        held += 2 * group
    return {
        "made": made,
        "weights": held,
        "reference": reference,
        "states": 12 * (group + others),
        "backward": gradients + kept,
        "update": 8 * max(group, others) + 2 * min(group, others),
    }


def peak_of(case: Case) -> float:
    """Bytes on a GPU at the most: whole models while they are made, a backward pass, or the optimizer's update."""
    parts = bytes_of(case)
    lasting = parts["weights"] + parts["reference"] + parts["states"]
    return max(parts["made"], lasting + max(parts["backward"], parts["update"]))


def fitting_layers(case: Case, memory: float) -> int:
    """The most layers of a case, whatever it has, that fit GPUs of so many bytes; 48 at the most, 0 if none does."""
    fits = [layers for layers in range(1, LAYERS + 1) if peak_of(case._replace(layers=layers)) <= _ROOM * memory]
    return max(fits, default=0)

"""The decoder's layers compiled, each by itself and all by one graph, for any number of tokens.

A step without compiling spends a third of the kernels' time on element-wise work and waits for the host besides. The
whole model in one graph takes minutes to compile and again for each change around it; the layers are alike, so one
graph serves all of them (torch calls it regional compilation). Norms, rotary angles, activations and their gradients
are fused; products and attention stay the libraries'.
"""

from typing import Any

import torch
from accelerate import DistributedType
from torch import nn

from otpo.plain_model import decoder_layers, has_experts, without_adapter
from otpo.trl_seam import implementations

# With fewer micro-batches than this the minute of compiling is not earned back.
_ENOUGH_BATCHES = 300

# Inductor computes a norm's gradients in another way where tokens are few, and asks for a second graph, which takes
# ten seconds, at the first batch on the other side of that number. The steps are as fast without.
_ANOTHER_WAY = "triton.mix_order_reduction"

# Engines that leave the layers' parameters where they are while a layer runs.
_WHOLE_LAYERS = {DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU}


def why_not_compile(causal_lm: Any, engine: DistributedType) -> str | None:
    """What keeps the layers from being compiled; None if nothing does.

    Args:
        causal_lm: The policy.
        engine: Of the run.
    """
    if decoder_layers(without_adapter(causal_lm).base_model) is None:
        return f"{type(causal_lm).__name__} has no list called `layers`"
    if engine not in _WHOLE_LAYERS:
        return f"{engine.value} gathers parameters while a layer runs"
    if getattr(causal_lm, "quantization_method", None) is not None:
        return "the model is quantized"
    if has_experts(causal_lm):
        if not all(leaves_recording_out(layer) for layer in decoder_layers(without_adapter(causal_lm).base_model)):
            return (
                "transformers records what routers return by hooks, at which compiled layers of experts fall into "
                "pieces"
            )
        if implementations(causal_lm.config.get_text_config())[1] == "eager":
            return (
                "`experts_implementation=eager` asks the device which experts were chosen, which no graph can; set "
                "grouped_mm or memcpy"
            )
    return None


def leaves_recording_out(layer: nn.Module) -> bool:
    """Whether a layer's own `compile` keeps transformers' recording hooks out of the graph, as Compass' layers do."""
    return type(layer).compile is not nn.Module.compile


def compile_by_default(causal_lm: Any, device: torch.device, micro_batches: int) -> bool:
    """Whether compiling pays: for a dense model on a GPU, in a run that is long enough.

    A step of four layers of Qwen3-30B-A3B took 182 ms compiled and 163 ms as it is (one H100).

    Args:
        causal_lm: The policy.
        device: Where it runs.
        micro_batches: Of the whole run.
    """
    return device.type == "cuda" and micro_batches >= _ENOUGH_BATCHES and not has_experts(causal_lm)


def compile_layers(
    causal_lm: Any, *, dynamic: bool | None = True, but: nn.Module | None = None, **options: Any
) -> None:
    """Compiles the decoder layers in place, at their next call.

    Args:
        causal_lm: The model, or a PEFT model around it.
        dynamic: Whether one graph serves any number of tokens. None: that of the first call, until another comes.
        but: A layer that is left as it is, since a hook looks at what enters it, and a graph leaves hooks out.
        **options: Of `torch.compile`.
    """
    if not {"backend", "mode"} & options.keys() and _ANOTHER_WAY in torch._inductor.list_options():
        options["options"] = {_ANOTHER_WAY: False, **options.get("options", {})}
    for layer in decoder_layers(without_adapter(causal_lm).base_model) or ():
        if layer is not but:
            layer.compile(dynamic=dynamic, **options)

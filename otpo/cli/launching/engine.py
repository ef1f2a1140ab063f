"""Which engine a run asked for, which one accelerate really runs, and what else runs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

ENGINES = ("DEEPSPEED", "FSDP")


def requested_engines(
    deepspeed: object = None, fsdp: object = None, environ: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The sharded engines that were asked for, each with what asked for it.

    Args:
        deepspeed: The training option of that name.
        fsdp: The training option of that name.
        environ: The environment that `accelerate launch` prepared.
    """
    environ = environ or {}
    requested = {}
    if is_on(environ.get("ACCELERATE_USE_DEEPSPEED")):
        requested["DEEPSPEED"] = "the accelerate config (ACCELERATE_USE_DEEPSPEED)"
    if is_on(environ.get("ACCELERATE_USE_FSDP")):
        requested["FSDP"] = "the accelerate config (ACCELERATE_USE_FSDP)"
    if deepspeed:
        requested["DEEPSPEED"] = f"`deepspeed={deepspeed}`"
    if fsdp:
        requested["FSDP"] = f"`fsdp={fsdp}`"
    return requested


def require_accelerator(requested: Mapping[str, str], on_cpu: str | None) -> None:
    """Raises a `ValueError` when a sharded engine and the CPU are both asked for.

    On the CPU accelerate leaves DeepSpeed and FSDP out without a word, and each process trains a whole copy.

    Args:
        requested: Engines and what asked for them, of [`requested_engines`].
        on_cpu: What asked for the CPU, None if nothing did.
    """
    if on_cpu is None:
        return
    for engine, source in requested.items():
        raise ValueError(
            f"{source} asks for {engine} and {on_cpu} for the CPU, where accelerate would leave {engine} out and "
            "train a whole copy in each process. Remove one of the two."
        )


def require_deepspeed(requested: Mapping[str, str], installed: bool) -> None:
    """Raises a `ValueError` when DeepSpeed was asked for and is not `installed`."""
    if "DEEPSPEED" in requested and not installed:
        raise ValueError(f"{requested['DEEPSPEED']} needs DeepSpeed: `pip install 'otpo[deepspeed]'`.")


def require_engine(requested: Mapping[str, str], running: str, processes: int) -> None:
    """Raises a `ValueError` when an engine was asked for and another one runs.

    Args:
        requested: Engines and what asked for them, of [`requested_engines`].
        running: Name of accelerate's distributed type, such as `"NO"` or `"FSDP"`.
        processes: Number of processes.
    """
    for engine, source in requested.items():
        if running != engine:
            raise ValueError(
                f"{source} asks for {engine}, but accelerate runs {running} with {processes} process(es). Start the "
                f"processes with `--accelerate_config {'zero3' if engine == 'DEEPSPEED' else 'fsdp2'}` or "
                "`accelerate launch`."
            )


def cpu_request(use_cpu: bool, environ: Mapping[str, str]) -> str | None:
    """What asks for the CPU: the training option or accelerate's environment; None if neither does."""
    if use_cpu:
        return "`use_cpu=True`"
    return "ACCELERATE_USE_CPU" if is_on(environ.get("ACCELERATE_USE_CPU")) else None


def describe_engine(accelerator: Any) -> str:
    """Accelerate's distributed type, with the ZeRO stage or the version of FSDP, and the number of processes."""
    name = accelerator.distributed_type.value
    if name == "DEEPSPEED":
        name += f" ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    elif name == "FSDP":
        name += f" {accelerator.state.fsdp_plugin.fsdp_version}"
    return f"{name}, {accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''}"


def describe_device(device: torch.device) -> str:
    """Name of a device, with the memory of a GPU in GiB."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def describe_run(trainer: Any, model: str | None) -> dict[str, str]:
    """What runs of any training, line by line: model, device, engine, precision, and what is quantized.

    Args:
        trainer: A `transformers.Trainer`.
        model: What the model is called.
    """
    args = trainer.args
    total, trainable = count_parameters(trainer.model)
    devices = set((getattr(trainer.model, "hf_device_map", None) or {}).values())
    spread = f", the model split over {len(devices)} devices" if len(devices) > 1 else ""
    precision = args.mixed_precision if args.mixed_precision != "no" else "none"
    lines = {
        "model": f"{model}, {total:,} parameters, {trainable:,} trainable",
        "device": describe_device(trainer.accelerator.device) + spread,
        "engine": describe_engine(trainer.accelerator),
        "precision": f"{next(trainer.model.parameters()).dtype} weights, mixed precision {precision}",
    }
    quantized, plain = weight_bytes(trainer.model)
    if quantized or getattr(trainer.model, "is_quantized", False):
        lines["quantized"] = f"{_count_bytes(quantized)}; left as it was: {_count_bytes(plain)}"
    return lines


def count_rows(dataset: Any) -> str:
    """Number of rows of a dataset as text; nothing counts as none, a stream is not counted."""
    if dataset is None:
        return "0"
    return f"{len(dataset):,}" if hasattr(dataset, "__len__") else "a stream"


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Parameters and trainable ones, whole even where ZeRO-3 holds a shard; 4-bit weights count two a byte."""
    total = trainable = 0
    for parameter in model.parameters():
        count = int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 leaves `numel` at zero
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.element_size()
        total += count
        trainable += count if parameter.requires_grad else 0
    return total, trainable


def weight_bytes(model: torch.nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of quantized and of plain weights, by the class of the module that holds them, the most first.

    bitsandbytes and torchao quantize linear layers alone, so the experts of a Mixture-of-Experts model, which are one
    tensor a layer, stay plain. Quantized is what has integers or floats of 8 bits in it: parameters, those of torchao
    with their scales, and matrices among the buffers, where GPTQ and AWQ have them.

    Args:
        model: Any model; weights that modules share are counted once, those that ZeRO-3 divides whole.
    """
    counted: tuple[dict[str, int], dict[str, int]] = ({}, {})
    seen = set()
    for module in model.modules():
        buffers = [buffer for buffer in module.buffers(recurse=False) if buffer.dim() > 1 and _is_packed(buffer)]
        for weight in [*module.parameters(recurse=False), *buffers]:
            if id(weight) in seen:
                continue
            seen.add(id(weight))
            leaves = _leaves(weight)
            size = sum(int(getattr(leaf, "ds_numel", leaf.numel())) * leaf.element_size() for leaf in leaves)
            of_class = counted[0 if any(_is_packed(leaf) for leaf in leaves) else 1]
            name = type(module).__name__
            of_class[name] = of_class.get(name, 0) + size
    return tuple(dict(sorted(sizes.items(), key=lambda entry: -entry[1])) for sizes in counted)  # pyright: ignore


def _leaves(tensor: Any) -> list[Any]:
    """The plain tensors that a tensor of torchao is made of; one that is divided among devices counts whole."""
    if not hasattr(tensor, "__tensor_flatten__") or isinstance(tensor, DTensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [leaf for name in names for leaf in _leaves(getattr(tensor, name))]


def _is_packed(tensor: Any) -> bool:
    return tensor.dtype != torch.bool and (tensor.element_size() == 1 or tensor.dtype == torch.int32)


def _count_bytes(sizes: Mapping[str, int]) -> str:
    units = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
    parts = []
    for name, size in sizes.items():
        unit, word = next((entry for entry in units if size >= entry[0]), units[-1])
        parts.append(f"{size / unit:,.1f} {word} in {name}")
    return ", ".join(parts) or "nothing"


def is_on(value: str | None) -> bool:
    """Whether a variable of the environment says yes, as accelerate reads it."""
    return (value or "").lower() in {"1", "true", "yes", "y", "on"}

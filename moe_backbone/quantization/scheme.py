"""Which matrices of a checkpoint become FP8, under which keys, and how `config.json` says so.

The format is compressed-tensors', by its own classes. Two of its presets are W8A8 FP8:

| input scales | weights | inputs | needs documents |
| --- | --- | --- | --- |
| `static` | one scale a matrix | one scale a matrix, measured before | yes |
| `dynamic` | one scale an output channel | one scale a token, computed as it runs | no |

vLLM's experts take these two and no mixture of them: static input scales with scales for each channel are refused by
its `CompressedTensorsW8A8Fp8MoEMethod`. It also multiplies the gate and up projections as one matrix, and queries,
keys and values as one, and so the two compressing projections of multi-head latent attention (`fused_qkv_a_proj`),
each with one scale, and requantizes what comes with several. So such matrices share their scale here, and the weights
that are written are those that it computes with.
"""

import json
import re
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

from moe_backbone.conversion.tensors import Tensors

from .tapping import Places

INPUT_SCALES = ("static", "dynamic")
_PRESETS = {"static": "FP8", "dynamic": "FP8_DYNAMIC"}
_FORMAT = "float-quantized"
_EXPERT = re.compile(r".*\blayers\.(\d+)\..*\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_NOT_LINEAR = re.compile(r"embed|norm|conv")
_FUSED: dict[str, str] = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv")
_FUSED |= dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), "gate_up")
_FUSED |= dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "qkv_a")


class Target(NamedTuple):
    """A matrix that becomes FP8.

    Attributes:
        name: Its key in the files, without `.weight`.
        sharing: Matrices of one value are multiplied as one, and share their scale.
        linear: Name of the linear layer; None for an expert's matrix.
        layer: Number of the layer of an expert's matrix, else -1.
        expert: Number of the expert, else -1.
        part: Of an expert's matrix `"gate"`, `"up"` or `"down"`, else `""`.
    """

    name: str
    sharing: str
    linear: str | None = None
    layer: int = -1
    expert: int = -1
    part: str = ""

    @property
    def product(self) -> str:
        """The product whose input goes into an expert's matrix."""
        return "down" if self.part == "down" else "gate_up"


def require_compressed_tensors() -> None:
    """Raises an `ImportError` where compressed-tensors is not installed."""
    if find_spec("compressed_tensors") is None:
        raise ImportError(
            "FP8 checkpoints are written by compressed-tensors, which is not installed. Run `pip install 'otpo[fp8]'`."
        )


def compressed_tensors(module: str) -> Any:
    """A module of compressed-tensors, which types are not checked against: it is an extra.

    Args:
        module: Its name within the library.
    """
    return import_module(f"compressed_tensors.{module}")


def find_targets(tensors: Tensors, places: Places) -> list[Target]:
    """The matrices of a checkpoint that become FP8, in the order of its files.

    Args:
        tensors: Of the files, experts one by one.
        places: Of the model that they load into.

    Raises:
        ValueError: A matrix of the model has no key of its own in the files.
    """
    targets = []
    for key in tensors:
        found = _EXPERT.fullmatch(key)
        name = key.removesuffix(".weight")
        parent, _, leaf = name.rpartition(".")
        sharing = f"{parent}.{_FUSED.get(leaf, leaf)}"
        if found is not None and int(found[1]) in places.layers:
            part = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up"}.get(found[3], "down")
            targets.append(Target(name, sharing, None, int(found[1]), int(found[2]), part))
        elif name in places.linears:
            targets.append(Target(name, sharing, name))
    linears = {target.linear for target in targets}
    missing = [name for name in places.linears if name not in linears]
    wanted = len(places.layers) * places.num_experts * 3
    experts = sum(target.linear is None for target in targets)
    if missing or experts != wanted:
        what = (
            f"no {missing[0]}.weight"
            if missing
            else f"{experts} of {wanted} matrices of experts with keys of their own"
        )
        raise ValueError(
            f"The checkpoint has {what}: its names are not those that vLLM reads. Export the model with `otpo export`."
        )
    return targets


def left_alone(tensors: Tensors, targets: list[Target]) -> list[str]:
    """The names that `ignore` lists: all other matrices of the files that a linear layer may hold, and the head."""
    taken = {target.name for target in targets}
    names = [
        key.removesuffix(".weight")
        for key, tensor in tensors.items()
        if key.endswith(".weight") and len(tensor.shape) == 2
    ]
    others = [name for name in names if name not in taken and not _NOT_LINEAR.search(name.rpartition(".")[2])]
    return [*others, *(["lm_head"] if "lm_head" not in others else [])]


def make_scheme(input_scales: str) -> Any:
    """compressed-tensors' scheme of weights and inputs, a `QuantizationScheme` for linear layers.

    Args:
        input_scales: One of [`INPUT_SCALES`].
    """
    return compressed_tensors("quantization").preset_name_to_scheme(_PRESETS[input_scales], ["Linear"])


def quantization_config(scheme: Any, ignore: list[str]) -> dict[str, Any]:
    """What `config.json` has as `quantization_config`.

    Args:
        scheme: Of [`make_scheme`].
        ignore: Names of [`left_alone`].
    """
    library = compressed_tensors("quantization")
    config = library.QuantizationConfig(
        config_groups={"group_0": scheme.model_copy(update={"format": _FORMAT})},
        format=_FORMAT,
        quantization_status=library.QuantizationStatus.COMPRESSED,
        ignore=ignore,
    )
    return {
        **json.loads(config.model_dump_json(exclude_none=False)),
        "version": compressed_tensors("version").__version__,
    }


def describe(input_scales: str) -> str:
    """A sentence on the scales."""
    if input_scales == "static":
        return "W8A8 FP8, one scale a matrix for its weights and one for what goes into it, measured on documents"
    return "W8A8 FP8, a scale for each channel of the weights, and for each token as it runs: nothing is measured"


def require_full_precision(config: Any) -> None:
    """Raises a `ValueError` for a model that is quantized already."""
    found = getattr(config, "quantization_config", None)
    if found is not None:
        method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", found)
        name = getattr(method, "value", method)
        raise ValueError(
            f"`quantization_config` of the model is {name}: it is quantized already. Name it in full precision."
        )

"""Which linear layers stay in full precision.

Some are told by their names: the head, routers and other gates, whose few numbers decide much; the projection that
multi-head latent attention (MLA) makes keys and values with; indexers of sparse attention. Others are told by where
they are: routers of other names beside the experts, and layers with a state, whose errors add up over a document.

llm-compressor's published recipes leave out the head, gates, and all of linear attention. That this holds for
state-space layers and convolutions too is our choice, as indexers are: DeepSeek's own FP8 keeps a part of them.

vLLM merges `kv_b_proj` into its neighbours. It reads the weights by multiplying a matrix of ones on the diagonal,
which a static input scale that was measured on small activations clips. So the layer stays, whatever the scales.
"""

from collections.abc import Iterable

from torch import nn

_LEAVES = {"lm_head", "kv_b_proj", "g_proj"}
_PARTS = {"gate", "linear_attn", "indexer"}
_STATES = ("A_log", "dt_bias", "slope_rate")
"""What layers with a state have: gated delta rules and Mamba, lightning attention."""


def is_ignored(name: str) -> bool:
    """Whether a linear layer stays as it is, by its name: any part of its path may tell.

    Args:
        name: Its path in the model.
    """
    parts = name.split(".")
    return parts[-1] in _LEAVES or any(part in _PARTS or part.endswith("_gate") or "router" in part for part in parts)


def find_staying(model: nn.Module, experts: Iterable[str], num_experts: int) -> set[str]:
    """The linear layers that stay by where they are.

    A router is beside the experts, alone or the one linear layer of its module, and has an output for each expert.
    A layer with a state has a convolution, or what gated delta rules, Mamba and lightning attention decay by.

    Args:
        model: Of transformers.
        experts: Paths of the experts' modules.
        num_experts: Of each.

    Returns:
        Their paths.
    """
    found: set[str] = set()
    for path in experts:
        parent, _, own = path.rpartition(".")
        for child, module in model.get_submodule(parent).named_children():
            linears = _linears(module, f"{parent}.{child}" if parent else child)
            if child != own and len(linears) == 1:
                found |= {name for name, linear in linears.items() if linear.out_features == num_experts}
    for path, module in model.named_modules():
        if any(hasattr(module, name) for name in _STATES) or any(
            isinstance(it, nn.Conv1d) for it in module.children()
        ):
            found |= _linears(module, path).keys()
    return found


def _linears(module: nn.Module, path: str) -> dict[str, nn.Linear]:
    """The linear layers of a module, itself included, by their paths in the model."""
    return {
        ".".join(filter(None, (path, name))): linear
        for name, linear in module.named_modules()
        if isinstance(linear, nn.Linear)
    }

"""Whole configurations by name: Compass-v3 and -v2 as far as published, and two small models."""

from typing import Any

from .configuration_compass import CompassConfig

PRESETS: dict[str, dict[str, Any]] = {
    "compass-v3": {
        "vocab_size": 180_000,
        "hidden_size": 8192,
        "num_hidden_layers": 48,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "moe_intermediate_size": 12_288,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "num_mtp_layers": 1,
        "max_position_embeddings": 131_072,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1_000_000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "compass-v2": {
        "vocab_size": 180_000,
        "hidden_size": 2560,
        "num_hidden_layers": 50,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "moe_intermediate_size": 1088,
        "num_experts": 64,
        "num_experts_per_tok": 4,
        "num_shared_experts": 2,
        "max_position_embeddings": 8192,
    },
    "compass-small": {
        "vocab_size": 32_000,
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "moe_intermediate_size": 1536,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "num_mtp_layers": 1,
        "tie_word_embeddings": True,
    },
    "compass-tiny": {
        "vocab_size": 2048,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "moe_intermediate_size": 96,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "num_mtp_layers": 1,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
}
"""Options of each preset.

The paper of `compass-v3` (arXiv 2509.09121) publishes 245B parameters, 71B active, 16 experts, top-4, MTP, and a
context of 128K after a stage at 8K. The paper of `compass-v2` (arXiv 2504.15527) publishes 30B parameters, 5B active,
2 shared and 4 routed experts a token, and a vocabulary of 180k. We chose all other numbers so that the counts without
MTP layers come within 1% of the published ones. The one MTP layer of our v3 adds 5.2B, and its vocabulary is v2's.
`compass-small` (1B, for one GPU) and `compass-tiny` (for tests and the demo) are our own models.
"""


def preset(name: str, **changes: Any) -> CompassConfig:
    """Makes the preset's configuration.

    Args:
        name: One of [`PRESETS`].
        changes: Options that replace the preset's.

    Raises:
        ValueError: No preset has this name, or the sizes do not fit together.
    """
    if name not in PRESETS:
        raise ValueError(f"`{name}` is no preset. There are: {', '.join(PRESETS)}.")
    return CompassConfig(**{**PRESETS[name], **changes})

"""The models whose experts DeepSpeed can spread here: one entry each, under the `model_type` of transformers.

DeepSpeed's parser asks a preset where a model's MoE blocks are and what their parts are called. All models below name
them alike, `model.layers.N.mlp` with `gate` and `experts`, and differ in the name of the number of experts alone. The
experts' own sizes are read from their weights, `gate_up_proj` `(E, 2F, D)` and `down_proj` `(E, D, F)`.
"""

from typing import Any

EXPERT_COUNTS = {
    "compass": "num_experts",
    "deepseek_v3": "n_routed_experts",
    "glm4_moe": "n_routed_experts",
    "mixtral": "num_local_experts",
    "olmoe": "num_experts",
    "qwen3_moe": "num_experts",
    "qwen3_next": "num_experts",
}
"""The configuration's option that says how many experts a layer has, for each `model_type`."""

OBSTACLES = {
    "gpt_oss": "its experts have biases, and gate and up projections in alternating columns, for which the three "
    "matrices of DeepSpeed's expert-parallel checkpoints have no place",
}
"""Why the experts of a `model_type` can't be spread by DeepSpeed, where that is known."""

PRESETS = {model_type: f"otpo_{model_type}" for model_type in EXPERT_COUNTS}
"""Name of the AutoEP preset for each `model_type`. DeepSpeed's own presets keep their names and their layer."""


def require_preset(model_type: str) -> str:
    """The name of a model's AutoEP preset.

    Raises:
        ValueError: There is none; the message says why, if that is known, and what to do.
    """
    if model_type in PRESETS:
        return PRESETS[model_type]
    refused = f"The experts of a model of type '{model_type}' can't be spread by DeepSpeed here"
    others = "Set `expert_parallel_backend` to transformers, or leave `expert_parallel_size` at 1."
    if model_type in OBSTACLES:
        raise ValueError(f"{refused}: {OBSTACLES[model_type]}. {others}")
    raise ValueError(
        f"{refused}, those of {', '.join(PRESETS)} can. {others} A model of transformers with "
        "`model.layers.N.mlp.experts` needs one entry in moe_backbone/expert_parallel/presets.py; CONTRIBUTING.md "
        "says which."
    )


def deepspeed_presets() -> dict[str, Any]:
    """DeepSpeed's presets under the names of [`PRESETS`]."""
    from dataclasses import replace

    from deepspeed.module_inject.auto_ep_presets import registry

    # The parent's adapter would have DeepSpeed move the recorders of router logits, which stay where they are here.
    # Compass has no preset of DeepSpeed's, so its type is named; the others' would be ambiguous.
    return {
        name: replace(
            registry.PRESET_MODELS["qwen3_moe"],
            num_experts_attr=EXPERT_COUNTS[model_type],
            preset_adapter="default",
            hf_model_types=("compass",) if model_type == "compass" else (),
            has_shared_experts=False,
        )
        for model_type, name in PRESETS.items()
    }

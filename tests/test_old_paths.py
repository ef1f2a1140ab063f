"""Import paths that users may have, from when these were single modules."""

from importlib import import_module

import pytest

NAMES = {
    "otpo": "OTPOConfig OTPOTrainer PairBatch TokenWeights LogTokenWeightsCallback __version__",
    "otpo.weighting": "PairBatch TokenWeights Weighting WEIGHTINGS otpo uniform budget length sampo ld d2po",
    "otpo.transport": "Cost CostScale TransportWeights pairwise_cost transport_weights transport_plan warn_unsolved",
    "moe_backbone.planning": "Plan make_plan load_config TIGHT REMEDIES",
    "moe_backbone.experts": "NAME memcpy_experts_forward",
    "moe_backbone.pretraining": "PretrainingConfig PretrainingTrainer",
    "moe_backbone.expert_parallel": "MODEL_TYPES ZERO_STAGES expert_parallel_config check_expert_parallel "
    "require_expert_parallelism with_expert_parallelism",
}


@pytest.mark.parametrize("module", NAMES)
def test_the_path_still_imports(module):
    found = import_module(module)
    assert not [name for name in NAMES[module].split() if not hasattr(found, name)]

"""Experts spread over the GPUs of a node, by DeepSpeed or by transformers; see README.md for the trip of a row."""

from .deepspeed_config import expert_parallel_config as expert_parallel_config
from .deepspeed_config import require_expert_parallelism as require_expert_parallelism
from .deepspeed_patch import patch_deepspeed as patch_deepspeed
from .sizes import check_expert_parallel as check_expert_parallel

"""Experts spread over the GPUs of a node, by DeepSpeed or by transformers; see README.md for the trip of a row.

Who calls `deepspeed.initialize` with a configuration of [`expert_parallel_config`] calls [`patch_deepspeed`] first;
trainers of [`with_expert_parallelism`] do so themselves.
"""

from .deepspeed_config import MODEL_TYPES as MODEL_TYPES
from .deepspeed_config import ZERO_STAGES as ZERO_STAGES
from .deepspeed_config import expert_parallel_config as expert_parallel_config
from .deepspeed_config import require_expert_parallelism as require_expert_parallelism
from .deepspeed_patch import patch_deepspeed as patch_deepspeed
from .deepspeed_trainer import with_expert_parallelism as with_expert_parallelism
from .sizes import check_expert_parallel as check_expert_parallel

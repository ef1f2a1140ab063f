"""The Compass Mixture-of-Experts backbone, native to transformers.

Importing this package registers the models with `AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and the Auto classes
of sequence classification, token classification and question answering, their checkpoint layout, which has a key for
each expert, for every MoE model of transformers `experts_implementation="memcpy"`, and the attention implementation
`torch_varlen` for packed rows.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .memcpy_experts import memcpy_experts_forward as memcpy_experts_forward
from .model.configuration_compass import CompassConfig as CompassConfig
from .model.modeling_compass import CompassForCausalLM as CompassForCausalLM
from .model.modeling_compass import CompassForQuestionAnswering as CompassForQuestionAnswering
from .model.modeling_compass import CompassForSequenceClassification as CompassForSequenceClassification
from .model.modeling_compass import CompassForTokenClassification as CompassForTokenClassification
from .model.modeling_compass import CompassModel as CompassModel
from .model.presets import PRESETS as PRESETS
from .model.presets import preset as preset
from .model.saved_code import save_code as save_code
from .packed_attention import varlen_attention_forward as varlen_attention_forward

AutoConfig.register(CompassConfig.model_type, CompassConfig, exist_ok=True)
AutoModel.register(CompassConfig, CompassModel, exist_ok=True)
AutoModelForCausalLM.register(CompassConfig, CompassForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(CompassConfig, CompassForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(CompassConfig, CompassForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(CompassConfig, CompassForQuestionAnswering, exist_ok=True)

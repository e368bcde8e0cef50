"""Per-layer decoders for transformers; importing this package registers them with its auto classes.

Only configuration_spp.py and modeling_spp.py travel inside a checkpoint; the other files do not.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from spp_export.models.modeling import uneven_attention
from spp_export.models.modeling.configuration_spp import (
    SppLlamaConfig,
    SppMistralConfig,
    SppQwen2Config,
    SppQwen3Config,
)
from spp_export.models.modeling.modeling_spp import (
    SppLlamaForCausalLM,
    SppLlamaModel,
    SppMistralForCausalLM,
    SppMistralModel,
    SppQwen2ForCausalLM,
    SppQwen2Model,
    SppQwen3ForCausalLM,
    SppQwen3Model,
)

__all__ = [
    "SppLlamaConfig",
    "SppLlamaForCausalLM",
    "SppLlamaModel",
    "SppMistralConfig",
    "SppMistralForCausalLM",
    "SppMistralModel",
    "SppQwen2Config",
    "SppQwen2ForCausalLM",
    "SppQwen2Model",
    "SppQwen3Config",
    "SppQwen3ForCausalLM",
    "SppQwen3Model",
]

for _config, _model, _causal in (
    (SppLlamaConfig, SppLlamaModel, SppLlamaForCausalLM),
    (SppMistralConfig, SppMistralModel, SppMistralForCausalLM),
    (SppQwen2Config, SppQwen2Model, SppQwen2ForCausalLM),
    (SppQwen3Config, SppQwen3Model, SppQwen3ForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal, exist_ok=True)
    # So that save_pretrained writes the two files beside the weights again.
    _config.register_for_auto_class()
    _causal.register_for_auto_class("AutoModelForCausalLM")

uneven_attention.register()

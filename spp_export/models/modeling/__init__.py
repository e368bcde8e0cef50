"""Per-layer decoders for transformers; importing this package registers them with its auto classes.

Only configuration_spp.py and modeling_spp.py travel inside a checkpoint; the other files do not.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from spp_export.models.modeling import configuration_spp, modeling_spp, uneven_attention
from spp_export.models.modeling.configuration_spp import *  # noqa: F403
from spp_export.models.modeling.modeling_spp import *  # noqa: F403

__all__ = [*configuration_spp.__all__, *modeling_spp.__all__]

for _name in configuration_spp.__all__:
    _prefix = _name.removesuffix("Config")
    _config = getattr(configuration_spp, _name)
    _causal = getattr(modeling_spp, f"{_prefix}ForCausalLM")
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, getattr(modeling_spp, f"{_prefix}Model"), exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal, exist_ok=True)
    # So that save_pretrained writes the two files beside the weights again.
    _config.register_for_auto_class()
    _causal.register_for_auto_class("AutoModelForCausalLM")

uneven_attention.register()

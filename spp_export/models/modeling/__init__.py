"""Per-layer decoders for transformers; importing this package registers them with its auto classes.

Only configuration_spp.py and modeling_spp.py travel inside a checkpoint; the other files do not.
Their classes are made when they are first asked for, `SppLlamaForCausalLM` of this package too.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from spp_export.models.families import known_types
from spp_export.models.modeling import configuration_spp, modeling_spp, uneven_attention


def __getattr__(name: str) -> Any:
    module = configuration_spp if name.endswith("Config") else modeling_spp
    return getattr(module, name)


@cache
def _config_class(model_type: str) -> type[Any]:
    """The per-layer config class of a stock model type, with its models registered."""
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"this version of transformers has no {model_type} models. Install a newer one."
        )
    stock = CONFIG_MAPPING[model_type]
    own: type[Any] = getattr(configuration_spp, f"Spp{stock.__name__}")
    for auto, models in modeling_spp.AUTO_CLASSES.items():
        # Of a config with a decoder in it, some of these take that decoder alone.
        model: Any = models.get(stock, None)
        if model is not None and model.config_class is stock:
            getattr(transformers, auto).register(
                own, getattr(modeling_spp, f"Spp{model.__name__}"), exist_ok=True
            )
    return own


def register(model_type: str) -> None:
    """Let the auto classes load per-layer models of a stock model type.

    transformers wants a config class here, and importing it for every family would take long: so
    this one stands for the real one, which is imported when it is first made.
    """

    def create(_: type[Any], *args: Any, **kwargs: Any) -> Any:
        return _config_class(model_type)(*args, **kwargs)

    def from_dict(_: type[Any], *args: Any, **kwargs: Any) -> Any:
        return _config_class(model_type).from_dict(*args, **kwargs)

    name = f"spp_{model_type}"
    attributes = {"__new__": create, "from_dict": classmethod(from_dict)}
    attributes |= {"__module__": __name__, "model_type": name}
    stand_in: Any = type(f"{name}_config", (PretrainedConfig,), attributes)
    AutoConfig.register(name, stand_in, exist_ok=True)


for _model_type in known_types():
    register(_model_type)

uneven_attention.register()

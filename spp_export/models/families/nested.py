"""Where in a config.json the settings of the decoder are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TEXT = "text_config"
# Keys of config.json that are not of the decoder, where it has no text_config: as Qwen2.5-VL was
# published. Ids of tokens that stand for pictures come to these.
_OUTSIDE = ("architectures", "model_type", "transformers_version", "vision_config", "auto_map")
_PICTURES = ("image_", "video_", "vision_")


def decoder_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config.json, or what transformers has of it, says of the decoder."""
    text = config.get(TEXT)
    if isinstance(text, Mapping):
        return text
    if "vision_config" not in config:
        return config
    names = (name for name in config if name not in _OUTSIDE and not name.startswith(_PICTURES))
    return {name: config[name] for name in names}

"""Models that see: a decoder of text, which is cut, beside a tower of vision, which is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from spp_export.common.errors import ModelError
from spp_export.common.json_files import shown
from spp_export.models.families.base import Family, Feature
from spp_export.models.families.nested import TEXT, decoder_settings


@dataclass(frozen=True)
class Wrapper:
    """A model type whose decoder is of another family, or of one that exists in it alone.

    text      the decoder's model type, where config.json does not say
    decoder   where the decoder is in memory
    defaults  what the stock class takes where text_config says nothing
    """

    model_type: str
    architecture: str
    text: str = ""
    decoder: str = "model.language_model"
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def family(self, config: Mapping[str, Any], texts: Mapping[str, Family]) -> Family:
        """The record of a model with this config.json. Raises ModelError for an unknown decoder."""
        kind = decoder_settings(config).get("model_type", self.text)
        text = texts.get(kind) if isinstance(kind, str) else None
        if text is None:
            raise ModelError(
                f"config.json: {TEXT} has the model_type {shown(kind)}, which is not supported in "
                f"{self.model_type} models; known are {', '.join(sorted(texts))}."
            )
        prefix = self.architecture.removesuffix("ForConditionalGeneration")
        moved: dict[str, Any] = {
            name: self._moved(getattr(text, name)) for name in ("layers", "embedding", "final_norm")
        }
        for name in ("outside", "tables"):
            moved[name] = {self._moved(place): size for place, size in getattr(text, name).items()}
        return replace(
            text,
            model_type=self.model_type,
            architecture=self.architecture,
            config_class=f"{prefix}Config",
            decoder_class=f"{prefix}Model",
            features=text.features | {Feature.VISION},
            inside=TEXT,
            defaults={**text.defaults, **self.defaults},
            **moved,
        )

    def _moved(self, name: str) -> str:
        return f"{self.decoder}.{name.removeprefix('model.')}"

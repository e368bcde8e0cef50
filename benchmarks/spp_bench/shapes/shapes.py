"""Published configurations, so that their speed and memory can be measured without their weights.

Rotary scaling, and windows that a model does not use, do not change the cost of what is computed,
so these records leave both out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from spp_export.common.errors import UsageError
from spp_export.common.json_files import dump_json
from spp_export.models.families import FAMILIES, Family
from spp_export.models.shape import ModelShape
from spp_export.slicing.config import portable_config


@dataclass(frozen=True)
class Published:
    """A model as its config.json describes it; `name` is how `--shape` takes it.

    context  positions that it was made for
    theta    base of its rotary embedding
    """

    name: str
    model_type: str
    layers: int
    hidden: int
    query_heads: int
    kv_heads: int
    head_dim: int
    channels: int
    vocabulary: int
    context: int
    theta: float
    tied: bool = False

    @property
    def family(self) -> Family:
        """Where its tensors are."""
        return FAMILIES[self.model_type]

    @cached_property
    def shape(self) -> ModelShape:
        """Its sizes, with two bytes per element of the weights."""
        return self.family.read_shape(self.config, 2)

    @cached_property
    def config(self) -> dict[str, Any]:
        """A config.json of the dense model."""
        return portable_config(
            {
                "model_type": self.model_type,
                "architectures": [self.family.architecture],
                "num_hidden_layers": self.layers,
                "hidden_size": self.hidden,
                "num_attention_heads": self.query_heads,
                "num_key_value_heads": self.kv_heads,
                "head_dim": self.head_dim,
                "intermediate_size": self.channels,
                "vocab_size": self.vocabulary,
                "tie_word_embeddings": self.tied,
                "max_position_embeddings": self.context,
                "rope_theta": self.theta,
                "sliding_window": None,
            }
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the configuration, since there are no weights to identify it by."""
        return hashlib.sha256(dump_json(self.config).encode()).hexdigest()


# layers, hidden size, query heads, KV heads, head_dim, channels, vocabulary, context, theta
_ALL = (
    Published("tiny", "llama", 3, 64, 8, 4, 16, 192, 263, 1024, 1e4),
    Published("smollm2-135m", "llama", 30, 576, 9, 3, 64, 1536, 49152, 8192, 1e5, tied=True),
    Published("smollm2-360m", "llama", 32, 960, 15, 5, 64, 2560, 49152, 8192, 1e5, tied=True),
    Published("llama-2-7b", "llama", 32, 4096, 32, 32, 128, 11008, 32000, 4096, 1e4),
    Published("llama-2-13b", "llama", 40, 5120, 40, 40, 128, 13824, 32000, 4096, 1e4),
    Published("llama-3.1-8b", "llama", 32, 4096, 32, 8, 128, 14336, 128256, 131072, 5e5),
    Published("mistral-7b-v0.3", "mistral", 32, 4096, 32, 8, 128, 14336, 32768, 32768, 1e6),
    Published("qwen2.5-0.5b", "qwen2", 24, 896, 14, 2, 64, 4864, 151936, 32768, 1e6, tied=True),
    Published("qwen2.5-1.5b", "qwen2", 28, 1536, 12, 2, 128, 8960, 151936, 131072, 1e6, tied=True),
    Published("qwen2.5-7b", "qwen2", 28, 3584, 28, 4, 128, 18944, 152064, 131072, 1e6),
    Published("qwen2.5-14b", "qwen2", 48, 5120, 40, 8, 128, 13824, 152064, 131072, 1e6),
    Published("qwen3-8b", "qwen3", 36, 4096, 32, 8, 128, 12288, 151936, 40960, 1e6),
)
SHAPES: Mapping[str, Published] = {shape.name: shape for shape in _ALL}
# Those whose artifacts and figures are published.
BACKBONES = ("qwen2.5-7b", "qwen2.5-14b", "llama-3.1-8b", "llama-2-13b")


def published(name: str) -> Published:
    """The record of a name, upper or lower case; UsageError lists the names there are."""
    try:
        return SHAPES[name.lower()]
    except KeyError:
        raise UsageError(f"--shape {name}: expected one of {', '.join(SHAPES)}.") from None

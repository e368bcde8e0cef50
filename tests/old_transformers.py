"""What stock models of transformers 4 cannot do, which tests therefore leave out there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pytest
import transformers

from spp_export.models.families import FAMILIES

OLD = transformers.__version__.startswith("4.")
SINGLE = {name for name, family in FAMILIES.items() if family.single_in_4}
FLOAT64 = "these stock models fail in float64"
WRITES = "its lists of experts do not show what single ones write"
FP8 = "it does not dequantise FP8"
ABSENT = "it does not have this family"
# Its other attention leaves scores uncapped.
CAPPED: dict[str, Any] = {"attn_implementation": "eager"} if OLD else {}


def since_5(reason: str) -> pytest.MarkDecorator:
    """Leaves a test, or a row of one, out in transformers 4."""
    return pytest.mark.skipif(OLD, reason=f"transformers 4: {reason}")


def but_in_old(names: Iterable[str], unable: Collection[str], reason: str) -> list[Any]:
    """Parameters of a test, of which transformers 4 leaves out those that it is `unable` to do."""
    return [pytest.param(name, marks=since_5(reason) if name in unable else ()) for name in names]


def in_its_words(
    config: Mapping[str, Any], keys: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """A config with rotary settings where this version of transformers reads them: those before 5
    ignore `rope_parameters`. `keys` are a family's own names for them."""
    config = dict(config)
    if not OLD or "rope_parameters" not in config:
        return config
    rope = dict(config.pop("rope_parameters"))
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            config[(keys or {}).get(key, key)] = rope.pop(key)
    if rope.get("rope_type", "default") != "default" or rope.keys() > {"rope_type"}:
        config["rope_scaling"] = rope
    return config

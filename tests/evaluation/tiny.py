"""A tiny checkpoint, its model and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factories import make_checkpoint, random_layers, shape_of
from transformers import AutoTokenizer

from spp_export.models.loader import load_dense

TEXTS = (
    "Hydrogen is the lightest element.",
    "No.",
    "x",
    "",
    "Water boils at a lower temperature on a mountain, where the air is thinner than by the sea.",
    "Salt is sodium chloride.",
)


@dataclass(frozen=True)
class Tiny:
    """What is on disk at `path`, loaded."""

    path: Path
    model: Any
    tokenizer: Any
    layers: Any
    shape: Any


def make_tiny(root: Path, family: str = "llama", **options: Any) -> Tiny:
    """A random model; `layers` is a random choice of its units."""
    path = make_checkpoint(root, family, kv_heads=2, query_heads=4, **options)
    shape = shape_of(path)
    model = load_dense(path)
    return Tiny(path, model, AutoTokenizer.from_pretrained(path), random_layers(shape, 0), shape)

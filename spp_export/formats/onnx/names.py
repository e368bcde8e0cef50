"""What a graph calls the tensors of a checkpoint that it holds as they are."""

from __future__ import annotations

from spp_export.models.families import Family

HEAD = "lm_head"


def initializer_name(family: Family, tensor: str) -> str:
    """The initialiser of a tensor that is no product's weight or bias."""
    inside = tensor.removeprefix(f"{family.layers}.")
    return f"layers.{inside}" if inside != tensor else tensor


def product_name(family: Family, module: str) -> str:
    """The product of a module beside the layers."""
    return HEAD if module == family.head else module

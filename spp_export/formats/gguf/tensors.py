"""The tensors of a GGUF file: their names, their types, and what of a checkpoint they are made of.

Names and shapes follow PyTorch's layout [out, in]; the file lists sizes the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spp_export.formats.gguf.architecture import Architecture, file_layers
from spp_export.formats.gguf.options import BLOCK, QUANTS, GgufOptions, Kind
from spp_export.formats.gguf.rotary import frequency_factors
from spp_export.models.checkpoint.checkpoint import Checkpoint

# Tensors of the vocabulary stay at eight bits where others have fewer, as llama.cpp's users expect:
# these suffer most.
_VOCABULARY: Kind = "q8_0"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor.

    sources  the checkpoint's tensors whose rows it has, one after the other
    shapes   of each of these
    step     rows of a head, where they are reordered within heads; else 0
    wanted   the type it would have, if it is another because of the length of its rows
    values   what it holds, where that is in no tensor of the checkpoint
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    sources: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    step: int = 0
    requested: Kind | None = None
    values: NDArray[np.float32] | None = None


def gguf_tensors(
    decoder: Checkpoint, architecture: Architecture, options: GgufOptions
) -> tuple[GgufTensor, ...]:
    """Every tensor in the order of the file; `options` are resolved."""
    return tuple(_Listing(decoder, architecture, options).all())


class _Listing:
    def __init__(self, decoder: Checkpoint, form: Architecture, options: GgufOptions) -> None:
        self._decoder, self._form, self._options = decoder, form, options
        layers = file_layers(decoder, form)
        specs = decoder.family.tensors(decoder.shape, layers)
        self._shapes = {spec.name: spec.shape for spec in specs}

    def all(self) -> Iterator[GgufTensor]:
        family = self._decoder.family
        factors = frequency_factors(self._decoder)
        if factors is not None:
            yield GgufTensor("rope_freqs.weight", factors.shape, "f32", values=factors)
        yield self._tensor("token_embd.weight", f"{family.embedding}.weight")
        for index in range(len(self._decoder.layers)):
            yield from self._layer(index)
        yield self._tensor("output_norm.weight", f"{family.final_norm}.weight")
        if not self._decoder.shape.tied_embeddings:
            yield self._tensor("output.weight", f"{family.head}.weight")

    def _layer(self, index: int) -> Iterator[GgufTensor]:
        family, dim = self._decoder.family, self._decoder.shape.head_dim
        turned = dim if self._form.interleaved else 0
        attention: tuple[tuple[str, tuple[str, ...], int], ...] = (
            ("attn_q", (family.query,), turned),
            ("attn_k", (family.key,), turned),
            ("attn_v", (family.value,), 0),
        )
        if self._form.fused:
            attention = (("attn_qkv", (family.query, family.key, family.value), 0),)
        modules = (
            ("attn_norm", (family.attention_norm,), 0),
            *attention,
            ("attn_q_norm", (family.query_norm,), 0),
            ("attn_k_norm", (family.key_norm,), 0),
            ("attn_output", (family.output,), 0),
            ("ffn_norm", (family.mlp_norm,), 0),
            ("ffn_gate", (family.gate,), 0),
            ("ffn_up", (family.up,), 0),
            ("ffn_down", (family.down,), 0),
        )
        for name, parts, step in modules:
            for ending in ("weight", "bias"):
                sources = [f"{family.layer_name(index, part)}.{ending}" for part in parts]
                if sources[0] in self._shapes:
                    yield self._tensor(f"blk.{index}.{name}.{ending}", *sources, step=step)

    def _tensor(self, name: str, *sources: str, step: int = 0) -> GgufTensor:
        shapes = tuple(self._shapes[source] for source in sources)
        shape = (sum(part[0] for part in shapes), *shapes[0][1:])
        requested = self._requested(name, shape)
        kind: Kind = "f16" if requested in QUANTS and shape[-1] % BLOCK else requested
        replaced = requested if kind != requested else None
        if sources[0] not in self._decoder.tensors:  # of attention or an MLP that the layer lacks
            zeros = np.zeros(shape, np.float32)
            return GgufTensor(name, shape, kind, requested=replaced, values=zeros)
        return GgufTensor(name, shape, kind, sources, shapes, step, replaced)

    def _requested(self, name: str, shape: tuple[int, ...]) -> Kind:
        if len(shape) == 1:
            return "f32"
        kind = self._options.kind
        vocabulary = name in ("token_embd.weight", "output.weight")
        return _VOCABULARY if vocabulary and kind in QUANTS else kind

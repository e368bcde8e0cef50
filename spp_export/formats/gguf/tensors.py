"""The tensors of a GGUF file: their names, their types, and what of a checkpoint they are made of.

Names and shapes follow PyTorch's layout [out, in]; the file lists sizes the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spp_export.formats.gguf.architecture import Architecture, file_layers, gguf_settings
from spp_export.formats.gguf.options import BLOCK, QUANTS, GgufOptions, Kind
from spp_export.formats.gguf.rotary import frequency_factors
from spp_export.formats.parts import HEADS, outputs_of
from spp_export.models.checkpoint.checkpoint import Checkpoint
from spp_export.models.families import Feature, Role

# Tensors of the vocabulary stay at eight bits where others have fewer, as llama.cpp's users expect:
# these suffer most.
_VOCABULARY: Kind = "q8_0"


@dataclass(frozen=True)
class Source:
    """Where rows of a tensor come from: all rows of one of the checkpoint's, or these, in this
    order.

    shape   of what is taken
    rows    None is all
    turned  inputs come first there
    """

    name: str
    shape: tuple[int, ...]
    rows: slice | Sequence[int] | None = None
    turned: bool = False


@dataclass(frozen=True)
class GgufTensor:
    """One tensor.

    sources  what its rows are, one after the other; what is left of `shape` is zero
    step     rows of a head, where they are reordered within heads; else 0
    requested  the type it would have, if it is another because of the length of its rows
    values   what it holds, where that is in no tensor of the checkpoint
    factor, shift  what the checkpoint's values are multiplied by, and then increased by
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    sources: tuple[Source, ...] = ()
    step: int = 0
    requested: Kind | None = None
    values: NDArray[np.float32] | None = None
    factor: float = 1.0
    shift: float = 0.0

    def changed(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The checkpoint's values as the file is to have them."""
        if self.factor == 1.0 and self.shift == 0.0:
            return values
        result: NDArray[np.float32] = values * np.float32(self.factor) + np.float32(self.shift)
        return result


def gguf_tensors(
    decoder: Checkpoint, architecture: Architecture, options: GgufOptions
) -> tuple[GgufTensor, ...]:
    """Every tensor in the order of the file; `options` are resolved."""
    return tuple(_Listing(decoder, architecture, options).all())


class _Listing:
    def __init__(self, decoder: Checkpoint, form: Architecture, options: GgufOptions) -> None:
        self._decoder, self._form, self._options = decoder, form, options
        self._settings = gguf_settings(decoder)
        self._layers = file_layers(decoder, form)
        self._width = max(layer.channels for layer in self._layers)
        # What a Llama is not told of, its weights tell; the others know it.
        told = Feature.MULTIPLIERS not in form.features or form.name in ("llama", "deci")
        self._folds = told and Feature.MULTIPLIERS in decoder.family.features

    def all(self) -> Iterator[GgufTensor]:
        decoder, family, settings = self._decoder, self._decoder.family, self._settings
        factors = frequency_factors(decoder)
        if factors is not None:
            yield GgufTensor("rope_freqs.weight", factors.shape, "f32", values=factors)
        enters = settings.embedding if self._folds else 1.0
        yield from self._module("token_embd", family.embedding, factor=enters)
        if family.embedding_norm:
            yield from self._module("token_embd_norm", family.embedding_norm)
        if family.positions:
            yield from self._module("position_embd", family.positions)
        for index in range(len(decoder.layers)):
            yield from self._layer(index)
        leaves = settings.logits if self._folds else 1.0
        if decoder.shape.tied_embeddings:
            leaves /= enters
        yield from self._module("output_norm", family.final_norm, factor=leaves, norm=True)
        if not decoder.shape.tied_embeddings:
            yield from self._module("output", family.head)

    def _layer(self, index: int) -> Iterator[GgufTensor]:
        family, form, settings = self._decoder.family, self._form, self._settings
        shape = self._decoder.layers[index]
        rows = outputs_of(family, self._decoder.shape, shape)
        writes = settings.writes if self._folds else 1.0
        dim = self._decoder.shape.head_dim
        scores = settings.scores / dim**-0.5
        turned = dim if form.interleaved else 0

        def module(name: str, *roles: Role, step: int = 0, factor: float = 1.0) -> Any:
            modules = (family.layer_name(index, family.projection(role)) for role in roles)
            parts = [(module, rows[role]) for module, role in zip(modules, roles, strict=True)]
            return self._projection(f"blk.{index}.{name}", parts, step, factor)

        def norm(name: str, place: str, factor: float = 1.0) -> Iterator[GgufTensor]:
            if place:
                whole = family.layer_name(index, place)
                yield from self._module(f"blk.{index}.{name}", whole, factor=factor, norm=True)

        first, second = "attn_norm", "ffn_norm"
        if family.attention_norm and family.mlp_norm:
            first = form.norms.get("attention_norm", first)
            second = form.norms.get("mlp_norm", second)
        yield from norm(first, family.attention_norm)
        if form.fused and scores == 1.0:
            yield from module("attn_qkv", *HEADS)
        else:
            # A norm of queries would undo it before.
            early = 1.0 if self._decoder.shape.qk_norm else scores
            yield from module("attn_q", Role.QUERY, step=turned, factor=early)
            yield from module("attn_k", Role.KEY, step=turned)
            yield from module("attn_v", Role.VALUE)
        yield from norm("attn_q_norm", family.query_norm, scores)
        yield from norm("attn_k_norm", family.key_norm)
        yield from module("attn_output", Role.OUTPUT, factor=writes)
        yield from norm(second, family.mlp_norm)
        gate = (Role.GATE,) if Role.GATE in rows else ()
        if form.gate_up:
            yield from module("ffn_up", Role.GATE, Role.UP)
        else:
            for role in gate:
                yield from module("ffn_gate", role)
            yield from module("ffn_up", Role.UP)
        yield from module("ffn_down", Role.DOWN, factor=writes)
        for number, (place, switch) in enumerate(family.norms):
            if number in form.norms and (not switch or switch in self._decoder.shape.switches):
                yield from norm(form.norms[number], place)
        yield from self._filled(index)

    def _filled(self, index: int) -> Iterator[GgufTensor]:
        """Attention and MLP of zeros, where the layer has none and the file must."""
        layer, written, shape = (
            self._decoder.layers[index],
            self._layers[index],
            self._decoder.shape,
        )
        hidden, dim = shape.hidden_size, shape.head_dim
        sizes: dict[str, tuple[int, ...]] = {}
        if written.has_attention and not layer.has_attention:
            parts = {"attn_qkv": 3} if self._form.fused else {"attn_q": 1, "attn_k": 1, "attn_v": 1}
            sizes |= {"attn_norm": (hidden,), "attn_output": (hidden, dim)}
            sizes |= {name: (count * dim, hidden) for name, count in parts.items()}
            sizes |= dict.fromkeys(("attn_q_norm", "attn_k_norm") if shape.qk_norm else (), (dim,))
        if not layer.has_mlp:
            width = self._width if self._form.padded else written.channels
            sizes |= {"ffn_norm": (hidden,), "ffn_down": (hidden, width)}
            sizes |= dict.fromkeys(("ffn_gate", "ffn_up"), (width, hidden))
        for name, size in sizes.items():
            whole = f"blk.{index}.{name}.weight"
            kind, replaced = self._kind(whole, size)
            values = np.zeros(size, np.float32)
            yield GgufTensor(whole, size, kind, requested=replaced, values=values)

    def _projection(
        self,
        name: str,
        parts: Sequence[tuple[str, slice | Sequence[int]]],
        step: int,
        factor: float,
    ) -> Iterator[GgufTensor]:
        family, tensors = self._decoder.family, self._decoder.tensors
        for ending in ("weight", "bias"):
            if f"{parts[0][0]}.{ending}" not in tensors:
                continue
            turned = family.transposed and ending == "weight"
            sources = []
            for module, rows in parts:
                stored = tensors[f"{module}.{ending}"]
                shape = stored.shape[::-1] if turned else stored.shape
                taken = range(shape[0])[rows] if isinstance(rows, slice) else rows
                every = len(taken) == shape[0] and not turned
                chosen = None if every else rows
                sources.append(Source(stored.name, (len(taken), *shape[1:]), chosen, turned))
            yield self._tensor(f"{name}.{ending}", sources, step, factor)

    def _module(
        self, name: str, module: str, *, factor: float = 1.0, norm: bool = False
    ) -> Iterator[GgufTensor]:
        """A module beside the layers, or a norm."""
        shifted = norm and Feature.SHIFTED_NORM in self._decoder.family.features
        for ending in ("weight", "bias"):
            stored = self._decoder.tensors.get(f"{module}.{ending}")
            if stored is not None:
                shift = factor if shifted and ending == "weight" else 0.0
                source = Source(stored.name, stored.shape)
                yield self._tensor(f"{name}.{ending}", [source], 0, factor, shift)

    def _tensor(
        self, name: str, sources: Sequence[Source], step: int, factor: float, shift: float = 0.0
    ) -> GgufTensor:
        shape = (sum(source.shape[0] for source in sources), *sources[0].shape[1:])
        if self._form.padded and name.partition(".")[2].partition(".")[2].startswith("ffn_"):
            shape = self._padded(name, shape)
        kind, replaced = self._kind(name, shape)
        return GgufTensor(
            name, shape, kind, tuple(sources), step, replaced, factor=factor, shift=shift
        )

    def _kind(self, name: str, shape: tuple[int, ...]) -> tuple[Kind, Kind | None]:
        """The type of a tensor, and the one that was asked for, if that is another."""
        requested = self._requested(name, shape)
        kind: Kind = "f16" if requested in QUANTS and shape[-1] % BLOCK else requested
        return kind, requested if kind != requested else None

    def _padded(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """As wide as the widest layer."""
        if len(shape) == 1:
            return shape
        return (shape[0], self._width) if "ffn_down" in name else (self._width, shape[1])

    def _requested(self, name: str, shape: tuple[int, ...]) -> Kind:
        if len(shape) == 1:
            return "f32"
        kind = self._options.kind
        vocabulary = name in ("token_embd.weight", "output.weight")
        if name == "position_embd.weight":
            return "f32"
        return _VOCABULARY if vocabulary and kind in QUANTS else kind

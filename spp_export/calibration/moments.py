"""Statistics of the dense model on text collections: gathered once, cached, read layer by layer.

"attention", "mlp", "experts" and "expert channels" come from one forward pass, and so do "attention
loss" and "mlp loss", whose moments are weighted by the gradient at each token so as to be in units
of the loss; where a text does not bring these, they take a backward pass. "gradients" take one of
their own.
They lie in the user's cache, one file each, so that no pass is made twice and that the matrices of
a large model never meet in memory once they are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spp_export.calibration.cache import (
    KINDS,
    LOSS,
    cache_paths,
    is_whole,
    read,
    statistics_bytes,
    write,
    writing,
)
from spp_export.calibration.reading import TokenText
from spp_export.calibration.statistics import (
    AttentionInputs,
    Axis,
    ExpertColumns,
    ExpertInputs,
    ExpertOutputs,
    Gradients,
    LayerStatistics,
    LayerWeights,
    MlpInputs,
)
from spp_export.calibration.stored import hold_for, trim
from spp_export.common.arrays import FloatArray
from spp_export.common.memory import free_memory
from spp_export.models.checkpoint.checkpoint import Checkpoint
from spp_export.models.checkpoint.dtypes import to_float
from spp_export.models.checkpoint.reader import blocks, read_float
from spp_export.models.families import Role
from spp_export.models.products import Matmul
from spp_export.models.shape import ModelShape

if TYPE_CHECKING:
    from torch import nn

    from spp_export.calibration.activations import Observer, TokenBatch

__all__ = ["KINDS", "Collection", "Moments", "gather", "layer_weights"]

# Of the free memory, what sums over activations may take.
_MEMORY_SHARE = 0.25
_GRADIENTS = tuple(field.name for field in fields(Gradients))
_EXPERTS = tuple(field.name for field in fields(ExpertOutputs))
_CHANNELS = "expert channels"


@dataclass(frozen=True)
class Collection:
    """Statistics of one text collection: averages over its real tokens, float32.

    parts: the cache file of each kind that was gathered. Other kinds cannot be asked for.
    """

    parts: Mapping[str, Path]

    def blocks(self, kind: str, layer: int) -> FloatArray:
        """Diagonal blocks [n,b,b] of E[a a^T], a [m] the input of o_proj ("attention") or down_proj
        ("mlp"), with " loss" as of `LossSums`: block i is of inputs i*b to (i+1)*b, the last
        one filled up with zeros. Of o_proj's there is one block (m = H*dh), of down_proj's one for
        up to 1536 channels."""
        return self._read(kind, f"second/{layer}")

    def mean(self, kind: str, layer: int) -> FloatArray:
        """E[a] [m]."""
        return self._read(kind, f"mean/{layer}")

    def input_square(self, kind: str, layer: int) -> FloatArray:
        """E x^2 [d] of the normed stream that q, k and v, or gate and up, read."""
        return self._read(kind, f"input_square/{layer}")

    def sensitivity(self, kind: str) -> FloatArray:
        """E 1/||r||^2 [L] of the residual stream after attention, or after the MLP."""
        return self._read(kind, "sensitivity")

    def experts(self, layer: int) -> ExpertOutputs:
        """What the layer's experts write."""
        return ExpertOutputs(
            **{name: self._read("experts", f"{name}/{layer}") for name in _EXPERTS}
        )

    def expert_inputs(self, layer: int) -> ExpertInputs:
        """What the down projections of the layer's experts read."""
        return ExpertInputs(self._read(_CHANNELS, f"square/{layer}"))

    def gradients(self, layer: int) -> Gradients:
        """First-order saliency of the layer's weights and units."""
        return Gradients(
            **{name: self._read("gradients", f"{name}/{layer}") for name in _GRADIENTS}
        )

    def layer_statistics(
        self,
        source: Checkpoint,
        layer: int,
        kinds: Iterable[str] | None = None,
        *,
        weights: LayerWeights | None = None,
        axis: Axis | None = None,
        seed: int = 0,
    ) -> LayerStatistics:
        """What criteria read of a layer of `source`, the parts of `kinds` (None: all gathered).

        `weights` None reads them from the source's files: give them where one layer is asked for
        many collections.
        """
        shape = source.shape
        kinds = set(self.parts if kinds is None else kinds)
        attends = "attention" in kinds and shape.has_heads[layer]
        widens = "mlp" in kinds and shape.has_channels[layer]
        of_experts = kinds & {"experts", _CHANNELS} if shape.sparse[layer] else set()
        return LayerStatistics(
            layer=layer,
            heads=shape.query_heads,
            groups=shape.kv_heads,
            weights=layer_weights(source, layer) if weights is None else weights,
            attention=self._attention(layer, shape.query_heads) if attends else None,
            mlp=self._mlp(layer) if widens else None,
            experts=self.experts(layer) if "experts" in of_experts else None,
            expert_inputs=self.expert_inputs(layer) if _CHANNELS in of_experts else None,
            gradients=self.gradients(layer) if "gradients" in kinds else None,
            axis=axis,
            seed=seed,
            expert_count=shape.experts,
        )

    def _attention(self, layer: int, heads: int) -> AttentionInputs:
        (second,) = self.blocks("attention", layer)
        dim = len(second) // heads
        return AttentionInputs(
            input_square=self.input_square("attention", layer),
            mean=self.mean("attention", layer),
            square=np.diagonal(second).copy(),
            second=np.stack([second[i : i + dim, i : i + dim] for i in range(0, len(second), dim)]),
        )

    def _mlp(self, layer: int) -> MlpInputs:
        mean = self.mean("mlp", layer)
        squares = np.diagonal(self.blocks("mlp", layer), axis1=1, axis2=2)
        return MlpInputs(
            input_square=self.input_square("mlp", layer),
            mean=mean,
            square=squares.reshape(-1)[: len(mean)],
        )

    def _read(self, kind: str, name: str) -> FloatArray:
        assert kind in self.parts, f"{kind} statistics were not gathered"
        values: FloatArray = read(self.parts[kind], name)
        return values


@dataclass(frozen=True)
class Moments:
    """A weighted mixture of text collections' moments; the weights sum to one.

    parts: (collection, weight). A collection counts by its weight, whatever its length.
    """

    parts: tuple[tuple[Collection, float], ...]

    def blocks(self, kind: str, layer: int) -> FloatArray:
        """As of `Collection`, mixed."""
        return self._mixed(lambda part: part.blocks(kind, layer))

    def mean(self, kind: str, layer: int) -> FloatArray:
        """As of `Collection`, mixed."""
        return self._mixed(lambda part: part.mean(kind, layer))

    def sensitivity(self, kind: str) -> FloatArray:
        """As of `Collection`, mixed."""
        return self._mixed(lambda part: part.sensitivity(kind))

    def _mixed(self, of: Callable[[Collection], FloatArray]) -> FloatArray:
        total: FloatArray | None = None
        for collection, weight in self.parts:
            part = of(collection)
            part *= part.dtype.type(weight)
            total = part if total is None else np.add(total, part, out=total)
        assert total is not None
        return total


def gather(
    source: Checkpoint,
    texts: Sequence[str | TokenText],
    kinds: Iterable[str],
    dense: Callable[[], tuple[nn.Module, Any]],
    *,
    dtype: str = "float32",
    matmul: Matmul = "float32",
    also: Sequence[Observer] = (),
    description: str = "gathering statistics",
) -> Collection:
    """As `gather_all`, of one collection of texts."""
    (collection,) = gather_all(
        source,
        [texts],
        kinds,
        dense,
        dtype=dtype,
        matmul=matmul,
        also=also,
        description=description,
    )
    return collection


def gather_all(
    source: Checkpoint,
    collections: Sequence[Sequence[str | TokenText]],
    kinds: Iterable[str],
    dense: Callable[[], tuple[nn.Module, Any]],
    *,
    dtype: str = "float32",
    matmul: Matmul = "float32",
    also: Sequence[Observer] = (),
    description: str = "gathering statistics",
) -> tuple[Collection, ...]:
    """Statistics of collections of texts, some of `KINDS`, from the cache or by the dense model.

    Whichever are missing, of whichever collection, come from one forward pass over the text of all,
    or from as few as memory for their sums allows; "gradients" from passes of their own, as do the
    gradients of tokens that moments in units of the loss need, unless the texts bring them. `dense`
    gives the model and its tokenizer, and is asked only where a pass is needed; `dtype` is the one
    that it computes in, and `matmul` that of its products. Observers in `also` look on in the
    forward pass, which is then made over all text; the index of a text is that in all collections.
    What is given back is not removed from the cache while it is held.
    Raises UsageError where gradients of an offloaded model are asked for.
    """
    kinds = tuple(kinds)
    gathered = tuple(map(Collection, cache_paths(source, collections, kinds, dtype, matmul)))
    missing = [
        {
            kind
            for kind, path in collection.parts.items()
            if not (hold_for(collection, path) and is_whole(path, _names(kind, source.shape)))
        }
        for collection in gathered
    ]
    starts = accumulate(map(len, collections), initial=0)
    parts = [
        _Part(
            texts,
            start,
            {kind: collection.parts[kind] for kind in sorted(absent) if kind != "gradients"},
        )
        for texts, start, collection, absent in zip(
            collections, starts, gathered, missing, strict=False
        )
    ]
    wanting = [part for part in parts if part.paths or also]
    if wanting:
        _forward(source, wanting, dense, also, description, matmul)
    for texts, collection, absent in zip(collections, gathered, missing, strict=True):
        if "gradients" in absent:
            described = f"{description}, gradients"
            reductions = _backward(source, texts, dense, described, matmul)
            write(collection.parts["gradients"], reductions, source.name)
        for kind in absent:
            hold_for(collection, collection.parts[kind])
    if any(missing):
        trim()
    return gathered


@dataclass(frozen=True)
class _Part:
    """A collection in a forward pass: its texts, the index of the first of them among those of all
    collections, and the cache file of each kind that is to be written."""

    texts: Sequence[str | TokenText]
    start: int
    paths: Mapping[str, Path]


def layer_weights(source: Checkpoint, layer: int) -> LayerWeights:
    """The seven projections of one layer, as far as it has them, read from the source's files."""
    family, shape = source.family, source.shape

    of_heads = (Role.QUERY, Role.KEY, Role.VALUE, Role.OUTPUT)

    def weight(role: Role) -> FloatArray:
        module = family.projection(role)
        has = shape.has_heads if role in of_heads else shape.has_channels
        if not module or not has[layer]:
            width = 0 if family.experts or not has[layer] else shape.channels
            return np.zeros((width, shape.hidden_size), dtype=np.float32)
        whole = source.weight(module, layer)
        return whole if role in (Role.OUTPUT, Role.DOWN) else whole[family.rows(role, shape)]

    names = (field.name for field in fields(LayerWeights))
    return LayerWeights(**{name: weight(Role(name)) for name in names})


def expert_columns(source: Checkpoint, layer: int) -> ExpertColumns:
    """Sums over the columns of what reads the channels of a layer's experts, read from the source's
    files an expert at a time."""
    shape, experts = source.shape, source.family.experts
    assert experts is not None
    tensor = next(one for one in shape.mlps[layer] if experts.is_down(one))
    name, wide = source.family.layer_name(layer, tensor.name), tensor.wide
    assert wide is not None
    found = ExpertColumns(*np.zeros((2, shape.experts, shape.expert_channels)))
    if tensor.each:
        stored = (source.tensors[name.replace("*", str(e))] for e in range(shape.experts))
        weights: Iterable[FloatArray] = map(read_float, stored)
        axis = wide
    else:
        rows = (
            to_float(block, source.tensors[name].dtype) for block in blocks(source.tensors[name])
        )
        weights, axis = chain.from_iterable(rows), wide - 1
    for expert, weight in enumerate(weights):
        across = 1 - axis
        found.squares[expert] = np.square(weight, dtype=np.float64).sum(axis=across)
        found.sums[expert] = np.abs(weight).sum(axis=across, dtype=np.float64)
    return found


def _forward(
    source: Checkpoint,
    parts: Sequence[_Part],
    dense: Callable[[], tuple[nn.Module, Any]],
    also: Sequence[Observer],
    description: str,
    matmul: Matmul,
) -> None:
    """Passes that write the parts' cache files, a layer at a time."""
    from spp_export.models.layerwise import stream_of

    model, tokenizer = dense()
    # Sums of a model that runs from disk are written, and given up, layer by layer.
    held = 1 if stream_of(model) is not None else source.shape.num_layers
    for group in _groups(source, parts, held):
        _one_pass(source, group, model, tokenizer, also, description, matmul)


def _groups(source: Checkpoint, parts: Sequence[_Part], layers: int) -> Iterator[Sequence[_Part]]:
    """Parts that fit in memory together, where a part holds the sums of so many layers."""
    room, taken = _MEMORY_SHARE * free_memory("cpu"), 0.0
    group: list[_Part] = []
    for part in parts:
        size = sum(statistics_bytes(source.shape, kind) for kind in part.paths)
        size = size * layers // source.shape.num_layers
        if group and taken + size > room:
            yield group
            group, taken = [], 0.0
        group.append(part)
        taken += size
    yield group


def _one_pass(
    source: Checkpoint,
    parts: Sequence[_Part],
    model: nn.Module,
    tokenizer: Any,
    also: Sequence[Observer],
    description: str,
    matmul: Matmul,
) -> None:
    from spp_export.calibration.activations import Router, observe, token_batches

    sums: list[dict[str, BlockSums | LossSums | ExpertSums]] = []
    batches: list[TokenBatch] = []
    # A batch is of one part, so that each part's sums are what a pass over it alone gives.
    for part in parts:
        of_part = token_batches(tokenizer, part.texts)
        if any(kind.endswith(LOSS) for kind in part.paths):
            of_part = _with_gradients(
                source, part.texts, of_part, model, tokenizer, description, matmul
            )
        sums.append({kind: _sums(kind, source.shape, of_part) for kind in part.paths})
        for batch in of_part:
            batches.append(replace(batch, texts=tuple(part.start + text for text in batch.texts)))
    observers = [
        [observer for kind in of_part.values() for observer in kind.observers] for of_part in sums
    ]
    starts = [part.start for part in parts]
    places = dict.fromkeys(observer.place for seen in observers for observer in seen)
    routers = [
        Router(place, starts, [[o for o in seen if o.place == place] for seen in observers])
        for place in places
    ]
    with ExitStack() as stack:
        files = [
            {
                kind: stack.enter_context(writing(path, of_part[kind].sizes, source.name))
                for kind, path in part.paths.items()
            }
            for part, of_part in zip(parts, sums, strict=True)
        ]

        def keep(layer: int) -> None:
            for of_part, written in zip(sums, files, strict=True):
                for kind, put in written.items():
                    for name, values in of_part[kind].averages(layer).items():
                        put(name, values)

        observe(
            model,
            source.family,
            batches,
            [*also, *routers],
            description=description,
            layer_done=keep,
            matmul=matmul,
        )


def _sums(
    kind: str, shape: ModelShape, batches: Sequence[TokenBatch]
) -> BlockSums | LossSums | ExpertSums:
    """What gathers statistics of a kind; the batches have gradients where it needs them."""
    if kind in ("experts", _CHANNELS):
        return ExpertSums(kind, shape)
    return LossSums(kind, shape, batches) if kind.endswith(LOSS) else BlockSums(kind, shape)


def _backward(
    source: Checkpoint,
    texts: Sequence[str | TokenText],
    dense: Callable[[], tuple[nn.Module, Any]],
    description: str,
    matmul: Matmul,
) -> dict[str, FloatArray]:
    from spp_export.calibration.activations import token_batches
    from spp_export.calibration.gradients import BATCH_TOKENS, gradient_reductions

    model, tokenizer = dense()
    reductions = gradient_reductions(
        model,
        source.family,
        source.shape,
        token_batches(tokenizer, texts, batch_tokens=BATCH_TOKENS),
        description=description,
        matmul=matmul,
    )
    return {f"{name}/{i}": row for name, rows in reductions.items() for i, row in enumerate(rows)}


def _with_gradients(
    source: Checkpoint,
    texts: Sequence[str | TokenText],
    batches: Sequence[TokenBatch],
    model: nn.Module,
    tokenizer: Any,
    description: str,
    matmul: Matmul,
) -> list[TokenBatch]:
    """The batches with the `gradient_lengths` of their tokens: those that the texts bring, else of
    a backward pass over the same tokens in smaller batches."""
    from spp_export.calibration.activations import token_batches
    from spp_export.calibration.gradients import BATCH_TOKENS, gradient_lengths

    if all(batch.gradients is not None for batch in batches):
        return list(batches)
    smaller = token_batches(tokenizer, texts, batch_tokens=BATCH_TOKENS)
    described = f"{description}, gradients"
    lengths = gradient_lengths(
        model, source.family, source.shape, smaller, description=described, matmul=matmul
    )
    ends = np.cumsum([batch.real_tokens for batch in batches])[:-1]
    return [
        replace(batch, gradients=part)
        for batch, part in zip(batches, np.split(lengths, ends), strict=True)
    ]


def _names(kind: str, shape: ModelShape) -> set[str]:
    """Tensors of a whole cache file."""
    if kind == "gradients":
        return {f"{name}/{i}" for name in _GRADIENTS for i in range(shape.num_layers)}
    layers = _layers_seen(kind, shape)
    if kind.endswith(LOSS):
        return {f"second/{i}" for i in layers}
    of_kind = {"experts": _EXPERTS, _CHANNELS: ("square",)}
    per_layer = of_kind.get(kind, ("second", "mean", "input_square"))
    return {"sensitivity", *(f"{name}/{i}" for name in per_layer for i in layers)}


def _layers_seen(kind: str, shape: ModelShape) -> list[int]:
    """The layers that have what statistics of a kind, with or without the loss, are of."""
    has = {"attention": shape.has_heads, "mlp": shape.has_channels}
    has |= dict.fromkeys(("experts", _CHANNELS), shape.sparse)
    return [layer for layer, there in enumerate(has[kind.removesuffix(LOSS)]) if there]


class BlockSums:
    """Observers of an attention block or of an MLP: what it reads, what its output projection
    reads, and the stream after it. `kind` is "attention" or "mlp"."""

    def __init__(self, kind: str, shape: ModelShape) -> None:
        # Imports torch, which reading what is cached does without.
        from spp_export.calibration.activations import (
            MeanSquares,
            SecondMoments,
            StreamSensitivity,
            channel_block,
        )

        layers = shape.num_layers
        reads, consumes, stream = {
            "attention": ("attention_input", "output", "residual_per_write"),
            "mlp": ("mlp_input", "down", "stream_per_write"),
        }[kind]
        width, block = {
            "attention": (shape.query_heads * shape.head_dim, None),
            "mlp": (shape.channels, channel_block(shape.channels)),
        }[kind]
        self._layers, self._seen = layers, _layers_seen(kind, shape)
        self._reads = MeanSquares(reads, layers, shape.hidden_size)
        self._second = SecondMoments(
            layers, width, place=consumes, block=block, first=self._seen[0] if self._seen else 0
        )
        self._block = block or width
        self._widths = shape.hidden_size, width
        self._stream = StreamSensitivity(layers, stream)

    @property
    def observers(self) -> tuple[Observer, ...]:
        """The observers to attach while the model runs."""
        return self._reads, self._second, self._stream

    @property
    def sizes(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Dtype and shape of each of the averages: of every layer's, and of `sensitivity`."""
        single, (read, width) = np.dtype(np.float32), self._widths
        sizes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            "sensitivity": (np.dtype(np.float64), (self._layers,))
        }
        for layer in self._seen:
            count = -(-width // self._block)
            sizes[f"second/{layer}"] = single, (count, self._block, self._block)
            sizes[f"mean/{layer}"] = single, (width,)
            sizes[f"input_square/{layer}"] = single, (read,)
        return sizes

    def averages(self, layer: int) -> dict[str, FloatArray]:
        """One layer's, per token, if it has such a block: `second/l` [n,b,b], `mean/l`,
        `input_square/l`; and with the last layer `sensitivity` [L].

        The layer's sums are given up for it, so that a large model's are not in memory together.
        """
        tokens = max(self._second.tokens, 1)
        averages: dict[str, FloatArray] = {}
        if layer in self._seen:
            averages = {
                f"second/{layer}": self._second.products(layer).div_(tokens).numpy(),
                f"mean/{layer}": (self._second.sums[layer] / tokens).numpy(),
                f"input_square/{layer}": (self._reads.sums[layer] / tokens).numpy(),
            }
        self._second.release(layer)
        if layer == self._layers - 1:
            averages["sensitivity"] = (self._stream.sums / tokens).numpy()
        return averages


class ExpertSums:
    """Observers of the stream after the MLP and, by the kind of statistics, of what experts write
    or of what their channels give; else as of `BlockSums`."""

    def __init__(self, kind: str, shape: ModelShape) -> None:
        from spp_export.calibration.activations import (
            ExpertChannelSquares,
            ExpertWrites,
            StreamSensitivity,
        )
        from spp_export.models.routing import check_routed_writes

        check_routed_writes()
        self._seen, self._layers = _layers_seen(kind, shape), shape.num_layers
        self._of_experts: ExpertChannelSquares | ExpertWrites
        if kind == _CHANNELS:
            size = (shape.experts, shape.expert_channels)
            self._of_experts = ExpertChannelSquares(self._layers, *size)
        else:
            self._of_experts = ExpertWrites(self._layers, shape.experts)
        self._stream = StreamSensitivity(self._layers, "stream_per_write")

    @property
    def observers(self) -> tuple[Observer, ...]:
        """The observers to attach while the model runs."""
        return self._of_experts, self._stream

    @property
    def sizes(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """As of `BlockSums`."""
        return {
            "sensitivity": (np.dtype(np.float64), (self._layers,)),
            **{
                f"{name}/{layer}": (np.dtype(np.float32), tuple(of.shape[1:]))
                for name, of in self._of_experts.named.items()
                for layer in self._seen
            },
        }

    def averages(self, layer: int) -> dict[str, FloatArray]:
        """As of `BlockSums`."""
        tokens = max(int(self._of_experts.tokens.max()), 1)
        averages: dict[str, FloatArray] = {}
        if layer in self._seen:
            averages = {
                f"{name}/{layer}": (of[layer] / tokens).float().numpy()
                for name, of in self._of_experts.named.items()
            }
        if layer == self._layers - 1:
            averages["sensitivity"] = (self._stream.sums / tokens).numpy()
        return averages


class LossSums:
    """As `BlockSums`, of "attention loss" or "mlp loss": second moments of what the output
    projection reads, `C = 1/(2dN) sum over tokens of |g|^2 a a^T` with the `gradients` |g| of the
    batches' tokens, N of which are predicted. `tr(D C D^T)` then estimates how many nats of KL, per
    predicted token, a change D of the projection costs.

    That of other tokens than those that the model draws itself is only near it.
    """

    def __init__(self, kind: str, shape: ModelShape, batches: Sequence[TokenBatch]) -> None:
        from spp_export.calibration.activations import SecondMoments, channel_block

        place, width, block = {
            "attention": ("output_by_loss", heads := shape.query_heads * shape.head_dim, heads),
            "mlp": ("down_by_loss", shape.channels, channel_block(shape.channels)),
        }[kind.removesuffix(LOSS)]
        self._moments = SecondMoments(shape.num_layers, width, place=place, block=block)
        predicted = sum(int(batch.predicted.sum()) for batch in batches)
        self._scale = 1 / (2 * shape.hidden_size * max(predicted, 1))
        self._layers, self._size = _layers_seen(kind, shape), (-(-width // block), block)

    @property
    def observers(self) -> tuple[Observer, ...]:
        """The observers to attach while the model runs."""
        return (self._moments,)

    @property
    def sizes(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """As of `BlockSums`."""
        count, block = self._size
        size = np.dtype(np.float32), (count, block, block)
        return {f"second/{layer}": size for layer in self._layers}

    def averages(self, layer: int) -> dict[str, FloatArray]:
        """As of `BlockSums`."""
        if layer not in self._layers:
            return {}
        second = self._moments.products(layer).mul_(self._scale).numpy()
        self._moments.release(layer)
        return {f"second/{layer}": second}

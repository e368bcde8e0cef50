"""Sizes of a decoder and of its layers, and what they cost. Plain numbers: no torch, no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

Units = Literal["heads", "channels", "both"]
UNITS: tuple[Units, ...] = ("heads", "channels", "both")
Layout = Literal["uniform", "per-layer", "ragged"]
LAYOUTS: tuple[Layout, ...] = ("uniform", "per-layer", "ragged")


@dataclass(frozen=True, slots=True, order=True)
class LayerShape:
    """How many query heads, KV heads and MLP channels a layer has.

    No heads: it has no attention, or another mixer in its place. No channels: it has no MLP that is
    cut. groups: where KV heads serve different numbers of query heads, the number of each; else
    empty.
    """

    query_heads: int
    kv_heads: int
    channels: int
    groups: tuple[int, ...] = ()

    @property
    def regular(self) -> bool:
        """Whether every KV head serves the same number of query heads."""
        if not self.kv_heads:
            return self.query_heads == 0
        return not self.groups and self.query_heads % self.kv_heads == 0

    @property
    def query_groups(self) -> tuple[int, ...]:
        """Query heads of each KV head."""
        return self.groups or (self.query_heads // max(self.kv_heads, 1),) * self.kv_heads

    def splits(self, ways: int) -> bool:
        """Whether `ways` cards can share the layer as vLLM does: each takes as many query heads and
        channels, and as many KV heads, or else one KV head serves as many cards."""
        kv = self.kv_heads % ways == 0 or ways % max(self.kv_heads, 1) == 0
        return self.regular and self.query_heads % ways == 0 and kv and self.channels % ways == 0

    @property
    def padded(self) -> LayerShape:
        """The regular layer whose every group is as large as the largest of this one."""
        query_heads = self.kv_heads * max(self.query_groups, default=0)
        return LayerShape(query_heads, self.kv_heads, self.channels)


@dataclass(frozen=True, slots=True)
class Uncut:
    """Tensors of a layer of which nothing is cut, all of one shape.

    name      relative to the layer; "*" in it is the number of an expert
    experts   how many there are, each with a tensor; 0 where it is one tensor
    routed    the share of it, or of them, that a token is routed to
    """

    name: str
    shape: tuple[int, ...]
    experts: int = 0
    routed: float = 1.0

    @property
    def names(self) -> tuple[str, ...]:
        """One name for each tensor."""
        if not self.experts:
            return (self.name,)
        return tuple(self.name.replace("*", str(expert)) for expert in range(self.experts))

    @property
    def elements(self) -> int:
        """Of all the tensors."""
        return prod(self.shape) * (self.experts or 1)

    @property
    def unread(self) -> int:
        """Elements that are not read for one token."""
        return self.elements - round(self.elements * self.routed)


@dataclass(frozen=True, slots=True)
class Costs:
    """Parameters of a model, summed over the tensors of its record.

    query_head, kv_head, channel  what goes with one of these, in every tensor that it is a part of
    layer     of any layer, what goes with none of them
    attention, mlp  the same of what only layers with heads have, and of those with channels
    outside   beside the layers, and in them where layers differ in it: `Uncut`; decoding a token
              does not read `unread` of these: an input embedding that is not the head, and
              experts that it is not routed to
    kv_rows   elements that one KV head adds to the cache per token
    query_rows  the same of one query head, of models that cache its keys and values
    layer_rows  the same of a layer with heads, however many
    """

    query_head: int
    kv_head: int
    channel: int
    layer: int
    outside: int
    unread: int
    kv_rows: int
    query_rows: int = 0
    layer_rows: int = 0
    attention: int = 0
    mlp: int = 0


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a dense decoder whose layers are alike, but for units that some do not have.

    `qkv_bias`, `output_bias` and `mlp_bias` say which projections carry a bias, `down_bias` that
    down_proj has one whatever gate and up have; `qk_norm` whether queries and keys are normalised
    per head. `element_bytes` is the size of one stored element of the attention weights.
    `switches` are further flags of the record that config.json turns on. `uncut` are, layer by
    layer, MLPs of which nothing is cut; empty where MLPs are. `mixers` are other tensors that stay
    and that layers differ in, such as those of what mixes tokens in the place of attention.
    `without_heads` and `without_channels` are the layers that have none.
    `head_rows` are the elements of one head in the tensors of queries and of keys, `head_inputs`
    what these read, 0 where it is head_dim and hidden_size; `cached` is what attention caches of a
    token, 0 where it is keys and values. `positions` are the rows of a table
    of positions, `embedding_size` is 0 where the embedding is as wide as the stream. `costs` come
    from the record; None counts the tensors of a Llama with these biases.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    query_heads: int
    kv_heads: int
    head_dim: int
    channels: int
    vocab_size: int
    tied_embeddings: bool
    element_bytes: int
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    down_bias: bool = False
    qk_norm: bool = False
    switches: tuple[str, ...] = ()
    uncut: tuple[tuple[Uncut, ...], ...] = ()
    mixers: tuple[tuple[Uncut, ...], ...] = ()
    without_heads: frozenset[int] = frozenset()
    without_channels: frozenset[int] = frozenset()
    head_rows: tuple[int, int] = (0, 0)
    head_inputs: tuple[int, int] = (0, 0)
    cached: int = 0
    positions: int = 0
    embedding_size: int = 0
    costs: Costs | None = None

    @property
    def group_size(self) -> int:
        """Query heads per KV head in the dense model (g)."""
        return self.query_heads // self.kv_heads

    @property
    def embedding_width(self) -> int:
        """Columns of the embedding and of the head."""
        return self.embedding_size or self.hidden_size

    @property
    def layer(self) -> LayerShape:
        """The shape of a layer of the dense model that has heads and channels."""
        return LayerShape(self.query_heads, self.kv_heads, self.channels)

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        """The dense model's layers, one entry each."""
        return self.alike(self.layer)

    def alike(self, size: LayerShape) -> tuple[LayerShape, ...]:
        """Layers of one size, each as far as it has such units."""
        return self.existing((size,) * self.num_layers)

    def existing(self, layers: Sequence[LayerShape]) -> tuple[LayerShape, ...]:
        """The layers without units that they do not have in this model."""
        return tuple(
            LayerShape(
                layer.query_heads * has_heads,
                layer.kv_heads * has_heads,
                layer.channels * has_channels,
                layer.groups if has_heads else (),
            )
            for layer, has_heads, has_channels in zip(
                layers, self.has_heads, self.has_channels, strict=True
            )
        )

    @property
    def has_heads(self) -> tuple[bool, ...]:
        """Whether each layer has heads."""
        return tuple(index not in self.without_heads for index in range(self.num_layers))

    @property
    def has_channels(self) -> tuple[bool, ...]:
        """Whether each layer has channels."""
        return tuple(index not in self.without_channels for index in range(self.num_layers))

    @property
    def counted(self) -> Costs:
        """`costs`, or those of a Llama."""
        if self.costs is not None:
            return self.costs
        hidden, dim, bias = self.hidden_size, self.head_dim, int(self.qkv_bias)
        table = self.vocab_size * hidden
        return Costs(
            query_head=dim * (2 * hidden + bias),
            kv_head=2 * dim * (hidden + bias),
            channel=3 * hidden + 2 * int(self.mlp_bias),
            layer=2 * hidden,
            attention=2 * dim * int(self.qk_norm) + hidden * int(self.output_bias),
            mlp=hidden * int(self.mlp_bias or self.down_bias),
            outside=table * (1 if self.tied_embeddings else 2) + hidden,
            unread=0 if self.tied_embeddings else table,
            kv_rows=2 * dim,
        )

    @property
    def uncut_parameters(self) -> int:
        """Parameters of MLPs that stay as they are: experts, routers and what is beside them."""
        return sum(tensor.elements for layer in self.uncut for tensor in layer)

    @property
    def mixer_parameters(self) -> int:
        """Parameters of what is beside heads and MLPs, and stays, such as other mixers."""
        return sum(tensor.elements for layer in self.mixers for tensor in layer)

    @property
    def query_head_parameters(self) -> int:
        """Parameters that go with one query head: its rows of q_proj and columns of o_proj."""
        return self.counted.query_head

    @property
    def kv_head_parameters(self) -> int:
        """Parameters that go with one KV head: its rows of k_proj and v_proj."""
        return self.counted.kv_head

    @property
    def channel_parameters(self) -> int:
        """Parameters that go with one MLP channel: rows of gate and up, a column of down."""
        return self.counted.channel

    def head_parameters(self, layers: Sequence[LayerShape]) -> int:
        """Parameters of q, k, v and o that belong to heads; o_proj's bias belongs to none."""
        return sum(
            layer.query_heads * self.query_head_parameters
            + layer.kv_heads * self.kv_head_parameters
            for layer in layers
        )

    def parameters(self, layers: Sequence[LayerShape]) -> int:
        """All parameters of a model with these layers; tied embeddings count once."""
        channels = sum(layer.channels for layer in layers) * self.channel_parameters
        costs, attending = self.counted, sum(layer.query_heads > 0 for layer in layers)
        fixed = costs.layer * len(layers) + costs.attention * attending + costs.outside
        fixed += costs.mlp * sum(layer.channels > 0 for layer in layers)
        return self.head_parameters(layers) + channels + fixed

    def decode_parameters(self, layers: Sequence[LayerShape]) -> int:
        """Parameters read to decode one token: all but an untied input embedding, of which one
        row is gathered, and the experts that it is not routed to."""
        return self.parameters(layers) - self.counted.unread

    def kv_bytes_per_token(
        self, layers: Sequence[LayerShape], element_bytes: int | None = None
    ) -> int:
        """Bytes of KV cache per token, at `element_bytes` (default: the stored dtype)."""
        size = self.element_bytes if element_bytes is None else element_bytes
        costs = self.counted
        return size * sum(
            costs.kv_rows * layer.kv_heads
            + costs.query_rows * layer.query_heads
            + costs.layer_rows * (layer.query_heads > 0)
            for layer in layers
        )


def common_size(layers: Sequence[LayerShape]) -> LayerShape:
    """The size of layers that are alike: each count as of the first that has such units."""
    heads = next((layer for layer in layers if layer.query_heads), layers[0])
    channels = next((layer.channels for layer in layers if layer.channels), 0)
    return replace(heads, channels=channels)


def channel_widths(channels: int, multiple: int) -> tuple[int, ...]:
    """Widths that an MLP of `channels` may be cut to, ascending: the multiples of `multiple`, which
    must be positive, and all of it."""
    return (*range(multiple, channels, multiple), channels)


def resident_parameters(shape: ModelShape) -> int:
    """Most parameters in memory at once of a model that runs layer by layer: two layers, or one
    and the head."""
    if shape.uncut:  # such models run as a whole
        return shape.parameters(shape.layers)
    outside = shape.parameters(())
    layer = max(shape.parameters((layer,)) - outside for layer in shape.layers)
    return layer + max(layer, shape.vocab_size * shape.hidden_size)


def unit_parameters(shape: ModelShape, layers: Sequence[LayerShape], units: Units) -> int:
    """Parameters of these layers that belong to heads, to channels or to both."""
    heads = shape.head_parameters(layers) if units != "channels" else 0
    channels = sum(layer.channels for layer in layers) if units != "heads" else 0
    return heads + channels * shape.channel_parameters

"""Sizes of a decoder and of its layers, and what they cost. Plain numbers: no torch, no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from operator import mul
from typing import Literal

Kind = Literal["heads", "channels", "experts"]
Units = Literal["heads", "channels", "both", "experts", "all"]
UNITS: tuple[Units, ...] = ("heads", "channels", "both", "experts", "all")
_KINDS: dict[Units, tuple[Kind, ...]] = {
    "heads": ("heads",),
    "channels": ("channels",),
    "both": ("heads", "channels"),
    "experts": ("experts",),
    "all": ("heads", "channels", "experts"),
}
# Names of tensors, relative to a layer, and their shapes.
Tensors = tuple[tuple[str, tuple[int, ...]], ...]
Layout = Literal["uniform", "per-layer", "ragged"]
LAYOUTS: tuple[Layout, ...] = ("uniform", "per-layer", "ragged")


def includes(units: Units, kind: Kind) -> bool:
    """Whether units of this kind may go."""
    return kind in _KINDS[units]


@dataclass(frozen=True, slots=True, order=True)
class LayerShape:
    """How many query heads, KV heads and MLP channels a layer has.

    No heads: it has no attention, or another mixer in its place; where a plan left it without, the
    bias of what wrote is all that is left. No channels: it has no MLP that is cut, or a plan left
    it without. groups: where KV heads serve different numbers of query heads, the number of each;
    else empty. dropped_experts: how many of the dense model's the layer has not; dropped_channels:
    how many of theirs each of its experts has not.
    """

    query_heads: int
    kv_heads: int
    channels: int
    groups: tuple[int, ...] = ()
    dropped_experts: int = 0
    dropped_channels: int = 0

    @property
    def has_attention(self) -> bool:
        """Whether there are heads."""
        return self.query_heads > 0

    @property
    def has_mlp(self) -> bool:
        """Whether there are channels."""
        return self.channels > 0

    @property
    def regular(self) -> bool:
        """Whether every KV head serves the same number of query heads."""
        if not self.kv_heads:
            return self.query_heads == 0
        return not self.groups and self.query_heads % self.kv_heads == 0

    @property
    def query_groups(self) -> tuple[int, ...]:
        """Query heads of each KV head."""
        if not self.kv_heads:
            return ()
        return self.groups or (self.query_heads // self.kv_heads,) * self.kv_heads

    def splits(self, ways: int) -> bool:
        """Whether `ways` cards can share the layer as vLLM does: each takes as many query heads and
        channels, and as many KV heads, or else one KV head serves as many cards."""
        kv = self.kv_heads % ways == 0 or ways % max(self.kv_heads, 1) == 0
        return self.regular and self.query_heads % ways == 0 and kv and self.channels % ways == 0

    @property
    def padded(self) -> LayerShape:
        """The regular layer whose every group is as large as the largest of this one."""
        query_heads = self.kv_heads * max(self.query_groups, default=0)
        return replace(self, query_heads=query_heads, groups=())


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """A tensor of experts, of a router or of an MLP beside them, of which experts alone are cut.

    name     relative to the layer; "*" in it is the number of an expert, each of which has one
    shape    of the dense model's
    axis     the one that counts experts; None where each has a tensor, or where it is of none
    routed   whether a token reads it of those experts only that it is routed to
    wide     the axis that counts an expert's channels, each expert having its own; None without
    form     what lies along it: "C" one element for each channel, "CC" all gates and then all ups,
             "[CC]" gate and up of each channel side by side
    """

    name: str
    shape: tuple[int, ...]
    axis: int | None = None
    routed: bool = False
    wide: int | None = None
    form: str = ""

    @property
    def each(self) -> bool:
        """Whether every expert has a tensor of its own."""
        return "*" in self.name

    @property
    def of_experts(self) -> bool:
        """Whether some of it goes with an expert."""
        return self.each or self.axis is not None

    @property
    def per_expert(self) -> int:
        """Elements that go with one expert."""
        if self.axis is not None:
            return prod(self.shape) // self.shape[self.axis]
        return prod(self.shape) if self.each else 0

    @property
    def per_channel(self) -> int:
        """Elements that go with one channel of one expert."""
        if self.wide is None:
            return 0
        return self.per_expert // self.shape[self.wide] * self.form.count("C")


@dataclass(frozen=True, slots=True)
class Costs:
    """Parameters of a model, summed over the tensors of its record.

    query_head, kv_head, channel, expert, expert_channel  what goes with one of these, in every
              tensor that it is a part of; the last is a channel of one expert
    layer     of any layer, what goes with none of them
    attention, mlp  the same of what only layers with heads have, and of those with channels
    emptied_attention, emptied_mlp  of a layer whose heads or channels a plan removes all, what it
              has beside `layer`: less than nothing, where a norm goes that other layers have
    outside   beside the layers, and in them where layers differ in it, as in experts and other
              mixers; decoding a token does not read `unread` of these: an input embedding that is
              not the head, and experts that it is not routed to, each of which has `routed`
              parameters
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
    expert: int = 0
    routed: int = 0
    layer_rows: int = 0
    attention: int = 0
    mlp: int = 0
    emptied_attention: int = 0
    emptied_mlp: int = 0
    expert_channel: int = 0


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a dense decoder whose layers are alike, but for units that some do not have.

    `qkv_bias`, `output_bias` and `mlp_bias` say which projections carry a bias, `down_bias` that
    down_proj has one whatever gate and up have; `qk_norm` whether queries and keys are normalised
    per head. `element_bytes` is the size of one stored element of the attention weights.
    `switches` are further flags of the record that config.json turns on. `mlps` are, layer by
    layer, the tensors of experts and of MLPs beside them; empty where no layer has experts. A layer
    with experts has `experts`, and a token is routed to `experts_per_token` of them, in
    `chosen_groups` of the `expert_groups` that these are, one after the other; each has
    `expert_channels` that can go, or 0. `mixers` are, layer by layer, names and shapes of other
    tensors that stay, such as those of what mixes tokens in the place of attention; `without_heads`
    and `without_channels` are the layers that have none, as those with experts have no channels of
    an MLP where other layers have. `head_rows` are the elements of one head
    in the tensors of queries and of keys, `head_inputs` what these read, 0 where it is head_dim and
    hidden_size; `cached` is what attention caches of a token for all heads together, 0 where it is
    keys and values; `cached_beside` what layers cache beside heads that can go. `unread` are
    tensors that files may have and no model reads, by layer and name. `outside` are further tensors
    beside the layers, and `tables` those of which a token reads a row. `beside` are names and
    shapes of tensors beside the decoder, such as those of a tower of vision. `positions` are the
    rows of a table of positions, `embedding_size` is 0 where the embedding is as wide as the
    stream. `costs` come from the record; None counts the tensors of
    a Llama with these biases.
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
    mlps: tuple[tuple[ExpertTensor, ...], ...] = ()
    experts: int = 0
    experts_per_token: int = 0
    expert_groups: int = 1
    chosen_groups: int = 1
    expert_channels: int = 0
    mixers: tuple[Tensors, ...] = ()
    without_heads: frozenset[int] = frozenset()
    without_channels: frozenset[int] = frozenset()
    head_rows: tuple[int, int] = (0, 0)
    head_inputs: tuple[int, int] = (0, 0)
    cached: int = 0
    cached_beside: int = 0
    unread: frozenset[str] = frozenset()
    outside: Tensors = ()
    tables: Tensors = ()
    beside: Tensors = ()
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
            replace(
                layer,
                query_heads=layer.query_heads * has_heads,
                kv_heads=layer.kv_heads * has_heads,
                channels=layer.channels * has_channels,
                groups=layer.groups if has_heads else (),
                dropped_experts=layer.dropped_experts * sparse,
                dropped_channels=layer.dropped_channels * sparse,
            )
            for layer, has_heads, has_channels, sparse in zip(
                layers, self.has_heads, self.has_channels, self.sparse, strict=True
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
    def has_mlps(self) -> bool:
        """Whether any layer has an MLP that is no expert, and whose channels can go."""
        return any(self.has_channels) and self.counted.channel > 0

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
            emptied_attention=hidden * int(self.output_bias) - hidden,
            emptied_mlp=hidden * int(self.mlp_bias or self.down_bias) - hidden,
            outside=table * (1 if self.tied_embeddings else 2) + hidden,
            unread=0 if self.tied_embeddings else table,
            kv_rows=2 * dim,
        )

    @property
    def sparse(self) -> tuple[bool, ...]:
        """Of every layer, whether it has experts."""
        if not self.mlps:
            return (False,) * self.num_layers
        return tuple(any(tensor.of_experts for tensor in layer) for layer in self.mlps)

    @property
    def expert_counts(self) -> tuple[int, ...]:
        """How many experts a layer may keep, ascending: as many as a token is routed to at least,
        of every group as many, and two of it, by which groups are judged."""
        each = self.experts_per_token
        if self.expert_groups > 1:
            each = max(2, -(-each // self.chosen_groups))
        least = min(each * self.expert_groups, self.experts)
        return tuple(range(least, self.experts + 1, self.expert_groups))

    @property
    def mlp_parameters(self) -> int:
        """Parameters of `mlps`: experts, routers and what is beside them."""
        return sum(
            prod(tensor.shape) * (self.experts if tensor.each else 1)
            for layer in self.mlps
            for tensor in layer
        )

    def experts_in(self, layers: Sequence[LayerShape]) -> tuple[int, ...]:
        """How many experts each of these layers, all of the model, has: 0 where it has none."""
        return tuple(
            self.experts - layer.dropped_experts if sparse else 0
            for layer, sparse in zip(layers, self.sparse, strict=True)
        )

    @property
    def mixer_parameters(self) -> int:
        """Parameters of what is beside heads and MLPs, and stays, such as other mixers."""
        return sum(prod(size) for layer in self.mixers for _, size in layer)

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
        """Parameters that go with one MLP channel: rows of gate and up and a column of down."""
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
        channels = mlp_channel_parameters(self, layers)
        costs, whole = self.counted, len(layers) == self.num_layers
        fixed = costs.outside
        for index, layer in enumerate(layers):
            # Of layers by themselves, which they are in the model is not known.
            emptied = index not in self.without_heads if whole else not self.without_heads
            fixed += costs.layer
            if layer.has_attention:
                fixed += costs.attention
            elif emptied:
                fixed += costs.emptied_attention
            if layer.has_mlp:
                fixed += costs.mlp
            elif index not in self.without_channels if whole else not self.without_channels:
                fixed += costs.emptied_mlp
        return self.head_parameters(layers) + channels + fixed - self._dropped(layers)

    def expert_parameters(self, layers: Sequence[LayerShape]) -> int:
        """Parameters that go with the experts of these layers, all of the model: with their rows of
        routers, without what is beside them."""
        return self.counted.expert * self.experts * sum(self.sparse) - self._dropped(layers)

    def _dropped(self, layers: Sequence[LayerShape]) -> int:
        """Parameters of experts that go, and of channels that go from those that stay."""
        return sum(
            self.counted.expert * layer.dropped_experts
            + self.counted.expert_channel
            * layer.dropped_channels
            * (self.experts - layer.dropped_experts)
            for layer in layers
        )

    def expert_channel_parameters(self, layers: Sequence[LayerShape]) -> int:
        """Parameters that go with the channels of the experts of these layers, all of the model."""
        return self.counted.expert_channel * self.expert_channels_in(layers)

    def expert_widths(self, layers: Sequence[LayerShape]) -> list[int]:
        """How many channels every expert keeps, of those of these layers, all of the model, that
        have experts whose channels can go."""
        if not self.expert_channels:
            return []
        return [
            self.expert_channels - layer.dropped_channels
            for layer, sparse in zip(layers, self.sparse, strict=True)
            if sparse
        ]

    def expert_channels_in(self, layers: Sequence[LayerShape]) -> int:
        """Channels of all experts of these layers, all of the model, that can go."""
        counts = (count for count in self.experts_in(layers) if count)
        return sum(map(mul, counts, self.expert_widths(layers)))

    def decode_parameters(self, layers: Sequence[LayerShape]) -> int:
        """Parameters read to decode one token: all but an untied input embedding, of which one
        row is gathered, and the experts that it is not routed to."""
        left_out, costs = self.experts - self.experts_per_token, self.counted
        # `unread` is of the dense model's experts, of which there are fewer, and narrower ones.
        gone = sum(
            costs.routed * layer.dropped_experts
            + costs.expert_channel * layer.dropped_channels * (left_out - layer.dropped_experts)
            for layer in layers
        )
        return self.parameters(layers) - costs.unread + gone

    def kv_bytes_per_token(
        self, layers: Sequence[LayerShape], element_bytes: int | None = None
    ) -> int:
        """Bytes of KV cache per token, at `element_bytes` (default: the stored dtype)."""
        size = self.element_bytes if element_bytes is None else element_bytes
        costs = self.counted
        return size * self.cached_beside + size * sum(
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


def channel_widths(channels: int, multiple: int, *, none: bool = False) -> tuple[int, ...]:
    """Widths that an MLP of `channels` may be cut to, ascending: the multiples of `multiple`, which
    must be positive, and all of it; with `none` 0 as well."""
    return (*range(0 if none else multiple, channels, multiple), channels)


def resident_parameters(shape: ModelShape) -> int:
    """Most parameters in memory at once of a model that runs layer by layer: two layers, or one
    and the head."""
    if shape.mlps:  # such models run as a whole
        return shape.parameters(shape.layers)
    outside = shape.parameters(())
    layer = max(shape.parameters((layer,)) - outside for layer in shape.layers)
    return layer + max(layer, shape.vocab_size * shape.hidden_size)


def unit_parameters(shape: ModelShape, layers: Sequence[LayerShape], units: Units) -> int:
    """Parameters of these layers, all of the model, that belong to the units of these kinds."""
    total = shape.head_parameters(layers) if includes(units, "heads") else 0
    if includes(units, "channels"):
        total += mlp_channel_parameters(shape, layers)
    if includes(units, "experts"):  # with their channels
        return total + shape.expert_parameters(layers)
    return total + shape.expert_channel_parameters(layers) * includes(units, "channels")


def mlp_channel_parameters(shape: ModelShape, layers: Sequence[LayerShape]) -> int:
    """Parameters of these layers, all of the model, that belong to channels of MLPs that are not
    experts."""
    return sum(layer.channels for layer in layers) * shape.channel_parameters


def kept_share(shape: ModelShape, layers: Sequence[LayerShape], units: Units) -> float:
    """Share of the parameters of the units of these kinds that these layers keep."""
    return unit_parameters(shape, layers, units) / unit_parameters(shape, shape.layers, units)

"""Sizes of a decoder and of its layers, and what they cost. Plain numbers: no torch, no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Units = Literal["heads", "channels", "both"]
UNITS: tuple[Units, ...] = ("heads", "channels", "both")
Layout = Literal["uniform", "per-layer", "ragged"]
LAYOUTS: tuple[Layout, ...] = ("uniform", "per-layer", "ragged")


@dataclass(frozen=True, slots=True, order=True)
class LayerShape:
    """How many query heads, KV heads and MLP channels a layer has.

    groups: where KV heads serve different numbers of query heads, the number of each; else empty.
    """

    query_heads: int
    kv_heads: int
    channels: int
    groups: tuple[int, ...] = ()

    @property
    def regular(self) -> bool:
        """Whether every KV head serves the same number of query heads."""
        return not self.groups and self.kv_heads > 0 and self.query_heads % self.kv_heads == 0

    @property
    def query_groups(self) -> tuple[int, ...]:
        """Query heads of each KV head."""
        return self.groups or (self.query_heads // self.kv_heads,) * self.kv_heads

    def splits(self, ways: int) -> bool:
        """Whether `ways` cards can share the layer as vLLM does: each takes as many query heads and
        channels, and as many KV heads, or else one KV head serves as many cards."""
        kv = self.kv_heads % ways == 0 or ways % self.kv_heads == 0
        return self.regular and self.query_heads % ways == 0 and kv and self.channels % ways == 0

    @property
    def padded(self) -> LayerShape:
        """The regular layer whose every group is as large as the largest of this one."""
        query_heads = self.kv_heads * max(self.query_groups)
        return LayerShape(query_heads, self.kv_heads, self.channels)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a dense decoder whose layers are all alike.

    `qkv_bias`, `output_bias` and `mlp_bias` say which projections carry a bias, `down_bias` that
    down_proj has one whatever gate and up have; `qk_norm` whether queries and keys are normalised
    per head. `element_bytes` is the size of one stored element of the attention weights.
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

    @property
    def group_size(self) -> int:
        """Query heads per KV head in the dense model (g)."""
        return self.query_heads // self.kv_heads

    @property
    def layer(self) -> LayerShape:
        """The shape of every layer of the dense model."""
        return LayerShape(self.query_heads, self.kv_heads, self.channels)

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        """The dense model's layers, one entry each."""
        return (self.layer,) * self.num_layers

    @property
    def query_head_parameters(self) -> int:
        """Parameters that go with one query head: its rows of q_proj and columns of o_proj."""
        return self.head_dim * (2 * self.hidden_size + int(self.qkv_bias))

    @property
    def kv_head_parameters(self) -> int:
        """Parameters that go with one KV head: its rows of k_proj and v_proj."""
        return 2 * self.head_dim * (self.hidden_size + int(self.qkv_bias))

    @property
    def channel_parameters(self) -> int:
        """Parameters that go with one MLP channel: rows of gate and up, a column of down."""
        return 3 * self.hidden_size + 2 * int(self.mlp_bias)

    def head_parameters(self, layers: Sequence[LayerShape]) -> int:
        """Parameters of q, k, v and o that belong to heads; o_proj's bias belongs to none."""
        return sum(
            layer.query_heads * self.query_head_parameters
            + layer.kv_heads * self.kv_head_parameters
            for layer in layers
        )

    def parameters(self, layers: Sequence[LayerShape]) -> int:
        """All parameters of a model with these layers; tied embeddings count once."""
        norms = 2 * self.hidden_size + 2 * self.head_dim * int(self.qk_norm)
        biases = self.hidden_size * (int(self.output_bias) + int(self.mlp_bias or self.down_bias))
        channels = sum(layer.channels for layer in layers) * self.channel_parameters
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        per_layer = (norms + biases) * len(layers)
        return self.head_parameters(layers) + channels + per_layer + embeddings + self.hidden_size

    def decode_parameters(self, layers: Sequence[LayerShape]) -> int:
        """Parameters read to decode one token: all but an untied input embedding, of which one
        row is gathered."""
        untied = 0 if self.tied_embeddings else self.vocab_size * self.hidden_size
        return self.parameters(layers) - untied

    def kv_bytes_per_token(
        self, layers: Sequence[LayerShape], element_bytes: int | None = None
    ) -> int:
        """Bytes of KV cache per token, at `element_bytes` (default: the stored dtype)."""
        size = self.element_bytes if element_bytes is None else element_bytes
        return 2 * self.head_dim * size * sum(layer.kv_heads for layer in layers)


def channel_widths(channels: int, multiple: int) -> tuple[int, ...]:
    """Widths that an MLP of `channels` may be cut to, ascending: the multiples of `multiple`, which
    must be positive, and all of it."""
    return (*range(multiple, channels, multiple), channels)


def resident_parameters(shape: ModelShape) -> int:
    """Most parameters in memory at once of a model that runs layer by layer: two layers, or one
    and the head."""
    outside = shape.parameters(())
    layer = max(shape.parameters((layer,)) - outside for layer in shape.layers)
    return layer + max(layer, shape.vocab_size * shape.hidden_size)


def unit_parameters(shape: ModelShape, layers: Sequence[LayerShape], units: Units) -> int:
    """Parameters of these layers that belong to heads, to channels or to both."""
    heads = shape.head_parameters(layers) if units != "channels" else 0
    channels = sum(layer.channels for layer in layers) if units != "heads" else 0
    return heads + channels * shape.channel_parameters

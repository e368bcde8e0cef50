"""The record of a family of decoders: where the roles live and which axis carries which unit.

A new family is one file with one `Family` record and one line in `families/__init__.py`, as the
README shows. Nothing outside this package spells a tensor name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from spp_export.common.errors import ModelError, PlanError
from spp_export.common.json_files import shown
from spp_export.models.shape import LayerShape, ModelShape

# Far above any model, far below what would be felt in memory before the tensors are compared.
_MOST: Mapping[str, int] = {
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "vocab_size": 1 << 24,
}


class Unit(StrEnum):
    """What an axis of a tensor counts, and so what can be cut from it."""

    QUERY = "query"
    KV = "kv"
    CHANNEL = "channel"


class Role(StrEnum):
    """The part a tensor plays; only these roles are ever cut."""

    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    OUTPUT = "output"
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a checkpoint: its name, shape, layer (None outside the layers) and role.

    `axis` counts `unit`s in steps of `step` elements (head_dim for heads, 1 for channels); both are
    None where nothing is ever cut.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None = None
    role: Role = Role.OTHER
    unit: Unit | None = None
    axis: int | None = None
    step: int = 1


# A flag of the family: fixed, or the name of the boolean in config.json that decides.
Flag = bool | str


@dataclass(frozen=True)
class Family:
    """Where the roles of one model type live. Names are relative to a layer's prefix."""

    model_type: str
    architecture: str
    qkv_bias: Flag = False
    output_bias: Flag = False
    mlp_bias: Flag = False
    qk_norm: bool = False
    # The stock config refuses head counts that do not divide the hidden size.
    heads_divide_hidden: bool = False
    layers: str = "model.layers"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    # Which layers see a sliding window: none, all (if the config has one), or those that the
    # config's layer_types name.
    sliding: Literal["none", "all", "listed"] = "none"
    # What the stock config takes for eos_token_id where config.json does not have the key.
    end_token: int | None = None
    # Buffers that old checkpoints carry and the config determines: left out of what is written.
    obsolete: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)

    def layer_name(self, layer: int, role: str) -> str:
        """Full module path of `role` in `layer`, e.g. `model.layers.3.self_attn.o_proj`."""
        return f"{self.layers}.{layer}.{role}"

    def projection(self, role: Role) -> str:
        """Module, relative to a layer, of any role but `OTHER`."""
        module: str = getattr(self, role.value)
        return module

    def bias_switch(self, role: Role) -> str:
        """The switch of the stock config that gives o_proj (OUTPUT) or down_proj (DOWN) a bias.

        Raises PlanError where the family has none.
        """
        switch = {Role.OUTPUT: self.output_bias, Role.DOWN: self.mlp_bias}[role]
        if not isinstance(switch, str):
            raise PlanError(
                f"layout 'uniform': the config of the {self.model_type} family has no bias on its "
                f"{role} projection, so 'bias' compensation cannot be stored. "
                "Use layout 'per-layer', or compensation 'lstsq' or 'none'."
            )
        return switch

    def read_shape(self, config: Mapping[str, Any], element_bytes: int) -> ModelShape:
        """Sizes from a parsed config.json.

        Raises ModelError for a missing or impossible size.
        """
        hidden = _size(config, "hidden_size")
        query_heads = _size(config, "num_attention_heads")
        kv_heads = _size(config, "num_key_value_heads", query_heads)
        if query_heads % kv_heads:
            raise ModelError(
                f"config.json: num_attention_heads {query_heads} is not a multiple of "
                f"num_key_value_heads {kv_heads}. The checkpoint is damaged."
            )
        if config.get("head_dim") is None and hidden % query_heads:
            raise ModelError(
                f"config.json: no head_dim, and hidden_size {hidden} is not a multiple of "
                f"num_attention_heads {query_heads}. Add head_dim."
            )
        layers = _size(config, "num_hidden_layers")
        types = config.get("layer_types")
        if isinstance(types, list) and len(types) != layers:
            raise ModelError(
                f"config.json: layer_types is of {len(types)} layers, and num_hidden_layers is "
                f"{layers}. Correct the one that is wrong."
            )
        return ModelShape(
            model_type=self.model_type,
            num_layers=layers,
            hidden_size=hidden,
            query_heads=query_heads,
            kv_heads=kv_heads,
            head_dim=_size(config, "head_dim", hidden // query_heads),
            channels=_size(config, "intermediate_size"),
            vocab_size=vocabulary_size(config),
            tied_embeddings=_flag(config, "tie_word_embeddings"),
            element_bytes=element_bytes,
            qkv_bias=_flag(config, self.qkv_bias),
            output_bias=_flag(config, self.output_bias),
            mlp_bias=_flag(config, self.mlp_bias),
            qk_norm=self.qk_norm,
        )

    def tensors(self, shape: ModelShape, layers: Sequence[LayerShape]) -> Iterator[TensorSpec]:
        """Every tensor of a checkpoint whose layers have these shapes, in file order."""
        hidden, dim = shape.hidden_size, shape.head_dim
        yield TensorSpec(f"{self.embedding}.weight", (shape.vocab_size, hidden))
        for index, layer in enumerate(layers):
            query, kv = layer.query_heads * dim, layer.kv_heads * dim
            parts: list[tuple[str, tuple[int, ...], Role, Unit | None, int | None, int]] = [
                (f"{self.attention_norm}.weight", (hidden,), Role.OTHER, None, None, 1),
                (f"{self.query}.weight", (query, hidden), Role.QUERY, Unit.QUERY, 0, dim),
                (f"{self.key}.weight", (kv, hidden), Role.KEY, Unit.KV, 0, dim),
                (f"{self.value}.weight", (kv, hidden), Role.VALUE, Unit.KV, 0, dim),
                (f"{self.output}.weight", (hidden, query), Role.OUTPUT, Unit.QUERY, 1, dim),
            ]
            if shape.qkv_bias:
                parts += [
                    (f"{self.query}.bias", (query,), Role.QUERY, Unit.QUERY, 0, dim),
                    (f"{self.key}.bias", (kv,), Role.KEY, Unit.KV, 0, dim),
                    (f"{self.value}.bias", (kv,), Role.VALUE, Unit.KV, 0, dim),
                ]
            if shape.output_bias:
                parts.append((f"{self.output}.bias", (hidden,), Role.OTHER, None, None, 1))
            if shape.qk_norm:
                parts += [
                    (f"{self.query_norm}.weight", (dim,), Role.OTHER, None, None, 1),
                    (f"{self.key_norm}.weight", (dim,), Role.OTHER, None, None, 1),
                ]
            width = layer.channels
            parts += [
                (f"{self.mlp_norm}.weight", (hidden,), Role.OTHER, None, None, 1),
                (f"{self.gate}.weight", (width, hidden), Role.GATE, Unit.CHANNEL, 0, 1),
                (f"{self.up}.weight", (width, hidden), Role.UP, Unit.CHANNEL, 0, 1),
                (f"{self.down}.weight", (hidden, width), Role.DOWN, Unit.CHANNEL, 1, 1),
            ]
            if shape.mlp_bias:
                parts += [
                    (f"{self.gate}.bias", (width,), Role.GATE, Unit.CHANNEL, 0, 1),
                    (f"{self.up}.bias", (width,), Role.UP, Unit.CHANNEL, 0, 1),
                ]
            if shape.mlp_bias or shape.down_bias:
                parts.append((f"{self.down}.bias", (hidden,), Role.OTHER, None, None, 1))
            for name, size, role, unit, axis, step in parts:
                yield TensorSpec(self.layer_name(index, name), size, index, role, unit, axis, step)
        yield TensorSpec(f"{self.final_norm}.weight", (hidden,))
        if not shape.tied_embeddings:
            yield TensorSpec(f"{self.head}.weight", (shape.vocab_size, hidden))

    def windows(self, config: Any, num_layers: int) -> tuple[int | None, ...]:
        """Per layer, how many last tokens attention sees by the stock config; None is all."""
        window = None if self.sliding == "none" else config.sliding_window
        if window is None or self.sliding == "all":
            return (window,) * num_layers
        return tuple(
            window if kind == "sliding_attention" else None
            for kind in config.layer_types[:num_layers]
        )

    def stock_accepts(self, shape: ModelShape) -> Callable[[int], bool]:
        """Whether the family's stock config takes a count of query heads, for layout `uniform`."""
        return lambda heads: not self.heads_divide_hidden or shape.hidden_size % heads == 0

    def is_obsolete(self, name: str) -> bool:
        """Whether a stored tensor is a buffer of a layer that the config determines."""
        layer, _, role = name.removeprefix(f"{self.layers}.").partition(".")
        return layer.isdigit() and name.startswith(f"{self.layers}.") and role in self.obsolete


def vocabulary_size(config: Mapping[str, Any]) -> int:
    """Tokens that a model has an embedding for. Raises ModelError."""
    return _size(config, "vocab_size")


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST[key]:
        raise ModelError(
            f"config.json: {key} must be a positive integer of at most {_MOST[key]}, got "
            f"{shown(value)}. The checkpoint is damaged or of another format."
        )
    return value


def _flag(config: Mapping[str, Any], flag: Flag) -> bool:
    if isinstance(flag, bool):
        return flag
    value = config.get(flag)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise ModelError(f"config.json: {flag} must be true or false, got {shown(value)}.")
    return value

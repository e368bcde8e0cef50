"""The record of a family of decoders: where the roles live and which axis carries which unit.

A new family is one `Family` record in `table.py`, as the README shows. Nothing outside this package
spells a tensor name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import prod
from typing import Any, Literal

from spp_export.common.errors import ModelError, PlanError
from spp_export.common.json_files import shown
from spp_export.models.families.computed import Computed
from spp_export.models.families.experts import Experts, product
from spp_export.models.families.mixers import Mixers, tensors_of
from spp_export.models.families.nested import decoder_settings
from spp_export.models.shape import (
    Costs,
    ExpertTensor,
    LayerShape,
    ModelShape,
    Units,
    includes,
)

# Far above any model, far below what would be felt in memory before the tensors are compared.
_MOST: Mapping[str, int] = {
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 24,
    "embedding_size": 1 << 20,
}


class Unit(StrEnum):
    """What an axis of a tensor counts, and so what can be cut from it."""

    QUERY = "query"
    KV = "kv"
    CHANNEL = "channel"
    EXPERT = "expert"


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
    None where nothing is ever cut. Where the axis has several parts, as in one tensor of queries,
    keys and values, `parts` says how many of which unit each has: one part after the other, or,
    `side_by_side`, unit by unit: the queries of a KV head, its key, its value. `expert` is the
    number of the expert that it belongs to as a whole. In a tensor of all experts, `wide` is the
    axis of their channels, of which each keeps its own, and `form` what lies along it, as of
    `ExpertTensor`.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None = None
    role: Role = Role.OTHER
    unit: Unit | None = None
    axis: int | None = None
    step: int = 1
    parts: tuple[tuple[Unit, int], ...] = ()
    side_by_side: bool = False
    expert: int | None = None
    wide: int | None = None
    form: str = ""


class Feature(StrEnum):
    """What a family computes otherwise than Llama does, in the words of a refusal."""

    NO_GATE = "an MLP without a gate"
    ACTIVATION = "an activation other than SiLU"
    FUSED = "several projections in one tensor"
    PARALLEL = "attention and MLP side by side"
    SANDWICH = "norms after attention and MLP"
    MULTIPLIERS = "multipliers of embeddings, attention, residuals or logits"
    SOFTCAP = "capped attention scores or logits"
    LAYER_NORM = "LayerNorm"
    SHIFTED_NORM = "norms that add 1 to their weights"
    BARE_NORM = "norms without weights"
    ROTARY = "a rotary embedding of its own"
    EXPERTS = "experts"
    ROUTER = "a router of its own kind"
    SINKS = "attention sinks"
    POSITIONS = "embeddings of positions"
    ALIBI = "scores biased by distance (ALiBi)"
    POST_NORM = "norms of the stream after attention and MLP"
    SIDE_BY_SIDE = "each head's query, key and value side by side in one tensor"
    TRANSPOSED = "weights with their inputs first"
    MIXERS = "other mixers than attention"
    GATED = "an output gate of every head in the tensor of its query"
    ALTERNATING = "layers of attention or of an MLP alone"
    LATENT = "keys and values made of latents (MLA)"
    WIDE_NORM = "norms over all heads or channels at once"
    VISION = "a tower of vision"


# What a reader of a plan has to be told of what a family computes.
_REMARKS: Mapping[Feature, str] = {
    Feature.WIDE_NORM: (
        "this model norms all its heads (or channels) together: a slim one norms those that are "
        "kept, and so does the dense model that it is checked against; removing units changes "
        "what the others compute, which the scores do not foresee"
    ),
    Feature.VISION: (
        "the decoder of text alone is cut, by text without pictures; the tower of vision and what "
        "projects from it stay as they are"
    ),
}


# Where a slim config.json keeps the stock class's own per_layer_config.
STOCK_LAYERS = "stock_per_layer_config"
# How the names of a decoder beside a tower of vision, and of its head, begin on disk where not as
# in memory.
_STORED = (("model.", "lm_head."), ("language_model.model.", "language_model.lm_head."))
# A flag of the family: fixed, or the name of the boolean in config.json that decides; "!name" where
# false means that there is one, "a&b" where it takes both.
Flag = bool | str
# What an axis counts, letter by letter: Q and K the head_dim elements of a query or KV head, q and
# k one element for each, C a channel.
_UNITS = {"Q": Unit.QUERY, "q": Unit.QUERY, "K": Unit.KV, "k": Unit.KV, "C": Unit.CHANNEL}


@dataclass(frozen=True)
class Family:
    """Where the roles of one model type live, and what their axes count.

    Names are relative to a layer's prefix. Roles of one name are parts of one tensor: queries,
    keys and values one after the other, or gate and up.
    """

    model_type: str
    architecture: str
    # What its attention, MLP or logits compute otherwise than Llama's.
    features: frozenset[Feature] = frozenset()
    # How, for other engines than transformers; None where none is told.
    computed: Computed | None = None
    # Biases of q, k and v, of o, of the MLP's projections.
    qkv_bias: Flag = False
    output_bias: Flag = False
    mlp_bias: Flag = False
    # Norms of queries and keys: one for all heads, or with `head_norms` weights of every head.
    qk_norm: Flag = False
    head_norms: bool = False
    qk_norm_bias: bool = False
    # The stock config refuses head counts that do not divide the hidden size.
    heads_divide_hidden: bool = False
    # Where the stock classes have no size of heads but hidden_size / heads: in the config, which
    # then is right for the dense model's count alone, or in the attention of every layer.
    derived_head_dim: Literal["", "config", "attention"] = ""
    # What config.json calls a key of Llama's; "" where it has none, and the size is fixed.
    keys: Mapping[str, str] = field(default_factory=dict)
    # Llama's keys that follow from others in config.json.
    derive: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: {}
    # Fields of the record that are others where a flag of config.json is on; of `features`, those
    # that come or go.
    variants: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    # What `logits_scaling` of config.json does to logits.
    scaled_logits: Literal["", "multiplied", "divided"] = ""
    # Values of config.json that the stock config class fills in, and switches that nobody handles
    # where they are on, or "!name" where they are off, or "name=value" where they are that.
    defaults: Mapping[str, Any] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    # What the stock config takes for theta where config.json says nothing of rotary settings; None
    # where it takes more than that.
    rope_theta: float | None = 10000.0
    # Sizes that the stock config has for single layers, in its per_layer_config.
    by_layer: tuple[str, ...] = ()
    # Layers rotate by their type.
    rope_by_type: bool = False
    # In one tensor: each KV head's queries, its key, its value. Else all queries, keys and values.
    side_by_side: bool = False
    # Attention takes KV heads that serve different numbers of query heads.
    uneven_groups: bool = True
    # The cache holds keys and values once for every query head.
    caches_queries: bool = False
    # Weights of projections have their inputs first.
    transposed: bool = False
    # The key of config.json under which the decoder's settings are; "" where they are all of it.
    inside: str = ""
    # How names of tensors begin in memory, and how on disk, where they differ there.
    stored: tuple[tuple[str, str], ...] = ()
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
    # What normalises the input of attention and of the MLP; "" where nothing does by itself.
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    # Other norms of a layer: "name", or "name?flag" for those that depend on config.json.
    more_norms: tuple[str, ...] = ()
    norm_weight: Flag = True
    norm_bias: bool = False
    # Norms over all query heads ("Q"), KV heads ("K") or channels ("C") at once. A slim model norms
    # the kept ones alone, so that cutting is not masking, and the masked model does the same.
    wide_norms: Mapping[str, str] = field(default_factory=dict)
    # Further tensors of a layer with one element for each query head, such as sinks.
    head_rows: tuple[str, ...] = ()
    # In place of gate, up and down in the layers that it says.
    experts: Experts | None = None
    # Layers with other mixers than attention, or with more tensors whose sizes config.json says.
    mixers: Mixers | None = None
    # Where they are not head_dim and hidden_size, by keys of config.json as in `Experts`: elements
    # that a head has among the outputs of the module of its query, and of that of its key, which
    # without a `value` is its value's as well; inputs of these modules.
    query_rows: str = ""
    key_rows: str = ""
    query_inputs: str = ""
    key_inputs: str = ""
    # Elements that attention caches of a token for all heads together, in place of keys and values.
    cached: str = ""
    # Keys of config.json that a slim one has otherwise, for their consequences are in its sizes;
    # None leaves one out.
    settled: Mapping[str, Any] = field(default_factory=dict)
    # Further tensors of a layer, of which nothing is cut.
    fixed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    # What attention and its mask take that has a part for every query head.
    per_head: tuple[str, ...] = ()
    embedding: str = "model.embed_tokens"
    # Further tensors beside the layers, and those of them of which a token reads a row, with sizes
    # as in `Experts`.
    outside: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, str] = field(default_factory=dict)
    # The projections between embeddings of another size and the stream.
    embedding_projections: tuple[str, ...] = ()
    # A norm right after the embedding; the table of positions and its rows beyond those that
    # config.json says.
    embedding_norm: str = ""
    positions: str = ""
    more_positions: int = 0
    final_norm: str = "model.norm"
    head: str = "lm_head"
    head_bias: Flag = False
    # Classes of transformers whose names do not follow from that of the architecture.
    config_class: str = ""
    decoder_class: str = ""
    # Which layers see a sliding window: none, all (if the config has one), or those that the
    # config's layer_types name.
    sliding: Literal["none", "all", "listed"] = "none"
    # In transformers 4 its routers or masks stay in float32, and fail beside float64.
    single_in_4: bool = False
    # What the stock config takes for eos_token_id where config.json does not have the key.
    end_token: int | tuple[int, ...] | None = None
    # Buffers that old checkpoints carry and the config determines: left out of what is written.
    obsolete: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)

    def of(self, config: Mapping[str, Any]) -> Family:
        """The record of a model with this config.json. Raises ModelError for a malformed flag."""
        config = self._read(self.settings(config))
        changed = replace(self, variants=())
        for flag, changes in self.variants:
            if _flag(config, flag):
                features = changed.features ^ changes.get("features", frozenset())
                changed = replace(changed, **{**changes, "features": features})
        return changed

    def settings(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """What config.json says of the decoder."""
        return decoder_settings(config) if self.inside else config

    def as_stored(self, names: Collection[str]) -> Family:
        """This record, for files whose tensors have these names: a decoder beside a tower of vision
        is stored under one of several names, by the version that wrote it."""
        for places in _STORED if self.inside else ():
            inner = f"{self.layers.rpartition('.')[0]}."
            found = replace(self, stored=tuple(zip((inner, f"{self.head}."), places, strict=True)))
            if found.on_disk(f"{self.embedding}.weight") in names:
                return found
        return self

    def on_disk(self, name: str) -> str:
        """The stored name of a tensor."""
        for here, there in self.stored:
            if name.startswith(here):
                return there + name.removeprefix(here)
        return name

    def in_memory(self, name: str) -> str:
        """The name that a stored tensor has in the model."""
        for here, there in self.stored:
            if name.startswith(there):
                return here + name.removeprefix(there)
        return name

    def _read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json under Llama's keys, with what is not said there."""
        config = {**self.defaults, **config}
        for key, name in self.keys.items():
            if name in config:
                config[key] = config[name]
            elif not name:  # of no meaning here
                config.pop(key, None)
        return {**config, **self.derive(config)}

    def stock_layers(self, config: Mapping[str, Any]) -> dict[str, dict[str, int]]:
        """The per_layer_config that the stock class has of this config.json: sizes, by `by_layer`,
        of layers in which they are not those of all."""
        if not self.by_layer:
            return {}
        found: dict[str, dict[str, int]] = self._read(self.settings(config))[STOCK_LAYERS]
        return found

    @property
    def width_key(self) -> str:
        """The key of an MLP's width, where layers differ: Llama's, but where the stock config has
        it for another width."""
        key = "intermediate_size"
        return self.keys.get(key, key) if self.experts and self.down else key

    def counts(self, layer: LayerShape) -> dict[str, int]:
        """The stock config's keys of a layer's sizes, as far as it has them."""
        sizes = {
            "num_attention_heads": layer.query_heads,
            "num_key_value_heads": layer.kv_heads,
            "intermediate_size": layer.channels,
        }
        named = {self.keys.get(key, key): size for key, size in sizes.items()}
        return {key: size for key, size in named.items() if key}

    def layer_name(self, layer: int, role: str) -> str:
        """Full module path of `role` in `layer`, e.g. `model.layers.3.self_attn.o_proj`."""
        return f"{self.layers}.{layer}.{role}"

    def projection(self, role: Role) -> str:
        """Module, relative to a layer, of any role but `OTHER`; "" where the family has none."""
        module: str = "" if role is Role.OTHER else getattr(self, role.value)
        return module

    @property
    def projections(self) -> Mapping[str, Role]:
        """The modules that are cut, in a layer's order, each with the first role that it plays."""
        roles: dict[str, Role] = {}
        for role in Role:
            if role is not Role.OTHER and (module := self.projection(role)):
                roles.setdefault(module, role)
        return roles

    def rows(self, role: Role, shape: ModelShape) -> slice | list[int]:
        """Where the outputs of q, k, v, gate or up are among those of the module that has them."""
        of_query, of_key = (rows or shape.head_dim for rows in shape.head_rows)
        sizes = {
            Role.QUERY: shape.query_heads * of_query,
            Role.KEY: shape.kv_heads * of_key,
            Role.VALUE: shape.kv_heads * shape.head_dim,
        }
        if self.side_by_side and role in sizes:
            return self._rows_beside(role, shape)
        sizes |= dict.fromkeys((Role.GATE, Role.UP), shape.channels)
        start = 0
        for other, size in sizes.items():
            if other is role:
                break
            start += size if self.projection(other) == self.projection(role) else 0
        return slice(start, start + sizes[role])

    def _rows_beside(self, role: Role, shape: ModelShape) -> list[int]:
        own, dim = shape.group_size, shape.head_dim
        first, heads = {
            Role.QUERY: (0, own),
            Role.KEY: (own, 1),
            Role.VALUE: (own + 1, 1),
        }[role]
        return [
            (group * (own + 2) + first) * dim + row
            for group in range(shape.kv_heads)
            for row in range(heads * dim)
        ]

    @property
    def write_norms(self) -> tuple[str, ...]:
        """The norms that what attention and what the MLP writes passes through, if any."""
        if Feature.SANDWICH not in self.features:
            return ()
        return tuple(name for name, _ in self.norms)

    @property
    def norms(self) -> tuple[tuple[str, str], ...]:
        """`more_norms`, each with its flag or ""."""
        return tuple(map(_optional, self.more_norms))

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a reader of a plan has to be told."""
        told = tuple(text for feature, text in _REMARKS.items() if feature in self.features)
        return (*told, f"{self.mixers.name} stay as they are") if self.mixers else told

    def refuse(self, unknown: Collection[Feature], what: str, instead: str) -> None:
        """ModelError if this family computes one of these things, which `what` does not know."""
        if refusal := self.refusal(unknown, what):
            raise ModelError(f"{refusal}, which {self.model_type} models have. {instead}")

    def refusal(self, unknown: Collection[Feature], what: str) -> str | None:
        """What `refuse` says begins with this; None where it says nothing."""
        features = sorted(self.features & set(unknown))
        return f"{what} does not know {features[0].value}" if features else None

    @property
    def mlp(self) -> str:
        """The module of the MLP, relative to a layer; "" where nothing of it is cut, or its
        projections are the layer's own."""
        return self.down.rpartition(".")[0]

    @property
    def attention_norms(self) -> tuple[str, ...]:
        """The norms that a layer without attention has no use for."""
        # Side by side, the MLP may read the same norm.
        return (self.attention_norm,) if self.attention_norm and self.mlp_norm else ()

    @property
    def mlp_norms(self) -> tuple[str, ...]:
        """The norms that a layer without an MLP has no use for."""
        return (self.mlp_norm,) if self.mlp_norm else ()

    def no_empty_layers(self, units: Units) -> str:
        """Why no layer may lose all of its heads, channels, or both; "" where it may."""
        if refusal := self.refusal((Feature.MIXERS, Feature.LATENT), "a layer that keeps nothing"):
            return refusal
        if self.derived_head_dim == "attention":
            return f"attention of {self.model_type} models has no size of heads of its own"
        if includes(units, "channels") and not self.mlp and not self.experts:
            return f"the MLPs of {self.model_type} models are not cut"
        if units == "channels" and self.experts:
            return f"MLPs and experts of {self.model_type} models become narrower, and none goes"
        return ""

    def check_units(self, units: Units, shape: ModelShape) -> None:
        """ModelError where units are to go that models of this family, or this one, do not have or
        that are not cut."""
        cut = shape.expert_channels or shape.has_mlps
        if includes(units, "channels") and self.experts and not cut:
            instead = "Use --units heads or experts."
            self.refuse((Feature.EXPERTS,), f"--units {units}", instead)
        if includes(units, "experts") and not any(shape.sparse):
            raise ModelError(
                f"--units {units}: this {self.model_type} model has no experts. "
                "Use --units heads, channels or both."
            )

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
        stated = self.settings(config)
        config = self._read(stated)
        for key in self.refused:
            name, _, given = key.removeprefix("!").partition("=")
            value = config.get(name)
            if value == given if given else value is False if key[0] == "!" else value:
                raise ModelError(
                    f"config.json: {name} is {shown(value)}; the record of the "
                    f"{self.model_type} family has no field for what comes with it."
                )
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
        flags = [flag for _, flag in map(_optional, self.more_norms) if flag]
        flags += [self.head_bias] if isinstance(self.head_bias, str) else []
        if isinstance(self.norm_weight, str):
            flags.append(self.norm_weight)
        shape = ModelShape(
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
            qk_norm=_flag(config, self.qk_norm),
            switches=tuple(flag for flag in flags if _flag(config, flag)),
            **self._others(config, {**config, **self.defaults, **stated}, layers),
            positions=(
                _size(config, "max_position_embeddings") + self.more_positions
                if self.positions
                else 0
            ),
            embedding_size=(
                _size(config, "embedding_size", hidden) if self.embedding_projections else 0
            ),
        )
        return self.changed(shape)

    def _others(
        self, config: Mapping[str, Any], stated: Mapping[str, Any], layers: int
    ) -> dict[str, Any]:
        """The fields of a shape that say what is beside heads and channels, or otherwise made; of
        experts by the keys of config.json as it has them, `stated`."""

        def sizes(*words: str) -> tuple[int, ...]:
            return tuple(product(config, word) if word else 0 for word in words)

        found: dict[str, Any] = {
            "head_rows": sizes(self.query_rows, self.key_rows),
            "head_inputs": sizes(self.query_inputs, self.key_inputs),
            "cached": product(config, self.cached) if self.cached else 0,
            "outside": tuple(tensors_of(config, self.outside)),
            "tables": tuple(tensors_of(config, self.tables)),
        }
        if self.mixers:
            found |= self.mixers.read(config, layers)
        if self.experts:
            found |= self.experts.read(stated, layers)
        if self.experts and self.down:  # layers with experts have no other MLP that is cut
            sparse = {i for i, mlp in enumerate(found["mlps"]) if any(x.of_experts for x in mlp)}
            found["without_channels"] = found.get("without_channels", frozenset()) | sparse
        return found

    def changed(self, shape: ModelShape, **changes: Any) -> ModelShape:
        """A shape of this family with other fields, and with the costs that follow from them."""
        shape = replace(shape, **changes, costs=None)
        return replace(shape, costs=self._costs(shape))

    def _costs(self, shape: ModelShape) -> Costs:
        """Parameters, summed over the tensors of one layer and of what is beside the layers."""
        none: frozenset[int] = frozenset()
        bare = replace(shape, mlps=(), mixers=(), without_heads=none, without_channels=none)
        per_unit = dict.fromkeys(Unit, 0)
        outside = rows = 0
        for spec in self.tensors(bare, (shape.layer,)):
            elements = prod(spec.shape)
            if spec.layer is None:
                outside += elements
            elif spec.unit is not None and spec.axis is not None:
                length = spec.shape[spec.axis]
                for unit, _ in spec.parts or ((spec.unit, 0),):
                    per_unit[unit] += elements // length * spec.step
                    weight = len(spec.shape) == 2 and spec.role is not Role.OTHER
                    rows += spec.step if unit is Unit.KV and weight else 0
        whole = self._fixed(bare, shape.layer)
        no_heads = replace(shape.layer, query_heads=0, kv_heads=0)
        no_channels, first = replace(shape.layer, channels=0), frozenset({0})
        attention = whole - self._fixed(replace(bare, without_heads=first), no_heads)
        mlp = whole - self._fixed(replace(bare, without_channels=first), no_channels)
        unread = 0 if shape.tied_embeddings else shape.vocab_size * shape.embedding_width
        alone = not (self.caches_queries or shape.cached)
        unread += sum(prod(size) for _, size in (*shape.beside, *shape.tables))
        sparse = next((mlp for mlp, has in zip(shape.mlps, shape.sparse, strict=False) if has), ())
        routed = sum(tensor.per_expert for tensor in sparse if tensor.routed)
        left_out = shape.experts - shape.experts_per_token
        return Costs(
            per_unit[Unit.QUERY],
            per_unit[Unit.KV],
            per_unit[Unit.CHANNEL],
            whole - attention - mlp,
            outside + shape.mlp_parameters + shape.mixer_parameters,
            unread + sum(shape.sparse) * left_out * routed,
            rows if alone else 0,
            rows if self.caches_queries else 0,
            sum(tensor.per_expert for tensor in sparse),
            routed,
            shape.cached,
            attention,
            mlp,
            attention - whole + self._fixed(bare, no_heads),
            mlp - whole + self._fixed(bare, no_channels),
            sum(tensor.per_channel for tensor in sparse),
        )

    def _fixed(self, shape: ModelShape, layer: LayerShape) -> int:
        """Parameters of a layer that go with none of its units."""
        return sum(
            prod(spec.shape)
            for spec in self.tensors(shape, (layer,))
            if spec.layer is not None and spec.unit is None
        )

    def tensors(self, shape: ModelShape, layers: Sequence[LayerShape]) -> Iterator[TensorSpec]:
        """Every tensor of a checkpoint whose layers have these shapes, in file order."""
        hidden = shape.hidden_size
        table = (shape.vocab_size, shape.embedding_width)
        yield TensorSpec(f"{self.embedding}.weight", table)
        for name, size in (*shape.tables, *shape.outside):
            yield TensorSpec(name, size)
        for name, size in self._norm(self.embedding_norm, shape):
            yield TensorSpec(name, size)
        if self.positions:
            yield TensorSpec(f"{self.positions}.weight", (shape.positions, hidden))
        if shape.embedding_width != hidden:
            enters, leaves = self.embedding_projections
            yield TensorSpec(f"{enters}.weight", (hidden, shape.embedding_width))
            yield TensorSpec(f"{leaves}.weight", (shape.embedding_width, hidden))
        for index, layer in enumerate(layers):
            yield from self._layer_tensors(shape, layer, index)
        for name, size in self._norm(self.final_norm, shape):
            yield TensorSpec(name, size)
        if not shape.tied_embeddings:
            yield TensorSpec(f"{self.head}.weight", table)
        if self.head_bias is True or self.head_bias in shape.switches:
            yield TensorSpec(f"{self.head}.bias", (shape.vocab_size,))
        for name, size in shape.beside:
            yield TensorSpec(name, size)

    def _layer_tensors(
        self, shape: ModelShape, layer: LayerShape, index: int
    ) -> Iterator[TensorSpec]:
        hidden = shape.hidden_size

        def cut(
            name: str, role: Role, form: str, *rest: int, axis: int = 0, rows: int = 0
        ) -> TensorSpec:
            """A tensor of which `axis` has the parts of `form`, and the other axes these sizes;
            `rows` of each unit, where that is not head_dim."""
            counts = {
                Unit.QUERY: layer.query_heads,
                Unit.KV: layer.kv_heads,
                Unit.CHANNEL: layer.channels,
            }
            parts = tuple((_UNITS[letter], counts[_UNITS[letter]]) for letter in form)
            step = rows or (shape.head_dim if form[0] in "QK" else 1)
            # A weight has another axis; where that of the inputs is the first, all is turned.
            turned = self.transposed and bool(rest) and role is not Role.OTHER
            axis = 1 - axis if turned else axis
            size = list(rest)
            size.insert(axis, sum(count for _, count in parts) * step)
            return TensorSpec(
                self.layer_name(index, name),
                tuple(size),
                index,
                role,
                parts[0][0],
                axis,
                step,
                parts if len(parts) > 1 else (),
                self.side_by_side and len(parts) > 1 and role is Role.QUERY,
            )

        def whole(names: Iterable[tuple[str, tuple[int, ...]]]) -> Iterator[TensorSpec]:
            for name, size in names:
                yield TensorSpec(self.layer_name(index, name), size, index)

        heads = self._forms({Role.QUERY: "Q", Role.KEY: "K", Role.VALUE: "K"})
        widths = self._forms({Role.GATE: "C", Role.UP: "C"})
        rows = dict(zip((Role.QUERY, Role.KEY), shape.head_rows, strict=True))
        inputs = dict(zip((Role.QUERY, Role.KEY), shape.head_inputs, strict=True))
        # Attention and MLP that a plan leaves without units keep the bias of what writes, and no
        # norm; what a layer never had is another thing.
        emptied = not layer.has_attention and index not in shape.without_heads
        if not (emptied and self.attention_norms):
            yield from whole(self._norm(self.attention_norm, shape))
        if layer.query_heads:
            for module, (role, form) in heads.items():
                size = inputs.get(role) or hidden
                yield cut(f"{module}.weight", role, form, size, rows=rows.get(role, 0))
            yield cut(f"{self.output}.weight", Role.OUTPUT, "Q", hidden, axis=1)
            for module, (role, form) in heads.items() if shape.qkv_bias else ():
                yield cut(f"{module}.bias", role, form, rows=rows.get(role, 0))
        if shape.output_bias and (layer.query_heads or emptied):
            yield from whole([(f"{self.output}.bias", (hidden,))])
        if layer.query_heads:
            if shape.qk_norm and self.head_norms:
                yield cut(f"{self.query_norm}.weight", Role.OTHER, "q", shape.head_dim)
                yield cut(f"{self.key_norm}.weight", Role.OTHER, "k", shape.head_dim)
            elif shape.qk_norm:
                for module in (self.query_norm, self.key_norm):
                    yield from whole([(f"{module}.weight", (shape.head_dim,))])
                    if self.qk_norm_bias:
                        yield from whole([(f"{module}.bias", (shape.head_dim,))])
            for name in self.head_rows:
                yield cut(name, Role.OTHER, "q")
        for module, form in self.wide_norms.items():
            if layer.channels if form == "C" else layer.query_heads:
                yield cut(f"{module}.weight", Role.OTHER, form)
        emptied = not layer.has_mlp and index not in shape.without_channels
        if not (emptied and self.mlp_norms):
            yield from whole(self._norm(self.mlp_norm, shape))
        if layer.channels:
            for module, (role, form) in widths.items():
                yield cut(f"{module}.weight", role, form, hidden)
            if self.down:
                yield cut(f"{self.down}.weight", Role.DOWN, "C", hidden, axis=1)
            for module, (role, form) in widths.items() if shape.mlp_bias else ():
                yield cut(f"{module}.bias", role, form)
        if self.down and (shape.mlp_bias or shape.down_bias) and (layer.channels or emptied):
            yield from whole([(f"{self.down}.bias", (hidden,))])
        yield from whole(shape.mixers[index] if shape.mixers else ())
        experts = shape.experts - layer.dropped_experts
        for tensor in shape.mlps[index] if shape.mlps else ():
            yield from self._expert_tensors(tensor, experts, layer.dropped_channels, index)
        for module, flag in map(_optional, self.more_norms):
            if not flag or flag in shape.switches:
                yield from whole(self._norm(module, shape))
        fixed = self.fixed.items()
        if not layer.has_mlp:
            fixed = {
                name: size for name, size in fixed if not name.startswith(f"{self.mlp}.")
            }.items()
        yield from whole(fixed)

    def _expert_tensors(
        self, tensor: ExpertTensor, experts: int, narrower: int, index: int
    ) -> Iterator[TensorSpec]:
        """A tensor of a layer with so many experts, each by so many channels narrower than the
        dense model's, or one for each of them."""
        name, axis, size = self.layer_name(index, tensor.name), tensor.axis, list(tensor.shape)
        wide, form = tensor.wide, tensor.form
        if wide is not None:
            size[wide] -= narrower * form.count("C")
        if tensor.each:
            one = TensorSpec(name, tuple(size), index)
            if wide is not None:
                step = 2 if form == "[CC]" else 1
                parts = ((Unit.CHANNEL, size[wide] // 2),) * 2 if form == "CC" else ()
                one = replace(one, unit=Unit.CHANNEL, axis=wide, step=step, parts=parts)
            for expert in range(experts):
                yield replace(one, name=name.replace("*", str(expert)), expert=expert)
        elif axis is None:
            yield TensorSpec(name, tensor.shape, index)
        else:
            size[axis] = experts
            yield TensorSpec(
                name, tuple(size), index, unit=Unit.EXPERT, axis=axis, wide=wide, form=form
            )

    def _forms(self, roles: Mapping[Role, str]) -> dict[str, tuple[Role, str]]:
        """The modules of these roles, each with its first role and what its outputs count."""
        found: dict[str, tuple[Role, str]] = {}
        for role, form in roles.items():
            if module := self.projection(role):
                first, before = found.get(module, (role, ""))
                found[module] = first, before + form
        return found

    def _norm(self, module: str, shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
        if module and (self.norm_weight is True or self.norm_weight in shape.switches):
            yield f"{module}.weight", (shape.hidden_size,)
            if self.norm_bias:
                yield f"{module}.bias", (shape.hidden_size,)

    def windows(self, config: Any, num_layers: int) -> tuple[int | None, ...]:
        """Per layer, how many last tokens attention sees by the stock config; None is all."""
        window = None if self.sliding == "none" else config.sliding_window
        if window is None or self.sliding == "all":
            return (window,) * num_layers
        return tuple(
            window if kind == "sliding_attention" else None
            for kind in config.layer_types[:num_layers]
        )

    @property
    def uniform(self) -> Literal["all", "channels", "experts", ""]:
        """What can go where all layers are alike, if the stock config takes no other number of
        heads than the dense model's; "" is nothing."""
        if not (self.derived_head_dim or (self.mixers and self.mixers.of_heads)):
            return "all"
        if self.experts:
            return "experts"
        if self.mixers and self.mixers.of_channels:
            return ""
        return "channels" if self.keys.get("intermediate_size", "any") else ""

    def stock_accepts(self, shape: ModelShape) -> Callable[[int], bool]:
        """Whether the family's stock config takes a count of query heads, for layout `uniform`."""
        if self.derived_head_dim:
            return lambda heads: heads * shape.head_dim == shape.hidden_size
        if self.mixers and self.mixers.of_heads:
            return lambda heads: heads == shape.query_heads
        return lambda heads: not self.heads_divide_hidden or shape.hidden_size % heads == 0

    def is_obsolete(self, name: str, shape: ModelShape) -> bool:
        """Whether a stored tensor is a buffer of a layer that the config determines, or one that
        models do not read."""
        place = name.removeprefix(f"{self.layers}.")
        layer, _, role = place.partition(".")
        known = role in self.obsolete or place in shape.unread
        return layer.isdigit() and name.startswith(f"{self.layers}.") and known


def _optional(norm: str) -> tuple[str, str]:
    """Name and flag of a norm; no flag where every model has it."""
    name, _, flag = norm.partition("?")
    return name, flag


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
    if "&" in flag:
        return all(_flag(config, one) for one in flag.split("&"))
    if flag.startswith("!"):
        return not _flag(config, flag[1:])
    value = config.get(flag)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise ModelError(f"config.json: {flag} must be true or false, got {shown(value)}.")
    return value

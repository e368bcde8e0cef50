"""The plan: which units of which layer stay, and where that decision came from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from spp_export.common.errors import PlanError
from spp_export.common.json_files import dump_json
from spp_export.models.shape import LayerShape, Layout, ModelShape, Units, includes

SCHEMA_VERSION = 1

Compensation = Literal["none", "bias", "lstsq"]
COMPENSATIONS: tuple[Compensation, ...] = ("none", "bias", "lstsq")
PROVENANCE = (
    "scenario",
    "artifacts",
    "diagnosis",
    "family",
    "calibration",
    "criterion",
    "policy",
    "budget",
    "predicted",
    "versions",
)
# Among the query heads of a padded layer: one whose weights are zero.
FILL = -1


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What one layer keeps, as ascending indices in the source; `channels` and `experts` None keep
    them all. `expert_channels` has a row for each expert that stays, all equally long: the channels
    that it keeps; None where they keep all. Nothing is listed of units that the layer does not have
    in the source. No heads, where it has some: the layer loses its attention; no channels: its
    MLP."""

    kv_heads: tuple[int, ...]
    query_heads: tuple[int, ...]
    channels: tuple[int, ...] | None = None
    experts: tuple[int, ...] | None = None
    expert_channels: tuple[tuple[int, ...], ...] | None = None

    def shape(self, model: ModelShape) -> LayerShape:
        """Size of the layer after slicing."""
        channels = model.channels if self.channels is None else len(self.channels)
        groups = tuple(len(heads) for heads in self._heads_by_group(model.group_size))
        groups = groups if len(set(groups)) > 1 else ()
        dropped = 0 if self.experts is None else model.experts - len(self.experts)
        width = self.expert_width
        narrower = 0 if width is None else model.expert_channels - width
        return LayerShape(
            len(self.query_heads), len(self.kv_heads), channels, groups, dropped, narrower
        )

    @property
    def expert_width(self) -> int | None:
        """How many channels each expert keeps; None for all."""
        if self.expert_channels is None:
            return None
        return max(map(len, self.expert_channels), default=0)

    def channels_of(self, expert: int) -> tuple[int, ...] | None:
        """The channels that an expert of the source, one that stays, keeps; None for all."""
        if self.expert_channels is None:
            return None
        place = expert if self.experts is None else self.experts.index(expert)
        return self.expert_channels[place]

    def padded_heads(self, group_size: int) -> tuple[int, ...]:
        """The query heads, each group followed by as many `FILL`s as the largest has more.

        group_size: query heads per KV head of the source.
        """
        groups = self._heads_by_group(group_size)
        widest = max(map(len, groups), default=0)
        return tuple(head for heads in groups for head in (*heads, *[FILL] * (widest - len(heads))))

    def _heads_by_group(self, group_size: int) -> list[list[int]]:
        """Kept query heads of every kept KV group."""
        heads: dict[int, list[int]] = {group: [] for group in self.kv_heads}
        for head in self.query_heads:
            heads.setdefault(head // group_size, []).append(head)
        return list(heads.values())

    def to_dict(self) -> dict[str, Any]:
        """The layer's object in plan.json."""
        return {
            "kv_heads": list(self.kv_heads),
            "query_heads": list(self.query_heads),
            "channels": None if self.channels is None else list(self.channels),
            **({} if self.experts is None else {"experts": list(self.experts)}),
            **(
                {}
                if self.expert_channels is None
                else {"expert_channels": [list(row) for row in self.expert_channels]}
            ),
        }


@dataclass(frozen=True)
class Plan:
    """The compiled decision. Slicing reads the first five fields and `padded`; the rest is
    provenance.

    `model_source` is a hub id or a directory name, never an absolute path: users publish plans.
    The provenance fields are JSON objects and may be empty. `padded`: the groups of a ragged layer
    are filled with heads of zeros and written as a regular one; a budget counts none of these.
    """

    model_fingerprint: str
    model_source: str
    layout: Layout
    compensation: Compensation
    layers: tuple[LayerPlan, ...]
    scenario: Mapping[str, Any] = field(default_factory=dict)
    artifacts: Mapping[str, Any] = field(default_factory=dict)
    diagnosis: Mapping[str, Any] = field(default_factory=dict)
    family: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    criterion: Mapping[str, Any] = field(default_factory=dict)
    policy: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)
    predicted: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    padded: bool = False

    def __post_init__(self) -> None:
        if self.padded and self.layout != "ragged":
            raise PlanError(
                f"plan: padded is true but layout is {self.layout}; only ragged layers are padded."
            )
        drive = self.model_source[1:3] in (":\\", ":/")
        if drive or self.model_source.startswith(("/", "~", "\\")):
            raise PlanError(
                f"plan: model.source is the path {self.model_source!r:.80}, expected a hub id or "
                "the name of a directory."
            )

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a reader has to be told: of this kind of model, as far as the plan says, and of
        layers that keep no attention or no MLP."""
        listed = self.family.get("remarks")
        said = [x for x in listed if isinstance(x, str)] if isinstance(listed, list) else []
        lacking = {
            "attention, and nothing in the KV cache": (
                [not kept.kv_heads for kept in self.layers],
                self.without_heads,
            ),
            "MLP": ([kept.channels == () for kept in self.layers], self._without("channels")),
        }
        for what, (places, never) in lacking.items():
            lost = [index for index, lacks in enumerate(places) if lacks and index not in never]
            numbers = list(map(str, lost))
            if numbers[1:]:
                said.append(f"layers {', '.join(numbers)} keep no {what}")
            elif numbers:
                said.append(f"layer {numbers[0]} keeps no {what}")
        return tuple(said)

    @property
    def without_heads(self) -> frozenset[int]:
        """The layers that have no heads in the source, as far as the plan says."""
        return self._without("heads")

    def _without(self, units: str) -> frozenset[int]:
        listed = self.family.get(f"without_{units}")
        return (
            frozenset(x for x in listed if type(x) is int)
            if isinstance(listed, list)
            else frozenset()
        )

    def layer_shapes(self, model: ModelShape) -> tuple[LayerShape, ...]:
        """Size of every layer after slicing, of what is kept alone."""
        return layer_shapes(self.layers, model)

    def written_shapes(self, model: ModelShape) -> tuple[LayerShape, ...]:
        """Size of every layer as it is written: with what pads it."""
        shapes = self.layer_shapes(model)
        return tuple(shape.padded for shape in shapes) if self.padded else shapes

    @property
    def written_layout(self) -> Layout:
        """The layout of the files: ragged layers that were padded are regular."""
        return "per-layer" if self.padded else self.layout

    def to_json(self) -> str:
        """plan.json: keys in a fixed order, one layer per line, provenance as given."""
        head = {
            "schema_version": SCHEMA_VERSION,
            "model": {"fingerprint": self.model_fingerprint, "source": self.model_source},
            "layout": self.layout,
            **({"padded": True} if self.padded else {}),
            "compensation": self.compensation,
        }
        tail = {name: value for name in PROVENANCE if (value := getattr(self, name))}
        rows = ",\n    ".join(json.dumps(layer.to_dict()) for layer in self.layers)
        entries = [_entry(name, value) for name, value in head.items()]
        entries.append(f'"layers": [\n    {rows}\n  ]')
        entries += [_entry(name, value) for name, value in tail.items()]
        return "{\n  " + ",\n  ".join(entries) + "\n}\n"


def dense_plan(shape: ModelShape, fingerprint: str, source: str) -> Plan:
    """The plan that keeps everything."""
    layer = LayerPlan(tuple(range(shape.kv_heads)), tuple(range(shape.query_heads)))
    layers = only_existing((layer,) * shape.num_layers, shape)
    return Plan(fingerprint, source, "uniform", "none", layers)


def layer_shapes(layers: Sequence[LayerPlan], model: ModelShape) -> tuple[LayerShape, ...]:
    """Size of every layer, all of the model, after slicing."""
    return model.existing([layer.shape(model) for layer in layers])


def only_existing(layers: Sequence[LayerPlan], shape: ModelShape) -> tuple[LayerPlan, ...]:
    """The layers without the units that they do not have in the source; of MLPs that are experts
    all channels stay."""
    return tuple(
        replace(
            layer,
            kv_heads=layer.kv_heads if has_heads else (),
            query_heads=layer.query_heads if has_heads else (),
            channels=layer.channels if has_channels else None if sparse else (),
        )
        for layer, has_heads, has_channels, sparse in zip(
            layers, shape.has_heads, shape.has_channels, shape.sparse, strict=True
        )
    )


def sample_plan(
    dense: Plan, shape: ModelShape, layout: Layout, compensation: Compensation, units: Units
) -> Plan:
    """A plan like others of its kind, for what depends on nothing else: where layers may differ,
    the first that has heads has about half of the units."""
    groups, heads = shape.kv_heads, shape.query_heads
    if includes(units, "heads"):
        groups = -(-groups // 2)
        heads = groups * shape.group_size if shape.kv_heads > 1 else -(-heads // 2)
    narrower = includes(units, "channels")
    layers = list(dense.layers)
    if layout != "uniform":
        first = LayerPlan(tuple(range(groups)), tuple(range(heads)))
        layers[shape.has_heads.index(True)] = first
        if narrower and shape.has_mlps:
            mlp, width = shape.has_channels.index(True), -(-shape.channels // 2)
            layers[mlp] = replace(layers[mlp], channels=tuple(range(width)))
        experts: tuple[int, ...] = ()
        if includes(units, "experts"):
            half = next(n for n in shape.expert_counts if 2 * n >= shape.experts)
            size, each = (count // shape.expert_groups for count in (shape.experts, half))
            experts = tuple(expert for expert in range(shape.experts) if expert % size < each)
            sparse = shape.sparse.index(True)
            layers[sparse] = replace(layers[sparse], experts=experts)
        if narrower and shape.expert_channels:
            sparse = shape.sparse.index(True)
            stay = shape.experts if layers[sparse].experts is None else len(experts)
            rows = (tuple(range(-(-shape.expert_channels // 2))),) * stay
            layers[sparse] = replace(layers[sparse], expert_channels=rows)
    existing = only_existing(layers, shape)
    return replace(dense, layout=layout, compensation=compensation, layers=existing)


def _entry(name: str, value: Any) -> str:
    return f'"{name}": ' + dump_json(value).rstrip("\n").replace("\n", "\n  ")

"""What a plan makes of the shapes of tensors: which projections lose inputs, which carry a bias."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from spp_export.models.checkpoint.checkpoint import Checkpoint
from spp_export.models.families import Family, Role, TensorSpec
from spp_export.models.shape import ModelShape
from spp_export.planning import Compensation, LayerPlan, Layout, Plan

# What reads heads and channels, and the kind of statistics that knows its input.
CONSUMERS = {Role.OUTPUT: "attention", Role.DOWN: "mlp"}


def loses(layer: LayerPlan, role: Role, shape: ModelShape) -> bool:
    """Whether a layer's o_proj (OUTPUT) or down_proj (DOWN), if it has one, loses inputs."""
    kept = layer.shape(shape)
    if role is Role.OUTPUT:
        return 0 < kept.query_heads < shape.query_heads
    return role is Role.DOWN and 0 < kept.channels < shape.channels


def layers_losing(layers: Iterable[LayerPlan], role: Role, shape: ModelShape) -> tuple[int, ...]:
    """The numbers of the layers whose o_proj (OUTPUT) or down_proj (DOWN) loses inputs."""
    return tuple(i for i, layer in enumerate(layers) if loses(layer, role, shape))


def losing_roles(layers: Iterable[LayerPlan], shape: ModelShape) -> frozenset[Role]:
    """The consumers that lose inputs in some layer."""
    return frozenset(role for layer in layers for role in CONSUMERS if loses(layer, role, shape))


def biased_roles(compiled: Plan, shape: ModelShape) -> frozenset[Role]:
    """The consumers that a plan's compensation adds biases to, in every layer."""
    if compiled.compensation != "bias":
        return frozenset()
    return losing_roles(compiled.layers, shape)


def compensated_shape(
    source: Checkpoint, layout: Layout, compensation: Compensation, losing: Collection[Role]
) -> ModelShape:
    """The source's shape with the biases that a compensation adds where the consumers `losing`
    (OUTPUT, DOWN) lose inputs.

    Raises PlanError for `bias` where the layout cannot hold one in this family.
    """
    return slim_shape(source, layout, losing if compensation == "bias" else ())


def written_shape(source: Checkpoint, compiled: Plan) -> ModelShape:
    """`compensated_shape` of a plan."""
    return slim_shape(source, compiled.layout, biased_roles(compiled, source.shape))


def moment_kinds(compiled: Plan, shape: ModelShape) -> tuple[str, ...]:
    """Kinds of statistics, see `moments.gather`, that a plan's compensation reads."""
    return tuple(sorted(CONSUMERS[role] for role in losing_roles(compiled.layers, shape)))


def slim_shape(source: Checkpoint, layout: Layout, biased: Collection[Role]) -> ModelShape:
    """The source's shape with biases on the projections `biased` (OUTPUT, DOWN) as well.

    Layouts of our own classes give these and no others one. In `uniform` the switch of the
    family's config does, which covers more projections: q, k and v, or gate and up.

    Raises PlanError where that config has no switch for one that the source lacks.
    """
    family, shape = source.family, source.shape
    if layout != "uniform":
        return family.changed(
            shape,
            output_bias=shape.output_bias or Role.OUTPUT in biased,
            down_bias=shape.down_bias or Role.DOWN in biased,
        )
    for role in sorted(biased):
        if {Role.OUTPUT: shape.output_bias, Role.DOWN: shape.mlp_bias}[role]:
            continue
        switch = family.bias_switch(role)
        shape = family.changed(
            shape,
            qkv_bias=shape.qkv_bias or family.qkv_bias == switch,
            output_bias=shape.output_bias or family.output_bias == switch,
            mlp_bias=shape.mlp_bias or family.mlp_bias == switch,
        )
    return shape


def kept_tensors(
    family: Family, shape: ModelShape, plan: Plan
) -> Iterator[tuple[TensorSpec, TensorSpec]]:
    """Every tensor that is written and the one of the source that it comes from, in file order.

    They have one name but for experts, which are numbered anew where others before them go.
    `shape` is of the source, with biases that only what is written has.
    """
    after = tuple(family.tensors(shape, plan.written_shapes(shape)))
    names = {spec.name for spec in after}

    def stays(spec: TensorSpec) -> bool:
        if spec.layer is None or spec.expert is None:
            return spec.name in names  # not of an attention or an MLP that goes as a whole
        experts = plan.layers[spec.layer].experts
        return experts is None or spec.expert in experts

    return zip(after, filter(stays, family.tensors(shape, shape.layers)), strict=True)

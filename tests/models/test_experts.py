"""Models of experts: what stays whole is counted, and what is not known of them refused by name."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_models import EXPERTS, KNOWN, load, make_dense, make_slim, tokens
from old_transformers import FLOAT64, SINGLE, WRITES, but_in_old, since_5

from spp_export.calibration.activations import (
    ExpertChannelSquares,
    ExpertWrites,
    MeanSquares,
    TokenBatch,
    observe,
)
from spp_export.calibration.gradients import gradient_lengths, gradient_reductions
from spp_export.calibration.moments import expert_columns
from spp_export.common.errors import ModelError, PlanError
from spp_export.evaluation.contract import drop_experts, narrow_experts
from spp_export.evaluation.harness.yardsticks import quantised_bits
from spp_export.formats.settings import settings_of
from spp_export.models.checkpoint.checkpoint import Checkpoint, open_checkpoint, open_source
from spp_export.models.families import FAMILIES
from spp_export.models.layerwise import open_layerwise
from spp_export.models.loader import load_dense
from spp_export.models.routing import expert_block, routed_channels, without_channels
from spp_export.models.shape import UNITS, Layout, unit_parameters
from spp_export.planning import LayerPlan, Plan, dense_plan, validate_plan
from spp_export.planning.allocate.options import expert_options
from spp_export.planning.plan import layer_shapes
from spp_export.planning.plan_file import parse_plan
from spp_export.slicing.compensation import written_config

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 97}
SIZES |= {"intermediate_size": 24, "num_key_value_heads": 2}
KNOWN_EXPERTS = [name for name in KNOWN if name in EXPERTS]


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    return open_source(make_dense(request.param, tmp_path / "dense"))


def batch() -> TokenBatch:
    ids = tokens()
    return TokenBatch(ids, torch.ones_like(ids), (0, 1))


def layers_with_experts(family: str, **config: object) -> list[int]:
    shape = FAMILIES[family].read_shape({**SIZES, **EXPERTS[family], **config}, 4)
    return [index for index, sparse in enumerate(shape.sparse) if sparse]


def test_which_layers_have_experts_is_as_config_json_says() -> None:
    assert layers_with_experts("mixtral") == [0, 1, 2]
    assert layers_with_experts("qwen3_moe", decoder_sparse_step=2) == [1]
    assert layers_with_experts("qwen3_moe", mlp_only_layers=[0, 1]) == [2]
    assert layers_with_experts("glm4_moe", first_k_dense_replace=2) == [2]
    assert layers_with_experts("llama4_text", interleave_moe_layer_step=3) == [2]
    assert layers_with_experts("llama4_text", moe_layers=[0, 1]) == [0, 1]
    assert layers_with_experts("ernie4_5_moe") == [1, 2]
    assert layers_with_experts("ernie4_5_moe", moe_layer_end_index=1) == [1]


@pytest.mark.parametrize("source", ["mixtral", "gpt_oss", "glm4_moe"], indirect=True)
def test_decoding_reads_the_experts_that_a_token_is_routed_to(source: Checkpoint) -> None:
    """Two of four here, and all else but the input embedding."""
    shape = source.shape
    fused = ("gate_up_proj", "down_proj")
    experts = sum(
        prod(tensor.shape)
        for name, tensor in source.tensors.items()
        if ".experts." in name and "shared" not in name
    )
    assert any(name.rpartition(".")[2] in fused for name in source.tensors) == (
        shape.model_type == "gpt_oss"
    )
    table = shape.vocab_size * shape.hidden_size
    whole = sum(prod(tensor.shape) for tensor in source.tensors.values())
    assert shape.parameters(shape.layers) == whole
    assert shape.decode_parameters(shape.layers) == whole - table - experts // 2
    biases = shape.hidden_size * (shape.model_type == "gpt_oss")  # of what experts write
    channels = shape.counted.expert_channel * shape.expert_channels
    assert sum(shape.sparse) * shape.experts * (channels + biases) == experts
    fewer = tuple(replace(layer, dropped_experts=1) for layer in shape.layers)
    each = experts // shape.experts // sum(shape.sparse)
    fewer = shape.existing(fewer)
    row = shape.hidden_size + (shape.model_type != "mixtral")
    assert whole - shape.parameters(fewer) == sum(shape.sparse) * (each + row)
    assert shape.decode_parameters(shape.layers) - shape.decode_parameters(fewer) == (
        sum(shape.sparse) * row
    )


@pytest.mark.parametrize("source", ["qwen3_moe", "gpt_oss", "glm4_moe"], indirect=True)
def test_experts_that_are_fewer_and_narrower_are_counted_by_their_tensors(
    source: Checkpoint, tmp_path: Path
) -> None:
    """On disk, and those that decoding reads: two of the three that stay."""
    shape = source.shape
    layers = narrow_experts(drop_experts(dense_layers(source), shape, 1, alike=True), shape, 1)
    pair = make_slim(source, "per-layer", tmp_path / "slim", layers)
    slim = open_checkpoint(pair.slim)
    sizes = layer_shapes(layers, shape)
    assert slim.layers == sizes
    whole = sum(prod(tensor.shape) for tensor in slim.tensors.values())
    assert shape.parameters(sizes) == whole
    of_experts = sum(
        prod(tensor.shape)
        for name, tensor in slim.tensors.items()
        if ".experts." in name and "shared" not in name
    )
    table = shape.vocab_size * shape.hidden_size
    assert shape.decode_parameters(sizes) == whole - table - of_experts // 3
    counts = [count for count in shape.experts_in(sizes) if count]
    inside = sum(map(mul, counts, shape.expert_widths(sizes)))
    of_mlps = sum(layer.channels for layer in sizes) * shape.channel_parameters
    whole = inside * shape.counted.expert_channel + of_mlps
    assert unit_parameters(shape, sizes, "channels") == whole
    assert (of_mlps > 0) == (shape.model_type == "glm4_moe")


def dense_layers(source: Checkpoint) -> tuple[LayerPlan, ...]:
    return dense_plan(source.shape, source.fingerprint, source.name).layers


@pytest.mark.parametrize("family", sorted(EXPERTS))
def test_a_size_that_is_missing_is_named(family: str) -> None:
    record = FAMILIES[family]
    for key in EXPERTS[family].keys() - record.defaults.keys() - {"num_experts"}:
        config = {**SIZES, **EXPERTS[family], key: "four"}
        with pytest.raises(ModelError, match=f"{key} must be an integer from 0"):
            record.read_shape(config, 4)


def test_more_experts_than_any_model_has_are_refused() -> None:
    config = {**SIZES, "num_local_experts": 1 << 20, "num_experts_per_tok": 2}
    with pytest.raises(ModelError, match="num_local_experts must be at most 4096"):
        FAMILIES["mixtral"].read_shape(config, 4)


@pytest.mark.parametrize("source", ["mixtral"], indirect=True)
def test_what_is_not_cut_yet_is_refused_by_name(source: Checkpoint) -> None:
    family, shape = source.family, source.shape
    for units in UNITS:
        family.check_units(units, shape)
    llama = FAMILIES["llama"].read_shape(SIZES, 4)
    with pytest.raises(ModelError, match="--units experts: this llama model has no experts"):
        FAMILIES["llama"].check_units("experts", llama)
    layer = LayerPlan((0, 1), (0, 1, 2, 3), tuple(range(8)))
    plan = Plan(source.fingerprint, source.name, "per-layer", "none", (layer,) * shape.num_layers)
    with pytest.raises(PlanError, match="layer 0: plan keeps channels, and of a layer with exper"):
        validate_plan(plan, shape, source.fingerprint)
    with pytest.raises(ModelError, match="a model that runs from disk does not know experts"):
        open_layerwise(source.path, torch.float32)
    with pytest.raises(ModelError, match="this format does not know experts"):
        settings_of(source)
    model = load(source.path)
    with pytest.raises(ModelError, match="reading down does not know experts"):
        observe(model, family, [batch()], [MeanSquares("down", 2, shape.channels)])


@since_5(WRITES)
@pytest.mark.parametrize("source", KNOWN_EXPERTS, indirect=True)
def test_what_each_expert_writes_is_told_apart(source: Checkpoint) -> None:
    """By the definition: with the others' weights at zero, the length of what is written."""
    model, shape = load(source.path), source.shape
    seen: list[torch.Tensor] = []
    block = expert_block(model, source.family, shape.sparse.index(True))
    assert block is not None

    def of_each(experts: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if len(inputs) == 1:
            whole = output.view(shape.experts, -1, shape.hidden_size)
        else:
            x, chosen, weights = inputs
            whole = torch.stack(
                [experts.forward(x, chosen, weights * (chosen == e)) for e in range(shape.experts)]
            )
            assert torch.allclose(whole.sum(0), output)
        seen.append(whole.square().sum(-1).sum(1))

    observer = ExpertWrites(shape.num_layers, shape.experts)
    hook = block.get_submodule("experts").register_forward_hook(of_each)
    observe(model, source.family, [batch()], [observer])
    hook.remove()
    layer = shape.sparse.index(True)
    assert torch.allclose(observer.squares[layer], seen[0].double(), rtol=1e-5)
    routed = observer.routed.sum(1).tolist()
    assert routed == [tokens().numel() * 2 * sparse for sparse in shape.sparse]


@since_5(WRITES)
@pytest.mark.parametrize("source", KNOWN_EXPERTS, indirect=True)
def test_what_each_channel_of_an_expert_writes_is_told_apart(source: Checkpoint) -> None:
    """By the definition: how far the layer's output moves, over all tokens, without the channel."""
    model, shape, family = load(source.path), source.shape, source.family
    layer = shape.sparse.index(True)
    block = expert_block(model, family, layer)
    assert block is not None
    experts: Any = block.get_submodule("experts")
    before = {name: value.clone() for name, value in experts.state_dict().items()}
    seen: list[Any] = []
    hook = experts.register_forward_hook(lambda _module, inputs, output: seen.append(inputs))
    observer = ExpertChannelSquares(shape.num_layers, shape.experts, shape.expert_channels)
    observe(model, family, [batch()], [observer])
    hook.remove()
    assert observer.tokens.tolist() == [tokens().numel() * sparse for sparse in shape.sparse]
    assert all(torch.equal(value, before[name]) for name, value in experts.state_dict().items())
    columns = expert_columns(source, layer)
    whole, every = experts.forward(*seen[0]), set(range(shape.expert_channels))
    for expert, channel in ((0, 0), (1, 7), (shape.experts - 1, shape.expert_channels - 1)):
        with without_channels(block, family, {expert: every - {channel}}):
            moved = float((whole - experts.forward(*seen[0])).square().sum())
        square = float(observer.sums[layer, expert, channel])
        assert moved == pytest.approx(square * columns.squares[expert, channel], rel=1e-5)
    assert torch.equal(experts.forward(*seen[0]), whole)
    with pytest.raises(ModelError, match="the weights of experts are offloaded"):
        routed_channels(experts.to("meta"), seen[0], shape.experts, family.experts.down_axis)


@pytest.mark.parametrize("source", ["qwen3_moe"], indirect=True)
def test_experts_of_a_layer_keep_as_many_channels(source: Checkpoint) -> None:
    shape, dense = source.shape, dense_layers(source)
    width, count = shape.expert_channels, shape.experts

    def plan(rows: Any, layout: Layout = "per-layer", experts: Any = None) -> Plan:
        first = replace(dense[0], expert_channels=rows, experts=experts)
        layers = (first, *dense[1:])
        return Plan(source.fingerprint, source.name, layout, "none", layers)

    good = plan(((0, 2), (1, 3), (0, 1), (2, 3)))
    validate_plan(good, shape, source.fingerprint)
    assert parse_plan(good.to_json()) == good
    validate_plan(plan(((0, 2), (1, 3)), experts=(1, 3)), shape, source.fingerprint)
    for rows, message in (
        (((0, 2),) * (count - 1), f"keeps 2 channels of {count - 1} experts; each of the {count}"),
        (((0, 2),) * (count - 1) + ((1,),), "keeps 1/2 channels of 4 experts"),
        (((),) * count, "at least 1"),
        (((0, width),) * count, f"keeps channel of an expert {width} but the model has {width}"),
    ):
        with pytest.raises(PlanError, match=message):
            validate_plan(plan(rows), shape, source.fingerprint)
    uniform = plan(((0, 2),) * count, "uniform")
    with pytest.raises(PlanError, match=f"keeps 2 channels of every expert in one .* {width} in"):
        validate_plan(uniform, shape, source.fingerprint)
    with pytest.raises(PlanError, match=f"experts have 2 to {width} channels; layout 'uniform'"):
        written_config(source, uniform)


@pytest.mark.parametrize("source", ["glm4_moe"], indirect=True)
def test_a_stock_config_that_widens_what_is_beside_experts_is_refused(source: Checkpoint) -> None:
    layers = narrow_experts(dense_layers(source), source.shape, 1, alike=True)
    plan = Plan(source.fingerprint, source.name, "uniform", "none", layers)
    with pytest.raises(PlanError, match="gives experts and the MLPs beside them one width"):
        written_config(source, plan)
    wrong = replace(layers[0], expert_channels=layers[1].expert_channels)
    plan = replace(plan, layout="per-layer", layers=(wrong, layers[1]))
    with pytest.raises(PlanError, match="layer 0: plan keeps channels of experts, and the layer"):
        validate_plan(plan, source.shape, source.fingerprint)


def plan_keeping(source: Checkpoint, *experts: tuple[int, ...] | None) -> Plan:
    layers = tuple(LayerPlan((0, 1), (0, 1, 2, 3), None, kept) for kept in experts)
    return Plan(source.fingerprint, source.name, "per-layer", "none", layers)


@pytest.mark.parametrize("source", ["glm4_moe"], indirect=True)
def test_a_plan_keeps_experts_that_a_token_can_be_routed_to(source: Checkpoint) -> None:
    """The first of its two layers has none; a token is routed to two of the other's four."""
    shape = source.shape
    plan = plan_keeping(source, None, (0, 3))
    validate_plan(plan, shape, source.fingerprint)
    assert parse_plan(plan.to_json()) == plan
    assert [layer.dropped_experts for layer in plan.layer_shapes(shape)] == [0, 2]
    for kept, message in (
        (((0, 1), None), "layer 0: plan keeps experts, and the layer has none"),
        ((None, (1,)), "layer 1: plan keeps 1 experts and every token is routed to 2"),
        ((None, (1, 4)), "layer 1: plan keeps expert 4 but the model has 4"),
    ):
        with pytest.raises(PlanError, match=message):
            validate_plan(plan_keeping(source, *kept), shape, source.fingerprint)


@pytest.mark.parametrize("source", ["glm4_moe"], indirect=True)
def test_a_plan_keeps_as_many_experts_of_every_group(source: Checkpoint) -> None:
    """Two groups of four, of which a token is routed to one: two of its experts decide on it."""
    sizes = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    shape = source.family.read_shape({**source.config, **sizes}, 4)
    assert shape.expert_counts == (4, 6, 8)
    assert replace(shape, experts_per_token=3).expert_counts == (6, 8)
    assert replace(shape, experts_per_token=4, chosen_groups=2).expert_counts == (4, 6, 8)
    for fine in (None, (0, 3, 5, 6), (0, 1, 3, 5, 6, 7)):
        validate_plan(plan_keeping(source, None, fine), shape, source.fingerprint)
    for kept, counts in (((0, 1, 2, 5), "1 and 3"), ((0, 5), "1"), ((0, 1, 4), "1 and 2")):
        message = rf"layer 1: plan keeps {counts} experts of a group, .* and 2 at least"
        with pytest.raises(PlanError, match=message):
            validate_plan(plan_keeping(source, None, kept), shape, source.fingerprint)
    scores = np.array([[5.0, 1, 4, 2, 9, 8, 7, 6]])
    options = expert_options(scores, shape)
    assert options.counts == (4, 6, 8)
    assert options.value.tolist() == [[[26], [35], [42]]]
    for count, best in ((4, [0, 2, 4, 5]), (6, [0, 2, 3, 4, 5, 6])):
        (kept,), _ = options.kept([count], options.widths)
        assert np.flatnonzero(kept).tolist() == best


def test_groups_of_experts_that_cannot_be_are_refused() -> None:
    for wrong in ({"n_group": 3}, {"n_group": 2, "topk_group": 3}, {"n_group": -1}):
        with pytest.raises(ModelError, match=r"groups of 4 experts \(n_group and topk_group\), wh"):
            layers_with_experts("glm4_moe", **wrong)


@pytest.mark.parametrize("source", ["qwen3_moe"], indirect=True)
def test_a_uniform_plan_has_as_many_experts_in_every_layer(source: Checkpoint) -> None:
    plan = replace(plan_keeping(source, (0, 3), (0, 1, 2)), layout="uniform")
    with pytest.raises(PlanError, match="keeps 2 experts in one layer and 3 in another"):
        validate_plan(plan, source.shape, source.fingerprint)
    with pytest.raises(PlanError, match="layers have 2 to 3 experts; layout 'uniform'"):
        written_config(source, plan)


@pytest.mark.parametrize("source", but_in_old(["gpt_oss", "dots1"], SINGLE, FLOAT64), indirect=True)
def test_gradients_are_of_attention_alone(source: Checkpoint) -> None:
    model = load(source.path)
    lengths = gradient_lengths(model, source.family, source.shape, [batch()])
    assert lengths[:-1, :, 0].any()
    assert not lengths[:, :, 1].any()
    found = gradient_reductions(model, source.family, source.shape, [batch()])
    assert found["head_gates"][0].all()
    assert found["query_rows"][0].any()
    assert not found["channel_gates"][0].any()
    assert quantised_bits(source) is None


@pytest.mark.parametrize("source", but_in_old(KNOWN_EXPERTS, SINGLE, FLOAT64), indirect=True)
def test_experts_can_be_widened_to_float64(source: Checkpoint) -> None:
    """As models are where they are judged; transformers' own choice knows float32 at most."""
    model = load_dense(source.path, torch.float32)
    with torch.no_grad():
        narrow, wide = model(tokens()).logits, model.double()(tokens()).logits
    assert wide.dtype is torch.float64
    # Other mixers add their own rounding: gated delta nets compute in float32 either way.
    limit = 3e-4 if source.family.mixers else 1e-4
    assert (narrow - wide).abs().max().item() < limit

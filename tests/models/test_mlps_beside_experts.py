"""Families where some layers have experts and others an ordinary MLP, whose channels go."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import load, make_dense, make_slim, tokens
from old_transformers import FLOAT64, SINGLE, but_in_old

from spp_export.calibration.activations import MeanSquares, TokenBatch, observe
from spp_export.calibration.gradients import gradient_lengths
from spp_export.common.errors import ModelError, PlanError
from spp_export.evaluation.contract import LIMIT, check, distances, random_layers
from spp_export.models.checkpoint.checkpoint import Checkpoint, open_checkpoint, open_source
from spp_export.models.families import FAMILIES, Role
from spp_export.models.shape import Layout, unit_parameters
from spp_export.planning import LayerPlan, Plan, dense_plan, validate_plan
from spp_export.planning.plan import layer_shapes, only_existing, sample_plan
from spp_export.planning.plan_file import parse_plan
from spp_export.planning.written import layers_losing, moment_kinds
from spp_export.slicing.compensation import written_config

# Each with two layers that have experts, and one or two that have none.
DENSE: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"mlp_only_layers": [0, 2]},
    "qwen3_moe": {"mlp_only_layers": [0, 2]},
    "qwen3_next": {"mlp_only_layers": [2]},
    "glm4_moe": {"first_k_dense_replace": 2},
    "dots1": {"first_k_dense_replace": 2},
    "llama4_text": {},
    "ernie4_5_moe": {"moe_layer_start_index": 2},
    "deepseek_v2": {"first_k_dense_replace": 2},
    "deepseek_v3": {"first_k_dense_replace": 2, "num_hidden_layers": 4},
}
CASES = but_in_old(list(DENSE), SINGLE, FLOAT64)
pytestmark = pytest.mark.thinned


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    layers = 2 if request.param == "qwen3_next" else 4  # of which it makes three
    return open_source(
        make_dense(request.param, tmp_path / "dense", layers=layers, **DENSE[request.param])
    )


def cut(source: Checkpoint, widths: Sequence[int]) -> tuple[LayerPlan, ...]:
    """The dense model's layers, those without experts with the last channels of their MLPs."""
    dense, left = dense_plan(source.shape, source.fingerprint, source.name), iter(widths)
    whole = source.shape.channels
    return tuple(
        replace(layer, channels=tuple(range(whole - next(left), whole))) if has else layer
        for layer, has in zip(dense.layers, source.shape.has_channels, strict=True)
    )


@pytest.mark.parametrize("source", CASES, indirect=True)
@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
def test_channels_of_mlps_go_where_no_layer_has_experts(
    source: Checkpoint, layout: Layout, tmp_path: Path
) -> None:
    """And these stay as they are: logits, a cache, padding, saved and loaded again."""
    shape = source.shape
    assert sum(shape.sparse) == 2
    assert list(shape.has_channels) == [not sparse for sparse in shape.sparse]
    layers = cut(source, (9, 14) if layout == "per-layer" else (10, 10))
    pair = make_slim(source, layout, tmp_path / "slim", layers)
    validate_plan(pair.plan, shape, source.fingerprint)
    assert parse_plan(pair.plan.to_json()) == pair.plan
    assert check(pair) <= LIMIT
    assert max(astuple(distances(pair, tmp_path / "again"))) <= LIMIT
    slim, sizes = open_checkpoint(pair.slim), layer_shapes(layers, shape)
    stored = [prod(tensor.shape) for tensor in slim.tensors.values()]
    assert shape.parameters(sizes) == sum(stored)
    gone = shape.parameters(shape.layers) - shape.parameters(sizes)
    whole, left = (sum(x.nbytes for x in of.tensors.values()) for of in (source, slim))
    assert whole - left == gone * shape.element_bytes
    counted = (unit_parameters(shape, of, "channels") for of in (shape.layers, sizes))
    assert gone == next(counted) - next(counted) > 0
    assert shape.decode_parameters(shape.layers) - shape.decode_parameters(sizes) == gone
    # Moments are read of those layers alone.
    dense = tuple(index for index, sparse in enumerate(shape.sparse) if not sparse)
    assert layers_losing(layers, Role.DOWN, shape) == dense
    assert moment_kinds(pair.plan, shape) == ("mlp",)


@pytest.mark.parametrize("source", CASES, indirect=True)
def test_a_plan_of_heads_is_written_as_it_was_before(source: Checkpoint) -> None:
    """Nothing is listed of MLPs, nor of their modules, of which every layer keeps its own."""
    layers = only_existing(random_layers(source.shape, 3, channels=False), source.shape)
    plan = Plan(source.fingerprint, source.name, "per-layer", "none", layers)
    assert all(layer.channels is None for layer in layers)
    assert "with_experts" not in plan.family
    config = written_config(source, plan)
    assert config["per_layer_modules"]["modules"] == ["self_attn"]
    widths = {layer["intermediate_size"] for layer in config["per_layer_config"].values()}
    assert widths == {source.config["intermediate_size"]}
    keys = {key for layer in config["per_layer_config"].values() for key in layer}
    assert keys == {"num_attention_heads", "num_key_value_heads", "intermediate_size"}
    validate_plan(plan, source.shape, source.fingerprint)


@pytest.mark.parametrize("source", but_in_old(["llama4_text"], SINGLE, FLOAT64), indirect=True)
def test_the_width_of_mlps_has_another_key_than_that_of_experts(
    source: Checkpoint, tmp_path: Path
) -> None:
    assert (source.shape.channels, source.shape.expert_channels) == (40, 20)
    pair = make_slim(source, "per-layer", tmp_path / "slim", cut(source, (9, 14)))
    config = json.loads((pair.slim / "config.json").read_text())
    listed = [config["per_layer_config"][str(index)] for index in range(4)]
    assert [layer.get("intermediate_size_mlp") for layer in listed] == [9, None, 14, None]
    assert {layer["intermediate_size"] for layer in listed} == {20}
    assert (config["intermediate_size"], config["intermediate_size_mlp"]) == (20, 40)


@pytest.mark.parametrize("source", ["qwen3_moe"], indirect=True)
def test_what_cannot_be_is_refused(source: Checkpoint) -> None:
    shape, family, layers = source.shape, source.family, cut(source, (9, 14))
    plan = Plan(source.fingerprint, source.name, "per-layer", "none", layers)
    for index, kept, message in (
        (1, (0, 1), "layer 1: plan keeps channels, and of a layer with experts these go"),
        (0, (0, 24), "layer 0: plan keeps channel 24 but the model has 24"),
    ):
        wrong = [*layers]
        wrong[index] = replace(layers[index], channels=kept)
        with pytest.raises(PlanError, match=message):
            validate_plan(replace(plan, layers=tuple(wrong)), shape, source.fingerprint)
    emptied = replace(plan, layers=(replace(layers[0], channels=()), *layers[1:]))
    with pytest.raises(PlanError, match="layer 0: the plan keeps no channels, and MLPs and exper"):
        written_config(source, emptied)
    assert family.no_empty_layers("both") == family.no_empty_layers("all") == ""
    alone = family.read_shape({**source.config, "mlp_only_layers": [0, 1, 2, 3]}, 4)
    family.check_units("channels", alone)
    with pytest.raises(ModelError, match="--units all: this qwen3_moe model has no experts"):
        family.check_units("all", alone)
    dense = dense_plan(shape, source.fingerprint, source.name)
    sample = sample_plan(dense, shape, "per-layer", "lstsq", "both")
    assert [layer.channels for layer in sample.layer_shapes(shape)] == [12, 0, 24, 0]


@pytest.mark.parametrize(
    "source", but_in_old(["glm4_moe", "qwen2_moe"], SINGLE, FLOAT64), indirect=True
)
def test_what_mlps_read_is_seen_where_there_are_any(source: Checkpoint) -> None:
    model, shape, ids = load(source.path), source.shape, tokens()
    seen = torch.zeros(shape.num_layers, shape.channels, dtype=torch.float64)
    hooks = []
    for index in [index for index, has in enumerate(shape.has_channels) if has]:

        def see(_module: Any, inputs: tuple[torch.Tensor], index: int = index) -> None:
            seen[index] = inputs[0].flatten(0, -2).square().sum(0)

        module = model.get_submodule(source.family.layer_name(index, source.family.down))
        hooks.append(module.register_forward_pre_hook(see))
    model(ids)
    for hook in hooks:
        hook.remove()
    batch = TokenBatch(ids, torch.ones_like(ids), (0, 1))
    observer = MeanSquares("down", shape.num_layers, shape.channels)
    observe(model, source.family, [batch], [observer])
    assert torch.allclose(observer.sums.double(), seen, rtol=1e-5)
    assert observer.sums.any(dim=1).tolist() == list(shape.has_channels)
    lengths = gradient_lengths(model, source.family, shape, [batch])[..., 1]
    assert lengths.any(axis=0).tolist() == list(shape.has_channels)


def test_every_family_that_mixes_the_two_is_tried() -> None:
    """Those whose record has both experts and the tensors of an MLP."""
    assert {name for name, one in FAMILIES.items() if one.experts and one.down} == set(DENSE)

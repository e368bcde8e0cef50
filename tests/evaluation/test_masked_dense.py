"""The oracle against the slow mask of the tests, and that it leaves nothing behind."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from factories import CASES, make_checkpoint, mask_in_torch, random_layers, shape_of
from untouched import assert_untouched, compensation, hooks, logits, plan_of, state

from spp_export.evaluation.oracle import masked_dense
from spp_export.models.families import FAMILIES, Role
from spp_export.models.loader import load_dense
from spp_export.slicing.projections import Projection

pytestmark = pytest.mark.thinned(most=4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("seed", [0, 1])
def test_removed_units_are_zeroed_before_the_projections(case, seed, tmp_path):
    dense = case.make(tmp_path)
    shape = shape_of(dense)
    layers = random_layers(shape, seed, channels=seed == 0)
    model = load_dense(dense, torch.float64)
    before, plain = state(model), logits(model)
    with mask_in_torch(model, layers):
        expected = logits(model)
    with masked_dense(model, FAMILIES[shape.model_type], shape, plan_of(layers)) as masked:
        assert masked is model
        assert torch.equal(logits(masked), expected)
    assert not torch.equal(expected, plain)
    assert torch.equal(logits(model), plain)
    assert_untouched(model, before)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oracle")
    return make_checkpoint(folder, "llama", kv_heads=2, query_heads=8, layers=2)


def by_hand(model, shape, layers, compensated):
    """The same model with the input of each compensated projection cut and its new weights
    applied, spelled out."""
    for (index, role), projection in compensated.items():
        layer, module = layers[index], model.model.layers[index]
        columns = [h * shape.head_dim + i for h in layer.query_heads for i in range(shape.head_dim)]
        replaced = module.self_attn.o_proj
        if role is Role.DOWN:
            columns, replaced = list(layer.channels), module.mlp.down_proj

        def forward(a, columns=columns, new=projection):
            return a[..., columns] @ new.weight.double().T + (0 if new.bias is None else new.bias)

        replaced.forward = forward
    return logits(model)


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_compensated_weights_stand_in_the_kept_columns(small, biased, channels):
    shape = shape_of(small)
    layers = random_layers(shape, 4, channels=channels)
    compensated = compensation(shape, layers)
    if not biased:
        compensated = {key: replace(p, bias=None) for key, p in compensated.items()}
    model = load_dense(small, torch.float64)
    before = state(model)
    with masked_dense(model, FAMILIES["llama"], shape, plan_of(layers), compensated):
        found = logits(model)
    assert_untouched(model, before)
    expected = by_hand(load_dense(small, torch.float64), shape, layers, compensated)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_layers_that_are_not_compensated_keep_their_weights(small):
    shape = shape_of(small)
    layers = random_layers(shape, 4, channels=False)
    compensated = {(1, Role.OUTPUT): compensation(shape, layers)[1, Role.OUTPUT]}
    model = load_dense(small, torch.float64)
    with masked_dense(model, FAMILIES["llama"], shape, plan_of(layers), compensated):
        found = logits(model)
    other = load_dense(small, torch.float64)
    with mask_in_torch(other, [layers[0], layers[1]]):
        own = compensated[1, Role.OUTPUT]
        columns = [h * 16 + i for h in layers[1].query_heads for i in range(16)]
        projection = other.model.layers[1].self_attn.o_proj
        with torch.no_grad():
            projection.weight.zero_()
            projection.weight[:, columns] = own.weight.double()
        projection.bias = torch.nn.Parameter(own.bias.double())
        expected = logits(other)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_family_whose_output_has_a_bias_gets_it_back(tmp_path):
    dense = make_checkpoint(tmp_path, "qwen3", kv_heads=2, query_heads=4, attention_bias=True)
    shape = shape_of(dense)
    layers = random_layers(shape, 1, channels=False)
    model = load_dense(dense)
    before, plain = state(model), logits(model)
    with masked_dense(
        model, FAMILIES["qwen3"], shape, plan_of(layers), compensation(shape, layers)
    ):
        assert not torch.equal(logits(model), plain)
    assert_untouched(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_everything_is_undone_after_an_exception(small, error):
    def interrupted():
        with masked_dense(
            model, FAMILIES["llama"], shape, plan_of(layers), compensation(shape, layers)
        ):
            assert hooks(model) > 0
            raise error

    shape = shape_of(small)
    layers = random_layers(shape, 2)
    model = load_dense(small)
    before = state(model)
    with pytest.raises(error):
        interrupted()
    assert_untouched(model, before)


@pytest.mark.parametrize("role", [Role.OUTPUT, Role.DOWN])
def test_everything_is_undone_where_a_projection_does_not_fit(small, role):
    shape = shape_of(small)
    layers = random_layers(shape, 2)
    compensated = compensation(shape, layers)
    compensated[1, role] = Projection(torch.zeros(3, 3))
    model = load_dense(small)
    before = state(model)
    with (
        pytest.raises(RuntimeError),
        masked_dense(model, FAMILIES["llama"], shape, plan_of(layers), compensated),
    ):
        pass
    assert_untouched(model, before)


def test_an_infinity_in_what_is_removed_does_not_become_nan(small):
    shape = shape_of(small)
    layers = random_layers(shape, 0)
    gone = next(iter(set(range(shape.channels)) - set(layers[0].channels)))
    model = load_dense(small)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[gone] = math.inf
    with masked_dense(model, FAMILIES["llama"], shape, plan_of(layers)):
        assert logits(model).isfinite().all()

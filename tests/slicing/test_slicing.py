from __future__ import annotations

import numpy as np
import pytest

from spp_export.common.errors import PlanError
from spp_export.models.families import FAMILIES, Role, TensorSpec, Unit
from spp_export.models.shape import ModelShape
from spp_export.planning import FILL, LayerPlan, Plan
from spp_export.slicing.cut import (
    kept_indices,
    kept_units,
    real_elements,
    slice_rows,
    slice_tensor,
    written_tensor,
    written_units,
)

PLAN = LayerPlan(kv_heads=(0, 2), query_heads=(1, 4), channels=(0, 3, 4))
SPECS = {
    "query rows": TensorSpec("q", (12, 5), 0, Role.QUERY, Unit.QUERY, 0, 2),
    "query columns": TensorSpec("o", (5, 12), 0, Role.OUTPUT, Unit.QUERY, 1, 2),
    "kv rows": TensorSpec("k", (6, 5), 0, Role.KEY, Unit.KV, 0, 2),
    "channel rows": TensorSpec("up", (6, 4), 0, Role.UP, Unit.CHANNEL, 0, 1),
    "channel columns": TensorSpec("down", (4, 6), 0, Role.DOWN, Unit.CHANNEL, 1, 1),
    "query bias": TensorSpec("qb", (12,), 0, Role.QUERY, Unit.QUERY, 0, 2),
    "kv bias": TensorSpec("kb", (6,), 0, Role.KEY, Unit.KV, 0, 2),
    "channel bias": TensorSpec("ub", (6,), 0, Role.UP, Unit.CHANNEL, 0, 1),
}


def by_hand(array: np.ndarray, spec: TensorSpec, units: tuple[int, ...]) -> np.ndarray:
    """Element by element: an element stays if its unit does."""
    stays = [i for i in range(array.shape[spec.axis]) if i // spec.step in units]
    if spec.axis == 0:
        return np.array([array[i] for i in stays])
    return np.array([[row[i] for i in stays] for row in array])


def units_of(spec: TensorSpec) -> tuple[int, ...]:
    return {"query": (1, 4), "kv": (0, 2), "channel": (0, 3, 4)}[str(spec.unit)]


@pytest.mark.parametrize("case", SPECS)
@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<u8", "<f4"])
def test_against_slicing_by_hand(case, dtype):
    spec = SPECS[case]
    array = np.random.default_rng(0).integers(0, 1 << 15, spec.shape).astype(dtype)
    result = slice_tensor(array, spec, PLAN)
    np.testing.assert_array_equal(result, by_hand(array, spec, units_of(spec)))
    assert result.dtype == array.dtype
    assert result.shape[spec.axis] == len(units_of(spec)) * spec.step
    assert result.flags.c_contiguous
    assert not np.shares_memory(result, array)


@pytest.mark.parametrize("case", SPECS)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 100])
def test_blocks_of_rows_one_after_another_are_the_whole(case, rows):
    spec = SPECS[case]
    array = np.random.default_rng(0).standard_normal(spec.shape)
    parts = [
        slice_rows(array[start : start + rows], spec, units_of(spec), start)
        for start in range(0, len(array), rows)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), slice_tensor(array, spec, PLAN))


PADDED = Plan("f", "m", "ragged", "none", (LayerPlan((0, 1, 2), (0, 2, 3, 5)),), padded=True)
SHAPE = ModelShape("llama", 1, 5, 6, 3, 2, 6, 7, False, 4)


@pytest.mark.parametrize("case", ["query rows", "query columns", "query bias"])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 100])
def test_padding_is_zeros_after_the_heads_of_a_group(case, rows):
    """Of three groups of two, the first and the last keep one head."""
    spec = SPECS[case]
    array = np.random.default_rng(0).integers(1, 99, spec.shape).astype("<u2")
    heads = np.split(array, 6, axis=spec.axis)
    nothing = np.zeros_like(heads[0])
    slots = [heads[0], nothing, heads[2], heads[3], heads[5], nothing]
    expected = np.concatenate(slots, axis=spec.axis)
    np.testing.assert_array_equal(written_tensor(array, spec, PADDED, SHAPE), expected)
    units = written_units(spec, PADDED, SHAPE)
    assert units == (0, FILL, 2, 3, 5, FILL)
    assert real_elements(units, 2).tolist() == [0, 1, 4, 5, 6, 7, 8, 9]
    parts = [
        slice_rows(array[start : start + rows], spec, units, start)
        for start in range(0, len(array), rows)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), expected)


def test_only_query_heads_are_padded():
    for case in ("kv rows", "kv bias", "channel rows", "channel columns"):
        array = np.ones(SPECS[case].shape)
        assert written_tensor(array, SPECS[case], PADDED, SHAPE) is array


@pytest.mark.parametrize("case", SPECS)
def test_nothing_cut_is_the_same_array(case):
    array = np.zeros(SPECS[case].shape)
    assert slice_tensor(array, SPECS[case], LayerPlan((0, 1, 2), tuple(range(6)), None)) is array
    assert kept_units(SPECS[case], LayerPlan((0, 1, 2), tuple(range(6)), tuple(range(6)))) is None


def test_a_norm_is_never_cut():
    norm = np.zeros(5)
    assert slice_tensor(norm, TensorSpec("norm", (5,), 0), PLAN) is norm


@pytest.mark.parametrize(
    ("units", "message"),
    [((0, 6), "unit 6, the model has 6"), ((-1, 0), "unit -1"), ((2, 1), "asc")],
)
def test_units_that_the_tensor_does_not_have(units, message):
    plan = LayerPlan(kv_heads=(0,), query_heads=units)
    with pytest.raises(PlanError, match=message):
        slice_tensor(np.zeros((12, 5)), SPECS["query rows"], plan)


def test_kept_indices():
    assert kept_indices((0, 2), 3).tolist() == [0, 1, 2, 6, 7, 8]
    assert kept_indices((5,), 1).tolist() == [5]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_slicing_gives_the_shapes_that_the_family_expects(model_type):
    family = FAMILIES[model_type]
    shape = ModelShape(model_type, 1, 5, 6, 3, 2, 6, 7, False, 4, True, True, True, True)
    slim = {spec.name: spec.shape for spec in family.tensors(shape, [PLAN.shape(shape)])}
    for spec in family.tensors(shape, shape.layers):
        array = np.zeros(spec.shape)
        result = array if spec.layer is None else slice_tensor(array, spec, PLAN)
        assert result.shape == slim[spec.name]


def test_queries_keys_and_values_side_by_side():
    """Of a KV head after the other: its queries, its key, its value, as in GPT-NeoX or Falcon."""
    parts = ((Unit.QUERY, 6), (Unit.KV, 3), (Unit.KV, 3))
    named = [f"{what}{group}" for group in range(3) for what in ("q0", "q1", "k", "v")]
    for axis, size in ((0, (24, 5)), (1, (5, 24))):
        spec = TensorSpec("qkv", size, 0, Role.QUERY, Unit.QUERY, axis, 2, parts, True)
        for kv, query, wanted in (
            ((0, 2), (0, 1, 5), "q00 q10 k0 v0 q12 k2 v2"),
            # As many queries as KV heads: their numbers are not those of the groups.
            ((0, 1), (1, 2), "q10 k0 v0 q01 k1 v1"),
            ((1,), (3,), "q11 k1 v1"),
        ):
            plan = LayerPlan(kv_heads=kv, query_heads=query, channels=None)
            units = kept_units(spec, plan)
            assert [named[unit] for unit in units] == wanted.split()
            array = np.random.default_rng(0).standard_normal(size)
            result = slice_tensor(array, spec, plan)
            np.testing.assert_array_equal(result, by_hand(array, spec, units))
        whole = LayerPlan(kv_heads=(0, 1, 2), query_heads=tuple(range(6)), channels=None)
        assert kept_units(spec, whole) is None


def test_padding_between_queries_side_by_side():
    parts = ((Unit.QUERY, 6), (Unit.KV, 3), (Unit.KV, 3))
    spec = TensorSpec("qkv", (24, 5), 0, Role.QUERY, Unit.QUERY, 0, 2, parts, True)
    # The first and the last KV head keep one query, and get zeros for the other.
    assert written_units(spec, PADDED, SHAPE) == (0, FILL, 2, 3, 4, 5, 6, 7, 9, FILL, 10, 11)

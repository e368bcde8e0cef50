from __future__ import annotations

import numpy as np
import pytest
import torch

from spp_export.models.checkpoint.dtypes import (
    FLOAT_DTYPES,
    all_finite,
    bits_dtype,
    from_float,
    to_float,
)

AWKWARD = [0.0, -0.0, 1.0, 1.00390625, 1.01171875, -1.00390625, 3.3e38, 3.39e38, 3.4e38, 1e39]
AWKWARD += [65504.0, 65519.9, 65520.0, 1e-40, 9.2e-41, 4.6e-41, 6e-8, 2.98e-8, 1e-310]


def torch_bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]).numpy()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_rounding_is_that_of_torch(dtype, kind):
    random = np.random.default_rng(0)
    scale = 10.0 ** random.integers(-45, 38, 4000)
    with np.errstate(over="ignore"):
        values = np.concatenate([AWKWARD, random.standard_normal(4000) * scale]).astype(kind)
    expected = torch.from_numpy(values).to(getattr(torch, FLOAT_DTYPES[dtype]))
    ours = from_float(values, dtype)
    assert ours.dtype == bits_dtype(dtype)
    if kind == np.float64 and dtype == "BF16":
        # torch rounds float64 twice, through float32; here one rounding is the reference.
        once = [nearest_bfloat16(value) for value in values]
        np.testing.assert_array_equal(to_float(ours, "BF16").astype(np.float64), once)
    else:
        np.testing.assert_array_equal(ours.view(f"i{ours.itemsize}"), torch_bits(expected))


def nearest_bfloat16(value: float) -> float:
    """Brute force: the nearer of the two neighbours with 8 significant bits, or the even one."""
    if value == 0:
        return value
    exponent = max(int(np.floor(np.log2(abs(value)))), -126) - 7
    rounded = float(np.round(np.ldexp(value, -exponent)))  # NumPy rounds ties to even
    rounded = float(np.ldexp(rounded, exponent))
    return rounded if abs(rounded) < 2.0**128 else float(np.copysign(np.inf, value))


def test_one_rounding_from_float64():
    value = np.array([1 + 2.0**-8 + 2.0**-40])
    assert to_float(from_float(value, "BF16"), "BF16")[0] == 1 + 2.0**-7


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_every_pattern_survives_the_way_there_and_back(dtype):
    random = np.random.default_rng(1)
    size = bits_dtype(dtype).itemsize
    bits = (
        np.arange(1 << 16, dtype="<u2")
        if size == 2
        else random.integers(0, 1 << (8 * size), 5000, dtype=bits_dtype(dtype))
    )
    values = to_float(bits, dtype)
    expected = torch.from_numpy(bits.copy()).view(getattr(torch, FLOAT_DTYPES[dtype]))
    kind = torch.float64 if dtype == "F64" else torch.float32
    np.testing.assert_array_equal(values, expected.to(kind).numpy())
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(from_float(values, dtype)[numbers], bits[numbers])
    assert np.isnan(to_float(from_float(values[~numbers], dtype), dtype)).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_all_finite_finds_one_bad_value_anywhere(dtype, bad):
    values = np.full((2, 3, 1 << 19), 2.0)
    assert all_finite(from_float(values, dtype), dtype)
    values[1, 2, 77] = bad
    assert not all_finite(from_float(values, dtype), dtype)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_the_largest_number_is_finite(dtype):
    largest = torch.finfo(getattr(torch, FLOAT_DTYPES[dtype])).max
    for sign in (1, -1):
        assert all_finite(from_float(np.array([sign * largest]), dtype), dtype)


def test_integers_have_no_infinities():
    assert all_finite(np.array([-1], dtype=np.int32).view("<u4"), "I32")

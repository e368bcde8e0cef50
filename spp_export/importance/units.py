"""Sums over the rows and columns of a unit, shared by the criteria. All results are float64."""

from __future__ import annotations

import numpy as np

from spp_export.common.arrays import FloatArray


def column_squares(matrix: FloatArray) -> FloatArray:
    """`sum_i W[i,c]^2` of every column, [in]."""
    squares: FloatArray = np.einsum("ic,ic->c", matrix, matrix, dtype=np.float64)
    return squares


def column_sums(matrix: FloatArray) -> FloatArray:
    """`sum_i |W[i,c]|` of every column, [in]."""
    sums: FloatArray = np.abs(matrix).sum(axis=0, dtype=np.float64)
    return sums


def row_sums(matrix: FloatArray) -> FloatArray:
    """`sum_j |W[r,j]|` of every row, [out]."""
    sums: FloatArray = np.abs(matrix).sum(axis=1, dtype=np.float64)
    return sums


def per_head(values: FloatArray, heads: int) -> FloatArray:
    """Values of adjacent rows or columns [heads*dh] summed over each head, [heads]."""
    sums: FloatArray = values.reshape(heads, -1).sum(axis=1, dtype=np.float64)
    return sums


def per_query_head(values_G: FloatArray, heads: int) -> FloatArray:
    """Each of H query heads gets 1/g of its KV head's value: head h reads KV head h//g. [H]"""
    size = heads // len(values_G)
    shares: FloatArray = np.repeat(values_G, size) / size
    return shares


def relative(values: FloatArray) -> FloatArray:
    """Values over their mean; zeros stay zeros."""
    mean = values.mean(dtype=np.float64)
    return values / (mean if mean > 0 else 1.0)


def normalised(values: FloatArray) -> FloatArray:
    """Values over their L2 norm; zeros stay zeros."""
    norm = np.sqrt(np.square(values, dtype=np.float64).sum())
    return values / (norm if norm > 0 else 1.0)

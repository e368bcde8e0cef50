"""Grouped-query attention whose KV groups have different numbers of query heads."""

from spp_kernels.ragged_attention.naive import ragged_attention

__all__ = ["ragged_attention"]

"""Operations that slim models need and torch does not have. Knows torch, not spp_export.

One operation per folder: `naive.py` is its definition in plain torch, slow and obvious. Faster
implementations stand beside it and are tested against it.
"""

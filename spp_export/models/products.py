"""How matrices are multiplied where most of the time goes into it.

On a CPU, PyTorch has two libraries for float32: MKL by default, which leaves the wide registers of
AMD's processors unused, and oneDNN, which it asks where bfloat16 inside a product is allowed.
oneDNN takes the digits down only where the processor has units for tiles (AMX); elsewhere it gives
those of float32, and on AMD's processors sooner. The small products of attention over short
sequences it gives several times later than MKL. Products of numbers in bfloat16, summed in float32,
are faster still where a processor has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, Literal

Matmul = Literal["float32", "bfloat16"]
# Capabilities by which a processor multiplies bfloat16 itself, as PyTorch names them.
_NATIVE = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
# Products of float32 numbers that differ by more are not in float32.
_MOST_ROUNDING = 1e-6
_CHECKED = 256
# What PyTorch calls the precision inside a product of float32 by which it asks the one library, or
# the other.
_ONEDNN, _MKL = "bf16", "ieee"
# Attention of fewer queries in a row is MKL's. With one thread of an EPYC with AVX-512, a step of
# 27 rows over 230 tokens takes 2.2 ms by oneDNN and 0.5 by MKL, and 12 rows of 80 tokens 9 and 3;
# 9 rows of 200 tokens take 14 and 12, and 4 of 500 tokens 23 and 30.
_FEW_QUERIES = 256


@cache
def multiplies_bfloat16(device: str) -> bool:
    """Whether a device multiplies bfloat16 itself; what emulates it is slower than float32."""
    import torch

    kind = _kind(device)
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if kind != "cpu":
        return False
    # Where PyTorch does not tell yet, nothing is known of it.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in _NATIVE)


@contextmanager
def products(device: str, matmul: Matmul = "float32") -> Iterator[None]:
    """Within it, products on a device are taken as fast as it can: in float32 with no more rounding
    than float32 has, or of numbers rounded to bfloat16.

    What else is computed stays in float32, and so do sums that are added up in place.
    """
    import torch

    kind = _kind(device)
    with ExitStack() as stack:
        if matmul == "bfloat16":
            stack.enter_context(torch.autocast(kind, torch.bfloat16))
        if kind == "cpu" and (matmul == "bfloat16" or _keeps_digits()):
            stack.enter_context(_inside(_ONEDNN))
            stack.enter_context(_short_attention_by_mkl())
        yield


@contextmanager
def as_they_are(device: str) -> Iterator[None]:
    """Within it, numbers are multiplied in the dtype they have, whatever `products` asks around
    it."""
    import torch

    kind = _kind(device)
    with ExitStack() as stack:
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if kind == "cpu" and not _keeps_digits():
            stack.enter_context(_inside(_MKL))
        yield


def _kind(device: str) -> str:
    return device.partition(":")[0]


@cache
def _keeps_digits() -> bool:
    """Whether oneDNN, where it may use bfloat16, gives products of float32 all the same."""
    import torch

    numbers = torch.Generator().manual_seed(0)
    left, right = torch.randn((2, _CHECKED, _CHECKED), generator=numbers)
    exact = left.double() @ right.double()
    with torch.no_grad(), torch.autocast("cpu", enabled=False), _inside(_ONEDNN):
        found = left @ right
    return bool((found - exact).norm() < _MOST_ROUNDING * exact.norm())


@contextmanager
def _short_attention_by_mkl() -> Iterator[None]:
    """Within it, models that ask PyTorch for attention get that over short sequences by MKL."""
    from torch.nn import functional

    attend: Any = functional.scaled_dot_product_attention

    def attend_by_length(query: Any, *args: Any, **options: Any) -> Any:
        with _inside(_MKL if query.shape[-2] < _FEW_QUERIES else _ONEDNN):
            return attend(query, *args, **options)

    setting: Any = functional
    setting.scaled_dot_product_attention = attend_by_length
    try:
        yield
    finally:
        setting.scaled_dot_product_attention = attend


@contextmanager
def _inside(precision: str) -> Iterator[None]:
    """With that precision allowed inside products of float32."""
    import torch

    # PyTorch before 2.9 has no such switch.
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None or not torch.backends.mkldnn.is_available():
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before

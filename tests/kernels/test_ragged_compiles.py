"""The Triton kernels through triton's compiler, which needs no card: the interpreter is lenient."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

CODE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from spp_kernels.ragged_attention import triton as kernels

pointers = dict.fromkeys(("starts", "ends", "heads", "first"), "*i64")
pointers |= dict.fromkeys(("parts", "sums"), "*fp32") | {"scale": "fp32"}
blocks = {"CAUSAL": True, "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_D": 16, "WIDEN": False, "BLOCK_P": 8}
for element, fixed in (("*fp32", {}), ("*bf16", {"starts": None, "ends": None, "CAUSAL": False})):
    types = pointers | dict.fromkeys(("query", "key", "value", "output"), element)
    for kernel in (kernels._whole, kernels._split, kernels._join):
        constants = {k: v for k, v in (blocks | fixed).items() if k in kernel.arg_names}
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
        assert compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""

# The largest blocks of each element, with all the stages that their kernel is started with.
SHARED = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from spp_kernels.ragged_attention import triton as kernels

for element, size, rows in (("*bf16", 2, 64), ("*fp32", 4, 32)):
    blocks = kernels._blocks(rows, 128, size)
    assert blocks[0] == rows
    fixed = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_D"), blocks))
    fixed |= {"CAUSAL": True, "WIDEN": False, "starts": None, "ends": None}
    fixed |= dict.fromkeys(("query_d", "key_d", "value_d"), 1)
    types = dict.fromkeys(("heads", "first"), "*i64") | dict.fromkeys(("parts", "sums"), "*fp32")
    types |= dict.fromkeys(("query", "key", "value"), element) | {"scale": "fp32"}
    names = kernels._split.arg_names
    signature = {name: types.get(name, "i32") for name in names} | dict.fromkeys(fixed, "constexpr")
    whole = ["query", "key", "value", "heads", "first", "parts", "sums", "key_t", "value_t"]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in whole}
    source = ASTSource(kernels._split, signature, fixed, aligned)
    options = {"num_warps": 4, "num_stages": kernels._stages(2)}
    found = compile(source, target=GPUTarget("cuda", 86, 32), options=options)
    assert 1 << 15 < found.metadata.shared <= 99 << 10, found.metadata.shared
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.slow
@pytest.mark.parametrize("code", [CODE, SHARED], ids=["every kernel", "within shared memory"])
def test_kernels_compile_for_a_card(code, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)

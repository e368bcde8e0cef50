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
    types = pointers | dict.fromkeys(("query", "key", "value", "found"), element)
    for kernel in (kernels._whole, kernels._split, kernels._join):
        constants = {k: v for k, v in (blocks | fixed).items() if k in kernel.arg_names}
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
        assert compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_every_kernel_compiles_for_a_card(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", CODE], check=True, env=environment)

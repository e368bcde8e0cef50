"""What optimum's users see who have not installed it; with it, see tests/with_optimum."""

from __future__ import annotations

import sys

import pytest

import spp_export.formats.onnx.runtime
from spp_export.common.errors import UsageError


def test_a_missing_optimum_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optimum", None)
    for name in [name for name in sys.modules if name.startswith("optimum.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "spp_export.formats.onnx.runtime.optimum", raising=False)
    with pytest.raises(UsageError, match=r"install .*\[optimum\]"):
        _ = spp_export.formats.onnx.runtime.ORTSlimForCausalLM


def test_other_names_are_no_attributes():
    with pytest.raises(
        AttributeError, match=r"'spp_export.formats.onnx.runtime' has no attribute 'nothing'"
    ):
        _ = spp_export.formats.onnx.runtime.nothing

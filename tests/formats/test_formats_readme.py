"""The README of the formats: its example is a format as it stands, for every command."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from factories import CASES, random_layers, shape_of

import spp_export
from spp_export import formats
from spp_export.commands.requests import form_fields
from spp_export.common.errors import ModelError, UsageError
from spp_export.formats.registry import FORMATS
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.planning import Plan

README = (Path(formats.__file__).parent / "README.md").read_text(encoding="utf-8")
NAME = "llama-gqa-bias"


@pytest.fixture
def arrays(monkeypatch):
    """The README's format, registered."""
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (line,) = re.findall(r"among the others: `(\w+)\(\),`", README)
    module = ModuleType("spp_export.formats.arrays")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(block, "arrays.py", "exec"), vars(module))
    made = vars(module)[line]()
    monkeypatch.setitem(FORMATS, made.name, made)
    return made


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    case = next(case for case in CASES if case.name == NAME)
    return case.make(tmp_path_factory.mktemp("dense"))


@pytest.fixture
def plan(dense) -> Plan:
    layers = random_layers(shape_of(dense), 5)
    return Plan(open_source(dense).fingerprint, "dense", "per-layer", "none", layers)


def test_export_verify_show_report_and_chat(arrays, dense, plan, tmp_path):
    out = tmp_path / "out"
    result = spp_export.export(output=out, model=str(dense), plan=plan, format="arrays")
    assert result.to_dict()["format"] == "arrays"
    assert result.to_dict()["arrays"]["bytes"] == (out / "model.npz").stat().st_size
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "manifest.json",
        "model.npz",
        "plan.json",
        "verify.json",
    }
    report = json.loads((out / "verify.json").read_text())
    assert report["passed"]
    assert report["checks"][-1]["name"] == "arrays as the checkpoint has them"
    assert spp_export.verify(out, model=str(dense)).checks[-1].name == "finite arrays"
    shown = spp_export.show(out)
    assert (shown.kind, shown.problems) == ("arrays export", ())
    assert shown.facts["arrays"] == {"float32": result.form["tensors"]}
    page = spp_export.report(out).path
    assert "Slim arrays export of dense" in page.read_text()
    with pytest.raises(UsageError, match="arrays are not run by spp"):
        spp_export.open_chat(out)


def test_convert(arrays, dense, tmp_path):
    out = tmp_path / "out"
    result = spp_export.convert(str(dense), out, format="arrays")
    assert result.to_dict()["arrays"] == {"tensors": result.form["tensors"]}
    embedding = np.load(out / "model.npz")["model.embed_tokens.weight"]
    assert embedding.shape == (shape_of(dense).vocab_size, shape_of(dense).hidden_size)
    with pytest.raises(ModelError, match="has NumPy arrays already"):
        spp_export.convert(out, tmp_path / "again", format="arrays")


def test_the_command_line_has_the_options_of_every_format(arrays):
    fields = form_fields(FORMATS.values())
    assert list(fields) == ["--onnx-attention", "--precision", "--quant"]
    with pytest.raises(UsageError, match="--quant: is for ONNX and GGUF"):
        spp_export.export("s.txt", format="arrays", quant="int8")


def test_the_table_lists_every_format():
    rows = re.findall(r"^\| `(.+?)` \| (.+?) \|", README, re.MULTILINE)
    assert rows == [(made.name, made.engine) for made in FORMATS.values()]

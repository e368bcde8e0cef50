"""The README of the families: its example is sliced and verified as it stands."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from factories import make_checkpoint, mask_in_torch, shape_of, uniform_layers

import spp_export
import spp_export.models.families as families
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.loader import load_dense, load_slim
from spp_export.planning import Plan, write_plan

README = (Path(families.__file__).parent / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def granite(tmp_path, monkeypatch):
    """The example's record, registered after one file and one line."""
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in block.splitlines() if line]) <= 10
    (file,) = re.findall(r"for instance `(\w+)\.py`", README)
    assert re.findall(r'among `FILES`: `"(\w+)",`', README) == [file]
    (tmp_path / f"{file}.py").write_text(block)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    try:
        found = families.registry((*families.FILES, file))
    finally:
        sys.modules.pop(f"spp_export.models.families.{file}", None)
        vars(families).pop(file, None)
    assert list(found) == [*families.FAMILIES, file]
    monkeypatch.setitem(families.FAMILIES, file, found[file])
    return file


def test_the_example_is_a_family_after_one_file_and_one_line(granite, tmp_path):
    """Exported, which verifies it, and equal to the dense model with the same heads masked."""
    dense = make_checkpoint(
        tmp_path, granite, kv_heads=2, query_heads=4, attention_multiplier=0.25, mlp_bias=True
    )
    layers = uniform_layers(shape_of(dense), 0, kv_heads=1, group_size=2, channels=40)
    source = open_source(dense)
    write_plan(
        Plan(source.fingerprint, source.name, "uniform", "none", layers), tmp_path / "plan.json"
    )
    spp_export.export(output=tmp_path / "slim", model=str(dense), plan=tmp_path / "plan.json")
    slim = load_slim(tmp_path / "slim", torch.float64)
    assert type(slim).__name__ == "GraniteForCausalLM"
    ids = torch.randint(3, 259, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), mask_in_torch(load_dense(dense, torch.float64), layers) as masked:
        expected = masked(ids).logits
        torch.testing.assert_close(slim(ids).logits, expected, rtol=1e-9, atol=1e-9)

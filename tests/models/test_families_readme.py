"""The example in the README of the families, which CONTRIBUTING shows too, is a family."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from factories import make_checkpoint, mask_in_torch, random_layers, shape_of

import spp_export
import spp_export.models.families as families
from spp_export.models import modeling
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.families import table
from spp_export.models.loader import load_dense, load_slim
from spp_export.planning import Plan, write_plan

CONTRIBUTING = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
README = (Path(families.__file__).parent / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def example(monkeypatch):
    """The model type of the example's record, registered as one of the table is."""
    (block,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    assert len(block.splitlines()) <= 5
    assert block in CONTRIBUTING
    family = eval(block.rstrip().removesuffix(","), dict(vars(table)))
    assert family.model_type not in families.FAMILIES
    monkeypatch.setitem(families.FAMILIES, family.model_type, family)
    modeling.register(family.model_type)
    return family.model_type


def test_the_example_is_a_family_after_one_record(example, tmp_path):
    """Exported, which verifies it, and equal to the dense model with the same heads masked."""
    dense = make_checkpoint(tmp_path, example, kv_heads=2, query_heads=4, attention_bias=True)
    layers = random_layers(shape_of(dense), 0)
    source = open_source(dense)
    write_plan(
        Plan(source.fingerprint, source.name, "per-layer", "none", layers), tmp_path / "plan.json"
    )
    spp_export.export(output=tmp_path / "slim", model=str(dense), plan=tmp_path / "plan.json")
    slim = load_slim(tmp_path / "slim", torch.float64)
    assert type(slim).__qualname__ == "SppHunYuanDenseV1ForCausalLM"
    ids = torch.randint(3, 259, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), mask_in_torch(load_dense(dense, torch.float64), layers) as masked:
        expected = masked(ids).logits
        torch.testing.assert_close(slim(ids).logits, expected, rtol=1e-9, atol=1e-9)


def test_the_fields_of_the_table_are_those_of_the_record():
    """The README's table names fields that there are."""
    named = re.findall(r"^\| (`.*?`) \|", README, re.MULTILINE)
    fields = [field for row in named for field in re.findall(r"`(\w+)`", row)]
    assert len(fields) > 15
    assert set(fields) <= set(families.Family.__dataclass_fields__)

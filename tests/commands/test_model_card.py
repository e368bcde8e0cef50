"""What a card says beside names: licence, scenario, decision, figures, in every format."""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import replace

import pytest
import yaml
from exporting import tree
from gguf_cases import add_merges

import spp_export
from spp_export.formats.card import onnx_card
from spp_export.planning import LayerPlan

CASE = "llama-gqa-bias"
FORMS = {
    "safetensors": {},
    "onnx": {"format": "onnx"},
    "gguf": {"format": "gguf"},
}
BEFORE = "---\nlicense: llama3\ntags: [x]\n---\n# A base\n"


@pytest.fixture(scope="module")
def licensed(workshop, tmp_path_factory):
    """The dense model with a card of its own."""
    dense = tmp_path_factory.mktemp("licensed") / "base"
    shutil.copytree(workshop.dense(CASE), dense)
    add_merges(dense)  # or llama.cpp does not take it
    (dense / "README.md").write_text(BEFORE)
    (dense / "LICENSE").write_text("Terms\n")
    (dense / "Notice.txt").write_text("Notice\n")
    return dense


def export(workshop, dense, target, **form):
    return spp_export.export(
        workshop.scenario,
        target,
        model=str(dense),
        artifacts=workshop.artifacts(CASE),
        keep=0.7,
        units="both",
        width_multiple=8,
        **form,
    )


def counts(card: str, name: str) -> list[int]:
    """Counts by layer, from runs like `3 x 9, 6`."""
    (line,) = re.findall(rf"^- {name}: (.*)$", card, re.MULTILINE)
    found: list[int] = []
    for run in line.split(", "):
        length, _, count = run.rpartition(" x ")
        found += [int(count)] * int(length or 1)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_a_card_says_what_was_decided(workshop, licensed, tmp_path, form):
    result = export(workshop, licensed, tmp_path / "slim", **FORMS[form])
    card = (tmp_path / "slim" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert "base_model" not in front  # a directory's name is no id on a hub
    assert front["license"] == "llama3"
    assert "pruned" in front["tags"]
    files = tree(tmp_path / "slim")
    assert (files["LICENSE"], files["Notice.txt"]) == (b"Terms\n", b"Notice\n")
    layers = result.plan.layers
    assert counts(card, "query heads") == [len(layer.query_heads) for layer in layers]
    assert counts(card, "KV heads") == [len(layer.kv_heads) for layer in layers]
    assert counts(card, "MLP channels") == [len(layer.channels or ()) for layer in layers]
    realised = result.plan.budget["realised"]
    expected = f"keep {realised['keep']:.4g}, parameters {realised['parameters']:,}"
    assert f"Budget asked for: keep 0.7. Realised: {expected}" in card
    digest = hashlib.sha256(workshop.scenario.read_bytes()).hexdigest()
    assert f"Scenario: SHA-256 `{digest}`." in card
    quality = result.report["quality"]
    assert f"perplexity {quality['slim_perplexity']} against {quality['dense_perplexity']}" in card
    assert card.count("FAILED") == 0
    assert card.count(": passed.") == len(result.report["checks"])


def test_a_converted_export_keeps_its_origin(workshop, tmp_path):
    slim = workshop.exported(CASE)
    spp_export.convert(slim.path, tmp_path / "graph", verify=False)
    card = (tmp_path / "graph" / "README.md").read_text()
    layers = slim.result.plan.layers
    assert counts(card, "query heads") == [len(layer.query_heads) for layer in layers]
    assert slim.result.plan.scenario["sha256"] in card
    assert "tags:\n- onnx\n- pruned\n- spp\n---\n" in card
    spp_export.convert(slim.dense, tmp_path / "dense", verify=False)
    card = (tmp_path / "dense" / "README.md").read_text()
    assert "Kept by layer" not in card
    assert "tags:\n- onnx\n- spp\n---\n" in card


@pytest.mark.parametrize(
    "record",
    [{}, {"asked": 3, "realised": []}, {"asked": {"keep": "# x\n<b>", "units": None}}],
    ids=str,
)
def test_what_a_plan_does_not_say_or_says_badly_is_left_out(workshop, record):
    plan = replace(
        workshop.exported(CASE).result.plan,
        budget=record,
        scenario={"sha256": "<script>"},
        artifacts={"sha256": 5},
        layers=(LayerPlan((0,), (0, 1), (1, 2, 3)),) * 3,
    )
    card = onnx_card("x", "base", "gqa", None, (), None, converted=plan)
    assert counts(card, "MLP channels") == [3, 3, 3]
    for word in ("Budget", "SHA-256", "script", "<b>"):
        assert word not in card

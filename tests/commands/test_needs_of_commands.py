"""Commands refuse before they work: nothing is loaded, nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from exporting import refused
from factories import format_options

import spp_export
from spp_export.calibration import cache as calibration_cache
from spp_export.commands import needs as preflight
from spp_export.commands.needs import export_needs
from spp_export.common.errors import OutputError, ResourceError
from spp_export.formats.onnx import OnnxOptions
from spp_export.formats.registry import FORMATS
from spp_export.formats.safetensors.format import SafetensorsOptions
from spp_export.models.checkpoint.dtypes import ELEMENT_BYTES
from spp_export.models.checkpoint.reader import stored_tensors
from spp_export.models.session import Session, open_session

NAME = "llama-gqa-bias"


@pytest.fixture(autouse=True)
def made(workshop):
    """What commands need is there before anything is taken away."""
    workshop.artifacts(NAME)
    workshop.exported(NAME)


@pytest.fixture
def no_model(made, monkeypatch):
    """Loading a model is work."""

    def loaded(self):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Session, "model", property(loaded))


@pytest.fixture
def full_disk(made, monkeypatch):
    free = lambda path: 10  # noqa: E731
    monkeypatch.setattr(preflight, "free_space", free)


@pytest.fixture
def little_memory(made, monkeypatch):
    monkeypatch.setattr(preflight, "_memory", lambda: 10)


def test_export(workshop, tmp_path, no_model, full_disk):
    with refused(OutputError, r"slim: needs .* \(slim checkpoint .* kB, other files .* MB\)"):
        export(workshop, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_export_as_onnx_counts_the_graph(workshop, tmp_path, no_model, full_disk):
    with refused(OutputError, r"slim checkpoint .* kB, other files .* MB, graph .* kB\)"):
        export(workshop, tmp_path, format_options(OnnxOptions()))


def test_export_of_a_given_plan(workshop, tmp_path, no_model, full_disk):
    plan = workshop.exported(NAME).result.plan
    with refused(OutputError, r"slim: needs .* are free"):
        spp_export.export(output=tmp_path / "slim", model=str(workshop.dense(NAME)), plan=plan)
    assert list(tmp_path.iterdir()) == []


def test_export_without_memory(workshop, tmp_path, no_model, little_memory):
    with refused(ResourceError, r"memory: needs at least .* kB, 0.0 kB are free, swap included"):
        export(workshop, tmp_path)


def test_convert(workshop, tmp_path, full_disk):
    slim = workshop.exported(NAME).path
    with refused(OutputError, r"onnx: needs .* MB \(graph .* kB, other files .* MB\)"):
        spp_export.convert(slim, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_probe(workshop, tmp_path, no_model, full_disk, little_memory):
    with refused(OutputError, r"artifacts: needs .* \(artifacts .* kB\)"):
        spp_export.probe(workshop.pools, tmp_path / "artifacts", model=str(workshop.dense(NAME)))


def test_the_cache_is_asked_before_any_pass(workshop, tmp_path, monkeypatch):
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration_cache, "free_space", lambda path: 10)
    with refused(OutputError, r"cache: statistics of the dense model need .* Make room, set SPP_"):
        export(workshop, tmp_path, compensate="lstsq")


def test_a_dry_run_tells_instead(workshop, tmp_path, full_disk):
    request = {"dry_run": True, **format_options(OnnxOptions(quant="int4"))}
    result = export(workshop, tmp_path, request)
    told = json.loads(json.dumps(result.to_dict()))["needs"]
    assert set(told["disk"]["bytes"]) == {
        "slim checkpoint",
        "other files",
        "graph",
        "graph to compare with",
    }
    assert "dense model in float32" in told["memory"]["bytes"]
    assert "slim model in float32" in told["memory"]["bytes"]


def test_what_is_promised_is_what_is_written(workshop):
    made = workshop.exported(NAME)
    assert made.result.needs
    stored = stored_tensors(made.path).values()
    assert made.result.needs.disk["slim checkpoint"] == sum(one.nbytes for one in stored)
    # Much the same with everything that travels beside it.
    total = sum(path.stat().st_size for path in made.path.iterdir())
    assert total <= sum(made.result.needs.disk.values()) <= total + 1_000_000


@pytest.mark.parametrize("quant", [None, "int8", "int4", "int8-dynamic"])
def test_graphs_are_about_as_large_as_promised(workshop, tmp_path, quant):
    slim = workshop.exported(NAME).path
    options = OnnxOptions(quant=quant)
    result = spp_export.convert(slim, tmp_path / "onnx", **format_options(options), verify=False)
    parameters = sum(
        one.nbytes // ELEMENT_BYTES[one.dtype] for one in stored_tensors(slim).values()
    )
    promised = FORMATS["onnx"].disk(options, "F32", parameters, verify=False)
    assert promised.get("graph to compare with", 0) == 0
    # The graph itself, whose size does not grow with the weights, comes on top.
    assert result.nbytes > 0.8 * promised["graph"]


def test_models_that_may_run_from_disk_need_little(workshop):
    dense = str(workshop.dense(NAME))
    form = SafetensorsOptions()
    for layerwise in (False, True, None):
        session = open_session(dense, layerwise=layerwise)
        whole = session.source.shape.parameters(session.source.shape.layers)
        found = export_needs(session, Path("out"), 1000, runs_model=True, verify=True, form=form)
        assert (found.least_memory == 4 * whole) == (layerwise is False)
        assert found.from_disk == bool(layerwise)
        sliced = export_needs(session, Path("out"), 1000, runs_model=False, verify=False, form=form)
        assert sliced.least_memory == 0


def export(workshop, tmp_path, request=None, **asked):
    asked = {"compensate": "none", **asked}
    return workshop.export(NAME, tmp_path / "slim", **(request or {}), **asked)

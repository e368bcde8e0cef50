"""`convert`: checkpoints that exist already, slim and dense, as ONNX."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
from exporting import CASE, refused, tree
from factories import CASES, format_options, random_layers, read_config, shape_of, write_slim
from onnx_exports import FILES, FORMS, exported_onnx
from pairs import few

import spp_export
import spp_export.formats.onnx.checks as onnx_checks
from spp_export import OnnxOptions
from spp_export.common.errors import (
    CheckFailed,
    ModelError,
    OutputError,
    ParityError,
    ScenarioError,
    UsageError,
)
from spp_export.evaluation.parity import Check

pytestmark = pytest.mark.thinned(most=4)

NAME = "qwen3-gqa-tied"


@pytest.mark.parametrize(
    ("layout", "compensate"),
    few(itertools.product(("per-layer", "uniform"), ("none", "lstsq", "bias")), set),
)
def test_an_export_becomes_the_directory_that_export_writes(workshop, tmp_path, layout, compensate):
    """But for what was measured: convert has no dense model to measure against."""
    slim = workshop.exported(NAME, layout, compensate)
    result = spp_export.convert(slim.path, tmp_path / "x", scenario=workshop.scenario)
    direct = exported_onnx(workshop, NAME, layout, compensate)
    found, expected = tree(tmp_path / "x"), tree(direct.path)
    assert found.keys() == expected.keys() == FILES
    differs = {name for name in FILES if found[name] != expected[name]}
    assert differs == {"README.md", "manifest.json", "verify.json"}
    assert (result.path, result.layout) == (tmp_path / "x", layout)
    assert result.nbytes == direct.result.nbytes
    report = spp_export.verify(tmp_path / "x", model=str(slim.dense), scenario=workshop.scenario)
    assert report.passed, report.failures


@pytest.mark.parametrize("case", few(CASES, lambda case: {case.family}), ids=str)
def test_a_dense_model(workshop, tmp_path, case):
    """Every family; it is its own reference."""
    dense = workshop.dense(case.name)
    form = FORMS[len(case.name) % 3]
    result = spp_export.convert(str(dense), tmp_path / "x", **format_options(OnnxOptions(form)))
    assert result.report["passed"]
    assert {path.name for path in (tmp_path / "x").iterdir()} == FILES
    assert read_config(tmp_path / "x")["spp_onnx"]["layout"] == "uniform"
    plan = spp_export.read_plan(tmp_path / "x" / "plan.json")
    assert {len(layer.query_heads) for layer in plan.layers} == {shape_of(dense).query_heads}
    assert (plan.compensation, plan.model_source) == ("none", "dense")
    card = (tmp_path / "x" / "README.md").read_text()
    assert "dense as an ONNX graph" in card
    report = spp_export.verify(tmp_path / "x", model=str(dense))
    assert report.passed, report.failures


@pytest.mark.parametrize(
    ("form", "precision", "quant"),
    few(itertools.product(FORMS, ("fp32", "fp16"), (None, "int8", "int4"))),
)
def test_every_form(workshop, tmp_path, form, precision, quant):
    slim = workshop.exported(NAME, "per-layer", "lstsq")
    options = OnnxOptions(form, precision, quant)
    result = spp_export.convert(slim.path, tmp_path / "x", **format_options(options))
    assert result.report["passed"]
    assert ("quantisation" in result.report) == (quant is not None)
    assert {path.name for path in (tmp_path / "x").iterdir()} == FILES
    report = spp_export.verify(tmp_path / "x", model=str(slim.dense))
    assert report.passed, report.failures


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_in_half_precision(tmp_path, dtype):
    dense = CASE[NAME].make(tmp_path, dtype=dtype)
    result = spp_export.convert(dense, tmp_path / "x")
    assert result.report["passed"]
    assert read_config(tmp_path / "x")["dtype"] == "float32"
    assert spp_export.verify(tmp_path / "x", model=str(dense)).passed


def test_the_record(workshop, tmp_path):
    slim = workshop.exported(NAME)
    result = spp_export.convert(slim.path, tmp_path / "x", quant="int8")
    found = result.to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    size = sum(path.stat().st_size for path in (tmp_path / "x").glob("model.onnx*"))
    expected = {
        "path": str(tmp_path / "x"),
        "format": "onnx",
        "layout": "per-layer",
        "onnx": {"attention": "gqa", "precision": "fp32", "quant": "int8"},
        "bytes": size,
        "verify": json.loads((tmp_path / "x" / "verify.json").read_text()),
    }
    assert expected.items() <= found.items()
    assert found.keys() == expected.keys() | {"engines"}


def test_the_scenario_is_what_logits_are_compared_on(workshop, tmp_path):
    slim = workshop.exported(NAME)
    details = []
    for name, scenario in (("text", workshop.scenario), ("random", None)):
        result = spp_export.convert(slim.path, tmp_path / name, scenario=scenario)
        compared = (check for check in result.report["checks"] if "prefill" in check["name"])
        details.append(next(compared)["detail"])
    assert details[0] != details[1]
    with refused(ScenarioError, "no such file"):
        spp_export.convert(slim.path, tmp_path / "x", scenario=tmp_path / "none.txt")


def test_the_same_twice(workshop, tmp_path):
    slim = workshop.exported(NAME)
    for name in "ab":
        (tmp_path / name).mkdir()
        spp_export.convert(slim.path, tmp_path / name / "x", quant="int4")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_the_source_is_left_as_it_is(workshop, tmp_path):
    slim = workshop.exported(NAME)
    before = tree(slim.path)
    spp_export.convert(slim.path, tmp_path / "x")
    assert tree(slim.path) == before


def test_the_license_travels(workshop, tmp_path):
    dense = shutil.copytree(workshop.dense(NAME), tmp_path / "dense")
    (dense / "README.md").write_text('---\nlicense: "apache-2.0"\n---\nText\n')
    names = ("LICENSE", "LICENCE.md", "NOTICE", "COPYING", "USE_POLICY.md")
    for name in names:
        (dense / name).write_text(f"{name}\n")
    (dense / "NOTICES_OF_OTHERS.py").write_text("no terms\n")
    spp_export.convert(dense, tmp_path / "x")
    assert "\nlicense: apache-2.0\n" in (tmp_path / "x" / "README.md").read_text()
    for name in names:
        assert (tmp_path / "x" / name).read_text() == f"{name}\n"
    assert not (tmp_path / "x" / "NOTICES_OF_OTHERS.py").exists()


def test_a_graph_is_not_converted_again(workshop, tmp_path):
    out = exported_onnx(workshop, NAME)
    with refused(ModelError, "has ONNX already. Give the safetensors"):
        spp_export.convert(out.path, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "plan.json"])
def test_an_export_that_has_changed_is_refused(workshop, tmp_path, file):
    slim = shutil.copytree(workshop.exported(NAME).path, tmp_path / "slim")
    data = bytearray((slim / file).read_bytes())
    data[-3] ^= 1
    (slim / file).write_bytes(data)
    with refused(ModelError, f"{file}: its content has changed.*Write the export again"):
        spp_export.convert(slim, tmp_path / "x")
    assert list(tmp_path.iterdir()) == [slim]


def test_a_per_layer_checkpoint_without_its_plan_is_refused(workshop, tmp_path):
    dense = workshop.dense(NAME)
    slim = write_slim(tmp_path / "slim", dense, random_layers(shape_of(dense), 1))
    with refused(ModelError, "slim: has no plan.json, so not a whole export"):
        spp_export.convert(slim, tmp_path / "x")
    assert list(tmp_path.iterdir()) == [slim]


def test_what_is_no_model_is_refused(workshop, tmp_path):
    for source in (tmp_path / "none", tmp_path, workshop.artifacts(NAME)):
        with refused(ModelError, "no such directory|no config.json|config.json"):
            spp_export.convert(source, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_targets_are_as_of_export(workshop, tmp_path):
    slim, target = workshop.exported(NAME), tmp_path / "x"
    spp_export.convert(slim.path, target, **format_options(OnnxOptions("standard")))
    with refused(OutputError, "is not empty"):
        spp_export.convert(slim.path, target)
    spp_export.convert(slim.path, target, force=True)
    assert read_config(target)["spp_onnx"]["attention"] == "gqa"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with refused(OutputError, "has no manifest.json of spp"):
        spp_export.convert(slim.path, tmp_path / "mine", force=True)


def test_it_may_not_replace_what_it_reads(workshop, tmp_path):
    """The safetensors would be gone."""
    slim = shutil.copytree(workshop.exported(NAME).path, tmp_path / "a" / "slim")
    shutil.copyfile(slim / "manifest.json", tmp_path / "a" / "manifest.json")
    (tmp_path / "link").symlink_to(slim)
    for target in (slim, slim.parent, tmp_path / "link"):
        with refused(OutputError, "holds the checkpoint that is to be read"):
            spp_export.convert(slim, target, force=True)
    assert tree(slim) == tree(workshop.exported(NAME).path)


@pytest.fixture
def failing(monkeypatch):
    def no(*_):
        return (Check("ONNX prefill against the oracle", False, 3.0, 1.0),)

    monkeypatch.setattr(onnx_checks, "check_logits", no)


@pytest.mark.parametrize("quant", [None, "int8"])
def test_a_wrong_graph_is_not_published(workshop, tmp_path, failing, quant):
    with refused(ParityError, "ONNX prefill against the oracle: found 3") as caught:
        spp_export.convert(
            workshop.exported(NAME).path,
            tmp_path / "a" / "x",
            **format_options(OnnxOptions(quant=quant)),
        )
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quant", [None, "int8"])
def test_keep_failed_publishes_and_still_fails(workshop, tmp_path, failing, quant):
    with refused(CheckFailed, "Published all the same, by --keep-failed"):
        spp_export.convert(
            workshop.exported(NAME).path,
            tmp_path / "x",
            **format_options(OnnxOptions(quant=quant)),
            keep_failed=True,
        )
    assert {path.name for path in (tmp_path / "x").iterdir()} == FILES
    assert json.loads((tmp_path / "x" / "verify.json").read_text())["passed"] is False
    assert "FAILED" in (tmp_path / "x" / "README.md").read_text()


def test_without_checks(workshop, tmp_path, failing):
    """bf16, which the CPU cannot run, can still be written there."""
    slim = workshop.exported(NAME).path
    with refused(UsageError, "no bf16 kernels on the CPU"):
        spp_export.convert(slim, tmp_path / "x", **format_options(OnnxOptions(precision="bf16")))
    result = spp_export.convert(
        slim, tmp_path / "x", **format_options(OnnxOptions(precision="bf16")), verify=False
    )
    assert result.report is None
    assert {path.name for path in (tmp_path / "x").iterdir()} == FILES - {"verify.json"}
    assert "Not verified" in (tmp_path / "x" / "README.md").read_text()

"""`export` with ONNX options: what every directory holds, and when there is none."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import onnxruntime
import pytest
import torch
from exporting import CASE, Exported, load, logits, masked, refused, stored, tokens, tree
from factories import CASES, format_options, read_config
from onnx_exports import FILES, FORMS, export_onnx, exported_onnx
from pairs import few, of_family

import spp_export
import spp_export.formats.onnx.checks as onnx_checks
from spp_export import OnnxOptions
from spp_export.common.errors import CheckFailed, OutputError, ParityError, QualityError, UsageError
from spp_export.evaluation.parity import Check
from spp_export.formats.onnx.options import QUANTS

pytestmark = pytest.mark.thinned(most=4)

NAME = "llama-gqa-bias"
# Families whose stock config can give o_proj a bias.
BIASED = {"llama", "qwen3"}


@dataclass(frozen=True)
class Asked:
    """One export to be made."""

    case: str
    layout: str
    compensate: str
    form: str


def _asked() -> list[Asked]:
    """Every kind of plan of every case, in one form each, every form many times."""
    plans = [
        (case.name, layout, compensate)
        for case in CASES
        for layout in ("per-layer", "uniform")
        for compensate in ("none", "lstsq", "bias")
        if compensate != "bias" or layout == "per-layer" or case.family in BIASED
    ]
    return [Asked(*plan, FORMS[index % 3]) for index, plan in enumerate(plans)]


def covered(asked: Asked) -> set[Hashable]:
    return of_family((CASE[asked.case], asked.layout, asked.compensate, asked.form))


@pytest.fixture(
    scope="module",
    params=few(_asked(), covered),
    ids=lambda a: f"{a.case}-{a.layout}-{a.compensate}-{a.form}",
)
def asked(request: pytest.FixtureRequest) -> Asked:
    return request.param


@pytest.fixture(scope="module")
def out(workshop, asked) -> Exported:
    options = OnnxOptions(attention=asked.form)
    return exported_onnx(workshop, asked.case, asked.layout, asked.compensate, options)


def test_every_check_holds(out):
    report = json.loads((out.path / "verify.json").read_text())
    assert report == out.result.report
    assert report["passed"] is True
    assert all(check["passed"] for check in report["checks"])
    names = [check["name"] for check in report["checks"]]
    assert "logits parity with the masked dense model" in names  # of the slim checkpoint
    assert sum(name.startswith(("ONNX ", "onnx.checker")) for name in names) == 5


def test_logits_are_those_of_the_masked_dense_model(workshop, out, asked):
    """By onnxruntime alone, without a line of the package's own runner."""
    slim = workshop.exported(asked.case, asked.layout, asked.compensate)
    ids = tokens()
    session = onnxruntime.InferenceSession(out.path / "model.onnx")
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())}
    for value in session.get_inputs():
        if value.name == "position_ids":
            feeds[value.name] = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy()
        elif value.name.startswith("past"):
            _, heads, _, dim = value.shape
            feeds[value.name] = np.zeros((len(ids), heads, 0, dim), np.float32)
    found = session.run(["logits"], feeds)[0]
    written = None if asked.compensate == "none" else slim.tensors
    with masked(out.dense, out.result.plan.layers, written) as model:
        expected = logits(model, ids).numpy()
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


def test_every_file_is_there_and_in_the_manifest(out):
    """And no other: the slim checkpoint it was made from is gone."""
    assert {path.name for path in out.path.iterdir()} == FILES
    listed = json.loads((out.path / "manifest.json").read_text())["files"]
    assert set(listed) == FILES - {"manifest.json"}
    for name, entry in listed.items():
        data = (out.path / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_the_plan_is_that_of_the_safetensors_export(workshop, out, asked):
    slim = workshop.exported(asked.case, asked.layout, asked.compensate)
    assert (out.path / "plan.json").read_bytes() == (slim.path / "plan.json").read_bytes()
    assert out.result.plan.to_json() == slim.result.plan.to_json()


def test_the_config_is_stock_and_lists_the_layers(out, asked):
    config, layers = read_config(out.path), out.result.plan.layers
    assert config["model_type"] == CASE[asked.case].family
    assert config["num_attention_heads_per_layer"] == [len(layer.query_heads) for layer in layers]
    assert config["num_key_value_heads_per_layer"] == [len(layer.kv_heads) for layer in layers]
    assert config["spp_onnx"] == {
        "attention": asked.form,
        "precision": "fp32",
        "quant": None,
        "layout": asked.layout,
        "version": 1,
    }


def test_the_result_says_what_was_written(out, asked):
    found = out.result.to_dict()
    size = sum(path.stat().st_size for path in out.path.glob("model.onnx*"))
    assert (found["format"], found["path"]) == ("onnx", str(out.path))
    form = {"attention": asked.form, "precision": "fp32", "quant": None}
    assert found["onnx"] == form | {"bytes": size}
    assert {engine["name"] for engine in found["engines"]} >= {"onnxruntime", "optimum"}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_nothing_names_a_path_of_this_machine(out, workshop):
    for path in out.path.iterdir():
        assert str(workshop.root).encode() not in path.read_bytes(), path.name


def test_verify_agrees(out, workshop):
    """With the scenario, and on random tokens without it."""
    for scenario in (workshop.scenario, None):
        report = spp_export.verify(out.path, model=str(out.dense), scenario=scenario)
        assert report.passed, report.failures
        assert report.context["onnx"]["precision"] == "fp32"


@pytest.mark.parametrize(
    ("case", "form"), few(itertools.product(("qwen2-mha-window", "qwen3-gqa-tied"), FORMS), set)
)
def test_half_precision_keeps_its_tolerance(workshop, case, form):
    options = OnnxOptions(form, "fp16")
    out = exported_onnx(workshop, case, "per-layer", "lstsq", options)
    assert out.result.report["passed"]
    whole = exported_onnx(workshop, case, "per-layer", "lstsq", OnnxOptions(form))
    assert out.result.nbytes < 0.55 * whole.result.nbytes
    report = spp_export.verify(out.path, model=str(out.dense))
    assert report.passed, report.failures
    assert report.context["computed_in"] == "float16"
    assert read_config(out.path)["dtype"] == "float16"


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("case", ["mistral-window-tied", NAME])
def test_quantised_graphs_say_how_well_they_agree(workshop, case, quant):
    """Tied and untied embeddings; products in floats have to hold the tolerances."""
    options = OnnxOptions(quant=quant)
    out = exported_onnx(workshop, case, "per-layer", "lstsq", options)
    report = out.result.report
    names = [check["name"] for check in report["checks"]]
    assert report["passed"]
    # Whole numbers alone cannot be multiplied in floats.
    assert ("ONNX prefill against the oracle" in names) == (quant != "int8-dynamic")
    assert f"{quant} graph against the model of its own weights" in names
    assert report["onnx"] == options.to_dict()
    cost = report["quantisation"]
    worst = {"int8": 0.05, "int8-dynamic": 0.1, "int4": 0.8}[quant]
    assert 0 < cost["mean_kl"] < worst
    assert 0.4 < cost["top1"] <= 1
    assert {path.name for path in out.path.iterdir()} == FILES
    verified = spp_export.verify(out.path, model=str(out.dense), scenario=workshop.scenario)
    assert verified.passed, verified.failures


def test_what_is_measured_is_the_graph(workshop):
    """A graph in few bits predicts otherwise than the checkpoint it was made from."""
    slim = workshop.exported(NAME, "per-layer", "lstsq").result.report["quality"]
    whole = exported_onnx(workshop, NAME, "per-layer", "lstsq").result.report["quality"]
    options = OnnxOptions(quant="int4")
    rounded = exported_onnx(workshop, NAME, "per-layer", "lstsq", options).result.report["quality"]
    assert whole["slim_perplexity"] == pytest.approx(slim["slim_perplexity"], rel=1e-4)
    assert rounded["slim_perplexity"] != pytest.approx(slim["slim_perplexity"], rel=1e-3)
    assert rounded["dense_perplexity"] == slim["dense_perplexity"]


def test_the_quality_gate_is_about_the_graph(workshop, tmp_path):
    slim = workshop.exported(NAME, "per-layer", "none")
    with refused(QualityError, "held-out perplexity is .*x dense, the gate allows 0.01x"):
        export_onnx(workshop, slim, tmp_path / "x", OnnxOptions(), max_perplexity=0.01)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_checkpoints_in_half_precision(workshop, tmp_path, dtype):
    """Each in its own precision, as far as the CPU has it, and in full."""
    dense = CASE["qwen3-gqa-tied"].make(tmp_path, dtype=dtype)
    plan = workshop.exported("qwen3-gqa-tied").path / "plan.json"
    document = json.loads(plan.read_text())
    from spp_export.models.checkpoint.checkpoint import open_source

    document["model"]["fingerprint"] = open_source(dense).fingerprint
    (tmp_path / "plan.json").write_text(json.dumps(document))
    for precision in ("fp32", "fp16"):
        target = tmp_path / precision
        result = spp_export.export(
            workshop.scenario,
            target,
            model=str(dense),
            plan=tmp_path / "plan.json",
            **format_options(OnnxOptions(precision=precision)),
        )
        assert result.report["passed"]
        assert spp_export.verify(target, model=str(dense)).passed


def test_bf16_is_written_but_not_checked_on_the_cpu(workshop, tmp_path):
    slim, options = workshop.exported(NAME), OnnxOptions(precision="bf16")
    with refused(UsageError, "no bf16 kernels on the CPU"):
        export_onnx(workshop, slim, tmp_path / "x", options)
    assert list(tmp_path.iterdir()) == []
    result = export_onnx(workshop, slim, tmp_path / "x", options, verify=False)
    assert result.report is None
    names = {path.name for path in (tmp_path / "x").iterdir()}
    assert names == FILES - {"verify.json"}
    assert read_config(tmp_path / "x")["dtype"] == "bfloat16"
    assert "Not verified" in (tmp_path / "x" / "README.md").read_text()
    with refused(UsageError, "no bf16 kernels on the CPU"):
        spp_export.verify(tmp_path / "x", model=str(slim.dense))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (OnnxOptions("flash"), "--onnx-attention flash: expected one of gqa, gqa-bias, standard"),
        (OnnxOptions(precision="fp8"), "--precision fp8: expected one of"),
        (OnnxOptions(quant="int2"), "--quant int2: expected one of"),
        (OnnxOptions(quant=""), "--quant : expected one of"),
        (OnnxOptions(precision="fp16", quant="int8-dynamic"), "starts from fp32 weights"),
    ],
    ids=str,
)
def test_forms_that_cannot_be(workshop, tmp_path, options, complaint):
    slim = workshop.exported(NAME)
    with refused(UsageError, complaint):
        export_onnx(workshop, slim, tmp_path / "x", options)
    assert list(tmp_path.iterdir()) == []


def test_a_device_without_onnx_runtime_is_refused_before_any_work(workshop, tmp_path):
    for device in ("mps", "auto"):
        with refused(UsageError, f"--device {device}: ONNX Runtime checks a graph on cpu or cuda"):
            spp_export.export(
                workshop.scenario,
                tmp_path / "x",
                model=str(tmp_path / "none"),
                **format_options(OnnxOptions()),
                device=device,
            )


@pytest.mark.parametrize("options", [OnnxOptions(), OnnxOptions(quant="int4")], ids=str)
def test_the_same_request_gives_the_same_bytes(workshop, tmp_path, options):
    first = exported_onnx(workshop, NAME, "per-layer", "lstsq", options)
    target = tmp_path / first.path.name  # which the card names
    export_onnx(workshop, workshop.exported(NAME, "per-layer", "lstsq"), target, options)
    assert tree(target) == tree(first.path)


def test_from_the_scenario_itself(workshop, tmp_path):
    """Without a plan, as most people will do it."""
    result = workshop.export(
        NAME, tmp_path / "x", **format_options(OnnxOptions()), compensate="lstsq"
    )
    assert result.plan == workshop.exported(NAME, "per-layer", "lstsq").result.plan
    assert result.report["passed"]
    assert set(result.seconds) == {"plan", "compensate", "slice", "onnx", "verify"}


def test_a_dry_run_writes_nothing(workshop, tmp_path):
    slim, options = workshop.exported(NAME), OnnxOptions("standard", "fp16", "int8")
    result = export_onnx(workshop, slim, tmp_path / "x", options, dry_run=True)
    assert result.path is None
    assert (result.format, result.form) == ("onnx", options.to_dict())
    assert list(tmp_path.iterdir()) == []
    assert result.predicted.file_bytes < 0.6 * slim.result.predicted.file_bytes


def test_force_replaces_an_older_export_of_any_format(workshop, tmp_path):
    slim, target = workshop.exported(NAME), tmp_path / "x"
    workshop.export(NAME, target, compensate="none")
    with refused(OutputError, "is not empty"):
        export_onnx(workshop, slim, target, OnnxOptions())
    export_onnx(workshop, slim, target, OnnxOptions(), force=True)
    assert {path.name for path in target.iterdir()} == FILES
    workshop.export(NAME, target, force=True, compensate="none")
    assert not list(target.glob("*.onnx*"))


@pytest.fixture
def failing(monkeypatch):
    """Make a check of the graph say no."""

    def no(*_):
        return (Check("ONNX prefill against the oracle", False, 3.0, 1.0),)

    monkeypatch.setattr(onnx_checks, "check_logits", no)


@pytest.mark.parametrize("quant", [None, "int8"])
def test_a_wrong_graph_is_not_published(workshop, tmp_path, failing, quant):
    slim, target = workshop.exported(NAME), tmp_path / "made" / "x"
    with refused(ParityError, "ONNX prefill against the oracle: found 3") as caught:
        export_onnx(workshop, slim, target, OnnxOptions(quant=quant))
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_an_older_export_survives_a_failed_one(workshop, tmp_path, failing):
    target = tmp_path / "x"
    workshop.export(NAME, target, compensate="none")
    older = tree(target)
    with pytest.raises(ParityError):
        export_onnx(workshop, workshop.exported(NAME), target, OnnxOptions(), force=True)
    assert tree(target) == older


@pytest.mark.parametrize("quant", [None, "int8"])
def test_keep_failed_publishes_and_still_fails(workshop, tmp_path, failing, quant):
    slim, target = workshop.exported(NAME), tmp_path / "x"
    with refused(CheckFailed, "Published all the same, by --keep-failed: .*x") as caught:
        export_onnx(workshop, slim, target, OnnxOptions(quant=quant), keep_failed=True)
    assert (type(caught.value), caught.value.exit_code) == (ParityError, 1)
    assert {path.name for path in target.iterdir()} == FILES
    assert json.loads((target / "verify.json").read_text())["passed"] is False
    assert "ONNX prefill against the oracle: FAILED" in (target / "README.md").read_text()


@pytest.mark.parametrize("form", FORMS)
def test_a_builder_that_turns_the_other_way_is_found(workshop, tmp_path, monkeypatch, form):
    """The checks themselves, on a graph that is wrong though its weights are right."""
    import spp_export.formats.onnx.graph as graph

    right = graph.rotary_tables

    def wrong(*arguments):
        cos, sin = right(*arguments)
        return cos, -sin

    monkeypatch.setattr(graph, "rotary_tables", wrong)
    with refused(ParityError, "ONNX prefill against the oracle: found .*, at most"):
        export_onnx(workshop, workshop.exported(NAME), tmp_path / "x", OnnxOptions(form))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", FORMS)
def test_a_builder_that_is_wrong_about_one_weight_is_found(workshop, tmp_path, monkeypatch, form):
    import spp_export.formats.onnx.projection as projection

    right = projection.matrix

    def wrong(tensors, precision):
        read = right(tensors, precision)
        if not tensors[0].stored.name.endswith("layers.1.self_attn.o_proj.weight"):
            return read
        return lambda: np.roll(read(), 1, axis=0)

    monkeypatch.setattr(projection, "matrix", wrong)
    with refused(ParityError, "weights as the checkpoint has them: found .*, at most 0; .*o_proj"):
        export_onnx(workshop, workshop.exported(NAME), tmp_path / "x", OnnxOptions(form))
    assert list(tmp_path.iterdir()) == []


def test_a_value_too_large_for_fp16_is_told(workshop, tmp_path):
    """From a checkpoint whose own precision holds it."""
    from safetensors.torch import save_file

    dense = CASE["llama-mqa"].make(tmp_path)
    tensors = stored(dense)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    with refused(spp_export.SppError, "up_proj.weight.* has a value too large for fp16"):
        spp_export.convert(dense, tmp_path / "x", **format_options(OnnxOptions(precision="fp16")))
    assert not (tmp_path / "x").exists()


def test_torch_is_left_as_it_was(workshop, tmp_path):
    before = torch.get_default_dtype(), torch.is_grad_enabled()
    export_onnx(workshop, workshop.exported(NAME), tmp_path / "x", OnnxOptions(quant="int8"))
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == before


def test_a_missing_library_is_told_before_any_work(workshop, tmp_path, monkeypatch):
    import sys

    for name in ("onnx", "onnx_ir", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with refused(UsageError, rf"needs the package {name}. Run: .*install .*\[onnx"):
                export_onnx(workshop, workshop.exported(NAME), tmp_path / "x", OnnxOptions())
            with refused(UsageError, rf"needs the package {name}. Run: .*install .*\[onnx"):
                spp_export.convert(tmp_path / "none", tmp_path / "x")


def test_the_dense_logits_have_nothing_to_do_with_it(workshop):
    """Else parity above would say little."""
    out = exported_onnx(workshop, NAME)
    difference = logits(load(out.dense), tokens()) - logits(
        load(workshop.exported(NAME).path), tokens()
    )
    assert difference.abs().max().item() > 0.1


@pytest.mark.parametrize("form", ["gqa-bias", "standard"])
def test_a_graph_that_reads_its_padding_is_found(workshop, tmp_path, monkeypatch, form):
    """Rows are of different lengths whatever the text, or this would not show without one."""
    import spp_export.formats.onnx.attention as attention

    def blind(self, g, shared):
        right(self, g, shared)
        mask = g.op("Equal", [shared.attention_mask] * 2, "mask/any", ["b", "t"], dtype="BOOL")
        axes = g.constant([1, 2], "axes_1_2")
        self._real = g.op("Unsqueeze", [mask, axes], "mask/all", ["b", 1, 1, "t"], dtype="BOOL")

    right = attention._Masks.__init__
    monkeypatch.setattr(attention._Masks, "__init__", blind)
    slim = workshop.exported("llama-mqa")
    with refused(ParityError, "ONNX rows .*: found .*, at most"):
        spp_export.export(
            None,
            tmp_path / "x",
            model=str(slim.dense),
            plan=slim.path / "plan.json",
            **format_options(OnnxOptions(form)),
        )


def test_a_graph_that_answers_to_padding_on_the_left_is_found(workshop, tmp_path, monkeypatch):
    import spp_export.formats.onnx.attention as attention

    monkeypatch.setattr(attention._Grouped, "_guard", lambda self: self._g.constant(0, "zero"))
    with refused(ParityError, "padded on the left are refused: answered all the same: the graph"):
        export_onnx(workshop, workshop.exported(NAME), tmp_path / "x", OnnxOptions())


@pytest.mark.parametrize(
    ("compensate", "quant"), few(itertools.product(("none", "lstsq"), (None, "int8")), set)
)
def test_ragged_layers_are_filled_with_zeros(workshop, tmp_path, compensate, quant):
    """Every KV head of a graph serves the same number of query heads."""
    asked = {"layout": "ragged", "compensate": compensate}
    form = OnnxOptions(quant=quant)
    request = {**format_options(form), "pad": True}
    result = workshop.export(NAME, tmp_path / "x", **request, **asked)
    assert result.engines == exported_onnx(workshop, NAME, options=form).result.engines
    report = spp_export.verify(tmp_path / "x", model=str(workshop.dense(NAME)))
    assert report.passed, report.failures
    with refused(UsageError, "--format onnx needs groups of the same size in a layer. Add --pad"):
        workshop.export(NAME, tmp_path / "y", **{**request, "pad": False}, **asked)

"""Heads and MLP channels cut together: every family, both layouts, every compensation.

Plans are given, not compiled. In `per-layer` the widths differ from layer to layer; layer 1 keeps
all its channels and layer 2 all its heads.
"""

from __future__ import annotations

import shutil
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exporting import (
    CASE,
    CONSUMERS,
    Exported,
    Workshop,
    columns,
    load,
    load_elsewhere,
    logits,
    masked,
    refused,
    stored,
    tokens,
)
from factories import CASES, read_config, shape_of, uniform_layers
from gathered import Inputs, inputs, mean_write, projection, ridge
from pairs import few, pairs
from safetensors.torch import save_file
from transformers import AutoTokenizer

import spp_export
from spp_export.calibration import activations
from spp_export.calibration.moments import gather
from spp_export.calibration.refit import refit_blocks
from spp_export.common.errors import ParityError, PlanError
from spp_export.common.manifest import write_manifest
from spp_export.evaluation.oracle import masked_dense
from spp_export.evaluation.quality import measure_quality
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.session import open_session
from spp_export.models.shape import ModelShape
from spp_export.planning import LayerPlan, Plan
from spp_export.slicing import compensation
from spp_export.slicing.compensation import Compensator

pytestmark = pytest.mark.thinned(most=4)

O_PROJ, DOWN_PROJ = CONSUMERS
CALIBRATION = [0, 1, 2, 4, 5, 6]  # of eight prompts every fourth is held out
PROMPT = "12 + 30 = 42"
# So that the 96 channels of a layer are five blocks, the last of them padded.
BLOCK = 20
# Float64; a matrix product over fewer columns may sum in another order.
TOLERANCE = 1e-12


@dataclass(frozen=True)
class Asked:
    """One export to be made."""

    case: str
    layout: str
    compensate: str


WRITTEN = [
    Asked(case.name, layout, compensate)
    for case in CASES
    for layout in ("per-layer", "uniform")
    for compensate in ("none", "lstsq", "bias")
    # Of the stock configs only Llama's can give down_proj a bias.
    if compensate != "bias" or layout == "per-layer" or case.family == "llama"
]


def covered(asked: Asked) -> set[Hashable]:
    """Of every family all, and of every case something."""
    return {asked.case} | pairs((CASE[asked.case].family, asked.layout, asked.compensate))


LSTSQ = [asked for asked in WRITTEN if asked.compensate == "lstsq"]
BIAS = [asked for asked in WRITTEN if asked.compensate == "bias"]


def layers_for(shape: ModelShape, layout: str) -> tuple[LayerPlan, ...]:
    """Three layers. Of layer 0 the fourth block of channels goes whole."""
    few = {"kv_heads": max(shape.kv_heads // 2, 1), "group_size": max(shape.group_size // 2, 1)}
    if layout == "uniform":
        return uniform_layers(shape, 3, **few, channels=64)
    first, second, _ = uniform_layers(shape, 3, **few)
    whole = LayerPlan(tuple(range(shape.kv_heads)), tuple(range(shape.query_heads)))
    return (
        replace(first, channels=(*range(1, 60, 2), 81, 95)),
        second,
        replace(whole, channels=tuple(range(0, 96, 5))),
    )


def id_of(asked: Asked) -> str:
    return f"{asked.case}-{asked.layout}-{asked.compensate}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Of this module alone: its blocks are smaller than everybody else's."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", autouse=True)
def _small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "CHANNEL_BLOCK", BLOCK)
        yield


class Bench:
    """The exports of this module, and what their projections were fitted to; each made once."""

    def __init__(self, workshop: Workshop, root: Path) -> None:
        self.workshop = workshop
        self._root = root
        self._exports: dict[Asked, Exported] = {}
        self._inputs: dict[tuple[str, str], list[Inputs]] = {}

    def plan(self, asked: Asked) -> Plan:
        dense = self.workshop.dense(asked.case)
        layers = layers_for(shape_of(dense), asked.layout)
        fingerprint = open_source(dense).fingerprint
        text = {"answer_tokens": 0}  # of prompts alone
        return Plan(fingerprint, "dense", asked.layout, asked.compensate, layers, calibration=text)

    def exported(self, asked: Asked) -> Exported:
        if asked not in self._exports:
            dense, path = self.workshop.dense(asked.case), self._root / id_of(asked)
            result = spp_export.export(
                self.workshop.scenario, path, model=str(dense), plan=self.plan(asked)
            )
            self._exports[asked] = Exported(path, dense, result)
        return self._exports[asked]

    @property
    def prompts(self) -> list[str]:
        prompts = self.workshop.scenario.read_text().strip().split("\n\n")
        return [prompts[index] for index in CALIBRATION]

    def inputs(self, case: str, module: str) -> list[Inputs]:
        if (case, module) not in self._inputs:
            found = inputs(self.workshop.dense(case), self.prompts, module)
            self._inputs[case, module] = found
        return self._inputs[case, module]


@pytest.fixture(scope="module")
def bench(workshop, tmp_path_factory) -> Bench:
    return Bench(workshop, tmp_path_factory.mktemp("channels"))


@pytest.mark.parametrize("asked", few(WRITTEN, covered), ids=id_of)
def test_the_slim_model_is_the_masked_dense_one(bench, asked):
    out = bench.exported(asked)
    assert out.result.report["passed"], out.result.report
    written = None if asked.compensate == "none" else out.tensors
    with masked(out.dense, out.result.plan.layers, written) as expected:
        difference = logits(load(out.path), tokens()) - logits(expected, tokens())
    assert difference.abs().max().item() < TOLERANCE
    assert spp_export.verify(out.path, model=str(out.dense)).passed


@pytest.mark.parametrize("asked", few(WRITTEN, covered), ids=id_of)
def test_what_is_written_is_what_was_said(bench, asked):
    out = bench.exported(asked)
    config, shape, tensors = read_config(out.path), shape_of(out.dense), out.tensors
    widths = [layer.shape(shape).channels for layer in out.result.plan.layers]
    assert widths == ([64] * 3 if asked.layout == "uniform" else [32, 96, 20])
    for index, width in enumerate(widths):
        assert tensors[f"model.layers.{index}.mlp.gate_proj.weight"].shape == (width, 64)
        assert tensors[f"model.layers.{index}.mlp.up_proj.weight"].shape == (width, 64)
        assert tensors[f"model.layers.{index}.mlp.down_proj.weight"].shape == (64, width)
    assert out.result.predicted.parameters == sum(t.numel() for t in tensors.values())
    card = (out.path / "README.md").read_text()
    assert f"| MLP channels | {3 * 96} | {sum(widths)} |" in card
    assert "attention heads and MLP channels that it does not need" in card
    result = out.result.to_dict()
    assert (result["kept_channels"], result["dense_channels"]) == (widths, 96)
    if asked.layout == "uniform":
        assert config["intermediate_size"] == 64
        assert "biased_projections" not in config
    else:
        sizes = [entry["intermediate_size"] for entry in config["per_layer_config"].values()]
        assert sizes == widths


def expected_refit(weight, found: Inputs, kept):
    """`ridge` of every block by itself."""
    expected, tolerances = np.empty((len(weight), len(kept))), [0.0]
    for start in range(0, weight.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        inside = [place for place, index in enumerate(kept) if start <= index < start + BLOCK]
        if not inside:
            continue
        part = Inputs(found.second[block, block], found.mean[block], found.tokens)
        here = [kept[place] - start for place in inside]
        expected[:, inside], tolerance = ridge(weight[:, block], part, here)
        tolerances.append(tolerance)
    return expected, max(tolerances)


@pytest.mark.parametrize("asked", few(LSTSQ, covered), ids=id_of)
def test_lstsq_fits_o_proj_whole_and_down_proj_by_blocks(bench, asked):
    out = bench.exported(asked)
    dense, slim = stored(out.dense), out.tensors
    for index, layer in enumerate(out.result.plan.layers):
        kept, weight = columns(layer, 16), projection(dense, index)
        if len(kept) < weight.shape[1]:
            found = bench.inputs(asked.case, O_PROJ)[index]
            expected, tolerance = ridge(weight, found, kept)
            assert np.abs(projection(slim, index) - expected).max() < tolerance
        weight, written = (projection(of, index, DOWN_PROJ) for of in (dense, slim))
        if layer.channels is None:
            np.testing.assert_array_equal(written, weight)
            continue
        found = bench.inputs(asked.case, DOWN_PROJ)[index]
        expected, tolerance = expected_refit(weight, found, layer.channels)
        assert np.abs(written - expected).max() < tolerance
        # The figures would tell if the blocks were not what was asked for, or nothing were done.
        for wrong in (ridge(weight, found, layer.channels)[0], weight[:, layer.channels]):
            assert np.abs(wrong - expected).max() > 10 * tolerance


@pytest.mark.parametrize("asked", few(BIAS, covered), ids=id_of)
def test_bias_is_the_mean_write_of_heads_and_of_channels(bench, asked):
    out = bench.exported(asked)
    dense, slim = stored(out.dense), out.tensors
    for index, layer in enumerate(out.result.plan.layers):
        for module in CONSUMERS:
            weight = projection(dense, index, module)
            kept = np.arange(weight.shape[1])[columns(layer, 16, module)]
            np.testing.assert_array_equal(projection(slim, index, module), weight[:, kept])
            found = bench.inputs(asked.case, module)[index]
            write, tolerance = mean_write(weight, found, kept)
            added = projection(slim, index, module, "bias")
            added -= projection(dense, index, module, "bias")
            assert np.abs(added - write).max() <= tolerance
            assert (np.abs(write).max() > 10 * tolerance) == (len(kept) < weight.shape[1])


@pytest.mark.parametrize("asked", few(BIAS, covered), ids=id_of)
def test_biases_that_nobody_asked_for_are_zero_and_only_in_stock_configs(bench, asked):
    out = bench.exported(asked)
    added = out.tensors.keys() - stored(out.dense).keys()
    modules = {name.split(".", 3)[3].removesuffix(".bias") for name in added}
    if asked.layout == "per-layer":
        assert modules <= set(CONSUMERS)
    elif not read_config(out.dense).get("mlp_bias"):
        assert {"mlp.gate_proj", "mlp.up_proj", DOWN_PROJ} <= modules
    for name in added:
        wanted = name.removesuffix(".bias").endswith(CONSUMERS)
        assert wanted or not out.tensors[name].any(), name


@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
@pytest.mark.parametrize("case", ["llama-mha-tied", "qwen2-gqa-tied"])
def test_a_plan_of_channels_alone_leaves_attention_as_it_was(bench, tmp_path, case, layout):
    dense = bench.workshop.dense(case)
    whole = layers_for(shape_of(dense), "per-layer")[2]
    for compensate in ("lstsq", "bias") if layout == "per-layer" else ("lstsq",):
        plan = replace(bench.plan(Asked(case, layout, compensate)), layers=(whole,) * 3)
        result = spp_export.export(
            bench.workshop.scenario, tmp_path / compensate, model=str(dense), plan=plan
        )
        assert result.report["passed"]
        before, after = stored(dense), stored(tmp_path / compensate)
        changed = {name for name in after if not same(before.get(name), after[name])}
        names = {name.split(".")[4] for name in changed}
        assert names == {"gate_proj", "up_proj", "down_proj"}
        card = (tmp_path / compensate / "README.md").read_text()
        assert ": MLP channels that it does not need" in card


def same(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    return one is not None and one.shape == other.shape and torch.equal(one, other)


@pytest.mark.parametrize("case", ["mistral-gqa", "qwen2-gqa-tied", "qwen3-gqa-tied"])
def test_a_stock_config_without_a_bias_on_down_proj_refuses_one(bench, tmp_path, case):
    plan = bench.plan(Asked(case, "uniform", "bias"))
    with refused(PlanError, "no bias on its (down|output) projection.*'per-layer'"):
        spp_export.export(
            bench.workshop.scenario,
            tmp_path / "slim",
            model=str(bench.workshop.dense(case)),
            plan=plan,
        )
    assert list(tmp_path.iterdir()) == []


ELSEWHERE = [
    Asked("llama-gqa-bias", "per-layer", "lstsq"),
    Asked("llama-mqa", "uniform", "bias"),
    Asked("mistral-window-tied", "per-layer", "bias"),
    Asked("mistral-gqa", "uniform", "lstsq"),
    Asked("qwen2-gqa-tied", "per-layer", "bias"),
    Asked("qwen2-mha-window", "uniform", "none"),
    Asked("qwen3-gqa-tied", "per-layer", "bias"),
    Asked("qwen3-mqa-bias", "uniform", "lstsq"),
]


@pytest.mark.slow
def test_transformers_alone_loads_them_and_generates(bench, tmp_path):
    """In another process, without this package: remote code for per-layer, none for uniform."""
    exports = [bench.exported(asked) for asked in ELSEWHERE]
    jobs = [
        (str(out.path), asked.layout == "per-layer")
        for asked, out in zip(ELSEWHERE, exports, strict=True)
    ]
    found = load_elsewhere(tmp_path, PROMPT, jobs)
    for asked, out, (module, ids, result) in zip(ELSEWHERE, exports, found, strict=True):
        assert ("modeling_spp" in module) == (asked.layout == "per-layer")
        batch = AutoTokenizer.from_pretrained(out.dense)(PROMPT, return_tensors="pt")
        written = None if asked.compensate == "none" else out.tensors
        with masked(out.dense, out.result.plan.layers, written) as expected, torch.no_grad():
            wanted = expected(**batch).logits
            continued = expected.generate(
                **batch, do_sample=False, max_new_tokens=6, min_new_tokens=6
            )
        assert (result - wanted).abs().max().item() < TOLERANCE
        assert ids == continued.tolist()


def test_a_refit_on_the_moments_of_all_channels(bench, tmp_path):
    """As the plan asks for: down_proj is the closed form on the whole moments, and o_proj what it
    is without; what is lost is reported of both."""
    asked = Asked("llama-gqa-bias", "per-layer", "lstsq")
    plan = bench.plan(asked)
    plan = replace(plan, calibration={**plan.calibration, "moments": "whole"})
    dense, in_blocks = bench.workshop.dense(asked.case), bench.exported(asked)
    result = spp_export.export(
        bench.workshop.scenario, tmp_path / "out", model=str(dense), plan=plan
    )
    tensors, before = stored(tmp_path / "out"), in_blocks.tensors
    seen, weights = bench.inputs(asked.case, DOWN_PROJ), stored(dense)
    for layer, kept in ((0, plan.layers[0].channels), (2, plan.layers[2].channels)):
        name = f"model.layers.{layer}.{DOWN_PROJ}.weight"
        weight = weights[name].double().numpy()
        expected, error = ridge(weight, seen[layer], list(kept))
        assert np.abs(tensors[name].double().numpy() - expected).max() <= error
        assert not torch.equal(tensors[name], before[name])
    name = f"model.layers.0.{O_PROJ}.weight"
    assert torch.equal(tensors[name], before[name])
    (check,) = (c for c in result.report["checks"] if c["name"].startswith("re-fitted"))
    assert "4 projections" in check["detail"]


def test_without_memory_for_them_blocks_are_taken_and_said(bench, tmp_path, monkeypatch, caplog):
    asked = Asked("llama-gqa-bias", "per-layer", "lstsq")
    plan = bench.plan(asked)
    plan = replace(plan, calibration={**plan.calibration, "moments": "whole"})
    monkeypatch.setattr("spp_export.calibration.whole.free_memory", lambda kind: 0)
    dense = bench.workshop.dense(asked.case)
    spp_export.export(bench.workshop.scenario, tmp_path / "out", model=str(dense), plan=plan)
    assert "in blocks, and the weights differ" in caplog.text
    tensors, expected = stored(tmp_path / "out"), bench.exported(asked).tensors
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_a_plan_of_other_moments_is_refused(bench, tmp_path):
    scenario, model = bench.workshop.scenario, str(bench.workshop.dense("llama-gqa-bias"))
    plan = bench.plan(Asked("llama-gqa-bias", "per-layer", "lstsq"))
    wrong = replace(plan, calibration={"moments": "all"})
    with refused(PlanError, r"calibration\.moments must be one of whole, blocks, got 'all'"):
        spp_export.export(scenario, tmp_path / "out", model=model, plan=wrong)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("compensate", ["lstsq", "bias"])
@pytest.mark.parametrize("case", ["llama-gqa-bias", "qwen2-gqa-tied"])
def test_projections_measure_a_plan_without_writing_it(bench, case, compensate):
    """In float32, which is the stored type: the same tensors that an export writes."""
    asked = Asked(case, "per-layer", compensate)
    out, session = bench.exported(asked), open_session(str(bench.workshop.dense(case)))
    source, plan = session.source, bench.plan(asked)
    moments = gather(
        source, bench.prompts, ["attention", "mlp"], lambda: (session.model, session.tokenizer)
    )
    projections = Compensator(source, plan, moments).projections()
    assert {(layer, str(role)) for layer, role in projections} == {
        (0, "output"),
        (0, "down"),
        (1, "output"),
        (2, "down"),
    }
    for (layer, role), found in projections.items():
        name = f"model.layers.{layer}.{source.family.projection(role)}"
        assert torch.equal(found.weight, out.tensors[f"{name}.weight"])
        if compensate == "bias":
            assert torch.equal(found.bias, out.tensors[f"{name}.bias"])
    texts = bench.prompts[:2]
    with masked_dense(session.model, source.family, source.shape, plan, projections) as model:
        quality = measure_quality(model, load(out.path, torch.float32), session.tokenizer, texts)
    assert quality.mean_kl == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("tensor", ["down_proj.weight", "down_proj.bias", "up_proj.weight"])
def test_what_compensation_should_not_have_touched_is_compared_with_the_source(
    bench, tmp_path, tensor
):
    """The oracle takes compensated tensors as they are written, but no others: layer 1 lost no
    channels. Sealed again, so that integrity holds."""
    out = bench.exported(Asked("qwen3-gqa-tied", "per-layer", "bias"))
    assert out.result.plan.layers[1].channels is None
    changed = shutil.copytree(out.path, tmp_path / "changed")
    tensors = out.tensors
    tensors[f"model.layers.1.mlp.{tensor}"] += 0.01
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    (changed / "manifest.json").unlink()
    write_manifest(changed)
    (failure,) = spp_export.verify(changed, model=str(out.dense)).failures
    assert failure.name == "logits parity with the masked dense model"


def refit_check(report) -> dict:
    name = "re-fitted projections against plain slices"
    return next(check for check in report["checks"] if check["name"] == name)


def test_every_refitted_projection_is_weighed_against_its_slice(bench):
    out = bench.exported(Asked("llama-mqa", "per-layer", "lstsq"))
    assert refit_check(out.result.report)["detail"].endswith(", 4 projections")


@pytest.mark.parametrize("inputs_of", [96, 64])
def test_a_refit_that_is_worse_than_the_slice_is_found(bench, tmp_path, monkeypatch, inputs_of):
    """Of down_proj (96 inputs) and of o_proj (64)."""

    def bad(weight, blocks, kept, ridge):
        fine = refit_blocks(weight, blocks, kept, ridge)
        return 2 * weight[:, kept] - fine if weight.shape[1] == inputs_of else fine

    monkeypatch.setattr(compensation, "refit_blocks", bad)
    asked = Asked("llama-mha-tied", "per-layer", "lstsq")
    with pytest.raises(ParityError, match="re-fitted projections against plain slices"):
        spp_export.export(
            bench.workshop.scenario,
            tmp_path / "slim",
            model=str(bench.workshop.dense(asked.case)),
            plan=bench.plan(asked),
        )

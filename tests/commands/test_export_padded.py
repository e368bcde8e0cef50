"""`--pad`: ragged layers as regular ones, for engines that know no others."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Hashable

import numpy as np
import pytest
import torch
from exporting import (
    CASE,
    Exported,
    load,
    logits,
    masked,
    refused,
    stored,
    tokens,
    tree,
    write_plan,
    written_heads,
)
from factories import CASES, format_options, ragged_layers, random_layers, read_config, shape_of
from onnx_exports import seal
from pairs import few, of_family
from safetensors.torch import save_file

import spp_export
from spp_export import OnnxOptions
from spp_export.common.errors import ModelError, PlanError, UsageError

pytestmark = pytest.mark.thinned(most=3)

NAME = "qwen2-gqa-tied"
PAD = {"pad": True}


WRITTEN = [(case, compensate) for case in CASES for compensate in ("none", "lstsq", "bias")]


def covered(asked: str) -> set[Hashable]:
    name, compensate = asked.split()
    return of_family((CASE[name], compensate))


@pytest.fixture(scope="module", params=few((f"{case} {how}" for case, how in WRITTEN), covered))
def both(workshop, request: pytest.FixtureRequest) -> tuple[Exported, Exported]:
    """One plan, written as it is and padded."""
    name, compensate = request.param.split()
    made = (workshop.exported(name, layout, compensate) for layout in ("ragged", "padded"))
    return next(made), next(made)


def test_the_zeros_are_all_that_padding_adds(both):
    bare, out = both
    dim, found, padding = read_config(out.dense)["head_dim"], out.tensors, 0
    assert found.keys() == bare.tensors.keys()
    for key, expected in bare.tensors.items():
        *_, index, _, role, _ = f"x.x.x.x.{key}".split(".")
        axis = {"q_proj": 0, "o_proj": 1}.get(role if "layers" in key else "")
        if axis is None or key.endswith("o_proj.bias"):
            assert torch.equal(found[key], expected), key
            continue
        layer = out.result.plan.layers[int(index)]
        heads = written_heads(out.result.plan, layer, out.group_size)
        real = [i * dim + j for i, head in enumerate(heads) if head >= 0 for j in range(dim)]
        assert torch.equal(found[key].index_select(axis, torch.tensor(real)), expected), key
        fill = torch.tensor(sorted({*range(found[key].shape[axis])} - {*real}), dtype=torch.long)
        assert found[key].index_select(axis, fill).count_nonzero() == 0, key
        padding += len(fill)
    widened = sum(layer.count(-1) for layer in headed(out))
    assert (padding > 0) == (widened > 0)


def headed(out):
    return [
        written_heads(out.result.plan, layer, out.group_size) for layer in out.result.plan.layers
    ]


def test_every_layer_is_regular_and_runs_on_stock_attention(both):
    _, out = both
    config = read_config(out.path)
    for layer, heads in zip(config["per_layer_config"].values(), headed(out), strict=True):
        assert layer["num_attention_heads"] == len(heads)
        assert layer["num_attention_heads"] % layer["num_key_value_heads"] == 0
        assert "query_groups" not in layer
    assert not any(layer.self_attn._forward_pre_hooks for layer in load(out.path).model.layers)


def test_it_computes_what_the_ragged_model_does(both):
    bare, out = both
    difference = logits(load(out.path), tokens()) - logits(load(bare.path), tokens())
    assert difference.abs().max().item() == 0.0


def test_plan_and_result_say_so(both):
    bare, out = both
    plan = json.loads((out.path / "plan.json").read_text())
    assert (plan["layout"], plan["padded"]) == ("ragged", True)
    assert "padded" not in json.loads((bare.path / "plan.json").read_text())
    assert out.result.plan.layers == bare.result.plan.layers
    assert (out.result.to_dict()["padded"], bare.result.to_dict()["padded"]) == (True, False)
    assert spp_export.show(out.path).facts["padded"] is True
    assert "padded" not in spp_export.show(bare.path).facts
    assert ", padded: " in (out.path / "README.md").read_text()
    loads = {engine.name: engine.loads for engine in out.result.engines}
    assert (loads["transformers"], loads["vLLM"]) == ("yes", "yes")
    loads = {engine.name: engine.loads for engine in bare.result.engines}
    assert loads.pop("transformers") == "yes"
    assert set(loads.values()) == {"no"}


def test_its_plan_makes_the_same_files_again(workshop, tmp_path):
    """Without --pad, for the plan says it."""
    out = workshop.exported(NAME, "padded", "lstsq")
    spp_export.export(
        workshop.scenario,
        tmp_path / "again",
        model=str(out.dense),
        artifacts=workshop.artifacts(NAME),
        plan=out.path / "plan.json",
    )
    found, expected = tree(tmp_path / "again"), tree(out.path)
    differs = {path for path in expected if found.get(path) != expected[path]}
    assert differs <= {"README.md", "manifest.json"}  # the card has the name of the directory


def test_a_plan_by_hand_can_be_padded(workshop, tmp_path):
    dense = workshop.dense(NAME)
    layers = ragged_layers(shape_of(dense), 3)
    plan = write_plan(tmp_path / "my.json", dense, layers, layout="ragged")
    result = spp_export.export(output=tmp_path / "slim", model=str(dense), plan=plan, **PAD)
    assert result.report["passed"]
    slim = load(tmp_path / "slim")
    with masked(dense, layers) as expected:
        difference = logits(slim, tokens()) - logits(expected, tokens())
    assert difference.abs().max().item() == 0.0


def test_a_zero_that_is_none_is_found(workshop, tmp_path):
    out = workshop.exported("mistral-gqa", "padded", "lstsq")
    index, heads = next((i, heads) for i, heads in enumerate(headed(out)) if -1 in heads)
    copy = tmp_path / "copy"
    shutil.copytree(out.path, copy)
    changed = stored(copy)
    dim = read_config(out.dense)["head_dim"]
    changed[f"model.layers.{index}.self_attn.o_proj.weight"][:, heads.index(-1) * dim] = 0.5
    save_file(changed, copy / "model.safetensors", {"format": "pt"})
    seal(copy)
    report = spp_export.verify(copy, model=str(out.dense))
    assert [check.name for check in report.failures] == [
        "logits parity with the masked dense model"
    ]


@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
def test_regular_layouts_have_nothing_to_pad(workshop, tmp_path, layout):
    with refused(UsageError, f"--pad fills the groups of ragged layers; this layout is {layout}"):
        workshop.export(NAME, tmp_path / "slim", **PAD, layout=layout)
    dense = workshop.dense(NAME)
    plan = write_plan(tmp_path / "my.json", dense, random_layers(shape_of(dense), 0))
    with refused(UsageError, "--pad fills the groups of ragged layers; this layout is per-layer"):
        spp_export.export(output=tmp_path / "slim", model=str(dense), plan=plan, **PAD)
    plan = write_plan(tmp_path / "my.json", dense, random_layers(shape_of(dense), 0), padded=True)
    with refused(PlanError, "padded is true but layout is per-layer"):
        spp_export.export(output=tmp_path / "slim", model=str(dense), plan=plan)
    assert not (tmp_path / "slim").exists()


@pytest.mark.parametrize(
    ("form", "quant"),
    few(itertools.product(("gqa", "gqa-bias", "standard"), (None, "int8", "int4")), set),
)
def test_padded_layers_go_to_onnx(workshop, tmp_path, form, quant):
    request = {"pad": True, **format_options(OnnxOptions(form, quant=quant))}
    out = tmp_path / "onnx"
    result = workshop.export(NAME, out, **request, layout="ragged", compensate="lstsq")
    assert result.report["passed"]
    padded = workshop.exported(NAME, "padded", "lstsq")
    config = read_config(out)
    assert config["num_attention_heads_per_layer"] == [len(heads) for heads in headed(padded)]
    assert config["spp_onnx"]["layout"] == "per-layer"
    report = spp_export.verify(out, model=str(padded.dense), scenario=workshop.scenario)
    assert report.passed, report.failures


def test_ragged_layers_do_not(workshop, tmp_path):
    request = {**format_options(OnnxOptions())}
    with refused(UsageError, "Add --pad"):
        workshop.export(NAME, tmp_path / "slim", **request, layout="ragged")
    slim = workshop.exported(NAME, "ragged", "lstsq")
    with refused(UsageError, "Add --pad"):
        spp_export.export(
            workshop.scenario,
            tmp_path / "slim",
            model=str(slim.dense),
            plan=slim.path / "plan.json",
            **request,
        )
    with refused(ModelError, "Export with --pad, or use layout 'per-layer'"):
        spp_export.convert(slim.path, tmp_path / "slim")
    assert list(tmp_path.iterdir()) == []


def test_the_budget_counts_no_zeros(workshop):
    """What is kept is the same with and without padding; what is written is not."""
    bare, out = (
        workshop.exported("mistral-gqa", layout, "lstsq") for layout in ("ragged", "padded")
    )
    assert out.result.plan.budget == bare.result.plan.budget
    assert out.result.plan.predicted != bare.result.plan.predicted
    sizes = [sum(np.prod(t.shape) for t in made.tensors.values()) for made in (bare, out)]
    assert sizes == [bare.result.predicted.parameters, out.result.predicted.parameters]
    assert out.result.predicted.kv_bytes == bare.result.predicted.kv_bytes

"""`plan`: budgets, criteria, the whitelist and the published policy, on real artifacts."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from exporting import kept_heads, load, stored, texts, write_texts
from factories import CASES, read_config, slice_in_torch
from pairs import few
from safetensors.numpy import load_file

import spp_export
from spp_export.common.errors import BudgetError
from spp_export.planning import read_plan

pytestmark = pytest.mark.thinned

NAME = "llama-gqa-bias"
CRITERIA = ("energy", "axis", "obs", "fisher")


def kv_bytes(result: spp_export.PlanResult, config) -> int:
    """Two cached vectors of fp32 per kept KV head."""
    return sum(2 * 4 * config["head_dim"] * len(layer.kv_heads) for layer in result.plan.layers)


def parameters(dense: Path, result: spp_export.PlanResult) -> int:
    """Counted in the tensors that slicing leaves, by the slow definition."""
    tensors = slice_in_torch(load(dense, torch.float32), result.plan.layers)
    return sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize(
    ("name", "criterion"), few(itertools.product([case.name for case in CASES], CRITERIA), set)
)
def test_every_criterion_keeps_within_the_share(workshop, name, criterion):
    result = workshop.plan(name, keep=0.6, criterion=criterion, compensate="none")
    dense = stored(workshop.dense(name))
    sizes = read_config(workshop.dense(name))
    kept = whole = 0
    for index, layer in enumerate(result.plan.layers):
        for role, count, of in (
            ("q_proj", layer.query_heads, "num_attention_heads"),
            ("k_proj", layer.kv_heads, "num_key_value_heads"),
            ("v_proj", layer.kv_heads, "num_key_value_heads"),
            ("o_proj", layer.query_heads, "num_attention_heads"),
        ):
            prefix = f"model.layers.{index}.self_attn.{role}"
            size = dense[f"{prefix}.weight"].numel()
            if role != "o_proj" and f"{prefix}.bias" in dense:
                size += dense[f"{prefix}.bias"].numel()
            whole += size
            kept += size * len(count) // sizes[of]
    assert kept <= 0.6 * whole
    assert result.plan.budget["realised"]["keep"] == kept / whole
    assert result.plan.criterion["name"] == criterion
    assert result.plan.budget["asked"] == {"keep": 0.6}


@pytest.mark.parametrize("name", [NAME, "qwen2-gqa-tied", "qwen3-mqa-bias"])
@pytest.mark.parametrize("compensate", ["none", "lstsq"])
def test_max_params_counts_the_whole_model(workshop, name, compensate):
    dense = workshop.dense(name)
    whole = sum(tensor.numel() for tensor in stored(dense).values())
    asked = {"max_params": int(0.93 * whole), "allow_empty_layers": False}
    result = workshop.plan(name, compensate=compensate, **asked)
    found = parameters(dense, result)
    assert found <= int(0.93 * whole) < whole
    assert result.plan.budget["realised"]["parameters"] == found
    assert result.predicted.parameters == found


@pytest.mark.parametrize("name", ["llama-mha-tied", NAME, "qwen3-gqa-tied"])
def test_max_params_counts_the_biases_that_compensation_adds(workshop, tmp_path, name):
    dense = workshop.dense(name)
    whole = sum(tensor.numel() for tensor in stored(dense).values())
    for share in (0.86, 0.9, 0.94):
        target = tmp_path / str(share)
        limit = int(share * whole)
        result = workshop.export(name, target, keep=None, max_params=limit, compensate="bias")
        written = sum(tensor.numel() for tensor in stored(target).values())
        assert written <= limit
        assert result.predicted.parameters == written
        assert result.plan.budget["realised"]["parameters"] == written


@pytest.mark.parametrize("name", ["llama-mha-tied", NAME, "mistral-window-tied"])
@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
def test_max_kv_bytes_counts_the_cache(workshop, name, layout):
    config = read_config(workshop.dense(name))
    dense = 2 * 4 * config["head_dim"] * config["num_key_value_heads"] * 3
    result = workshop.plan(name, max_kv_bytes=int(0.7 * dense), layout=layout, compensate="none")
    found = kv_bytes(result, config)
    assert found <= int(0.7 * dense)
    assert result.predicted.kv_bytes == found
    assert result.predicted.dense_kv_bytes == dense


def test_numbers_of_kv_heads_that_divide_are_in_the_plan(workshop):
    """Of four KV heads, three are kept only where they may be."""
    free, dividing = set(), set()
    for keep in (0.6, 0.7, 0.8, 0.9):
        common = {"keep": keep, "compensate": "none"}
        plan = workshop.plan("qwen3-gqa-tied", **common, kv_divisors=True).plan
        dividing |= {len(layer.kv_heads) for layer in plan.layers}
        assert plan.budget["asked"] == {"keep": keep, "kv_divisors": True}
        layers = workshop.plan("qwen3-gqa-tied", **common).plan.layers
        free |= {len(layer.kv_heads) for layer in layers}
    assert 3 in free
    assert dividing <= {1, 2, 4}


def test_strength_keeps_more_for_a_broad_scenario(workshop, tmp_path):
    """keep = rho + (1 - rho) (1 - eta (1 - c))."""
    narrow = workshop.scenario
    broad = write_texts(
        tmp_path / "broad.txt",
        [text for domain in ("capitals", "figures", "small") for text in texts(domain, 2, 55)],
    )
    found = {}
    for path in (narrow, broad):
        for strength in (0.2, 0.5):
            result = spp_export.plan(
                path,
                model=str(workshop.dense(NAME)),
                artifacts=workshop.artifacts(NAME),
                strength=strength,
                compensate="none",
            )
            asked = 0.1 + 0.9 * (1 - strength * (1 - result.diagnosis.breadth))
            keep = result.plan.budget["realised"]["keep"]
            assert keep <= asked + 1e-9
            found[path.stem, strength] = keep
    assert found["broad", 0.5] > found["sums", 0.5]
    assert found["sums", 0.2] > found["sums", 0.5]


def test_the_default_budget_is_four_fifths(workshop):
    result = workshop.plan(NAME)
    assert result.plan.budget["asked"] == {"keep": 0.8}
    assert result.plan.compensation == "lstsq"
    assert result.plan.criterion["name"] == "obs"
    assert result.plan.layout == "per-layer"


@pytest.mark.parametrize(
    ("layout", "groups"), [("per-layer", [1, 1, 1]), ("uniform", [1, 1, 1]), ("empty", [0, 0, 1])]
)
@pytest.mark.parametrize("budget", ["keep", "max_params", "max_kv_bytes"])
def test_a_budget_that_cannot_be_met_names_one_that_can(workshop, layout, groups, budget):
    asked = {"keep": 0.01, "max_params": 1000, "max_kv_bytes": 8}[budget]
    options = {"layout": layout, "compensate": "none", "allow_empty_layers": False}
    if layout == "empty":
        options = {"compensate": "none", "allow_empty_layers": True}
    with pytest.raises(BudgetError, match=f"budget {budget} {asked} is below") as caught:
        workshop.plan(NAME, **{budget: asked}, **options)
    message = str(caught.value)
    assert "\n" not in message
    nearest = re.search(rf"Ask for {budget} ([\d.]+) or more\.$", message)[1]
    number = float(nearest) if budget == "keep" else int(nearest)
    result = workshop.plan(NAME, **{budget: number}, **options)
    assert sorted(len(layer.kv_heads) for layer in result.plan.layers) == groups
    with pytest.raises(BudgetError):
        workshop.plan(
            NAME, **{budget: number * 0.99 if budget == "keep" else number - 1}, **options
        )


def test_nothing_is_left_out_for_the_whole_budget(workshop):
    result = workshop.plan(NAME, keep=1.0)
    assert kept_heads(result) == {(layer, head) for layer in range(3) for head in range(8)}


def test_the_plan_travels_as_a_file(workshop, tmp_path):
    result = workshop.plan(NAME, keep=0.7)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(result.to_dict()["plan"]))
    assert read_plan(path).layers == result.plan.layers
    assert result.plan.scenario["prompts"] == 8
    assert result.plan.scenario["held_out"] == 2
    assert result.plan.model_source == "dense"


def test_energy_and_axis_are_mixed_by_the_diagnosis(workshop):
    """The plan keeps the highest scores there are for its shape, layer by layer."""
    importance = load_file(workshop.artifacts("llama-mha-tied") / "importance.safetensors")
    for criterion in ("energy", "axis"):
        result = workshop.plan("llama-mha-tied", keep=0.6, criterion=criterion, compensate="none")
        mixed = np.einsum("k,klh->lh", result.diagnosis.mixture, importance[f"head/{criterion}"])
        for layer, scores in zip(result.plan.layers, mixed, strict=True):
            best = np.argsort(-scores)[: len(layer.query_heads)]
            assert sorted(best.tolist()) == list(layer.query_heads)


def with_whitelist(workshop, tmp_path, name: str, pairs) -> Path:
    """Artifacts edited by hand."""
    edited = shutil.copytree(workshop.artifacts(name), tmp_path / "artifacts")
    (edited / "whitelist.json").write_text(json.dumps([list(pair) for pair in pairs]))
    return edited


@pytest.mark.parametrize(
    ("name", "layout", "criterion"),
    few(
        itertools.product(
            ("llama-mha-tied", NAME, "qwen2-gqa-tied"), ("per-layer", "uniform"), CRITERIA
        ),
        set,
    ),
)
def test_whitelisted_heads_stay(workshop, tmp_path, name, layout, criterion):
    heads = read_config(workshop.dense(name))["num_attention_heads"]
    asked = {"keep": 0.55, "criterion": criterion, "layout": layout, "compensate": "none"}
    before = kept_heads(workshop.plan(name, **asked))
    dropped = {(layer, head) for layer in range(3) for head in range(heads)} - before
    forced = {min(dropped), max(dropped)}
    edited = with_whitelist(workshop, tmp_path, name, forced)
    result = workshop.plan(name, artifacts=edited, **asked)
    assert forced <= kept_heads(result)
    assert result.plan.policy["whitelist"] == len(forced)
    assert result.plan.budget["realised"]["keep"] <= 0.55
    assert result.plan.artifacts["sha256"] != workshop.plan(name, **asked).plan.artifacts["sha256"]


def test_a_whitelist_that_does_not_fit_the_budget_says_so(workshop, tmp_path):
    every = [(layer, head) for layer in range(3) for head in range(8)]
    edited = with_whitelist(workshop, tmp_path, NAME, every)
    with pytest.raises(BudgetError, match="and the whitelist"):
        workshop.plan(NAME, artifacts=edited, keep=0.7, compensate="none")


def test_a_plan_of_a_wide_mlp_says_which_moments_its_refit_reads(workshop, tmp_path, monkeypatch):
    # Statistics in blocks of this size are no other test's.
    monkeypatch.setenv("SPP_CACHE", str(tmp_path))
    monkeypatch.setattr("spp_export.calibration.activations.CHANNEL_BLOCK", 20)

    def moments(**asked):
        plan = spp_export.plan(
            workshop.scenario,
            model=str(workshop.dense(NAME)),
            artifacts=workshop.artifacts(NAME),
            answer_tokens=0,
            width_multiple=8,
            **asked,
        ).plan
        return plan.calibration.get("moments")

    assert moments(units="channels", keep=0.5) == "whole"
    assert moments(units="channels", keep=0.5, whole_moments=False) == "blocks"
    assert moments(units="channels", keep=0.5, compensate="bias") is None
    assert moments(units="heads", keep=0.5) is None
    monkeypatch.setattr("spp_export.calibration.whole.free_memory", lambda kind: 0)
    assert moments(units="channels", keep=0.5) == "blocks"

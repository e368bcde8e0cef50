"""Compensated weights of o_proj against the closed forms, on moments gathered by the tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from exporting import CONSUMERS, KEEP, columns, stored, texts, write_texts
from factories import CASES, shape_of, uniform_layers
from gathered import EPS, inputs, mean_write, mixed, projection, ridge
from pairs import few

import spp_export
from spp_export.calibration.moments import gather
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.session import open_session
from spp_export.planning import Plan

pytestmark = pytest.mark.thinned(most=2)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> Path:
    """Prompts of very different lengths, which padding would drown."""
    long, short = (texts("figures", 1, 3, n, n) for n in (120, 90))
    path = tmp_path_factory.mktemp("uneven") / "uneven.txt"
    return write_texts(path, [*long, "ABC", "7+", *short, "klm", "=", "F", "9"])


CALIBRATION = [0, 1, 2, 4, 5, 6]  # of eight prompts every fourth is held out


def given_plan(dense: Path, compensation: str) -> Plan:
    shape = shape_of(dense)
    kept = {"kv_heads": max(shape.kv_heads // 2, 1), "group_size": max(shape.group_size // 2, 1)}
    layers = uniform_layers(shape, 5, **kept)
    fingerprint = open_source(dense).fingerprint
    text = {"answer_tokens": 0}  # of prompts alone
    return Plan(fingerprint, "dense", "per-layer", compensation, layers, calibration=text)


@pytest.mark.parametrize("case", few(CASES, lambda case: {case.family}), ids=str)
def test_lstsq_is_the_ridge_solution_on_the_scenarios_moments(workshop, tmp_path, uneven, case):
    """A given plan and no artifacts: only the scenario speaks for itself."""
    dense = workshop.dense(case.name)
    plan = given_plan(dense, "lstsq")
    spp_export.export(uneven, tmp_path / "slim", model=str(dense), plan=plan)
    prompts = uneven.read_text().split("\n\n")
    calibration = [prompts[index].strip() for index in CALIBRATION]
    dense_tensors, slim = stored(dense), stored(tmp_path / "slim")
    with_padding = inputs(dense, calibration, padded=True)
    for index, found in enumerate(inputs(dense, calibration)):
        kept = columns(plan.layers[index], shape_of(dense).head_dim)
        weight = projection(dense_tensors, index)
        expected, tolerance = ridge(weight, found, kept)
        assert np.abs(projection(slim, index) - expected).max() < tolerance
        # The figures would tell if padding, or nothing at all, had been counted.
        wrong, _ = ridge(weight, with_padding[index], kept)
        assert np.abs(wrong - expected).max() > 10 * tolerance
        assert np.abs(weight[:, kept] - expected).max() > 10 * tolerance


@pytest.mark.parametrize("adapt", [False, True])
@pytest.mark.parametrize("name", ["llama-gqa-bias", "mistral-window-tied", "qwen2-gqa-tied"])
def test_with_artifacts_the_pools_count_by_the_diagnosis(workshop, tmp_path, name, adapt):
    """Each domain by its diagnosed share, shrunk towards an even one; the scenario's own text as
    well where it is asked for."""
    mix = {"layout": "uniform", "compensate": "lstsq", "adapt": adapt, "shrinkage": 0.4}
    result = workshop.export(name, tmp_path / "slim", **mix)
    own_weight = result.plan.calibration["scenario_weight"]
    assert (own_weight > 0) == adapt
    dense = workshop.dense(name)
    prompts = workshop.scenario.read_text().strip().split("\n\n")
    own = inputs(dense, [prompts[index] for index in CALIBRATION])
    diagnosis = result.diagnosis
    parts = [(own_weight, own)]
    for domain, share in zip(diagnosis.domains, diagnosis.mixture, strict=True):
        pool = (workshop.pools / domain / "train.txt").read_text().strip().split("\n\n")
        parts.append(((1 - own_weight) * (0.6 * share + 0.4 / 3), inputs(dense, pool)))
    assert sum(weight for weight, _ in parts) == pytest.approx(1)
    tensors, slim = stored(dense), stored(tmp_path / "slim")
    own_only = mixed([(1.0, own)])
    for index, found in enumerate(mixed(parts)):
        kept = columns(result.plan.layers[index], shape_of(dense).head_dim)
        weight = projection(tensors, index)
        expected, tolerance = ridge(weight, found, kept)
        assert np.abs(projection(slim, index) - expected).max() < tolerance
        wrong, _ = ridge(weight, own_only[index], kept)
        assert np.abs(wrong - expected).max() > 10 * tolerance


@pytest.mark.parametrize("case", few(CASES, lambda case: {case.family}), ids=str)
def test_bias_is_the_mean_write_of_what_goes(workshop, tmp_path, uneven, case):
    dense = workshop.dense(case.name)
    plan = given_plan(dense, "bias")
    spp_export.export(uneven, tmp_path / "slim", model=str(dense), plan=plan)
    prompts = uneven.read_text().split("\n\n")
    calibration = [prompts[index].strip() for index in CALIBRATION]
    dense_tensors, slim = stored(dense), stored(tmp_path / "slim")
    with_padding = inputs(dense, calibration, padded=True)
    for index, found in enumerate(inputs(dense, calibration)):
        kept = columns(plan.layers[index], shape_of(dense).head_dim)
        weight = projection(dense_tensors, index)
        write, tolerance = mean_write(weight, found, kept)
        added = projection(slim, index, kind="bias") - projection(dense_tensors, index, kind="bias")
        assert np.abs(added - write).max() < tolerance
        wrong, _ = mean_write(weight, with_padding[index], kept)
        assert np.abs(wrong - write).max() > 10 * tolerance
        np.testing.assert_array_equal(projection(slim, index), weight[:, kept])


@pytest.mark.parametrize("name", ["llama-mha-tied", "mistral-gqa", "qwen2-gqa-tied"])
def test_a_per_layer_export_has_the_wanted_biases_alone(workshop, name):
    out = workshop.exported(name, "per-layer", "bias")
    config = json.loads((out.path / "config.json").read_text())
    assert config["biased_projections"] == ["self_attn.o_proj"]
    assert config.get("attention_bias") in (None, False)
    layers = range(len(out.result.plan.layers))
    added = out.tensors.keys() - stored(out.dense).keys()
    assert added == {f"model.layers.{index}.self_attn.o_proj.bias" for index in layers}


@pytest.mark.parametrize("name", ["llama-mha-tied", "llama-mqa", "qwen3-gqa-tied"])
def test_biases_that_share_the_switch_are_zero(workshop, name):
    """One flag of the stock config gives q, k, v and o their biases; only o_proj's is wanted."""
    out = workshop.exported(name, "uniform", "bias")
    assert json.loads((out.path / "config.json").read_text())["attention_bias"] is True
    added = out.tensors.keys() - stored(out.dense).keys()
    layers = len(out.result.plan.layers)
    assert {key.split(".")[-2] for key in added} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert len(added) == 4 * layers
    for key in added:
        assert out.tensors[key].any().item() == ("o_proj" in key), key


def test_a_layer_that_loses_nothing_is_copied(workshop):
    """Least squares has nothing to make up for there."""
    out = workshop.exported("llama-gqa-bias", "per-layer", "lstsq")
    whole = [len(layer.query_heads) == 8 for layer in out.result.plan.layers]
    assert any(whole)
    assert not all(whole)
    dense, slim = stored(out.dense), out.tensors
    for index, copied in enumerate(whole):
        if copied:
            np.testing.assert_array_equal(projection(slim, index), projection(dense, index))


@pytest.mark.parametrize("module", CONSUMERS)
def test_moments_count_real_tokens_alone(workshop, uneven, module):
    """What is gathered are means over tokens, however the batches were padded."""
    dense = workshop.dense("llama-gqa-bias")
    session = open_session(str(dense))
    prompts = [prompt.strip() for prompt in uneven.read_text().split("\n\n")]
    kind = {CONSUMERS[0]: "attention", CONSUMERS[1]: "mlp"}[module]
    got = gather(session.source, prompts, [kind], lambda: (session.model, session.tokenizer))
    for index, found in enumerate(inputs(dense, prompts, module)):
        (second,), mean = got.blocks(kind, index), got.mean(kind, index)
        scale = np.sqrt(found.tokens) * EPS * np.diag(found.second).max()
        assert np.abs(second - found.second).max() < scale
        assert np.abs(mean - found.mean).max() < np.sqrt(found.tokens) * EPS


def test_compensation_without_any_text_is_an_error(workshop, tmp_path):
    dense = workshop.dense("llama-mqa")
    with pytest.raises(spp_export.SppError, match=r"compensation needs text: give --scenario"):
        spp_export.export(
            output=tmp_path / "slim", model=str(dense), plan=given_plan(dense, "lstsq")
        )
    assert list(tmp_path.iterdir()) == []


def test_compensation_helps_on_the_text_it_saw(workshop, tmp_path):
    """Both leave out the same heads; the re-fitted o_proj loses less of what they wrote."""
    name = "llama-gqa-bias"
    dense = workshop.dense(name)
    plan = workshop.plan(name, keep=KEEP, compensate="none").plan
    lost = {}
    prompts = workshop.scenario.read_text().strip().split("\n\n")
    found = inputs(dense, [prompts[index] for index in CALIBRATION])
    weights = stored(dense)
    for compensation in ("none", "lstsq"):
        again = Plan(plan.model_fingerprint, "dense", plan.layout, compensation, plan.layers)
        target = tmp_path / compensation
        spp_export.export(workshop.scenario, target, model=str(dense), plan=again)
        slim = stored(target)
        for index, layer in enumerate(plan.layers):
            missing = projection(weights, index)
            missing[:, columns(layer, 16)] -= projection(slim, index)
            energy = float(np.trace(missing @ found[index].second @ missing.T))
            lost[compensation, index] = energy
    losing = [i for i, layer in enumerate(plan.layers) if len(layer.query_heads) < 8]
    assert losing
    for index in losing:
        assert lost["lstsq", index] < 0.9 * lost["none", index]

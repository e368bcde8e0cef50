"""Compensated weights against the closed forms, on moments gathered here.

The moments are means over tokens of what transformers' own o_proj reads, one text at a time and
hence without padding, summed in float64. The package's are fp32 sums over padded batches.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from exporting import KEEP, columns, load, stored, texts, write_texts
from factories import CASES, shape_of, uniform_layers
from safetensors import safe_open
from transformers import AutoTokenizer

import spp_export
from spp_export.checkpoint.source import open_source
from spp_export.moments import gather
from spp_export.plans import Plan
from spp_export.session import open_session

EPS = float(np.finfo(np.float32).eps)
RIDGE = 0.01
BIASED = [case.name for case in CASES if case.family in ("llama", "qwen3")]


@dataclass(frozen=True)
class Inputs:
    """What a layer's o_proj reads: E[a a^T] [m,m], E[a] [m] and the number of tokens."""

    second: np.ndarray
    mean: np.ndarray
    tokens: int


def inputs(dense: Path, prompts: Sequence[str], *, padded: bool = False) -> list[Inputs]:
    """Per layer. `padded` counts padding as the tokens that it is not."""
    model = load(dense, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    seen: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for layer, rows in zip(model.model.layers, seen, strict=True):
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, rows=rows: rows.append(args[0].flatten(0, 1).double())
        )
    batches = [list(prompts)] if padded else [[prompt] for prompt in prompts]
    with torch.no_grad():
        for batch in batches:
            model(**tokenizer(batch, padding=True, return_tensors="pt"))
    found = []
    for rows in seen:
        values = torch.cat(rows).numpy()
        found.append(Inputs(values.T @ values / len(values), values.mean(axis=0), len(values)))
    return found


def mixed(parts: Sequence[tuple[float, list[Inputs]]]) -> list[Inputs]:
    """The weighted mean of several collections' moments."""
    return [
        Inputs(
            sum(weight * part[layer].second for weight, part in parts),
            sum(weight * part[layer].mean for weight, part in parts),
            max(part[layer].tokens for _, part in parts),
        )
        for layer in range(len(parts[0][1]))
    ]


def ridge(weight: np.ndarray, found: Inputs, kept: Sequence[int]) -> tuple[np.ndarray, float]:
    """W_S + W_R C_RS (C_SS + lam I)^-1 in float64, and how far fp32 moments may take it.

    The error of a solution X of A X = B is at most |A^-1| (|dB| + |dA| |X|). Moments summed in
    fp32 are off by a few eps |C|: 1.4 to 1.9 in these cases, 4 are allowed.
    """
    removed = np.setdiff1d(np.arange(weight.shape[1]), kept)
    among = found.second[np.ix_(kept, kept)].copy()
    among += RIDGE * np.mean(np.diag(among)) * np.eye(len(among))
    solution = np.linalg.solve(among, found.second[np.ix_(kept, removed)])
    off = 4 * EPS * np.linalg.norm(found.second)
    amplified = np.linalg.norm(np.linalg.inv(among), 2) * (1 + np.linalg.norm(solution, 2)) * off
    expected = weight[:, kept] + weight[:, removed] @ solution.T
    rounding = EPS * np.abs(expected).max()
    return expected, float(np.linalg.norm(weight[:, removed], 2) * amplified + rounding)


def o_proj(tensors: dict[str, torch.Tensor], layer: int, kind: str = "weight") -> np.ndarray:
    return tensors[f"model.layers.{layer}.self_attn.o_proj.{kind}"].double().numpy()


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
    return Plan(fingerprint, "dense", "per-layer", compensation, layers)


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_lstsq_is_the_ridge_solution_on_the_scenarios_moments(workshop, tmp_path, uneven, name):
    """A given plan and no artifacts: only the scenario speaks for itself."""
    dense = workshop.dense(name)
    plan = given_plan(dense, "lstsq")
    spp_export.export(uneven, tmp_path / "slim", model=str(dense), plan=plan)
    prompts = uneven.read_text().split("\n\n")
    calibration = [prompts[index].strip() for index in CALIBRATION]
    dense_tensors, slim = stored(dense), stored(tmp_path / "slim")
    with_padding = inputs(dense, calibration, padded=True)
    for index, found in enumerate(inputs(dense, calibration)):
        kept = columns(plan.layers[index], shape_of(dense).head_dim)
        weight = o_proj(dense_tensors, index)
        expected, tolerance = ridge(weight, found, kept)
        assert np.abs(o_proj(slim, index) - expected).max() < tolerance
        # The figures would tell if padding, or nothing at all, had been counted.
        wrong, _ = ridge(weight, with_padding[index], kept)
        assert np.abs(wrong - expected).max() > 10 * tolerance
        assert np.abs(weight[:, kept] - expected).max() > 10 * tolerance


@pytest.mark.parametrize("name", ["llama-gqa-bias", "mistral-window-tied", "qwen2-gqa-tied"])
def test_with_artifacts_the_pools_count_by_the_diagnosis(workshop, name):
    """Seven tenths pools, each domain by half its diagnosed share and half evenly; the rest is the
    scenario."""
    out = workshop.exported(name, "uniform", "lstsq")
    prompts = workshop.scenario.read_text().strip().split("\n\n")
    own = inputs(out.dense, [prompts[index] for index in CALIBRATION])
    diagnosis = out.result.diagnosis
    parts = [(0.3, own)]
    for domain, share in zip(diagnosis.domains, diagnosis.mixture, strict=True):
        pool = (workshop.pools / domain / "train.txt").read_text().strip().split("\n\n")
        parts.append((0.7 * (0.5 * share + 0.5 / 3), inputs(out.dense, pool)))
    assert sum(weight for weight, _ in parts) == pytest.approx(1)
    dense, slim = stored(out.dense), out.tensors
    own_only = mixed([(1.0, own)])
    for index, found in enumerate(mixed(parts)):
        kept = columns(out.result.plan.layers[index], shape_of(out.dense).head_dim)
        weight = o_proj(dense, index)
        expected, tolerance = ridge(weight, found, kept)
        assert np.abs(o_proj(slim, index) - expected).max() < tolerance
        wrong, _ = ridge(weight, own_only[index], kept)
        assert np.abs(wrong - expected).max() > 10 * tolerance


@pytest.mark.parametrize("name", BIASED)
def test_bias_is_the_mean_write_of_what_goes(workshop, tmp_path, uneven, name):
    dense = workshop.dense(name)
    plan = given_plan(dense, "bias")
    spp_export.export(uneven, tmp_path / "slim", model=str(dense), plan=plan)
    prompts = uneven.read_text().split("\n\n")
    calibration = [prompts[index].strip() for index in CALIBRATION]
    dense_tensors, slim = stored(dense), stored(tmp_path / "slim")
    with_padding = inputs(dense, calibration, padded=True)
    for index, found in enumerate(inputs(dense, calibration)):
        kept = columns(plan.layers[index], shape_of(dense).head_dim)
        weight = o_proj(dense_tensors, index)
        removed = np.setdiff1d(np.arange(weight.shape[1]), kept)
        before = f"model.layers.{index}.self_attn.o_proj.bias" in dense_tensors
        old = o_proj(dense_tensors, index, "bias") if before else np.zeros(weight.shape[0])
        expected = old + weight[:, removed] @ found.mean[removed]
        # a sum over T tokens in fp32, then rounded once
        size = np.abs(weight[:, removed]) @ np.sqrt(np.diag(found.second))[removed]
        tolerance = np.sqrt(found.tokens) * EPS * size.max() + EPS * np.abs(expected).max()
        assert np.abs(o_proj(slim, index, "bias") - expected).max() < tolerance
        wrong = old + weight[:, removed] @ with_padding[index].mean[removed]
        assert np.abs(wrong - expected).max() > 10 * tolerance
        np.testing.assert_array_equal(o_proj(slim, index), weight[:, kept])


@pytest.mark.parametrize("name", ["llama-mha-tied", "llama-mqa", "qwen3-gqa-tied"])
def test_biases_that_share_the_switch_are_zero(workshop, name):
    """One flag of the config gives q, k, v and o their biases; only o_proj's is wanted."""
    out = workshop.exported(name, "per-layer", "bias")
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
            np.testing.assert_array_equal(o_proj(slim, index), o_proj(dense, index))


def test_moments_count_real_tokens_alone(workshop, uneven):
    """The cache file itself: means over tokens, however the batches were padded."""
    dense = workshop.dense("llama-gqa-bias")
    session = open_session(str(dense))
    prompts = [prompt.strip() for prompt in uneven.read_text().split("\n\n")]
    path = gather(session.source, prompts, lambda: (session.model, session.tokenizer))
    expected = inputs(dense, prompts)
    with safe_open(path, framework="numpy") as file:
        assert file.metadata()["tokens"] == str(sum(len(prompt) for prompt in prompts))
        for index, found in enumerate(expected):
            second, mean = (
                file.get_tensor(f"{kind}/{index}") for kind in ("o_proj", "o_proj_mean")
            )
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
            missing = o_proj(weights, index)
            missing[:, columns(layer, 16)] -= o_proj(slim, index)
            energy = float(np.trace(missing @ found[index].second @ missing.T))
            lost[compensation, index] = energy
    for index in range(len(plan.layers)):
        assert lost["lstsq", index] < 0.9 * lost["none", index]

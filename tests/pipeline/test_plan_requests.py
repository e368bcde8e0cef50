"""`plan`: budgets, criteria, the whitelist and the published policy, on real artifacts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from exporting import load, stored, texts, write_texts
from factories import CASES, read_config, slice_in_torch
from safetensors.numpy import load_file
from transformers import AutoTokenizer

import spp_export
from spp_export.errors import BudgetError, UsageError
from spp_export.plans import read_plan
from spp_export.published import published_mask, remove_common_words

NAME = "llama-gqa-bias"
CRITERIA = ("energy", "axis", "obs")


def kept_heads(result: spp_export.PlanResult) -> set[tuple[int, int]]:
    layers = result.plan.layers
    return {(index, head) for index, layer in enumerate(layers) for head in layer.query_heads}


def kv_bytes(result: spp_export.PlanResult, config) -> int:
    """Two cached vectors of fp32 per kept KV head."""
    return sum(2 * 4 * config["head_dim"] * len(layer.kv_heads) for layer in result.plan.layers)


def parameters(dense: Path, result: spp_export.PlanResult) -> int:
    """Counted in the tensors that slicing leaves, by the slow definition."""
    tensors = slice_in_torch(load(dense, torch.float32), result.plan.layers)
    return sum(tensor.numel() for tensor in tensors.values())


# --- budgets


@pytest.mark.parametrize("name", [case.name for case in CASES])
@pytest.mark.parametrize("criterion", CRITERIA)
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
    result = workshop.plan(name, max_params=int(0.93 * whole), compensate=compensate)
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
                request=spp_export.PlanRequest(strength=strength, compensate="none"),
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


@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
@pytest.mark.parametrize("budget", ["keep", "max_params", "max_kv_bytes"])
def test_a_budget_that_cannot_be_met_names_one_that_can(workshop, layout, budget):
    asked = {"keep": 0.01, "max_params": 1000, "max_kv_bytes": 8}[budget]
    options = {"layout": layout, "compensate": "none"}
    with pytest.raises(BudgetError, match=f"budget {budget} {asked} is below") as caught:
        workshop.plan(NAME, **{budget: asked}, **options)
    message = str(caught.value)
    assert "\n" not in message
    nearest = re.search(rf"Ask for {budget} ([\d.]+) or more\.$", message)[1]
    number = float(nearest) if budget == "keep" else int(nearest)
    result = workshop.plan(NAME, **{budget: number}, **options)
    assert {len(layer.kv_heads) for layer in result.plan.layers} == {1}
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


# --- criteria and the whitelist


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


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
@pytest.mark.parametrize("name", ["llama-mha-tied", NAME, "qwen2-gqa-tied"])
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


def test_a_criterion_that_the_artifacts_lack_is_named(workshop, published):
    with pytest.raises(UsageError, match="--criterion energy: the artifacts hold head/published"):
        workshop.plan(NAME, artifacts=published, criterion="energy", compensate="none")


# --- the published policy

DOMAINS = ("capitals", "figures", "small")
PROBED = (0, 2)


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """A released artifact directory for a model of three layers of eight heads, width 64."""
    root = tmp_path_factory.mktemp("release") / "ppd_pipeline"
    probes = root / "probe1_base.pt"
    probes.mkdir(parents=True)
    rng = np.random.default_rng(4)
    metadata = {"num_layers": 3, "num_domains": 3, "layer_indices": list(PROBED)}
    (probes / "metadata.json").write_text(json.dumps(metadata))
    for layer in PROBED:
        state = {
            "classifier.weight": torch.tensor(rng.normal(size=(3, 64)), dtype=torch.float32),
            "classifier.bias": torch.tensor(rng.normal(size=3), dtype=torch.float32),
        }
        torch.save({"state_dict": state}, probes / f"probe_layer_{layer}.pt")
    table = {str(layer): rng.random((8, 3)).tolist() for layer in range(3)}
    sizes = {"num_layers": 3, "num_heads_per_layer": 8, "num_domains": 3}
    (root / "head_importance.pt").write_text(json.dumps(sizes | {"importance": table}))
    (root / "whitelist.json").write_text(json.dumps([[1, 5]]))
    (root / "probe_temperatures.json").write_text("{}")
    return root.parent


@pytest.fixture(scope="module")
def published(release, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("imported") / "artifacts"
    spp_export.import_artifacts(release, path, domains=DOMAINS)
    return path


def released_probabilities(dense: Path, text: str, release: Path) -> np.ndarray:
    """Its probes on the mean over tokens of what the attention block returns, [P,K]."""
    model, tokenizer = load(dense, torch.float32), AutoTokenizer.from_pretrained(dense)
    seen = {}
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(
            lambda _, __, output, index=index: seen.update({index: output[0][0].mean(0)})
        )
    with torch.no_grad():
        model(**tokenizer(remove_common_words(text), return_tensors="pt"))
    rows = []
    for layer in PROBED:
        path = release / "ppd_pipeline" / "probe1_base.pt" / f"probe_layer_{layer}.pt"
        state = torch.load(path, weights_only=True)["state_dict"]
        logits = state["classifier.weight"] @ seen[layer] + state["classifier.bias"]
        rows.append(torch.sigmoid(logits).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.8])
def test_the_published_policy_covers_its_own_mask(workshop, release, published, strength):
    """Computed here from the released files, by the algorithm that has golden tests of its own."""
    dense = workshop.dense(NAME)
    result = workshop.plan(NAME, artifacts=published, policy="published", strength=strength)
    table = json.loads((release / "ppd_pipeline" / "head_importance.pt").read_text())
    importance = np.array([table["importance"][str(layer)] for layer in range(3)], dtype=np.float32)
    first = workshop.scenario.read_text().split("\n\n")[0]
    probabilities = released_probabilities(dense, first, release)
    expected = published_mask(probabilities, importance, [(1, 5)], strength)
    wanted = {(int(layer), int(head)) for layer, head in np.argwhere(expected.mask)}
    assert (1, 5) in wanted
    assert wanted <= kept_heads(result)
    policy = result.plan.policy
    assert policy["name"] == "published"
    assert "here its heads are removed" in policy["note"]
    assert policy["mask_pruning_ratio"] == pytest.approx(expected.ratio, abs=1e-6)
    assert policy["inferred"] == [DOMAINS[k] for k in expected.inferred]
    assert result.plan.criterion == {"name": "published"}
    assert result.plan.budget["realised"]["query_heads"] == len(kept_heads(result))


def test_a_published_plan_exports(workshop, published, tmp_path):
    """Imported artifacts have no text, so the scenario alone compensates."""
    result = spp_export.export(
        workshop.scenario,
        tmp_path / "slim",
        model=str(workshop.dense(NAME)),
        artifacts=published,
        plan_request=spp_export.PlanRequest(policy="published", strength=0.3),
    )
    assert result.report["passed"]
    assert result.plan.compensation == "lstsq"


def test_imported_artifacts_serve_our_own_criterion(workshop, published):
    """`obs` needs no importance, only text."""
    result = workshop.plan(NAME, artifacts=published, keep=0.7)
    assert result.plan.criterion["name"] == "obs"
    assert result.plan.budget["realised"]["keep"] <= 0.7
    assert (1, 5) in kept_heads(result)


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({}, "takes its own budget, --strength ETA"),
        ({"keep": 0.5}, "takes its own budget, --strength ETA"),
        ({"strength": 0.5, "layout": "uniform"}, "the per-layer layout"),
    ],
)
def test_what_the_published_policy_cannot_do(workshop, published, asked, match):
    with pytest.raises(UsageError, match=match):
        workshop.plan(NAME, artifacts=published, policy="published", **asked)


def test_the_published_policy_needs_its_own_artifacts(workshop):
    with pytest.raises(UsageError, match="needs imported artifacts"):
        workshop.plan(NAME, policy="published", strength=0.5)


def test_artifacts_import_refuses_an_existing_directory(release, published, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(spp_export.SppError, match="is not empty"):
        spp_export.import_artifacts(release, tmp_path, domains=DOMAINS)
    with pytest.raises(spp_export.SppError, match="6 names were given"):
        spp_export.import_artifacts(release, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

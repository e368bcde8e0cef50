"""The published policy, from a released directory to a plan."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from exporting import kept_heads, load
from transformers import AutoTokenizer

import spp_export
from spp_export.common.errors import UsageError
from spp_export.planning.published import published_mask, remove_common_words

NAME = "llama-gqa-bias"
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
    ragged = workshop.plan(
        NAME, artifacts=published, policy="published", strength=strength, layout="ragged"
    )
    # Layers of which the mask keeps nothing have to keep a head.
    empty = len(ragged.plan.layers) - len({layer for layer, _ in wanted})
    assert wanted <= kept_heads(ragged) <= kept_heads(result)
    assert len(kept_heads(ragged)) == len(wanted) + empty
    assert "regular" not in ragged.plan.policy["note"]


def test_a_published_plan_exports(workshop, published, tmp_path):
    """Imported artifacts have no text, so the scenario alone compensates."""
    result = spp_export.export(
        workshop.scenario,
        tmp_path / "slim",
        model=str(workshop.dense(NAME)),
        artifacts=published,
        policy="published",
        strength=0.3,
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


def test_a_criterion_of_domains_needs_their_text(workshop, published):
    """Imported artifacts hold none: the scenario's own text speaks alone, but has no axis."""
    with pytest.raises(UsageError, match="--criterion axis: it is defined for domains"):
        workshop.plan(NAME, artifacts=published, criterion="axis", compensate="none")
    result = workshop.plan(NAME, artifacts=published, criterion="energy", compensate="none")
    assert result.plan.criterion["name"] == "energy"

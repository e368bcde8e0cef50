"""`diagnose` on pools that no probe can confuse, and what `probe` records."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from exporting import ALPHABETS, CASE, load, texts, write_texts
from factories import CASES
from pairs import few, of_family
from safetensors.numpy import load_file
from transformers import AutoTokenizer

import spp_export
from spp_export.common.errors import ArtifactsError, OutputError, ScenarioError, UsageError
from spp_export.data.scenario import read_scenario

pytestmark = pytest.mark.thinned(most=3)

NAME = "llama-gqa-bias"
DOMAINS = tuple(ALPHABETS)


def diagnose(workshop, path, name=NAME, **options):
    return spp_export.diagnose(
        path, model=str(workshop.dense(name)), artifacts=workshop.artifacts(name), **options
    )


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory):
    """Six unseen prompts of one domain each, and of all."""
    root = tmp_path_factory.mktemp("scenarios")
    found = {
        domain: write_texts(root / f"{domain}.txt", texts(domain, 6, 77)) for domain in DOMAINS
    }
    every = [prompt for domain in DOMAINS for prompt in texts(domain, 2, 78)]
    return found | {"all": write_texts(root / "all.txt", every)}


@pytest.mark.parametrize(
    ("case", "domain"), few(itertools.product(CASES, DOMAINS), of_family), ids=str
)
def test_a_domain_is_recognised(workshop, scenarios, case, domain):
    found = diagnose(workshop, scenarios[domain], case.name)
    assert found.domains == DOMAINS
    assert DOMAINS[int(np.argmax(found.mixture))] == domain
    assert found.mixture.sum() == pytest.approx(1)
    assert (found.mixture >= 0).all()
    assert 0 <= found.breadth <= 1
    assert (found.prompts, found.held_out) == (5, 1)


@pytest.mark.parametrize("case", few(CASES, lambda case: {case.family}), ids=str)
def test_breadth_is_the_entropy_of_the_mixture(workshop, scenarios, case):
    broad = diagnose(workshop, scenarios["all"], case.name)
    weights = broad.mixture[broad.mixture > 0]
    entropy = -(weights * np.log(weights)).sum() / np.log(3)
    assert broad.breadth == pytest.approx(entropy, abs=1e-12)
    for domain in DOMAINS:
        assert diagnose(workshop, scenarios[domain], case.name).breadth < broad.breadth <= 1


def test_probabilities_are_those_of_the_probes_by_the_formula(workshop, scenarios):
    """sigmoid((w . mean over tokens of the stream before the MLP's norm + b) / T), by layer, text
    by text, in transformers' own modules."""
    dense = workshop.dense(NAME)
    found = diagnose(workshop, scenarios["all"], regime="in-domain")
    probes = load_file(workshop.artifacts(NAME) / "probes.safetensors")
    model, tokenizer = load(dense, torch.float32), AutoTokenizer.from_pretrained(dense)
    pooled: list[list[np.ndarray]] = [[] for _ in model.model.layers]
    for layer, rows in zip(model.model.layers, pooled, strict=True):
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args, rows=rows: rows.append(args[0][0].double().mean(0).numpy())
        )
    calibration, _ = read_scenario(scenarios["all"]).split()
    prompts = [conversation.content for conversation in calibration]
    with torch.no_grad():
        for prompt in prompts:
            model(**tokenizer(prompt, return_tensors="pt"))
    for layer, rows in enumerate(pooled):
        logits = np.stack(rows) @ probes["weight"][layer].T.astype(np.float64)
        logits = (logits + probes["bias"][layer]) / probes["temperature"][0, layer]
        # The clip is where float64 cannot tell the result from 0 or 1.
        expected = 1 / (1 + np.exp(-np.clip(logits, -700, 700)))
        assert np.abs(found.probabilities[layer] - expected.mean(0)).max() < 1e-3
    assert found.layers == (0, 1, 2)


def test_layers_are_reported_on_request(workshop, scenarios):
    found = diagnose(workshop, scenarios["figures"])
    plain, full = found.to_dict(), found.to_dict(layers=True)
    assert "layers" not in plain
    assert {key: value for key, value in full.items() if key != "layers"} == plain
    assert [entry["layer"] for entry in full["layers"]] == [0, 1, 2]
    rows = [entry["probability"] for entry in full["layers"]]
    for row in rows:
        assert list(row) == list(DOMAINS)
        assert all(0 <= value <= 1 for value in row.values())
    mean = np.mean([list(row.values()) for row in rows], axis=0)
    assert np.abs(mean - list(full["probability"].values())).max() < 1e-5
    json.dumps(full, allow_nan=False)


def test_the_order_and_padding_of_prompts_do_not_count(workshop, tmp_path):
    # So few that none is held out.
    prompts = [*texts("figures", 2, 5, 100, 120), *texts("small", 1, 5, 1, 3)]

    def found(name, prompts):
        return diagnose(workshop, write_texts(tmp_path / name, prompts), regime="in-domain")

    there, back = found("a.txt", prompts), found("b.txt", prompts[::-1])
    alone = [found("c.txt", [text]) for text in prompts]
    np.testing.assert_allclose(there.probabilities, back.probabilities, atol=1e-3)
    mean = np.mean([one.probabilities for one in alone], axis=0)
    np.testing.assert_allclose(there.probabilities, mean, atol=1e-3)


@pytest.mark.parametrize("prompts", [["t u v w x y z"], ["{}[]()!?"], ["x"], ["酸🧪"]], ids=ascii)
@pytest.mark.parametrize("name", ["qwen3-gqa-tied", "mistral-window-tied"])
def test_text_of_no_domain_still_has_a_mixture(workshop, tmp_path, name, prompts):
    found = diagnose(workshop, write_texts(tmp_path / "odd.txt", prompts), name)
    assert np.isfinite(found.mixture).all()
    assert found.mixture.sum() == pytest.approx(1)
    assert 0 <= found.breadth <= 1


def test_export_and_diagnose_read_the_same_part_of_a_file(workshop):
    result = workshop.exported(NAME, "per-layer", "none").result
    alone = diagnose(workshop, workshop.scenario)
    assert (alone.prompts, alone.held_out) == (6, 2)
    assert alone.to_dict() == result.diagnosis.to_dict() == dict(result.plan.diagnosis)


def test_regimes(workshop, scenarios):
    with pytest.raises(UsageError, match="regime 'out-of-domain' is not in these artifacts"):
        diagnose(workshop, scenarios["figures"], regime="out-of-domain")
    for regime in ("in-domain", "cross-domain"):
        assert diagnose(workshop, scenarios["figures"], regime=regime).regime == regime


def test_what_cannot_be_diagnosed(workshop, tmp_path, scenarios):
    (tmp_path / "empty.txt").write_text(" \n\n\t\n")
    with pytest.raises(ScenarioError, match="is empty"):
        diagnose(workshop, tmp_path / "empty.txt")
    with pytest.raises(UsageError, match=r"Make them once with 'spp probe --model .* --pools"):
        spp_export.diagnose(scenarios["figures"], model=str(workshop.dense(NAME)))
    with pytest.raises(ArtifactsError, match="no such directory"):
        spp_export.diagnose(
            scenarios["figures"], model=str(workshop.dense(NAME)), artifacts=tmp_path / "none"
        )


def test_the_artifacts_say_where_they_come_from(workshop):
    header = json.loads((workshop.artifacts(NAME) / "artifacts.json").read_text())
    manifest = header["manifest"]
    assert manifest["model"] == "dense"
    assert manifest["seed"] == 0
    assert sorted(manifest["pools"]) == sorted(
        f"{domain}/{part}.txt" for domain in DOMAINS for part in ("train", "val")
    )
    for domain in DOMAINS:
        pool = (workshop.pools / domain / "train.txt").read_text().strip().split("\n\n")
        tokens = sum(len(text) for text in pool)  # one per byte
        assert manifest["counts"][domain] == {"train": 10, "val": 5, "tokens": tokens}
    assert len(manifest["validation_accuracy"]) == 3
    assert min(manifest["validation_accuracy"]) > 0.8
    assert {"torch", "transformers", "numpy", "python", "spp-export"} <= set(manifest["versions"])
    assert str(workshop.root) not in json.dumps(header)


def test_probing_refuses_before_any_work(workshop, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    dense = str(workshop.dense(NAME))
    with pytest.raises(OutputError, match="is not empty"):
        spp_export.probe(workshop.pools, tmp_path, model=dense)
    with pytest.raises(ScenarioError):
        spp_export.probe(tmp_path / "none", tmp_path / "new", model=dense)
    with pytest.raises(ScenarioError, match="chemistry"):
        spp_export.probe(workshop.pools, tmp_path / "new", model=dense, domains=["chemistry"])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_probing_again_needs_force(workshop, tmp_path):
    dense = str(CASE[NAME].make(tmp_path))
    spp_export.probe(workshop.pools, tmp_path / "a", model=dense, domains=["small", "figures"])
    with pytest.raises(OutputError, match="or use --force"):
        spp_export.probe(workshop.pools, tmp_path / "a", model=dense)
    found = spp_export.probe(workshop.pools, tmp_path / "a", model=dense, force=True)
    assert found.domains == DOMAINS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "dense"]

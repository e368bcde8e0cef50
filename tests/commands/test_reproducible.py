"""Same inputs, same bytes out, whatever the cache holds."""

from __future__ import annotations

import itertools

import pytest
import torch
from exporting import CASE, KEEP, tree, write_texts
from factories import shape_of
from pairs import few

import spp_export
from spp_export.data.artifacts import read_artifacts
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.planning import LayerPlan, Plan

NAME = "llama-gqa-bias"


@pytest.fixture
def name():
    """The checkpoint, for tests that do not go through several."""
    return NAME


@pytest.fixture
def cold(monkeypatch, tmp_path, workshop, name):
    """From here on, a cache that is empty; artifacts are made before, and leave nothing in it."""
    workshop.artifacts(name)
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "cold"))
    return tmp_path / "cold"


@pytest.mark.parametrize(
    ("layout", "compensate"),
    few(itertools.product(("per-layer", "uniform"), ("none", "lstsq", "bias")), set),
)
def test_two_exports_have_the_same_bytes(workshop, tmp_path, layout, compensate):
    asked = {"layout": layout, "compensate": compensate}
    for place in ("one", "other"):
        workshop.export(NAME, tmp_path / place / "slim", **asked)
    one, other = (tree(tmp_path / place / "slim") for place in ("one", "other"))
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


@pytest.mark.parametrize(
    "name",
    [
        NAME,
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("mistral-window-tied", "qwen2-mha-window")
        ),
    ],
)
def test_a_cold_cache_changes_nothing(workshop, tmp_path, cold, name):
    """First without a cache, then with what that left, then with what `probe` left."""
    for place in ("cold", "warm"):
        workshop.export(name, tmp_path / place / "slim", compensate="lstsq")
    own = read_artifacts(workshop.artifacts(name)).scenario_weight > 0
    assert len(list((cold / "statistics").glob("*.safetensors"))) == 3 + own  # pools, the scenario
    exports = [tree(tmp_path / place / "slim") for place in ("cold", "warm")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPP_CACHE", str(tmp_path / "probed"))
        spp_export.probe(workshop.pools, tmp_path / "again", model=str(workshop.dense(name)))
        workshop.export(name, tmp_path / "after" / "slim", compensate="lstsq")
    exports.append(tree(tmp_path / "after" / "slim"))
    for other in exports[1:]:
        assert [file for file in exports[0] if exports[0][file] != other[file]] == []


def test_a_damaged_cache_entry_costs_a_pass_and_not_the_export(workshop, tmp_path, cold):
    workshop.export(NAME, tmp_path / "one" / "slim", compensate="lstsq")
    for number, entry in enumerate(sorted((cold / "statistics").iterdir())):
        entry.write_bytes([b"", b"junk", entry.read_bytes()[:-9], entry.read_bytes()[:64]][number])
    workshop.export(NAME, tmp_path / "other" / "slim", compensate="lstsq")
    assert tree(tmp_path / "one" / "slim") == tree(tmp_path / "other" / "slim")


def test_the_cache_tells_models_of_one_shape_apart(workshop, tmp_path, cold):
    """Two fine-tunes of one model have the same config and tensors of the same shapes."""
    plans = {}
    for seed in (1, 2):
        dense = CASE[NAME].make(tmp_path / str(seed), seed=seed)
        plans[seed] = _all_of_one_group(dense)
        target = tmp_path / str(seed) / "warm" / "slim"
        spp_export.export(workshop.scenario, target, model=str(dense), plan=plans[seed])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPP_CACHE", str(tmp_path / "empty"))
        target = tmp_path / "2" / "cold" / "slim"
        dense = tmp_path / "2" / "dense"
        spp_export.export(workshop.scenario, target, model=str(dense), plan=plans[2])
    assert tree(tmp_path / "2" / "cold" / "slim") == tree(tmp_path / "2" / "warm" / "slim")


def test_the_cache_tells_precisions_apart(workshop, tmp_path, cold):
    """What was gathered in bfloat16 must not decide a float32 export, nor the other way round."""
    dense = workshop.dense(NAME)
    plan = _all_of_one_group(dense)

    def export(place: str, dtype: str) -> dict[str, bytes]:
        target = tmp_path / place / "slim"
        spp_export.export(workshop.scenario, target, model=str(dense), plan=plan, dtype=dtype)
        return tree(target)

    export("first", "bfloat16")
    warm = export("warm", "float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPP_CACHE", str(tmp_path / "empty"))
        assert export("cold", "float32") == warm


def _all_of_one_group(dense) -> Plan:
    """A plan that keeps the first KV group of every layer, re-fitted."""
    shape = shape_of(dense)
    layer = LayerPlan((0,), tuple(range(shape.group_size)))
    layers = (layer,) * shape.num_layers
    return Plan(open_source(dense).fingerprint, "dense", "uniform", "lstsq", layers)


def test_two_probes_have_the_same_bytes(workshop, tmp_path):
    dense = str(workshop.dense(NAME))
    for place in ("one", "other"):
        torch.manual_seed(hash(place) % 1000)
        spp_export.probe(workshop.pools, tmp_path / place, model=dense, seed=3)
    assert tree(tmp_path / "one") == tree(tmp_path / "other")
    assert set(tree(tmp_path / "one")) == {
        "artifacts.json",
        "calibration.jsonl",
        "importance.safetensors",
        "manifest.json",
        "probes.safetensors",
        "whitelist.json",
    }


def test_the_order_of_domains_is_the_one_asked_for(workshop, tmp_path):
    dense = str(workshop.dense(NAME))
    names = ("small", "figures")
    found = spp_export.probe(workshop.pools, tmp_path / "two", model=dense, domains=names)
    assert found.domains == names
    assert {domain for domain, _ in found.calibration} == set(names)


def test_the_seed_of_the_checks_is_all_that_random_tokens_depend_on(workshop, tmp_path):
    """Without a scenario parity is checked on random tokens."""
    plan = workshop.exported(NAME, "per-layer", "none").path / "plan.json"
    dense = str(workshop.dense(NAME))

    def report(seed: int, place: str) -> dict:
        request = {"seed": seed}
        target = tmp_path / place
        return dict(spp_export.export(output=target, model=dense, plan=plan, **request).report)

    torch.manual_seed(1)
    first = report(0, "a")
    torch.manual_seed(2)
    assert report(0, "b") == first
    assert report(1, "c") != first


def test_a_scenario_decides_by_its_content_and_name_alone(workshop, tmp_path):
    for place in ("here", "there"):
        copy = write_texts(
            tmp_path / place / "sums.txt", workshop.scenario.read_text().split("\n\n")
        )
        spp_export.export(
            copy,
            tmp_path / place / "slim",
            model=str(workshop.dense(NAME)),
            artifacts=workshop.artifacts(NAME),
            keep=KEEP,
        )
    assert tree(tmp_path / "here" / "slim") == tree(tmp_path / "there" / "slim")

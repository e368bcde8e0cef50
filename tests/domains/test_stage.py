"""The offline stage on a tiny model: pools to artifacts."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from factories import make_checkpoint
from transformers import AutoTokenizer

from spp_export.calibration.moments import gather
from spp_export.calibration.statistics import Axis
from spp_export.commands.probe import probe
from spp_export.common.errors import UsageError
from spp_export.data.artifacts import read_artifacts, write_artifacts
from spp_export.data.pools import Pools
from spp_export.domains.probe_model import ProbeSettings, probe_model
from spp_export.importance import SCORING
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.loader import load_dense

POOLS = Pools(
    ("numbers", "letters", "marks"),
    (
        ("123 45 6789", "3.14159 2.718", "10 100 1000 10000", "42", "7 x 8 = 56"),
        ("abc def ghi", "lorem ipsum dolor sit", "quick brown fox", "zebra", "to be or not"),
        ("?! ... ;;", "(( )) [[ ]]", "--- +++ ===", "<> <> <>", "#$% &*"),
    ),
    (("99 98 97", "1 2 3 4 5"), ("alpha beta", "gamma delta"), (":: ;; ,,", "!? !?")),
    {
        f"{name}/{part}.txt": "00"
        for name in ("numbers", "letters", "marks")
        for part in ("train", "val")
    },
)
GIVEN, REST = POOLS.take(["numbers", "letters"]), POOLS.take(["marks"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("probed")
    path = make_checkpoint(root, "llama", kv_heads=2, query_heads=4, layers=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPP_CACHE", str(root / "cache"))
        model = load_dense(path)
        tokenizer = AutoTokenizer.from_pretrained(path)

        def run(pools=GIVEN, left_out=REST, **request):
            return probe_model(
                model,
                tokenizer,
                open_source(path),
                pools,
                left_out=left_out,
                request=ProbeSettings(**request),
            )

        yield path, run, run(seed=5)


def test_artifacts_have_the_sizes_of_model_and_pools(tiny, tmp_path):
    path, _, artifacts = tiny
    shape = open_source(path).shape
    assert artifacts.domains == ("numbers", "letters")
    assert artifacts.regimes == ("in-domain", "cross-domain", "out-of-domain")
    assert artifacts.weight.shape == (shape.num_layers, 2, shape.hidden_size)
    assert artifacts.temperature.shape == (3, shape.num_layers)
    assert artifacts.axes.shape == (2, shape.hidden_size)
    assert {name: scores.shape for name, scores in artifacts.importance.items()} == {
        f"{kind}/{name}": (2, shape.num_layers, units)
        for kind, units in (("head", shape.query_heads), ("channel", shape.channels))
        for name in ("energy", "axis")
    }
    assert write_artifacts(artifacts, tmp_path).sha256 == read_artifacts(tmp_path).sha256


def test_the_manifest_says_what_was_done(tiny):
    artifacts = tiny[2]
    manifest = artifacts.manifest
    assert manifest["counts"]["letters"] == {
        "train": 5,
        "val": 2,
        "tokens": sum(len(text) for text in GIVEN.train[1]),
    }
    assert manifest["left_out"] == {"marks": {"val": 2}}
    assert "marks/val.txt" in manifest["pools"]
    assert "marks/train.txt" not in manifest["pools"]
    assert manifest["axes"]["candidates"] == manifest["axes"]["selected"] == ["numbers", "letters"]
    assert manifest["validation_accuracy"][-1] == 1.0
    for regime in artifacts.regimes:
        assert {"texts", "ece_before", "ece_after"} == set(manifest["reliability"][regime])
        assert sum(manifest["regime_choice"]["counts"][regime].values()) > 0
    assert manifest["seed"] == 5
    assert 0 <= artifacts.shrinkage == manifest["shrinkage"]["chosen"] <= 1
    assert 0 <= artifacts.scenario_weight == manifest["scenario_weight"]["chosen"] <= 1
    assert manifest["whitelist"]["units"] == len(artifacts.whitelist)
    json.dumps(manifest, allow_nan=False)


def test_twice_gives_the_same_numbers(tiny):
    _, run, one = tiny
    other = run(seed=5)
    for field in dataclasses.fields(one):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, np.ndarray):
            np.testing.assert_array_equal(left, right)
        elif field.name in ("importance", "familiar"):
            for name in left:
                np.testing.assert_array_equal(left[name], right[name])
        else:
            assert left == right


def test_exports_find_the_statistics_of_the_pools_in_the_cache(tiny):
    path, _, artifacts = tiny

    def not_needed():
        raise AssertionError("a pass was asked for")

    for domain in artifacts.domains:
        texts = [text for name, text in artifacts.calibration if name == domain]
        assert gather(open_source(path), texts, ("attention", "mlp"), not_needed)


def test_importance_is_that_of_the_criteria_on_the_gathered_statistics(tiny):
    path, run, _ = tiny
    source = open_source(path)
    artifacts = run(criteria=("wanda-sp", "axis"), units="heads")
    assert set(artifacts.importance) == {"head/wanda-sp", "head/axis"}
    for k in range(2):
        collection = gather(source, GIVEN.train[k], ("attention",), lambda: None)
        for layer in range(3):
            seen = collection.layer_statistics(source, layer)
            expected = SCORING["wanda-sp"].heads(seen)
            found = artifacts.importance["head/wanda-sp"][k, layer]
            np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_channels_along_the_axis_are_those_of_the_probes(tiny):
    path, _, artifacts = tiny
    source = open_source(path)
    collection = gather(source, GIVEN.train[1], ("attention",), lambda: None)
    for layer in range(3):
        direction = artifacts.weight[layer, 1] / np.linalg.norm(artifacts.weight[layer, 1])
        axis = Axis(direction, np.zeros(source.shape.query_heads))
        expected = SCORING["axis"].channels(collection.layer_statistics(source, layer, axis=axis))
        found = artifacts.importance["channel/axis"][1, layer]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)


def test_domains_can_be_selected_and_the_others_are_unknown(tiny):
    artifacts = tiny[1](POOLS, None, select=2, units="heads")
    axes = artifacts.manifest["axes"]
    assert axes["candidates"] == list(POOLS.domains)
    assert [step["domain"] for step in axes["steps"]] != []
    assert sorted(step["domain"] for step in axes["steps"]) == sorted(artifacts.domains)
    assert axes["selected"] == list(artifacts.domains)
    (apart,) = set(POOLS.domains) - set(artifacts.domains)
    assert artifacts.manifest["left_out"] == {apart: {"val": 2}}
    assert artifacts.manifest["reliability"]["out-of-domain"]["texts"] == 2
    assert len(axes["cosines"]) == 3


def test_without_domains_left_out_that_regime_is_absent(tiny):
    artifacts = tiny[1](left_out=None, units="heads")
    assert artifacts.regimes == ("in-domain", "cross-domain")
    assert "absent" in artifacts.manifest["reliability"]["out-of-domain"]
    assert artifacts.manifest["regime_choice"]["known"] == 0.5


def test_one_domain_has_nothing_to_choose(tiny):
    artifacts = tiny[1](POOLS.take(["numbers"]), None, units="heads")
    assert artifacts.regimes == ("in-domain",)
    assert (artifacts.shrinkage, artifacts.scenario_weight) == (0.5, 0.3)
    assert "shrinkage" not in artifacts.manifest
    assert not artifacts.axes.any()


@pytest.mark.parametrize(
    ("request_fields", "match"),
    [
        ({"select": 3}, "--select 3: expected a number from 1 to 2"),
        ({"criteria": ("energy", "taste")}, "--criteria taste: expected some of energy, axis"),
        ({"criteria": ()}, "--criteria: expected at least one"),
        ({"units": "channels"}, "--units channels: expected one of heads, both"),
    ],
)
def test_requests_that_cannot_be(tiny, request_fields, match):
    with pytest.raises(UsageError, match=match):
        tiny[1](**request_fields)


def test_the_command_takes_the_other_pools_of_the_directory_for_unknown(tiny, tmp_path):
    for name, train, val in zip(POOLS.domains, POOLS.train, POOLS.val, strict=True):
        folder = tmp_path / "pools" / name
        folder.mkdir(parents=True)
        (folder / "train.txt").write_text("\n\n".join(train))
        (folder / "val.txt").write_text("\n\n".join(val))
    (tmp_path / "pools" / "notes").mkdir()
    made = probe(
        tmp_path / "pools",
        tmp_path / "out",
        model=str(tiny[0]),
        domains=["numbers", "letters"],
        units="heads",
        seed=5,
    )
    assert made.domains == ("numbers", "letters")
    assert made.manifest["left_out"] == {"marks": {"val": 2}}
    np.testing.assert_array_equal(made.weight, tiny[2].weight)

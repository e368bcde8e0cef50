"""Text of another kind is told from text like that of the pools, by where it lies."""

from __future__ import annotations

import numpy as np
import pytest

from spp_export.common.errors import ArtifactsError
from spp_export.data.artifacts import Artifacts, check_artifacts, read_artifacts, write_artifacts
from spp_export.domains.diagnosis import diagnose_activations
from spp_export.domains.familiar import Beginnings, Familiar, fit_familiar

LAYERS, WIDTH, DOMAINS = 8, 48, 3
LONG = 128


def text(count, seed, *, tokens=LONG, shift=0.0, turn=None):
    """Pooled text [N,L,d] of the domains and their labels: most variance along a few directions.

    A text is the mean of its tokens: of fewer, it lies farther from its domain's mean.
    """
    generator = np.random.default_rng(seed)
    world = np.random.default_rng(99)
    means = world.normal(size=(DOMAINS, LAYERS, WIDTH)) * 3
    directions = world.normal(size=(LAYERS, 6, WIDTH))
    labels = np.arange(count) % DOMAINS
    along = generator.normal(size=(count, LAYERS, 6)) * 4
    values = means[labels] + np.einsum("nlr,lrd->nld", along, directions)
    values += generator.normal(size=values.shape)
    values += generator.normal(size=values.shape) * np.sqrt(40 / tokens)
    if turn is not None:
        values = values[..., np.random.default_rng(turn).permutation(WIDTH)]
    return (values + shift).astype(np.float32), labels


def beginnings(count, seed, tokens=16):
    counts = np.full(count, tokens)
    return Beginnings(*text(count, seed, tokens=tokens), counts, np.full(count, LONG))


def long(pooled):
    """How many tokens each has."""
    return np.full(len(pooled), LONG)


def diagnosed(pooled, *arguments):
    return diagnose_activations(pooled, long(pooled), *arguments)


@pytest.fixture(scope="module")
def known():
    return fit_familiar(*text(240, 1), *text(90, 2), beginnings(90, 3), DOMAINS)


def explicit(familiar, pooled):
    """Distances by the covariance matrix itself, its inverse and loops."""
    found = []
    for one in pooled:
        layers = []
        for p, layer in enumerate(familiar.layers):
            basis = familiar.basis[p].astype(np.float64)
            variances = familiar.scales[p].astype(np.float64) ** 2
            covariance = variances[-1] * (np.eye(WIDTH) - basis.T @ basis)
            covariance += basis.T @ np.diag(variances[:-1]) @ basis
            inverse = np.linalg.inv(covariance)
            off = [one[layer] - mean for mean in familiar.means[p]]
            layers.append(np.sqrt(min(o @ inverse @ o for o in off) / WIDTH))
        found.append(np.mean(layers))
    return np.array(found)


def test_the_distance_is_that_of_the_covariance_matrix(known):
    familiar, _ = known
    pooled, _ = text(7, 3, shift=0.3)
    np.testing.assert_allclose(familiar.distances(pooled), explicit(familiar, pooled), rtol=1e-3)


def test_directions_are_orthonormal_and_training_text_is_at_one(known):
    familiar, _ = known
    for basis in familiar.basis:
        np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-5)
    assert familiar.distances(text(240, 1)[0]).mean() == pytest.approx(1, abs=0.1)
    assert familiar.layers == (2, 4, 6)


@pytest.mark.parametrize("prompts", [1, 4, 30])
def test_scenarios_of_the_domains_are_familiar(known, prompts):
    familiar, record = known
    for seed in range(20):
        pooled, _ = text(prompts, 100 + seed)
        assert familiar.distance(pooled, long(pooled)) < 1
    assert all(0 <= rate < 0.05 for rate in record["false_alarms"].values())
    assert familiar.limit(1) > familiar.limit(4) > familiar.limit(100) > 1


@pytest.mark.parametrize("tokens", [8, 16, 40])
@pytest.mark.parametrize("prompts", [1, 6])
def test_short_prompts_of_the_domains_are_familiar_too(known, tokens, prompts):
    familiar, record = known
    for seed in range(20):
        pooled, _ = text(prompts, 100 + seed, tokens=tokens)
        assert familiar.distance(pooled, np.full(prompts, tokens)) < 1
        if tokens == 8:
            # As text of many tokens it would not be.
            assert familiar.distance(pooled, long(pooled)) > 1
        pooled, _ = text(prompts, 100 + seed, tokens=tokens, shift=6.0)
        assert familiar.distance(pooled, np.full(prompts, tokens)) > 1
    assert all(0 <= rate < 0.05 for rate in record["false_alarms_of_beginnings"].values())


def test_what_is_expected_of_a_length_is_what_such_text_has(known):
    """Measured at 16 tokens, foretold at others."""
    familiar, record = known
    assert record["length"] == LONG
    for tokens in (8, 16, 32, 64, LONG, 10 * LONG):
        measured = familiar.distances(text(300, 7, tokens=min(tokens, LONG))[0]).mean()
        assert familiar.expected(np.array([tokens]))[0] == pytest.approx(measured, rel=0.05)


def test_artifacts_of_before_judge_short_text_as_long_text(known):
    familiar, record = known
    arrays, manifest = familiar.arrays(), dict(record)
    del manifest["growth"], manifest["length"]
    before = Familiar.of(artifacts(familiar=arrays, manifest={"familiarity": manifest}))
    assert before.expected(np.array([1, 16, 1000])).tolist() == [record["centre"]] * 3
    pooled, _ = text(5, 3)
    assert before.distance(pooled, np.full(5, 2)) == familiar.distance(pooled, long(pooled))


@pytest.mark.parametrize("other", [{"shift": 3.0}, {"turn": 1}, {"turn": 2, "shift": -1.0}])
@pytest.mark.parametrize("prompts", [1, 6])
def test_text_of_another_kind_is_not(known, other, prompts):
    familiar, _ = known
    for seed in range(10):
        pooled, _ = text(prompts, 200 + seed, **other)
        assert familiar.distance(pooled, long(pooled)) > 1


def test_few_texts_have_few_directions():
    """As of the pools that tests make."""
    familiar, _ = fit_familiar(*text(6, 1), *text(3, 2), beginnings(3, 3), DOMAINS)
    assert familiar.basis.shape == (3, 1, WIDTH)
    assert np.isfinite(familiar.distances(text(5, 3)[0])).all()
    assert (familiar.scales > 0).all()
    assert familiar.limit(1) > 0


def test_equal_text_gives_equal_figures(known):
    again, record = fit_familiar(*text(240, 1), *text(90, 2), beginnings(90, 3), DOMAINS)
    assert record == known[1]
    np.testing.assert_array_equal(again.basis, known[0].basis)


def artifacts(**fields):
    def zeros(*shape):
        return np.zeros(shape, np.float32)

    return Artifacts(
        fingerprint="",
        domains=("a", "b", "c"),
        regimes=("in-domain", "out-of-domain"),
        weight=zeros(LAYERS, DOMAINS, WIDTH),
        bias=zeros(LAYERS, DOMAINS) + 2 * np.eye(1, DOMAINS, dtype=np.float32),
        temperature=zeros(2, LAYERS) + 1,
        axes=zeros(DOMAINS, WIDTH),
        importance={"head/energy": zeros(DOMAINS, LAYERS, 4)},
        whitelist=(),
        calibration=(),
        **({"manifest": {}} | fields),
    )


@pytest.fixture
def held(known, tmp_path):
    """Artifacts that were written and read; their probes answer "a", whatever the text."""
    familiar, record = known
    made = artifacts(familiar=familiar.arrays(), manifest={"familiarity": record})
    write_artifacts(made, tmp_path)
    return read_artifacts(tmp_path)


def test_it_comes_back_from_artifacts(known, held):
    familiar = known[0]
    again = Familiar.of(held)
    assert (again.layers, again.limit(3)) == (familiar.layers, familiar.limit(3))
    pooled, _ = text(5, 3)
    np.testing.assert_array_equal(again.distances(pooled), familiar.distances(pooled))
    assert Familiar.of(artifacts()) is None


def test_all_domains_count_alike_for_text_of_none_of_them(held):
    inside = diagnosed(text(8, 5)[0], held)
    assert (inside.unfamiliar, inside.regime) == (False, "cross-domain")
    assert inside.mixture[0] > 0.4
    outside = diagnosed(text(8, 5, shift=3.0)[0], held)
    assert (outside.unfamiliar, outside.regime) == (True, "out-of-domain")
    assert outside.mixture.tolist() == pytest.approx([1 / 3] * 3)
    assert outside.breadth == pytest.approx(1)
    record = outside.to_dict()
    assert record["unfamiliar"] is True
    assert record["distance"] > 1
    assert record["probability"]["a"] > record["probability"]["b"]


def test_a_regime_that_was_chosen_stays(held):
    found = diagnosed(text(8, 5, shift=3.0)[0], held, "in-domain")
    assert (found.regime, found.unfamiliar) == ("in-domain", True)


def test_artifacts_that_cannot_tell_say_nothing_of_it():
    found = diagnosed(text(8, 5, shift=3.0)[0], artifacts())
    assert (found.distance, found.unfamiliar) == (None, False)
    assert "unfamiliar" not in found.to_dict()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"familiar": {}}, "expected the tensors familiar_means"),
        ({"manifest": {}}, "familiar_means"),
        ({"layers": [4, 2, 6]}, "expected ascending layers below 8, got 4, 2, 6"),
        ({"layers": [2, 4]}, r"familiar_means: expected the shape \(2, 3, 48\)"),
        ({"centre": 0}, "centre"),
        ({"growth": -1.0}, "growth"),
        ({"length": 0}, "length"),
        ({"scale": 0.0}, "familiar_scales: expected values above 0"),
        ({"mean": np.nan}, "familiar_means: holds a value that is not finite"),
    ],
)
def test_what_contradicts_itself_is_refused(known, fields, match):
    familiar, record = known
    arrays, manifest = dict(familiar.arrays()), dict(record)
    manifest |= {
        key: fields[key] for key in ("layers", "centre", "growth", "length") if key in fields
    }
    if "scale" in fields:
        arrays["scales"] = np.full_like(arrays["scales"], fields["scale"])
    if "mean" in fields:
        arrays["means"] = np.full_like(arrays["means"], fields["mean"])
    made = artifacts(
        familiar=fields.get("familiar", arrays),
        manifest=fields.get("manifest", {"familiarity": manifest}),
    )
    with pytest.raises(ArtifactsError, match=match):
        check_artifacts(made, "artifacts")

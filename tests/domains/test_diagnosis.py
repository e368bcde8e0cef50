"""Mixture, breadth and regime of a scenario, against the formulas computed one number at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from spp_export.common.errors import ArtifactsError, UsageError
from spp_export.data.artifacts import Artifacts
from spp_export.domains.diagnosis import (
    CROSS_DOMAIN,
    IN_DOMAIN,
    OUT_OF_DOMAIN,
    Diagnosis,
    choose_regime,
    diagnose_activations,
    probe_probabilities,
)

LAYERS, WIDTH, HEADS = 4, 6, 5
DOMAINS = ("chemistry", "math", "finance")
REGIMES = (IN_DOMAIN, CROSS_DOMAIN, OUT_OF_DOMAIN)


def artifacts(*, regimes=REGIMES, probe_layers=None, seed=0, **fields):
    random = np.random.default_rng(seed)
    domains = len(DOMAINS)
    values = {
        "weight": random.standard_normal((LAYERS, domains, WIDTH)).astype(np.float32),
        "bias": random.standard_normal((LAYERS, domains)).astype(np.float32),
        "temperature": random.uniform(0.5, 2, (len(regimes), LAYERS)).astype(np.float32),
        **fields,
    }
    return Artifacts(
        fingerprint="",
        domains=DOMAINS,
        regimes=regimes,
        axes=np.zeros((domains, WIDTH), dtype=np.float32),
        importance={"head/energy": np.ones((domains, LAYERS, HEADS), dtype=np.float32)},
        whitelist=(),
        calibration=(),
        manifest={} if probe_layers is None else {"probe_layers": list(probe_layers)},
        **values,
    )


def saying(*probabilities, **options):
    """Artifacts whose probes answer these probabilities per domain, whatever the text."""
    p = np.array(probabilities)
    bias = np.broadcast_to(np.log(p / (1 - p)), (LAYERS, len(DOMAINS))).astype(np.float32)
    regimes = options.get("regimes", REGIMES)
    return artifacts(
        weight=np.zeros((LAYERS, len(DOMAINS), WIDTH), dtype=np.float32),
        bias=bias,
        temperature=np.ones((len(regimes), LAYERS), dtype=np.float32),
        **options,
    )


def pooled(texts=3, seed=1):
    return np.random.default_rng(seed).standard_normal((texts, LAYERS, WIDTH)).astype(np.float32)


def diagnosed(activations, *arguments):
    return diagnose_activations(activations, np.full(len(activations), 100), *arguments)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def one_probability(art, activations, n, layer, k, regime=IN_DOMAIN):
    logit = float(art.bias[layer, k])
    for i in range(WIDTH):
        logit += float(art.weight[layer, k, i]) * float(activations[n, layer, i])
    return sigmoid(logit / float(art.temperature[art.regimes.index(regime), layer]))


@pytest.mark.parametrize("regime", REGIMES)
def test_probabilities_are_calibrated_sigmoids(regime):
    art, activations = artifacts(), pooled()
    found = probe_probabilities(activations, art, regime)
    assert found.shape == (3, LAYERS, len(DOMAINS))
    for n, layer, k in np.ndindex(found.shape):
        expected = one_probability(art, activations, n, layer, k, regime)
        assert found[n, layer, k] == pytest.approx(expected, rel=1e-6)


def test_large_logits_neither_overflow_nor_vanish():
    """Overflow would be a warning, hence an error here; a mixture needs more than zeros."""
    art, activations = artifacts(), 30 * pooled()
    found = probe_probabilities(activations, art)
    assert found.min() > 0
    assert found.max() <= 1
    assert found.min() < 1e-30


def test_probes_that_deny_every_domain_still_give_a_mixture():
    art = artifacts(
        weight=np.zeros((LAYERS, 3, WIDTH), dtype=np.float32),
        bias=np.tile(np.array([-50, -60, -50], dtype=np.float32), (LAYERS, 1)),
        temperature=np.ones((3, LAYERS), dtype=np.float32),
    )
    found = diagnosed(pooled(), art)
    assert found.regime == OUT_OF_DOMAIN
    np.testing.assert_allclose(found.mixture, [0.5, 0, 0.5], atol=1e-4)


def test_mixture_is_the_mean_over_layers_and_prompts_normalised():
    art, activations = artifacts(), pooled()
    found = diagnosed(activations, art, IN_DOMAIN)
    q = [
        np.mean(
            [one_probability(art, activations, n, i, k) for n in range(3) for i in range(LAYERS)]
        )
        for k in range(len(DOMAINS))
    ]
    np.testing.assert_allclose(found.q, q, rtol=1e-6)
    np.testing.assert_allclose(found.mixture, np.array(q) / sum(q), rtol=1e-6)
    s = np.array(q) / sum(q)
    assert found.breadth == pytest.approx(-sum(s * np.log(s)) / math.log(3), rel=1e-6)
    assert found.prompts == 3
    assert found.layers == (0, 1, 2, 3)


def diagnosis(*q, layers=2):
    domains = tuple("abcdefgh"[: len(q)])
    return Diagnosis(domains, np.tile(np.array(q, float), (layers, 1)), IN_DOMAIN, 1, (0, 1))


@pytest.mark.parametrize(
    ("q", "breadth"),
    [
        ((0.7, 0.0, 0.0), 0.0),
        ((1.0, 1.0, 1.0), 1.0),
        ((0.2,) * 8, 1.0),
        ((0.3, 0.3, 0.0, 0.0), 0.5),
        ((0.9,), 0.0),
    ],
)
def test_breadth_is_zero_for_one_domain_and_one_for_all_alike(q, breadth):
    assert diagnosis(*q).breadth == pytest.approx(breadth, abs=1e-12)
    assert 0 <= diagnosis(*q).breadth <= 1


def test_breadth_does_not_depend_on_how_sure_the_probes_are():
    assert diagnosis(0.8, 0.4, 0.1).breadth == pytest.approx(diagnosis(0.08, 0.04, 0.01).breadth)


@pytest.mark.parametrize(
    ("probabilities", "regime"),
    [
        ((0.9, 0.1, 0.1), IN_DOMAIN),
        ((0.51, 0.49, 0.49), CROSS_DOMAIN),
        ((0.9, 0.17, 0.01), CROSS_DOMAIN),
        ((0.9, 0.15, 0.01), IN_DOMAIN),
        ((0.9, 0.8, 0.1), CROSS_DOMAIN),
        ((0.6, 0.7, 0.8), CROSS_DOMAIN),
        ((0.4, 0.2, 0.49), OUT_OF_DOMAIN),
    ],
)
def test_the_regime_follows_how_many_domains_are_present(probabilities, regime):
    assert diagnosed(pooled(), saying(*probabilities)).regime == regime


def test_prompts_of_one_domain_each_are_known_and_cross_domain_together():
    apart = np.array([[0.98, 0.01, 0.01], [0.01, 0.98, 0.01], [0.01, 0.01, 0.98]])
    assert (apart.mean(axis=0) < 0.5).all()
    assert choose_regime(apart) == CROSS_DOMAIN


def test_the_thresholds_of_the_regime_are_those_of_the_artifacts():
    probabilities = (0.7, 0.3, 0.1)
    assert diagnosed(pooled(), saying(*probabilities)).regime == CROSS_DOMAIN
    for choice, regime in (
        ({"known": 0.8}, OUT_OF_DOMAIN),
        ({"known": 0.6, "share": 0.4}, IN_DOMAIN),
        ({"known": 0.6, "share": 0.2}, CROSS_DOMAIN),
    ):
        art = replace(saying(*probabilities), manifest={"regime_choice": choice})
        assert diagnosed(pooled(), art).regime == regime


def test_the_regimes_temperatures_are_used_once_it_is_chosen():
    art = saying(0.9, 0.8, 0.1)
    art.temperature[1] = 4.0
    found = diagnosed(pooled(), art)
    assert found.regime == CROSS_DOMAIN
    expected = [sigmoid(math.log(p / (1 - p)) / 4) for p in (0.9, 0.8, 0.1)]
    np.testing.assert_allclose(found.q, expected, rtol=1e-6)


def test_prompts_of_one_domain_are_read_as_such_in_a_scenario_of_several():
    """Two prompts of one domain each and one of two, told by the sign of their activations."""
    weight = np.zeros((LAYERS, 3, WIDTH), dtype=np.float32)
    weight[:, 0, 0] = weight[:, 1, 1] = 1.0
    art = artifacts(
        weight=weight,
        bias=np.full((LAYERS, 3), -6, dtype=np.float32),
        temperature=np.repeat([[1.0], [4.0], [1.0]], LAYERS, axis=1).astype(np.float32),
    )
    activations = np.zeros((3, LAYERS, WIDTH), dtype=np.float32)
    activations[0, :, 0] = activations[1, :, 1] = activations[2, :, 0] = activations[2, :, 1] = 12
    found = diagnosed(activations, art)
    assert found.regime == CROSS_DOMAIN
    first = (sigmoid(6) + sigmoid(-6) + sigmoid(6 / 4)) / 3
    third = (2 * sigmoid(-6) + sigmoid(-6 / 4)) / 3
    np.testing.assert_allclose(found.q, [first, first, third], rtol=1e-6)
    forced = diagnosed(activations, art, CROSS_DOMAIN)
    all_at_four = (sigmoid(6 / 4) * 2 + sigmoid(-6 / 4)) / 3
    np.testing.assert_allclose(forced.q[0], all_at_four, rtol=1e-6)


def test_without_temperatures_of_a_regime_those_in_domain_stand_in():
    art = saying(0.9, 0.8, 0.1, regimes=(IN_DOMAIN,))
    found = diagnosed(pooled(), art)
    assert found.regime == CROSS_DOMAIN
    np.testing.assert_allclose(found.q, [0.9, 0.8, 0.1], rtol=1e-6)


def test_a_regime_can_be_asked_for():
    art, activations = artifacts(), pooled()
    found = diagnosed(activations, art, OUT_OF_DOMAIN)
    assert found.regime == OUT_OF_DOMAIN
    expected = probe_probabilities(activations, art, OUT_OF_DOMAIN).mean(axis=0)
    np.testing.assert_array_equal(found.probabilities, expected)
    with pytest.raises(UsageError, match=r"regime 'polar' .* have in-domain, cross-domain, out"):
        diagnosed(activations, art, "polar")


def test_only_layers_with_a_probe_take_part():
    art, activations = artifacts(probe_layers=[3, 1]), pooled()
    found = diagnosed(activations, art, IN_DOMAIN)
    assert found.layers == (3, 1)
    for row, layer in enumerate((3, 1)):
        for k in range(len(DOMAINS)):
            expected = np.mean([one_probability(art, activations, n, layer, k) for n in range(3)])
            assert found.probabilities[row, k] == pytest.approx(expected, rel=1e-6)
    assert [row["layer"] for row in found.to_dict(layers=True)["layers"]] == [3, 1]


@pytest.mark.parametrize("shape", [(3, LAYERS - 1, WIDTH), (3, LAYERS, WIDTH + 1)])
def test_activations_of_another_model_are_refused(shape):
    with pytest.raises(ArtifactsError, match=rf"4 layers x 6, got {shape[1]} x {shape[2]}"):
        diagnosed(np.zeros(shape), artifacts())


def test_the_record_of_a_diagnosis_is_rounded_and_named():
    record = diagnosis(0.6, 0.3, 0.1).to_dict()
    assert record["mixture"] == {"a": 0.6, "b": 0.3, "c": 0.1}
    assert record["probability"] == {"a": 0.6, "b": 0.3, "c": 0.1}
    assert record["regime"] == IN_DOMAIN
    assert record["breadth"] == round(diagnosis(0.6, 0.3, 0.1).breadth, 6)
    assert "layers" not in record

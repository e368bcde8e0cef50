"""Probes, temperatures, whitelist and axes against other solvers and constructed cases."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from factories import make_checkpoint
from transformers import AutoTokenizer

from spp_export.checkpoint.source import open_source
from spp_export.loader import load_dense
from spp_export.moments import gather
from spp_export.pools import Pools
from spp_export.probing import (
    choose_whitelist,
    domain_axes,
    fit_probes,
    fit_temperatures,
    probe_model,
)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def clusters(domains=3, per=30, layers=2, width=5, spread=0.6, seed=0):
    """Pooled activations [N,L,d] of overlapping classes, features of unequal scale, and labels."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((layers, domains, width))
    labels = np.repeat(np.arange(domains), per)
    noise = spread * random.standard_normal((len(labels), layers, width))
    scale, offset = np.geomspace(0.1, 100, width), random.standard_normal(width) * 10
    pooled = (centres[:, labels].transpose(1, 0, 2) + noise) * scale + offset
    return pooled.astype(np.float32), labels


def newton(features, targets, penalty, steps=50):
    """Weights and bias that minimise the mean logistic loss + penalty/2 ||w||^2."""
    x = np.column_stack([features, np.ones(len(features))])
    ridge = penalty * np.eye(x.shape[1])
    ridge[-1, -1] = 0
    parameters = np.zeros(x.shape[1])
    for _ in range(steps):
        p = sigmoid(x @ parameters)
        gradient = x.T @ (p - targets) / len(x) + ridge @ parameters
        hessian = (x * (p * (1 - p))[:, None]).T @ x / len(x) + ridge
        parameters -= np.linalg.solve(hessian, gradient)
    assert np.abs(gradient).max() < 1e-10
    return parameters[:-1], parameters[-1]


def test_probes_equal_those_of_another_solver():
    pooled, labels = clusters(per=12, layers=2, width=4)
    weight, bias = fit_probes(pooled, labels, 3)
    assert weight.shape == (2, 3, 4)
    assert bias.shape == (2, 3)
    assert weight.dtype == bias.dtype == np.float32
    for layer, k in np.ndindex(2, 3):
        features = pooled[:, layer].astype(np.float64)
        mean, deviation = features.mean(0), features.std(0, ddof=1)
        w, b = newton((features - mean) / deviation, labels == k, penalty=1e-2)
        np.testing.assert_allclose(weight[layer, k], w / deviation, rtol=1e-4, atol=1e-4)
        expected = b - (w / deviation) @ mean
        assert bias[layer, k] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_probes_tell_separate_classes_apart():
    pooled, labels = clusters(spread=0.15, per=40)
    weight, bias = fit_probes(pooled[::2], labels[::2], 3)
    logits = np.einsum("nld,lkd->nlk", pooled[1::2], weight) + bias
    assert (logits.argmax(axis=2) == labels[1::2, None]).all()
    own = np.take_along_axis(logits, labels[1::2, None, None], axis=2)
    assert (own > 0).mean() > 0.95


def test_a_feature_that_never_changes_has_no_weight():
    pooled, labels = clusters()
    pooled[:, :, 2] = 7.0
    weight, bias = fit_probes(pooled, labels, 3)
    assert (weight[:, :, 2] == 0).all()
    assert np.isfinite(weight).all()
    assert np.isfinite(bias).all()


@pytest.mark.parametrize("known", [0.4, 1.0, 3.0])
def test_a_known_temperature_is_recovered(known):
    """Labels drawn from sigmoid(z/T): of two domains, so that one-vs-rest is the true model."""
    random = np.random.default_rng(1)
    z = 2 * known * random.standard_normal((20_000, 1))
    labels = (random.random(20_000) < sigmoid(z[:, 0] / known)).astype(np.int64)
    logits = np.stack([-z, z], axis=2)
    assert fit_temperatures(logits, labels) == pytest.approx([known], rel=0.05)


def test_temperatures_have_the_lowest_loss_of_a_grid_layer_by_layer():
    pooled, labels = clusters(layers=3)
    weight, bias = fit_probes(pooled, labels, 3)
    held_out, truth = clusters(layers=3, spread=1.0, seed=0)
    logits = np.einsum("nld,lkd->nlk", held_out, weight) + bias
    found = fit_temperatures(logits, truth)
    assert found.shape == (3,)
    assert found.dtype == np.float32

    def loss(layer, temperature):
        z = logits[:, layer].astype(np.float64) / temperature
        wrong_way = np.where(np.arange(3) == truth[:, None], -z, z)
        return np.logaddexp(0, wrong_way).mean()

    for layer in range(3):
        grid = np.geomspace(0.05, 20, 400)
        best = min(loss(layer, temperature) for temperature in grid)
        assert loss(layer, found[layer]) <= best + 1e-9


@pytest.mark.parametrize(("sign", "end"), [(1, 0.05), (-1, 20.0)])
def test_temperatures_stay_within_their_bounds(sign, end):
    """Held-out text that is all right asks for a temperature of zero, all wrong for an infinite."""
    labels = np.arange(30) % 3
    logits = sign * (10.0 * np.eye(3)[labels] - 5)[:, None]
    assert fit_temperatures(logits, labels) == pytest.approx([end], rel=1e-3)


def test_the_whitelist_holds_heads_that_matter_alike_in_every_domain():
    random = np.random.default_rng(0)
    importance = 1 + 0.01 * random.random((3, 4, 12))
    importance[:, 0, 5] = 9.0  # high everywhere
    importance[:, 1, 2] = [9.0, 9.0, 1.0]  # high on average, and not in the third
    importance[:, 1, 7] = [1.0, 1.0, 9.0]  # high in one
    importance[:, 2] = 4.0  # a layer without preference
    importance[:, 3] *= 1000
    importance[:, 3, [0, 11]] *= [[3.0], [3.1], [2.9]]  # two, in a layer of larger writes
    assert choose_whitelist(importance) == ((0, 5), (3, 0), (3, 11))


def test_the_whitelist_is_empty_where_nothing_stands_out():
    assert choose_whitelist(np.ones((2, 3, 4))) == ()
    # of four heads none can stand 1.5 deviations above the mean with another as high
    importance = np.ones((2, 1, 4))
    importance[:, 0, :2] = 5.0
    assert choose_whitelist(importance) == ()


def test_axes_are_unit_offsets_from_the_mean_over_domains_not_texts():
    pooled = np.array([[0.0, 0.0]] * 9 + [[4.0, 0.0]] + [[2.0, 3.0]] * 2)
    labels = np.array([0] * 9 + [1] + [2] * 2)
    axes = domain_axes(pooled, labels, 3)
    assert axes.dtype == np.float32
    # centres (0,0), (4,0), (2,3), their mean (2,1)
    expected = np.array([[-2, -1], [2, -1], [0, 2]]) / np.array([[5**0.5], [5**0.5], [2]])
    np.testing.assert_allclose(axes, expected, rtol=1e-6)


def test_the_axis_of_a_single_domain_is_zero_and_not_nan():
    assert (domain_axes(np.ones((4, 3)), np.zeros(4, dtype=int), 1) == 0).all()


POOLS = Pools(
    ("numbers", "letters"),
    (
        ("123 45 6789", "3.14159 2.718", "10 100 1000 10000", "42", "7 x 8 = 56"),
        ("abc def ghi", "lorem ipsum dolor sit", "quick brown fox", "zebra", "to be or not"),
    ),
    (("99 98 97", "1 2 3 4 5"), ("alpha beta", "gamma delta epsilon")),
    {"numbers/train.txt": "00"},
)


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    root = tmp_path_factory.mktemp("probed")
    path = make_checkpoint(root, "llama", kv_heads=2, query_heads=4, layers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPP_CACHE", str(root / "cache"))
        source, model = open_source(path), load_dense(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        twice = [probe_model(model, tokenizer, source, POOLS, seed=5) for _ in range(2)]
        yield source, *twice


def test_artifacts_have_the_sizes_of_model_and_pools(probed):
    source, artifacts, _ = probed
    shape = source.shape
    assert artifacts.fingerprint == source.fingerprint
    assert artifacts.domains == POOLS.domains
    assert artifacts.weight.shape == (shape.num_layers, 2, shape.hidden_size)
    assert artifacts.bias.shape == (shape.num_layers, 2)
    assert artifacts.temperature.shape == (len(artifacts.regimes), shape.num_layers)
    assert artifacts.axes.shape == (2, shape.hidden_size)
    assert set(artifacts.importance) == {"head/energy", "head/axis"}
    for scores in artifacts.importance.values():
        assert scores.shape == (2, shape.num_layers, shape.query_heads)
        assert scores.dtype == np.float32
    expected = [
        (d, text) for d, texts in zip(POOLS.domains, POOLS.train, strict=True) for text in texts
    ]
    assert list(artifacts.calibration) == expected
    counts = artifacts.manifest["counts"]["letters"]
    assert counts == {"train": 5, "val": 2, "tokens": sum(len(t) for t in POOLS.train[1])}
    assert artifacts.manifest["seed"] == 5


def test_probing_twice_gives_the_same_numbers(probed):
    _, one, other = probed
    for field in dataclasses.fields(one):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, np.ndarray):
            np.testing.assert_array_equal(left, right)
        elif field.name == "importance":
            for name in left:
                np.testing.assert_array_equal(left[name], right[name])
        else:
            assert left == right


def test_the_probes_know_digits_from_letters(probed):
    _, artifacts, _ = probed
    assert min(artifacts.manifest["validation_accuracy"]) == 1.0
    assert (artifacts.temperature > 0).all()


def test_exports_find_the_moments_of_the_pools_in_the_cache(probed):
    source, artifacts, _ = probed

    def not_needed():
        raise AssertionError("a pass was asked for")

    for domain in artifacts.domains:
        texts = [text for name, text in artifacts.calibration if name == domain]
        assert gather(source, texts, not_needed).is_file()

"""Domain axes in a space of few dimensions, against explicit algebra on constructed texts."""

from __future__ import annotations

import json

import numpy as np
import pytest

from spp_export.domains.axes import choose_space, domain_space


def texts(candidates=4, per=20, width=10, spread=0.5, seed=0):
    """Pooled texts [N,d] around a centre per candidate, on features of unequal scale."""
    random = np.random.default_rng(seed)
    centres = 3 * np.eye(candidates, width)
    labels = np.repeat(np.arange(candidates), per)
    noise = spread * random.standard_normal((len(labels), width))
    scale = np.geomspace(0.01, 100, width)
    return (centres[labels] + noise) * scale + 5, labels


def test_the_space_is_that_of_the_principal_components_of_standardised_text():
    pooled, labels = texts()
    space = domain_space(pooled, labels, 4, dimensions=3)
    standard = (pooled - pooled.mean(0)) / pooled.std(0)
    values, vectors = np.linalg.eigh(standard.T @ standard)
    assert space.basis.shape == (3, 10)
    np.testing.assert_allclose(space.basis @ space.basis.T, np.eye(3), atol=1e-12)
    ours = np.abs(space.basis @ vectors[:, ::-1][:, :3])
    np.testing.assert_allclose(ours, np.eye(3), atol=1e-9)
    assert space.variance == pytest.approx(values[-3:].sum() / values.sum())
    np.testing.assert_allclose(space.texts, space.embed(pooled), atol=1e-12)


def test_axes_are_unit_offsets_of_centres_from_the_mean_of_all_centres():
    pooled, labels = texts(candidates=3)
    labels = np.where(np.arange(len(labels)) < 30, 0, labels)  # unequal numbers of texts
    space = domain_space(pooled, labels, 3)
    embedded = space.embed(pooled)
    centres = np.array([embedded[labels == k].mean(0) for k in range(3)])
    for k in range(3):
        offset = centres[k] - sum(centres) / 3
        np.testing.assert_allclose(space.axes[k], offset / np.linalg.norm(offset), atol=1e-9)
    for i, j in np.ndindex(3, 3):
        assert space.cosines[i, j] == pytest.approx(space.axes[i] @ space.axes[j], abs=1e-12)


def test_an_axis_in_the_stream_is_where_moving_along_it_leads_in_the_space():
    pooled, labels = texts()
    space = domain_space(pooled, labels, 4)
    directions = space.residual_axes()
    assert directions.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, rtol=1e-6)
    for k in range(4):
        step = space.embed(pooled[:1] + directions[k]) - space.embed(pooled[:1])
        np.testing.assert_allclose(step[0] / np.linalg.norm(step), space.axes[k], atol=1e-5)


def test_separation_is_the_least_d_prime_on_the_line_to_another_centre():
    pooled, labels = texts()
    space = domain_space(pooled, labels, 4)
    embedded = space.embed(pooled)
    for k in range(4):
        best = float("inf")
        for j in set(range(4)) - {k}:
            a, b = embedded[labels == k], embedded[labels == j]
            line = (b.mean(0) - a.mean(0)) / np.linalg.norm(b.mean(0) - a.mean(0))
            gap = b.mean(0) @ line - a.mean(0) @ line
            best = min(best, gap / np.sqrt(((a @ line).var() + (b @ line).var()) / 2))
        assert space.separation()[k] == pytest.approx(best)


def test_separation_falls_as_texts_scatter():
    tight, loose = (domain_space(*texts(spread=s), 4).separation() for s in (0.2, 1.0))
    assert (tight > 2 * loose).all()


def test_the_layer_is_the_one_where_held_out_text_is_told_apart():
    random = np.random.default_rng(0)
    told, labels = texts(spread=0.3)
    layers = [random.standard_normal(told.shape) for _ in range(8)]
    layers[4] = told
    train = np.stack(layers, axis=1)
    space, accuracy = choose_space(train[::2], labels[::2], train[1::2], labels[1::2], 4)
    assert space.layer == 4
    assert list(accuracy) == [2, 4, 6, 7]
    assert accuracy[4] == 1.0
    assert max(accuracy[i] for i in (2, 6, 7)) < 0.8


def test_a_single_candidate_has_the_axis_zero_and_figures_that_are_json():
    space = domain_space(np.ones((4, 3)), np.zeros(4, dtype=int), 1)
    assert (space.residual_axes() == 0).all()
    record = json.loads(json.dumps(space.to_dict(["only"]), allow_nan=False))
    assert record["separation"] == {"only": None}
    assert record["max_abs_cosine"] is None


def test_two_candidates_lie_opposite_each_other():
    space = domain_space(*texts(candidates=2), 2)
    record = space.to_dict(["a", "b"])
    assert record["cosines"] == [[1.0, -1.0], [-1.0, 1.0]]
    assert record["mean_abs_cosine"] == record["max_abs_cosine"] == 1.0
    assert record["dimensions"] == 10
    assert record["variance"] == pytest.approx(1.0)

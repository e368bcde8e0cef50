"""The released algorithm against a plain twin written from its description, and its properties."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spp_export.common.errors import ArtifactsError, ScenarioError, UsageError
from spp_export.data.conversation import plain
from spp_export.data.scenario import Scenario
from spp_export.planning.published import (
    COMMON_WORDS,
    infer_domains,
    published_mask,
    published_text,
    remove_common_words,
)


def twin_inferred(p):
    layers, domains = len(p), len(p[0])
    shares = [[value / sum(row) for value in row] for row in p]
    score = {}
    for k in range(domains):
        column = sorted((row[k] for row in shares), reverse=True)
        top = column[:5]
        present = sum(1 for layer in range(layers) if shares[layer][k] > 0.05)
        score[k] = (0.6 * sum(top) / len(top) + 0.4 * column[0]) * (1 + 0.3 / (present + 1))
    left = {k: v for k, v in score.items() if v >= 0.05} or score
    high = [k for k in left if left[k] >= 0.15]
    if len(high) >= 2:
        return sorted(high, key=lambda k: -left[k])
    return [max(left, key=lambda k: left[k])]


def twin_mask(p, importance, whitelist, strength):
    layers, heads, domains = len(importance), len(importance[0]), len(p[0])
    s = [max(row[k] for row in p) for k in range(domains)]
    q = [sum(row[k] for row in p) / len(p) for k in range(domains)]
    qn = [value / sum(q) for value in q]
    c = -sum(v * math.log(v + 1e-8) for v in qn) / math.log(domains)
    beta = min(0.1 + strength * c, 1.0)
    low = max(s) < 0.1
    valid = [value for value in s if value >= 0.1]
    smax, smin = (max(valid), min(valid)) if valid else (max(s), 0.1)
    inferred = twin_inferred(p)
    used = [k for k in inferred if low or s[k] >= 0.1]

    def warp(x):
        return smin + ((x - smin) / (smax - smin)) ** 1.5 * (smax - smin)

    def score(layer, head, k):
        if low:
            return max(s[k], 0.3) * sum(importance[layer][head]) / domains
        return s[k] * importance[layer][head][k]

    every = [(layer, head) for layer in range(layers) for head in range(heads)]
    chosen = set(whitelist)
    for k in used:
        effective = s[k]
        if low:
            effective = max(s[k], 0.3)
        elif smax > smin:
            effective = warp(warp(s[k]))
        kappa = min(beta * effective, 1.0)
        ranked = sorted(every, key=lambda unit, k=k: -score(*unit, k))
        chosen |= set(ranked[: max(1, int(len(every) * kappa))])

    def fill(units, least):
        left = [unit for unit in units if unit not in chosen]
        left.sort(key=lambda unit: -max((score(*unit, k) for k in used), default=0.0))
        have = sum(unit in chosen for unit in units)
        chosen.update(left[: max(least - have, 0)])

    rows = [[(layer, head) for head in range(heads)] for layer in range(layers)]
    for row in rows:
        fill(row, 1)
    if used:
        fill(every, max(int(0.05 * len(every)), layers))
    for row in rows:
        fill(row, max(int(0.1 * heads), 1))
    return chosen


@pytest.mark.parametrize("seed", range(40))
def test_matches_the_plain_twin(seed):
    rng = np.random.default_rng(seed)
    layers, heads, domains = rng.integers(2, 9), rng.integers(2, 45), rng.integers(2, 7)
    # Exponents reach from flat to sharp, scales from all-low to saturated.
    p = rng.random((layers, domains)) ** rng.choice([0.3, 1, 4]) * rng.choice([0.09, 0.5, 1.0])
    importance = rng.random((layers, heads, domains))
    units = rng.integers(0, [layers, heads], size=(rng.integers(0, 6), 2))
    whitelist = [(int(layer), int(head)) for layer, head in units]
    strength = float(rng.choice([0.0, 0.2, 0.5, 1.0]))
    result = published_mask(p, importance, whitelist, strength)
    assert list(result.inferred) == twin_inferred(p.tolist())
    expected = twin_mask(p.tolist(), importance.tolist(), whitelist, strength)
    assert {(int(a), int(b)) for a, b in np.argwhere(result.mask)} == expected


@pytest.mark.parametrize("seed", range(10))
def test_more_strength_keeps_more(seed):
    """The knob works against its name."""
    rng = np.random.default_rng(seed)
    probabilities, importance = rng.random((8, 6)) ** 2, rng.random((8, 16, 6))
    counts = [
        int(published_mask(probabilities, importance, [(0, 3)], eta).mask.sum())
        for eta in np.linspace(0, 1, 21)
    ]
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]


@pytest.mark.parametrize("scale", [0.09, 1.0])
def test_ranking_by_importance_only_changes_nothing(scale):
    rng = np.random.default_rng(3)
    probabilities, importance = rng.random((6, 4)) * scale, rng.random((6, 24, 4))
    plain = published_mask(probabilities, importance, [], 0.4)
    ablated = published_mask(probabilities, importance, [], 0.4, importance_only=True)
    assert (plain.mask == ablated.mask).all()


def test_layers_without_a_probe_are_simply_not_in_the_probabilities():
    rng = np.random.default_rng(4)
    result = published_mask(rng.random((3, 2)), rng.random((5, 4, 2)), [], 0.5)
    assert result.mask.shape == (5, 4)
    assert result.mask.any(axis=1).all()


def test_a_layer_of_zero_probabilities_is_not_divided_by():
    assert infer_domains(np.array([[0.0, 0.0], [0.0, 0.6]])) == (1,)


def test_single_precision_is_accepted():
    rng = np.random.default_rng(5)
    probabilities, importance = rng.random((4, 3)), rng.random((4, 6, 3))
    half = published_mask(probabilities.astype("f4"), importance.astype("f4"), [], 0.5)
    assert (half.mask == published_mask(probabilities, importance, [], 0.5).mask).all()


@pytest.mark.parametrize(
    ("probabilities", "importance", "whitelist", "strength", "error", "match"),
    [
        (np.zeros(3), np.zeros((1, 1, 3)), [], 0.5, ArtifactsError, "probabilities: expected"),
        (np.full((1, 2), 1.5), np.zeros((1, 1, 2)), [], 0.5, ArtifactsError, "from 0 to 1"),
        (np.full((1, 2), np.nan), np.zeros((1, 1, 2)), [], 0.5, ArtifactsError, "from 0 to 1"),
        (np.ones((1, 2)), np.zeros((1, 1, 3)), [], 0.5, ArtifactsError, "2 domains"),
        (np.ones((1, 2)), np.full((1, 1, 2), np.inf), [], 0.5, ArtifactsError, "not finite"),
        (np.ones((1, 2)), np.zeros((1, 1, 2)), [(0, 1)], 0.5, ArtifactsError, "layer 0, head 1"),
        (np.ones((1, 2)), np.zeros((1, 1, 2)), [(-1, 0)], 0.5, ArtifactsError, "layer -1"),
        (np.ones((1, 2)), np.zeros((1, 1, 2)), [], -0.1, UsageError, "strength"),
        (np.ones((1, 2)), np.zeros((1, 1, 2)), [], math.nan, UsageError, "strength"),
    ],
)
def test_bad_input_is_named(probabilities, importance, whitelist, strength, error, match):
    with pytest.raises(error, match=match):
        published_mask(probabilities, importance, whitelist, strength)


def test_common_words_and_punctuation_go():
    text = "Hello! What is the pH of 0.1 M HCl, and why don't they say_it?"
    # "don't" is two words, the first of them not a common one; "_" belongs to a word.
    assert remove_common_words(text) == "ph 0 1 m hcl don t say_it"
    assert remove_common_words("  Yes, PLEASE\tthank you. ") == ""
    assert len(COMMON_WORDS) == 64
    assert COMMON_WORDS.isdisjoint({"if", "then", "than", "so", "because", "after", "her", "say"})


def test_the_description_comes_before_the_first_prompt():
    prompts = ("What is an acid?", "And a base?")
    assert (
        published_text(Scenario("x", "", tuple(map(plain, prompts)), "The scenario of acids"))
        == "scenario acids"
    )
    assert published_text(Scenario("x", "", tuple(map(plain, prompts)), "")) == "acid"
    assert published_text(Scenario("x", "", tuple(map(plain, prompts)))) == "acid"
    with pytest.raises(ScenarioError, match="common words"):
        published_text(Scenario("x", "", (plain("What is it?"),)))

"""Every criterion against its definition: single weights and tokens, one loop per sum."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import prod

import numpy as np
import pytest

from spp_export.calibration.statistics import (
    AttentionInputs,
    Axis,
    Gradients,
    LayerStatistics,
    LayerWeights,
    MlpInputs,
)
from spp_export.importance import SCORING

HEADS, DIM, HIDDEN, CHANNELS = 6, 3, 8, 7
TEXTS, LENGTH = 4, 5
TOKENS = TEXTS * LENGTH
EPS = 1e-6


@dataclass
class Layer:
    """A layer with all that it saw: weights and their gradients by name, inputs [tokens, in]."""

    groups: int
    weights: dict
    gradients: dict
    x_attention: np.ndarray
    a: np.ndarray
    x_mlp: np.ndarray
    z: np.ndarray
    grad_a: np.ndarray
    grad_z: np.ndarray
    axis: np.ndarray

    def rows(self, h):
        return range(h * DIM, (h + 1) * DIM)

    def shared_rows(self, h):
        return self.rows(h // (HEADS // self.groups))


def make(groups):
    random = np.random.default_rng(groups)
    shapes = {
        "query": (HEADS * DIM, HIDDEN),
        "key": (groups * DIM, HIDDEN),
        "value": (groups * DIM, HIDDEN),
        "output": (HIDDEN, HEADS * DIM),
        "gate": (CHANNELS, HIDDEN),
        "up": (CHANNELS, HIDDEN),
        "down": (HIDDEN, CHANNELS),
    }

    def normal(*shape):
        return random.standard_normal(shape)

    def inputs(size):
        return normal(TOKENS, size) * random.gamma(2.0, size=size) + random.standard_normal(size)

    axis = normal(HIDDEN)
    return Layer(
        groups,
        {name: normal(*shape) * random.gamma(2.0) for name, shape in shapes.items()},
        {name: normal(*shape) * random.gamma(2.0) for name, shape in shapes.items()},
        inputs(HIDDEN),
        inputs(HEADS * DIM),
        inputs(HIDDEN),
        inputs(CHANNELS),
        normal(TOKENS, HEADS * DIM),
        normal(TOKENS, CHANNELS),
        axis / np.linalg.norm(axis),
    )


def head_writes(layer):
    """[tokens, H, d]"""
    blocks = layer.weights["output"].reshape(HIDDEN, HEADS, DIM)
    return np.einsum("dhi,thi->thd", blocks, layer.a.reshape(TOKENS, HEADS, DIM))


def gates(products):
    """Mean over texts of the absolute sum over a text's tokens, of [tokens, units]."""
    return np.abs(products.reshape(TEXTS, LENGTH, -1).sum(axis=1)).mean(axis=0)


def reduce(layer):
    """What the passes over the texts keep of a layer."""
    a, z = layer.a, layer.z
    by_head = a.reshape(TOKENS, HEADS, DIM)
    saliency = {n: np.abs(layer.weights[n] * layer.gradients[n]) for n in layer.weights}
    writes = head_writes(layer)
    energy = (writes**2).sum(axis=2)
    return LayerStatistics(
        layer=0,
        heads=HEADS,
        groups=layer.groups,
        weights=LayerWeights(**layer.weights),
        attention=AttentionInputs(
            (layer.x_attention**2).mean(axis=0),
            a.mean(axis=0),
            (a**2).mean(axis=0),
            np.einsum("thi,thj->hij", by_head, by_head) / TOKENS,
        ),
        mlp=MlpInputs((layer.x_mlp**2).mean(axis=0), z.mean(axis=0), (z**2).mean(axis=0)),
        gradients=Gradients(
            **{f"{n}_rows": saliency[n].sum(axis=1) for n in ("query", "key", "value")},
            **{f"{n}_rows": saliency[n].sum(axis=1) for n in ("gate", "up")},
            **{f"{n}_columns": saliency[n].sum(axis=0) for n in ("output", "down")},
            head_gates=gates((a * layer.grad_a).reshape(TOKENS, HEADS, DIM).sum(axis=2)),
            channel_gates=gates(z * layer.grad_z),
        ),
        axis=Axis(layer.axis, ((writes @ layer.axis) ** 2 / (energy + EPS)).mean(axis=0)),
    )


@pytest.fixture(params=[1, 2, 6], ids=["mqa", "gqa", "mha"])
def layer(request):
    return make(request.param)


def check(name, layer, heads, channels, rtol=1e-9):
    statistics = reduce(layer)
    np.testing.assert_allclose(SCORING[name].heads(statistics), heads, rtol=rtol)
    np.testing.assert_allclose(SCORING[name].channels(statistics), channels, rtol=rtol)


def norm(inputs, j, per=TOKENS):
    """Root of the energy of input j over tokens, or per sequence as Wanda has it."""
    return (sum(inputs[t, j] ** 2 for t in range(TOKENS)) / per) ** 0.5


def wanda_scores(weight, inputs, per=TOKENS):
    """|W[i,j]| n_j of every single weight."""
    scores = np.zeros(weight.shape)
    for i, j in np.ndindex(weight.shape):
        scores[i, j] = abs(weight[i, j]) * norm(inputs, j, per)
    return scores


def block_sum(layer, of, h):
    """A head's part of per-weight scores of its own matrices and 1/g of its KV head's."""
    g = HEADS // layer.groups
    total = 0.0
    for j in range(HIDDEN):
        total += sum(of["query"][r, j] for r in layer.rows(h))
        total += sum(of["output"][j, c] for c in layer.rows(h))
        total += sum(of["key"][r, j] + of["value"][r, j] for r in layer.shared_rows(h)) / g
    return total


def channel_sum(of, c):
    return sum(of["gate"][c, j] + of["up"][c, j] + of["down"][j, c] for j in range(HIDDEN))


def output_only(layer, score):
    """Sums over a unit's weights of score(weight matrix, inputs)[i,c]."""
    o = score(layer.weights["output"], layer.a)
    d = score(layer.weights["down"], layer.z)
    return (
        [sum(o[i, c] for i in range(HIDDEN) for c in layer.rows(h)) for h in range(HEADS)],
        [sum(d[i, c] for i in range(HIDDEN)) for c in range(CHANNELS)],
    )


def test_energy_is_the_mean_square_of_every_tokens_write(layer):
    heads, channels = np.zeros(HEADS), np.zeros(CHANNELS)
    for t in range(TOKENS):
        for h in range(HEADS):
            write = sum(layer.weights["output"][:, c] * layer.a[t, c] for c in layer.rows(h))
            heads[h] += write @ write / TOKENS
        for c in range(CHANNELS):
            write = layer.weights["down"][:, c] * layer.z[t, c]
            channels[c] += write @ write / TOKENS
    check("energy", layer, np.sqrt(heads), np.sqrt(channels))


def test_axis_is_the_share_along_the_axis_of_every_tokens_write(layer):
    heads, channels = np.zeros(HEADS), np.zeros(CHANNELS)
    for t in range(TOKENS):
        for h in range(HEADS):
            write = sum(layer.weights["output"][:, c] * layer.a[t, c] for c in layer.rows(h))
            heads[h] += (layer.axis @ write) ** 2 / (write @ write + EPS) / TOKENS
        for c in range(CHANNELS):
            write = layer.weights["down"][:, c] * layer.z[t, c]
            channels[c] += (layer.axis @ write) ** 2 / (write @ write) / TOKENS
    check("axis", layer, heads, channels)


def test_axis_of_a_channel_that_writes_nothing_is_zero(layer):
    layer.weights["down"][:, 2] = 0
    scores = SCORING["axis"].channels(reduce(layer))
    assert scores[2] == 0
    assert (np.delete(scores, 2) > 0).all()
    assert (scores <= 1).all()


def test_taylor_is_the_gradient_of_a_gate_text_by_text(layer):
    heads, channels = np.zeros(HEADS), np.zeros(CHANNELS)
    for text in range(TEXTS):
        tokens = range(text * LENGTH, (text + 1) * LENGTH)
        for h in range(HEADS):
            slope = sum(layer.a[t, c] * layer.grad_a[t, c] for t in tokens for c in layer.rows(h))
            heads[h] += abs(slope) / TEXTS
        for c in range(CHANNELS):
            channels[c] += abs(sum(layer.z[t, c] * layer.grad_z[t, c] for t in tokens)) / TEXTS
    check("taylor", layer, heads, channels)


def test_wanda_sp_is_the_sum_of_wanda_scores_of_the_output(layer):
    check("wanda-sp", layer, *output_only(layer, wanda_scores))


def test_wanda_adds_all_matrices_each_by_its_own_mean(layer):
    inputs = dict.fromkeys(("query", "key", "value"), layer.x_attention)
    inputs |= {"output": layer.a, "gate": layer.x_mlp, "up": layer.x_mlp, "down": layer.z}
    scores = {n: wanda_scores(layer.weights[n], inputs[n], per=TEXTS) for n in inputs}
    scores = {n: s / (s.sum() / prod(s.shape)) for n, s in scores.items()}
    # The mean over single weights is 1/(weights in a unit) of that over units, for every matrix.
    heads = [block_sum(layer, scores, h) / (DIM * HIDDEN) for h in range(HEADS)]
    channels = [channel_sum(scores, c) / HIDDEN for c in range(CHANNELS)]
    check("wanda", layer, heads, channels)


def test_flap_is_the_standardised_fluctuation(layer):
    def metric(weight, inputs, power):
        size = weight.shape[1]
        values = []
        for c in range(size):
            mean = sum(inputs[:, c]) / TOKENS
            variance = sum((x - mean) ** 2 for x in inputs[:, c]) / TOKENS
            values.append((variance * sum(w**2 for w in weight[:, c])) ** power)
        mean = sum(values) / size
        deviation = (sum((v - mean) ** 2 for v in values) / (size - 1)) ** 0.5
        return [(v - mean) / deviation for v in values]

    o = metric(layer.weights["output"], layer.a, 2)
    heads = [sum(o[c] for c in layer.rows(h)) / DIM for h in range(HEADS)]
    check("flap", layer, heads, metric(layer.weights["down"], layer.z, 1))


def test_ppsp_is_the_norm_of_a_units_squared_weights_times_energy(layer):
    def score(weight, inputs):
        return (weight**2 * (inputs**2).mean(axis=0)[None, :]) ** 2

    heads, channels = output_only(layer, score)
    check("ppsp", layer, np.sqrt(heads), np.sqrt(channels))


def test_llm_pruner_is_the_sum_of_single_saliencies(layer):
    saliency = {n: np.abs(layer.weights[n] * layer.gradients[n]) for n in layer.weights}
    heads = [block_sum(layer, saliency, h) for h in range(HEADS)]
    check("llm-pruner", layer, heads, [channel_sum(saliency, c) for c in range(CHANNELS)])
    # Whole groups, in the fold [G,g,dh]: all there is of a KV head and of the heads that read it.
    g = HEADS // layer.groups
    found = SCORING["llm-pruner"].heads(reduce(layer)).reshape(layer.groups, g).sum(axis=1)
    for k in range(layer.groups):
        query, shared = slice(k * g * DIM, (k + 1) * g * DIM), slice(k * DIM, (k + 1) * DIM)
        whole = saliency["query"][query].sum() + saliency["output"][:, query].sum()
        whole += saliency["key"][shared].sum() + saliency["value"][shared].sum()
        assert found[k] == pytest.approx(whole)


def test_ria_is_the_sum_of_both_shares_times_the_root_of_the_norm(layer):
    def score(weight, inputs):
        scores = np.zeros(weight.shape)
        for i, c in np.ndindex(weight.shape):
            of_column = abs(weight[i, c]) / sum(abs(weight[:, c]))
            of_row = abs(weight[i, c]) / sum(abs(weight[i, :]))
            scores[i, c] = (of_column + of_row) * norm(inputs, c) ** 0.5
        return scores

    check("ria", layer, *output_only(layer, score))


def test_ria_gives_nothing_to_columns_of_zeros(layer):
    layer.weights["down"][:, 4] = 0
    layer.weights["down"][3] = 0
    scores = SCORING["ria"].channels(reduce(layer))
    assert scores[4] == 0
    assert (np.delete(scores, 4) > 0).all()


def test_dass_weighs_channels_and_leaves_heads_to_wanda_sp(layer):
    read, written = np.zeros(CHANNELS), np.zeros(CHANNELS)
    for c in range(CHANNELS):
        size = norm(layer.z, c, per=TEXTS)
        for j in range(HIDDEN):
            read[c] += (abs(layer.weights["gate"][c, j]) + abs(layer.weights["up"][c, j])) * (
                size**0.5
            )
            written[c] += abs(layer.weights["down"][j, c]) * size
    channels = read / (sum(read) / CHANNELS) + written / (sum(written) / CHANNELS)
    check("dass", layer, SCORING["wanda-sp"].heads(reduce(layer)), channels)
    assert SCORING["dass"].companion == "wanda-sp"


def test_loraprune_adds_vectors_of_unit_length(layer):
    saliency = {n: np.abs(layer.weights[n] * layer.gradients[n]) for n in layer.weights}
    g = HEADS // layer.groups
    votes = {
        name: [sum(saliency[name][r].sum() for r in layer.rows(k)) for k in range(count)]
        for name, count in (("query", HEADS), ("key", layer.groups), ("value", layer.groups))
    }
    votes["output"] = [saliency["output"][:, list(layer.rows(h))].sum() for h in range(HEADS)]
    votes |= {name: [sum(row) for row in saliency[name]] for name in ("gate", "up")}
    votes["down"] = [sum(column) for column in saliency["down"].T]
    votes = {n: np.array(v) / sum(x**2 for x in v) ** 0.5 for n, v in votes.items()}
    heads = [
        votes["query"][h] + votes["output"][h] + (votes["key"][h // g] + votes["value"][h // g]) / g
        for h in range(HEADS)
    ]
    check("loraprune", layer, heads, votes["gate"] + votes["up"] + votes["down"])


def test_magnitude_is_the_sum_of_column_norms(layer):
    o = [sum(w**2 for w in column) ** 0.5 for column in layer.weights["output"].T]
    heads = [sum(o[c] for c in layer.rows(h)) for h in range(HEADS)]
    down = [sum(w**2 for w in column) ** 0.5 for column in layer.weights["down"].T]
    check("magnitude", layer, heads, down)


@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize("name", ["wanda", "llm-pruner", "loraprune"])
def test_a_larger_kv_head_counts_for_the_heads_that_read_it(name, part):
    """Heads 0 to 2 read KV head 0 and 3 to 5 KV head 1; read with the wrong fold they alternate."""
    layer = make(2)
    before = SCORING[name].heads(reduce(layer))
    layer.weights[part][DIM:] *= 5
    change = SCORING[name].heads(reduce(layer)) - before
    assert (change[3:] > 0.01 * before[3:]).all()
    np.testing.assert_allclose(change[3:], change[3])
    np.testing.assert_allclose(change[:3], change[0], atol=1e-12)
    assert change[0] <= 1e-12


@pytest.mark.parametrize("name", [n for n, c in SCORING.items() if c.convention != "group-sum"])
def test_output_only_criteria_do_not_read_the_other_matrices(name):
    statistics = reduce(make(2))
    blank = {
        field.name: np.zeros_like(getattr(statistics.weights, field.name))
        for field in fields(LayerWeights)
        if field.name not in {"output", "down"}
    }
    bare = replace(statistics, weights=replace(statistics.weights, **blank))
    for units in (SCORING[name].heads, SCORING[name].channels):
        np.testing.assert_array_equal(units(bare), units(statistics))

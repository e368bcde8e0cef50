"""The static builds against Probe Pruning spelled out one text and one layer at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from factories import CASES, make_checkpoint
from probed_models import hooks, lowest_removed, opened, padded, scenario_by_hand, some_texts

from spp_export.common.errors import ScenarioError
from spp_export.importance.probe_pruning import History, gather_history, scenario_scores

TEXTS = some_texts([13, 6, 24], seed=3)
# Of 8 heads and 96 channels at 0.4 in a model too shallow to protect any layer.
COUNTS = {"heads": 5, "channels": 64}
PRUNES = {"heads": ("heads",), "channels": ("channels",), "both": ("heads", "channels")}
EIGHT = [case for case in CASES if case.options["query_heads"] == 8]


@pytest.fixture(scope="module")
def opened_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenario")
    return opened(make_checkpoint(folder, "qwen3", kv_heads=2, query_heads=8))


@pytest.fixture(scope="module")
def history(opened_model):
    return gather_history(*opened_model, [padded(some_texts([30, 18, 11], seed=9))], positions=20)


def compared(model_of, texts, batches, *, units, history, full):
    model, family, shape = model_of
    heads, channels = scenario_scores(
        model, family, shape, batches, ratio=0.4, history=history, full=full, units=units
    )
    expected, _ = scenario_by_hand(
        model,
        shape,
        texts,
        kept_of=lowest_removed(COUNTS),
        history=history,
        full=full,
        prunes=PRUNES[units],
    )
    np.testing.assert_allclose(heads, expected["heads"].numpy(), rtol=1e-6)
    np.testing.assert_allclose(channels, expected["channels"].numpy(), rtol=1e-6)


@pytest.mark.parametrize("units", ["heads", "channels", "both"])
@pytest.mark.parametrize("full", [False, True])
def test_scores_on_the_pruned_prefix(opened_model, history, units, full):
    batches = [padded(TEXTS[:2], width=15), padded(TEXTS[2:])]
    compared(
        opened_model, TEXTS, batches, units=units, history=None if full else history, full=full
    )


@pytest.mark.parametrize("case", EIGHT, ids=lambda case: case.name)
@pytest.mark.parametrize("full", [False, True])
def test_every_family_without_a_history(case, full, tmp_path):
    model_of = opened(case.make(tmp_path, shards=1))
    compared(model_of, TEXTS, [padded(TEXTS)], units="both", history=None, full=full)


@pytest.mark.parametrize("full", [False, True])
def test_padding_and_batching_change_nothing(opened_model, history, full):
    def scores(batches):
        return scenario_scores(
            *opened_model, batches, ratio=0.4, history=history, full=full, units="both"
        )

    expected = scores([padded([text]) for text in TEXTS])
    found = scores([padded(TEXTS, width=40, filler=7)])
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)


def test_the_full_batch_reads_no_history(opened_model, history):
    other = History(tuple(7 * h for h in history.heads), tuple(7 * c for c in history.channels))
    batches = [padded(TEXTS)]
    found = [
        scenario_scores(*opened_model, batches, ratio=0.4, history=h, full=True, units="both")
        for h in (None, history, other)
    ]
    for ours in found[1:]:
        np.testing.assert_array_equal(ours[0], found[0][0])
        np.testing.assert_array_equal(ours[1], found[0][1])


def test_protected_layers_have_scores_but_lose_nothing(tmp_path):
    model, family, shape = opened(
        make_checkpoint(tmp_path, "llama", kv_heads=4, query_heads=8, layers=6)
    )
    heads, _ = scenario_scores(
        model, family, shape, [padded(TEXTS)], ratio=0.2, history=None, full=True, units="heads"
    )
    # 6/3 * 0.2 of 8 heads in the last three layers
    dropped = {0: 0, 1: 0, 2: 0, 3: 3, 4: 3, 5: 3}

    def kept_of(_kind, layer, scores):
        kept = torch.ones(len(scores), dtype=torch.bool)
        kept[scores.argsort()[: dropped[layer]]] = False
        return kept

    expected, _ = scenario_by_hand(model, shape, TEXTS, kept_of=kept_of, full=True)
    np.testing.assert_allclose(heads, expected["heads"].numpy(), rtol=1e-6)
    assert (heads > 0).all()


def test_hooks_go_when_the_text_fails(opened_model):
    batch = padded(TEXTS)
    batch.input_ids[0, 0] = 10**6
    with pytest.raises(IndexError):
        scenario_scores(*opened_model, [batch], ratio=0.4, history=None, full=True, units="both")
    assert hooks(opened_model[0]) == 0


def test_a_scenario_without_text_is_refused(opened_model):
    with pytest.raises(ScenarioError, match="no text"):
        scenario_scores(*opened_model, [], ratio=0.4, history=None, full=True, units="both")


def test_a_model_in_half_precision(tmp_path):
    path = make_checkpoint(tmp_path, "mistral", kv_heads=2, query_heads=8, dtype="bfloat16")
    model, family, shape = opened(path)
    low = scenario_scores(
        model.bfloat16(),
        family,
        shape,
        [padded(TEXTS)],
        ratio=0.4,
        history=None,
        full=True,
        units="heads",
    )
    high = scenario_scores(
        model.double(),
        family,
        shape,
        [padded(TEXTS)],
        ratio=0.4,
        history=None,
        full=True,
        units="heads",
    )
    np.testing.assert_allclose(low[0][0], high[0][0], rtol=0.05)

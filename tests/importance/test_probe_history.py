"""The history: means by position over the texts that reach it."""

from __future__ import annotations

import pytest
import torch
from factories import make_checkpoint
from probed_models import captured, hooks, opened, padded, some_texts

from spp_export.common.errors import UsageError
from spp_export.common.progress import show_progress
from spp_export.importance.probe_pruning import gather_history


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("history")
    return opened(make_checkpoint(folder, "qwen2", kv_heads=2, query_heads=4, layers=2))


@torch.no_grad()
def test_history_against_one_text_at_a_time(model_of):
    model, family, shape = model_of
    texts = some_texts([7, 12, 3, 20])
    history = gather_history(
        model, family, shape, [padded(texts[:3], width=15), padded(texts[3:])], positions=16
    )
    assert history.positions == 16
    assert hooks(model) == 0
    for layer in range(2):
        sums, counts = {"heads": 0, "channels": 0}, torch.zeros(16, 1)
        for text in texts:
            with captured(model, layer) as seen:
                model(torch.tensor([text[:16]]), use_cache=False)
            reached = min(len(text), 16)
            counts[:reached] += 1
            for kind in sums:
                squares = torch.zeros(16, seen[f"{kind} a"].shape[-1], dtype=torch.float64)
                squares[:reached] = seen[f"{kind} a"][0] ** 2
                sums[kind] = sums[kind] + squares
        for kind, total in sums.items():
            found = getattr(history, kind)[layer]
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, (total / counts.clamp(min=1)).float())


def test_positions_no_text_reached_are_zero_and_progress_counts_tokens(model_of):
    model, family, shape = model_of
    told = []

    class Bar:
        def __init__(self, _description, total):
            told.append(total)

        def __enter__(self):
            return told.append

        def __exit__(self, *_):
            return None

    batches = [padded(some_texts([5])), padded(some_texts([2, 4]))]
    with show_progress(Bar):
        history = gather_history(model, family, shape, batches, positions=8)
    assert not history.heads[0][5:].any()
    assert history.heads[0][:5].any(dim=1).all()
    assert told == [11, 5, 11]


def test_a_history_of_nothing_is_refused(model_of):
    with pytest.raises(UsageError, match="needs text"):
        gather_history(*model_of, [])


def test_hooks_go_when_a_batch_fails(model_of):
    model, family, shape = model_of
    batch = padded(some_texts([4]))
    batch.input_ids[0, 0] = 10**6
    with pytest.raises(IndexError):
        gather_history(model, family, shape, [batch])
    assert hooks(model) == 0

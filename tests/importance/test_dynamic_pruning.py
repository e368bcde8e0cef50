"""Masks decided per batch: which, on what, and that nothing stays behind."""

from __future__ import annotations

import pytest
import torch
from factories import CASES, make_checkpoint, mask_in_torch
from probed_models import (
    captured,
    chosen_positions,
    everything,
    explicit_scores,
    fused,
    hooks,
    lowest_removed,
    opened,
    padded,
    probed_inputs,
    run,
    scenario_by_hand,
    some_texts,
    with_kept,
)

from spp_campaigns.probe_pruning import probe_pruning
from spp_export.common.errors import UsageError
from spp_export.evaluation.oracle import masked_dense
from spp_export.importance.probe_pruning import History, gather_history
from spp_export.planning import Plan

COUNTS = {"heads": 5, "channels": 64}
KINDS = ("heads", "channels")
EIGHT = [case for case in CASES if case.options["query_heads"] == 8]
TEXT = some_texts([26], seed=5)


@pytest.fixture(scope="module")
def opened_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dynamic")
    return opened(make_checkpoint(folder, "qwen2", kv_heads=2, query_heads=8))


@pytest.fixture(scope="module")
def history(opened_model):
    return gather_history(*opened_model, [padded(some_texts([30, 18, 11], seed=9))], positions=20)


@pytest.fixture(autouse=True)
def nothing_left(opened_model):
    yield
    assert hooks(opened_model[0]) == 0


def plan_of(record, shape):
    layers = everything(shape)
    for kind in KINDS:
        for layer, decision in getattr(record, kind).items():
            layers = with_kept(layers, layer, kind, decision.kept)
    return layers


def pruned(model_of, history=None, *, units="both", full_batch=False, ratio=0.4):
    return probe_pruning(
        *model_of, ratio=ratio, history=history, units=units, full_batch=full_batch
    )


def same_decisions(first, second):
    for kind in KINDS:
        ours, theirs = getattr(first, kind), getattr(second, kind)
        assert ours.keys() == theirs.keys()
        for layer in ours:
            torch.testing.assert_close(ours[layer].scores, theirs[layer].scores)
            assert torch.equal(ours[layer].kept, theirs[layer].kept)


@pytest.mark.parametrize("case", EIGHT, ids=lambda case: case.name)
@pytest.mark.parametrize("full_batch", [False, True])
def test_one_text_against_the_method_spelled_out(case, full_batch, tmp_path):
    """With one text in the batch, a batch's decisions are those of the scenario's build."""
    model, family, shape = opened(case.make(tmp_path, shards=1))
    history = gather_history(model, family, shape, [padded(some_texts([30, 11]))], positions=32)
    scores, layers = scenario_by_hand(
        model,
        shape,
        TEXT,
        kept_of=lowest_removed(COUNTS),
        history=history,
        full=full_batch,
        prunes=KINDS,
    )
    with pruned((model, family, shape), history, full_batch=full_batch) as record:
        found = run(model, padded(TEXT))
    for kind in KINDS:
        for layer, expected in enumerate(scores[kind]):
            decision = getattr(record, kind)[layer]
            torch.testing.assert_close(decision.scores, expected, rtol=1e-6, atol=0)
            assert int(decision.kept.sum()) == COUNTS[kind]
    with mask_in_torch(model, layers):
        torch.testing.assert_close(found, run(model, padded(TEXT)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("full_batch", [False, True])
def test_masks_equal_the_masked_dense_model(opened_model, history, full_batch):
    model, family, shape = opened_model
    batch = padded(some_texts([22, 9, 15]))
    plain = run(model, batch)
    with pruned(opened_model, history, full_batch=full_batch) as record:
        found = run(model, batch)
    plan = Plan("f" * 64, "dense", "per-layer", "none", tuple(plan_of(record, shape)))
    with masked_dense(model, family, shape, plan):
        expected = run(model, batch)
    real = batch.attention_mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found[real], plain[real])
    assert torch.equal(run(model, batch), plain)


@torch.no_grad()
def test_a_probe_of_several_texts(opened_model, history):
    """Of 22 texts two are probed, at positions that serve all; the first block, by hand."""
    model = opened_model[0]
    texts = some_texts([19, 4, *[11] * 20], seed=8)
    with captured(model, 0) as seen:
        run(model, padded(texts))
    norms = seen["heads r"].norm(dim=-1)
    table = [
        [norms[b, s].item() if s < len(t) else 0.0 for s in range(19)] for b, t in enumerate(texts)
    ]
    column = [sum(row[s] ** 2 for row in table) ** 0.5 for s in range(19)]
    positions = chosen_positions(column)
    strength = [sum(row[s] ** 2 for s in positions) for row in table]
    samples = sorted(range(22), key=lambda b: -strength[b])[:2]
    total = 0
    for place, position in enumerate(positions):
        squares = []
        for sample in samples:
            if position < len(texts[sample]):
                reached = [s for s in positions if s < len(texts[sample])]
                with captured(model, 0) as alone:
                    model(torch.tensor([texts[sample]]), use_cache=False)
                squares.append(probed_inputs(model, 0, alone, "heads", reached)[place] ** 2)
        moment = sum(squares) / len(squares) if squares else torch.zeros(1)
        total = total + fused(moment, history.heads[0][position].double())
    expected = explicit_scores(total, model.model.layers[0].self_attn.o_proj.weight, 8)
    with pruned(opened_model, history) as record:
        run(model, padded(texts))
    torch.testing.assert_close(record.heads[0].scores, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("full_batch", [False, True])
def test_a_block_is_decided_on_the_prefix_this_batch_has_pruned(opened_model, history, full_batch):
    model, family, shape = opened_model
    batch = padded(TEXT)
    with pruned(opened_model, history, full_batch=full_batch, units="heads") as free:
        run(model, batch)
    kept = torch.zeros(8, dtype=torch.bool)
    kept[:1] = True
    forced = with_kept(everything(shape), 0, "heads", kept)
    plan = Plan("f" * 64, "dense", "per-layer", "none", tuple(forced))
    with (
        masked_dense(model, family, shape, plan),
        pruned(opened_model, history, full_batch=full_batch, units="heads") as record,
    ):
        run(model, batch)
    assert not torch.allclose(record.heads[1].scores, free.heads[1].scores)
    assert not torch.equal(record.heads[1].kept, free.heads[1].kept)


@pytest.mark.parametrize("full_batch", [False, True])
def test_padding_changes_nothing(opened_model, history, full_batch):
    model = opened_model[0]
    texts = some_texts([22, 9, 15])
    logits, records = [], []
    for batch in (padded(texts), padded(texts, width=61, filler=7)):
        with pruned(opened_model, history, full_batch=full_batch) as record:
            logits.append(run(model, batch)[batch.attention_mask.bool()])
        records.append(record)
    same_decisions(*records)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-10, atol=1e-10)


def followed(history, seen_per_layer, lengths, layers):
    """The history after one batch, element by element."""
    after = {kind: [layer.clone() for layer in getattr(history, kind)] for kind in KINDS}
    dim = len(history.heads[0][0]) // 8
    for layer, seen in enumerate(seen_per_layer):
        kept = {
            "heads": [h * dim + i for h in layers[layer].query_heads for i in range(dim)],
            "channels": list(layers[layer].channels),
        }
        for kind in KINDS:
            for s in range(min(max(lengths), history.positions)):
                rows = [b for b, length in enumerate(lengths) if s < length]
                mean = (seen[f"{kind} a"][rows, s] ** 2).mean(0)
                old = after[kind][layer][s]
                old[kept[kind]] = 0.99 * old[kept[kind]] + 0.01 * mean[kept[kind]].float()
    return History(tuple(after["heads"]), tuple(after["channels"]))


def test_the_history_follows_kept_columns_from_the_second_batch_on(opened_model, history):
    model, _, shape = opened_model
    before = [layer.clone() for layer in (*history.heads, *history.channels)]
    lengths = [14, 7, 9]
    first, third = (padded(some_texts([18, 7, 25], seed)) for seed in range(2))
    second = padded(some_texts(lengths, 2), width=19)
    # loud, so that a hundredth of it moves the next decision's scores
    loud = History(tuple(h / 50 for h in history.heads), tuple(c / 50 for c in history.channels))
    with pruned(opened_model, loud) as record:
        run(model, first)
        run(model, second)
        after_first = (record.heads.copy(), record.channels.copy())
        layers = plan_of(record, shape)
        run(model, third)
    assert record.batches == 3

    def fresh(prior, batch):
        with pruned(opened_model, prior) as alone:
            run(model, batch)
        return alone

    undisturbed = fresh(loud, second)
    for kind, decided in zip(KINDS, after_first, strict=True):
        for layer, decision in decided.items():
            expected = getattr(undisturbed, kind)[layer].scores
            torch.testing.assert_close(decision.scores, expected, rtol=1e-12, atol=0)
    seen = []
    for layer in range(shape.num_layers):
        with captured(model, layer) as caught, mask_in_torch(model, layers):
            run(model, second)
        seen.append(caught)
    moved = followed(loud, seen, lengths, layers)
    expected = fresh(moved, third)
    for kind in KINDS:
        for layer, decision in getattr(record, kind).items():
            theirs = getattr(expected, kind)[layer].scores
            torch.testing.assert_close(decision.scores, theirs, rtol=1e-6, atol=0)
    unmoved = fresh(loud, third)
    assert not torch.allclose(unmoved.heads[0].scores, record.heads[0].scores, rtol=1e-4)
    for layer, old in zip((*history.heads, *history.channels), before, strict=True):
        assert torch.equal(layer, old)


@torch.no_grad()
def test_tokens_on_a_filled_cache_keep_the_masks_of_their_text(opened_model, history):
    model, _, shape = opened_model
    ids = torch.tensor(TEXT)
    with pruned(opened_model, history) as record:
        start = model(ids[:, :20], use_cache=True)
        found = model(ids[:, 20:], past_key_values=start.past_key_values).logits
    assert record.batches == 1
    with mask_in_torch(model, plan_of(record, shape)):
        expected = model(ids, use_cache=False).logits[:, 20:]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_cache_filled_elsewhere_is_refused(opened_model, history):
    model = opened_model[0]
    ids = torch.tensor(TEXT)
    start = model(ids[:, :20], use_cache=True)
    with pruned(opened_model, history), pytest.raises(UsageError, match="filled cache"):
        model(ids[:, 20:], past_key_values=start.past_key_values)


@pytest.mark.parametrize(
    ("units", "share"),
    [
        # 2 KV heads and 8 query heads of 16: rows of q, k, v with biases, columns of o
        ("heads", (5 * (2 * 64 + 1) + 2 * 2 * 65) / (8 * (2 * 64 + 1) + 2 * 2 * 65)),
        ("channels", 64 / 96),
        (
            "both",
            (16 * (5 * 129 + 4 * 65) + 64 * 192) / (16 * (8 * 129 + 4 * 65) + 96 * 192),
        ),
    ],
)
def test_what_the_masks_would_leave(opened_model, history, units, share):
    model, _, shape = opened_model
    with pruned(opened_model, history, units=units) as record:
        for seed in range(2):
            run(model, padded(some_texts([12], seed)))
    assert record.achieved_keep(shape) == pytest.approx(share)
    heads, channels = (0 if units == other else 1 for other in ("channels", "heads"))
    assert record.removed_heads == pytest.approx((heads * 3 / 8,) * 3)
    assert record.removed_channels == pytest.approx((channels / 3,) * 3)


def test_protected_layers_are_left_alone(tmp_path):
    model_of = opened(make_checkpoint(tmp_path, "llama", kv_heads=4, query_heads=8, layers=6))
    model, _, shape = model_of
    with pruned(model_of, full_batch=True, ratio=0.2, units="heads") as record:
        run(model, padded(TEXT))
    assert sorted(record.heads) == [3, 4, 5]
    assert record.removed_heads == pytest.approx((0, 0, 0, 3 / 8, 3 / 8, 3 / 8))
    kept = 3 * 8 + 3 * 5
    assert record.achieved_keep(shape) == pytest.approx((kept * 2 + 6 * 4 * 2) / (48 * 2 + 48))


def test_what_cannot_be_done_is_said(opened_model, history):
    model = opened_model[0]
    with pytest.raises(UsageError, match="no history"), pruned(opened_model):
        pass
    with pytest.raises(UsageError, match="ratio of 1"), pruned(opened_model, history, ratio=1.0):
        pass
    batch = padded(TEXT)
    mask = torch.ones(1, 1, 26, 26, dtype=torch.bool).tril()
    with pruned(opened_model, history), pytest.raises(UsageError, match=r"got \[1, 1, 26, 26\]"):
        model(input_ids=batch.input_ids, attention_mask=mask)
    left = torch.arange(26)[None] > 3
    with pruned(opened_model, history), pytest.raises(UsageError, match="padding on the left"):
        model(input_ids=batch.input_ids, attention_mask=left)


def test_hooks_go_after_exceptions(opened_model, history):
    model = opened_model[0]
    batch = padded(TEXT)
    batch.input_ids[0, 0] = 10**6
    with pruned(opened_model, history):
        assert hooks(model) == 1 + 3 * 6
    with pytest.raises(IndexError), pruned(opened_model, history):
        run(model, batch)
    assert hooks(model) == 0

"""`spp bench --profile` on tiny models, and the comparison of plans made from such tables."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from factories import CASES
from typer.testing import CliRunner

from spp_bench import blocks
from spp_bench import profile as profiling
from spp_bench.blocks import Pass, Setting, make_passes
from spp_bench.profile import ProfileRequest, Target, grid, in_turns, profile, shapes
from spp_campaigns import latency_plan
from spp_campaigns.latency_plan import choose_both, verdict
from spp_cli.main import app
from spp_export.common.errors import OutputError, UsageError
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.planning.allocate.options import channel_options, layer_options
from spp_export.planning.latency import read_latency_table
from spp_export.planning.scoring import UnitOptions

CASE = {case.name: case for case in CASES}
QUICK = ProfileRequest(context=7, batch=2, rounds=2, threads=1, width_multiple=16)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(blocks, "_COLD_BYTES", 1 << 20)
    monkeypatch.setattr(blocks, "_MOST_COPIES", 2)
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "cache"))


def make(tmp_path, name="llama-gqa-bias"):
    return str(CASE[name].make(tmp_path))


@pytest.mark.parametrize(
    "name", ["llama-gqa-bias", "llama-mha-tied", "qwen2-gqa-tied", "qwen3-mqa-bias"]
)
def test_a_table_is_of_every_shape_and_is_read(tmp_path, name):
    dense, path = make(tmp_path, name), tmp_path / "table.json"
    document = profile(Target.of_model(dense), path, request=QUICK)
    assert json.loads(path.read_text()) == document
    table, shape = read_latency_table(path), open_source(tmp_path / "dense").shape
    table.check_model(shape)
    assert (table.phase, table.batch, table.context) == ("decode", 2, 7)
    assert set(table.attention) == set(shapes(shape))
    assert set(table.mlp) == set(grid(shape, 16))
    assert document["options"]["samples"] >= 2
    assert 0 < table.step_cost(shape.layers) < 10**9


def test_prefill(tmp_path):
    request = replace(QUICK, phase="prefill")
    profile(Target.of_model(make(tmp_path)), tmp_path / "t.json", request=request)
    assert read_latency_table(tmp_path / "t.json").phase == "prefill"


def test_blocks_see_the_whole_cache_and_compute_what_the_model_does(tmp_path):
    """The same stream through a block and through stock attention with a stock cache."""
    import torch
    from transformers import DynamicCache

    target = Target.of_model(make(tmp_path, "llama-gqa-bias"))
    setting = Setting("decode", 2, 7, "cpu", "float64")
    shape = target.shape
    model = blocks._model(
        target.config, target.family, shape, [shape.layer] * 3, setting, torch.float64
    )
    parts = blocks._Parts(model, target.family, shape, setting, torch.float64)
    own = parts._cache(shape.kv_heads)
    own_in_place = blocks._Cache(
        *(torch.cat([t, torch.zeros_like(t[:, :, :1])], 2) for t in (own.keys, own.values)), True
    )
    stock = DynamicCache()
    stock.update(own.keys, own.values, 0)
    layer = model.model.layers[0]
    with torch.inference_mode():
        found = [
            layer.self_attn(
                hidden_states=parts.stream,
                position_embeddings=parts.rotary,
                attention_mask=None,
                past_key_values=cache,
            )[0]
            for cache in (stock, own, own_in_place)
        ]
    assert stock.get_seq_length() == 8
    for each in found[1:]:
        assert torch.equal(each, found[0])
    assert parts.positions.tolist() == [[7]]


def test_passes_are_of_every_kind_and_sizes_are_their_own(tmp_path):
    target = Target.of_model(make(tmp_path))
    setting = Setting("decode", 1, 5, "cpu", "float32")
    attention, widths = shapes(target.shape), [16, 96]
    passes = make_passes(target.config, target.family, target.shape, attention, widths, setting)
    kinds = {each.kind for each in passes}
    assert kinds == {
        ("rest",),
        *(("attention", *size) for size in attention),
        *(("mlp", width) for width in widths),
    }
    assert len(passes) == 2 * (len(attention) + len(widths)) + 1


def test_turns_are_counted_after_the_warm_up_and_per_block():
    log, clock_times = [], iter(range(1, 100))
    passes = [Pass(("a",), lambda: log.append("a"), 2), Pass(("b",), lambda: log.append("b"), 1)]

    def clock(work):
        work()
        return float(next(clock_times))

    times = in_turns(passes, 3, clock, seed=1)
    assert sorted(log) == ["a"] * 5 + ["b"] * 5
    seconds = {"a": 2.0, "b": 1.0}
    counted = [
        (name, (index + 1) / seconds[name])
        for index, name in enumerate(log)
        if index >= 2 * profiling.WARM_UP_ROUNDS
    ]
    assert times == {(n,): [s for name, s in counted if name == n] for n in "ab"}


def test_the_grid_has_both_ends_and_is_never_long():
    for channels, multiple in ((1536, 64), (18944, 64), (96, 16), (100, 64), (10, 64)):
        shape = replace(Target.of_shape("tiny").shape, channels=channels)
        widths = grid(shape, multiple)
        assert widths == sorted(set(widths))
        assert len(widths) <= profiling.MOST_WIDTHS
        assert (widths[0], widths[-1]) == (min(multiple, channels), channels)


def test_the_command(tmp_path):
    path = tmp_path / "t.json"
    flags = ["--context", "6", "--threads", "1", "-o", str(path)]
    shown = CliRunner().invoke(app, ["bench", "--profile", "--shape", "tiny", *flags])
    assert shown.exit_code == 0, shown.output
    for text in ("attention blocks, decode, batch 1, context 6", "MLP blocks", "of dense"):
        assert text in shown.stdout
    assert read_latency_table(path).sizes["hidden_size"] == 64


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "-o is missing"),
        (["-o", "t", "--context", "4", "--context", "5"], "--context: a table is of one; got 4, 5"),
        (["-o", "t", "some/out"], "some/out: a table is of the dense model"),
        (["-o", "t", "--device", "tpu"], "--device tpu: expected cpu, cuda"),
    ],
)
def test_the_command_refuses(flags, message):
    shown = CliRunner().invoke(app, ["bench", "--profile", "--shape", "tiny", *flags])
    assert message in str(shown.exception)


def test_nothing_is_replaced_and_windows_are_not_passed_over(tmp_path):
    target = Target.of_model(make(tmp_path, "mistral-window-tied"))
    (tmp_path / "t.json").write_text("mine")
    with pytest.raises(OutputError, match="already exists"):
        profile(target, tmp_path / "t.json", request=QUICK)
    with pytest.raises(UsageError, match="attention of dense sees"):
        profile(target, tmp_path / "new.json", request=replace(QUICK, context=1000))


def test_the_plan_by_latency_keeps_as_much_and_is_no_slower_by_the_table(tmp_path):
    target = Target.of_shape("tiny")
    profile(target, tmp_path / "t.json", request=QUICK)
    table, shape = read_latency_table(tmp_path / "t.json"), target.shape
    rng = np.random.default_rng(2)
    heads = layer_options(rng.normal(1, 1, (3, 8)), shape)
    channels = channel_options(rng.normal(0.1, 1, (3, 192)), shape, 16)
    found = choose_both(UnitOptions(heads, channels), shape, table, "both", 0.7)
    params, latency = found["params"], found["latency"]
    assert params.realised.keep <= 0.7
    assert latency.realised.score >= params.realised.score
    assert latency.nanoseconds <= params.nanoseconds


def test_verdicts():
    quick, slow = [1.0 + 0.01 * i for i in range(9)], [2.0 + 0.01 * i for i in range(9)]
    assert verdict(slow, quick)["says"] == "the plan by latency is faster"
    assert verdict(quick, slow)["says"] == "the plan by latency is slower"
    assert verdict(quick, quick[::-1])["says"] == "no difference shown"
    found = verdict(slow, quick)
    assert found["low"] <= found["median"] <= found["high"]


@pytest.mark.parametrize("name", latency_plan.PLANS)
def test_the_report_names_both_plans(name):
    times = {"median_ms": 2.0, "p20_ms": 1.0, "p80_ms": 3.0}
    plan = {"score": 1.5, "parameters": 7, "predicted_ms": 2.0}
    document = {
        "model": "tiny",
        "options": {"batch": 1, "context": 9, "dtype": "float32", "device": "cpu"},
        "dense": {"predicted_ms": 3.0},
        "plans": dict.fromkeys(latency_plan.PLANS, plan),
        "decode": dict.fromkeys(("dense", *latency_plan.PLANS), times),
        "speedup": verdict([1.0] * 9, [1.0] * 9),
    }
    assert name in latency_plan.report(document)
    assert "no difference shown" in latency_plan.report(document)

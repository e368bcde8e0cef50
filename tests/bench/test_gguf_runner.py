"""llama.cpp beside the other engines, on tiny models."""

from __future__ import annotations

import json

import numpy as np
import pytest
from benching import QUICK, make_file, make_graph, make_pair, small_rates

from spp_bench import bench as bench_module
from spp_bench.bench import bench
from spp_bench.candidates import gguf_candidate, read_out, windows_of
from spp_bench.cases import Cell, tokens
from spp_bench.engines.open import open_runner
from spp_bench.gguf_weights import CACHE_BLOCK, cached_heads, stored_weights
from spp_bench.memory import measure_memory
from spp_bench.schema import check
from spp_export.commands.report.bench import benchmark_part
from spp_export.common.errors import ModelError, UsageError
from spp_export.common.manifest import hash_file
from spp_export.formats.gguf.header import read_gguf
from spp_export.formats.gguf.llama_cpp import LlamaCpp
from spp_export.models.checkpoint.checkpoint import open_source

pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def pair(root):
    return make_pair(root, merges=True)


@pytest.fixture(scope="module")
def plain(root, pair):
    return make_file(root, pair[1])


@pytest.fixture(scope="module")
def quantised(root, pair):
    return make_file(root, pair[1], "q8_0")


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    small_rates(monkeypatch)
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "cache"))


def candidate_of(pair, directory):
    source = open_source(pair[0])
    out = read_out(directory, source)
    return gguf_candidate(source, out, out.form, directory, windows_of(source))


def test_llama_cpp_stands_beside_the_other_engines(root, pair, plain, quantised, tmp_path):
    pytest.importorskip("onnxruntime")
    dense, slim = pair
    outs = [slim, plain, make_graph(root, dense, slim), quantised]
    path = tmp_path / "bench.json"
    document = bench(outs, model=str(dense), request=QUICK, results=path)
    check(json.loads(path.read_text()))
    assert document["problems"] == []
    rows = document["cells"][0]["rows"]
    assert [row["name"] for row in rows] == [
        "dense torch",
        "slim torch",
        "dense onnx gqa",
        "graph onnx",
        "dense gguf fp32",
        "dense gguf q8_0",
        "fp32 gguf",
        "q8_0 gguf",
    ]
    for row in rows[-2:]:
        for phase in ("prefill", "decode"):
            assert {"speedup", "over_dense_torch"} <= row[phase].keys()
    candidates = {record["name"]: record for record in document["candidates"]}
    assert candidates["q8_0 gguf"]["engine"] == "gguf"
    assert candidates["q8_0 gguf"]["baseline"] == "dense gguf q8_0"
    agreed = {record["name"]: record["as"] for record in document["agreement"]}
    assert agreed["dense gguf fp32"] == "dense torch"
    assert agreed["fp32 gguf"] == "slim torch"
    assert "xllamacpp" in document["versions"]
    page = benchmark_part(path, hash_file(slim / "plan.json").sha256)
    assert "q8_0 gguf" in {timing.name for timing in page.timings}


@pytest.mark.parametrize("form", ["plain", "quantised"])
def test_a_fresh_process_holds_what_the_plan_predicts(form, pair, request):
    candidate = candidate_of(pair, request.getfixturevalue(form))
    record = measure_memory(candidate, (Cell(1, 6), Cell(2, CACHE_BLOCK)), 3, "cpu", 1)
    assert record["problems"] == []
    assert record["weight_bytes"] == record["predicted_weight_bytes"]
    for cell, length in zip(record["cells"], (CACHE_BLOCK, 2 * CACHE_BLOCK), strict=True):
        sizes = candidate.sizes
        heads = sum(layer.kv_heads for layer in sizes.layers)
        per_token = 2 * sizes.kv_element_bytes * sizes.shape.head_dim * heads
        assert cell["kv_bytes"] == cell["predicted_kv_bytes"] == cell["batch"] * length * per_token
        assert cell["peak_bytes"] > record["before_bytes"] + cell["kv_bytes"]


def test_the_cache_grows_in_blocks_and_has_room_for_one_token_more(pair, quantised):
    candidate = candidate_of(pair, quantised)
    runner = open_runner(candidate, "cpu", 1)
    runner.reserve(CACHE_BLOCK - 1)
    short = runner.kv_bytes()
    runner.reserve(CACHE_BLOCK)
    assert runner.kv_bytes() == 2 * short
    assert cached_heads(quantised) == sum(layer.kv_heads for layer in candidate.sizes.layers)


def test_every_round_reads_its_prompts_and_takes_the_same_steps(pair, quantised, monkeypatch):
    asked = []
    real = LlamaCpp.read

    def spy(self, prompts, new, *, afresh):
        done = real(self, prompts, new, afresh=afresh)
        asked.append((len(prompts), done))
        return done

    monkeypatch.setattr(LlamaCpp, "read", spy)
    fed = tokens(Cell(2, 6), 3, 263)
    runner = open_runner(candidate_of(pair, quantised), "cpu", 1)
    runner.reserve(9)
    for _ in range(2):
        runner.prefill(fed.prompt)
        runner.decode(fed.continuation)
        runner.forget()
    prompt, step = {"cached": 0, "read": 6, "new": 1}, {"cached": 6, "read": 1, "new": 3}
    assert asked == [(2, prompt), (2, step)] * 2


def test_other_passes_than_were_asked_for_are_an_error(pair, quantised, monkeypatch):
    runner = open_runner(candidate_of(pair, quantised), "cpu", 1)
    monkeypatch.setattr(LlamaCpp, "read", lambda *_, **__: {"cached": 5, "read": 1, "new": 1})
    with pytest.raises(ModelError, match="was to work on"):
        runner.prefill(np.ones((1, 6), np.int64))


def test_an_embedding_of_its_own_is_not_read_by_a_step(pair, quantised, tmp_path):
    weights = stored_weights(quantised)
    embedding = read_gguf(quantised).tensors["token_embd.weight"]
    assert weights.total - weights.read == embedding.nbytes
    tied = make_pair(tmp_path, "llama-mha-tied", merges=True)
    weights = stored_weights(make_file(tmp_path, tied[1], "q4_0"))
    assert weights.total == weights.read


def test_what_cannot_be_measured_is_refused_at_once(pair, quantised, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(bench_module, "llama_installed", lambda: False)
        with pytest.raises(UsageError, match="needs the package xllamacpp"):
            bench([quantised], model=str(pair[0]), request=QUICK)
    source = open_source(pair[0])
    with pytest.raises(UsageError, match="GGUF runs on the CPU here"):
        bench_module._check_llama([read_out(quantised, source)], "cuda")

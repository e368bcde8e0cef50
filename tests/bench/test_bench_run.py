"""`bench` on a tiny model: parity before figures, a document of the schema, going on later."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
from benching import QUICK, FakeRunner, make_graph, make_pair, small_rates

from spp_bench import bench as bench_module
from spp_bench.bench import bench
from spp_bench.gate import check_agreement
from spp_bench.plots import write_plots
from spp_bench.report import NO_GAIN, TOO_FEW, panels
from spp_bench.results import problems
from spp_bench.schema import check
from spp_export.common.errors import OutputError, ParityError, UsageError


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def graph(pair, tmp_path_factory):
    pytest.importorskip("onnxruntime")
    return make_graph(tmp_path_factory.mktemp("graph"), *pair)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    small_rates(monkeypatch)
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def measured(pair, tmp_path_factory):
    """A document and the file it was kept in."""
    with pytest.MonkeyPatch.context() as patch:
        small_rates(patch)
        path = tmp_path_factory.mktemp("results") / "bench.json"
        document = bench([pair[1]], model=str(pair[0]), request=QUICK, results=path)
    return document, path


def names(document):
    return [row["name"] for row in document["cells"][0]["rows"]]


def test_the_document_is_of_the_schema_and_is_what_was_written(measured):
    document, path = measured
    check(document)
    assert json.loads(path.read_text()) == json.loads(json.dumps(document))
    assert names(document) == ["dense torch", "slim torch"]
    dense, slim = document["cells"][0]["rows"]
    assert "speedup" not in dense["decode"]
    over = slim["decode"]["speedup"]
    assert over["p20"] <= over["median"] <= over["p80"]
    assert over["low"] is None
    assert document["gate"][0]["checks"]
    assert "published claims" in str([*panels(document)])


def test_no_path_of_the_machine_is_in_the_document(measured, pair):
    assert str(pair[0].parent) not in json.dumps(measured[0])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema_version",), "1", "schema_version is '1', expected an integer"),
        (("options", "rounds"), True, "options.rounds is True, expected an integer"),
        (("cells", 0, "rows", 0, "decode", "speed"), 1.0, "decode has the unknown key 'speed'"),
        (
            ("cells", 0, "rows", 1, "decode", "speedup", "bound"),
            None,
            "bound is null, expected a number",
        ),
    ],
)
def test_the_schema_refuses_what_is_not_of_it(measured, path, value, message):
    document = copy.deepcopy(measured[0])
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        check(document)


def test_a_missing_field_is_refused(measured):
    document = {key: value for key, value in measured[0].items() if key != "rates"}
    with pytest.raises(ValueError, match="the document has no rates"):
        check(document)


def test_a_run_goes_on_with_the_cells_it_has(measured, pair, tmp_path, monkeypatch):
    path = tmp_path / "bench.json"
    path.write_bytes(measured[1].read_bytes())
    seen = []
    real = bench_module.measure_cell

    def spy(runners, fed, *rest):
        seen.append(fed.prompt.shape)
        return real(runners, fed, *rest)

    monkeypatch.setattr(bench_module, "measure_cell", spy)
    monkeypatch.setattr(bench_module, "check_outs", lambda *_: pytest.fail("was checked before"))
    more = replace(QUICK, contexts=(8, 12))
    document = bench([pair[1]], model=str(pair[0]), request=more, results=path)
    assert seen == [(1, 12)]
    assert document["cells"][0] == json.loads(json.dumps(measured[0]["cells"][0]))
    assert [cell["context"] for cell in document["cells"]] == [8, 12]


def test_results_of_other_options_are_not_mixed(measured, pair, tmp_path):
    path = tmp_path / "bench.json"
    path.write_bytes(measured[1].read_bytes())
    other = replace(QUICK, new_tokens=2)
    with pytest.raises(OutputError, match="other options"):
        bench([pair[1]], model=str(pair[0]), request=other, results=path)
    document = bench([pair[1]], model=str(pair[0]), request=other, results=path, force=True)
    assert document["options"]["new_tokens"] == 2


def test_results_of_other_files_are_kept_unless_forced(measured, pair, tmp_path, monkeypatch):
    path = tmp_path / "bench.json"
    path.write_bytes(measured[1].read_bytes())
    monkeypatch.setattr(bench_module, "same_files", lambda *_: False)
    with pytest.raises(OutputError, match="other files"):
        bench([pair[1]], model=str(pair[0]), request=QUICK, results=path)
    assert path.read_bytes() == measured[1].read_bytes()
    seen = []
    monkeypatch.setattr(bench_module, "check_outs", lambda *_: seen.append(True) or [])
    bench([pair[1]], model=str(pair[0]), request=QUICK, results=path, force=True)
    assert seen == [True]


def test_a_model_that_fails_its_checks_gives_no_figures(pair, tmp_path):
    dense, slim = make_pair(tmp_path, seed=3)
    weights = slim / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    path = tmp_path / "bench.json"
    with pytest.raises(ParityError, match="No figures"):
        bench([slim], model=str(dense), request=QUICK, results=path)
    assert not path.exists()


def test_engines_stand_beside_each_other(pair, graph):
    dense, slim = pair
    document = bench([slim, graph], model=str(dense), request=QUICK)
    check(document)
    assert names(document) == ["dense torch", "slim torch", "dense onnx gqa", "graph onnx"]
    baselines = {c["name"]: c["baseline"] for c in document["candidates"]}
    assert baselines["graph onnx"] == "dense onnx gqa"
    agreed = {record["name"]: record["as"] for record in document["agreement"]}
    assert agreed == {"dense onnx gqa": "dense torch", "graph onnx": "slim torch"}
    onnx = document["cells"][0]["rows"][3]["decode"]
    assert {"speedup", "over_dense_torch"} <= onnx.keys()


def test_a_runner_that_computes_something_else_is_caught(pair):
    source_row = bench_module.torch_candidate(
        bench_module.open_source(pair[0]), None, "float32", (None,) * 3
    )
    logits = np.eye(1, 4, dtype=np.float32)
    runners = [FakeRunner("a", [], logits=logits), FakeRunner("b", [], logits=-logits)]
    rows = {name: replace(source_row, name=name) for name in "ab"}
    with pytest.raises(ParityError, match="not the same model"):
        check_agreement(runners, rows, 4)
    assert check_agreement([runners[0]] * 2, rows, 4) == []
    shifted = FakeRunner("b", [], logits=logits - 3)
    (agreed,) = check_agreement([runners[0], shifted], rows, 4)
    assert agreed["distance"] < 1e-6


def test_a_speedup_above_its_bound_fails_the_run(measured):
    document = copy.deepcopy(measured[0])
    assert problems(document) == document["problems"]
    row = document["cells"][0]["rows"][1]
    row["decode"]["speedup"] |= {"median": 9.0, "low": 8.0, "above_bound": True}
    (problem, *_) = [line for line in problems(document) if "decode" in line]
    assert "9.000x (at least 8.000x) is above the bound" in problem
    assert "impossible" in str([*panels(document)])


def test_few_rounds_cannot_tell_noise_from_an_impossible_speedup(measured):
    document = copy.deepcopy(measured[0])
    over = document["cells"][0]["rows"][1]["decode"]["speedup"]
    over |= {"median": 9.0, "low": None, "above_bound": False}
    assert not [line for line in problems(document) if "decode" in line]
    assert TOO_FEW in str([*panels(document)])


def test_where_nothing_can_be_gained_the_table_says_so(measured):
    document = copy.deepcopy(measured[0])
    over = document["cells"][0]["rows"][1]["decode"]["speedup"]
    over |= {"median": 1.0, "bound": 1.01, "efficiency": None, "above_bound": False}
    assert NO_GAIN in str([*panels(document)])


def test_curves_are_drawn(measured, tmp_path):
    document = copy.deepcopy(measured[0])
    assert [path.name for path in write_plots(document, tmp_path / "a")] == ["speedup.png"]
    assert (tmp_path / "a" / "speedup.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "--rounds 0"),
        ({"device": "tpu"}, "--device tpu"),
        ({"device": "cuda:1"}, "--device cuda:1: PyTorch sees no CUDA card"),
        ({"dtype": "int3"}, "--dtype int3"),
        ({"contexts": ()}, "--context"),
    ],
)
def test_options_that_make_no_sense_are_refused(pair, changes, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match=message):
        bench([pair[1]], model=str(pair[0]), request=replace(QUICK, **changes))


def test_directories_need_a_plan_and_names_of_their_own(pair):
    with pytest.raises(OutputError, match=r"no plan\.json"):
        bench([pair[0]], model=str(pair[0]), request=QUICK)
    with pytest.raises(UsageError, match="unlike names"):
        bench([pair[1], pair[1]], model=str(pair[0]), request=QUICK)

"""Published shapes: their sizes, plans for them, and documents of their figures."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benching import QUICK, small_rates
from pairs import few
from typer.testing import CliRunner

from spp_bench.cases import Cell, tokens
from spp_bench.claims import claim_rows
from spp_bench.gate import check_agreement
from spp_bench.measure import Samples
from spp_bench.plan_time import TimeFromText
from spp_bench.report import panels
from spp_bench.schema import check
from spp_bench.shapes import bench as shape_bench
from spp_bench.shapes.bench import Timed, bench_shape
from spp_bench.shapes.measure import Part, measure_parts
from spp_bench.shapes.plans import Variant, shape_plan, variants
from spp_bench.shapes.shapes import BACKBONES, SHAPES, published
from spp_campaigns import gpu
from spp_cli.main import app
from spp_export.common.errors import OutputError, ParityError, UsageError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    small_rates(monkeypatch)
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "cache"))


# Parameters in billions, as their makers publish them.
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen2.5-7b", 7.62),
        ("qwen2.5-14b", 14.77),
        ("llama-3.1-8b", 8.03),
        ("llama-2-13b", 13.02),
        ("llama-2-7b", 6.74),
        ("mistral-7b-v0.3", 7.25),
        ("qwen2.5-0.5b", 0.494),
        ("qwen2.5-1.5b", 1.54),
        ("qwen3-8b", 8.19),
        ("smollm2-135m", 0.1345),
        ("smollm2-360m", 0.362),
    ],
)
def test_shapes_have_as_many_parameters_as_published(name, billions):
    shape = published(name.upper()).shape
    assert shape.parameters(shape.layers) / 1e9 == pytest.approx(billions, rel=4e-3)


def test_the_four_backbones_are_there():
    assert set(BACKBONES) <= SHAPES.keys()
    with pytest.raises(UsageError, match=r"--shape gpt: expected one of tiny, smollm2-135m"):
        published("gpt")


@pytest.mark.parametrize("name", few(BACKBONES, lambda _: {"one"}))
def test_plans_are_of_the_layout_and_within_the_share(name):
    of = published(name)
    for variant in variants((0.9, 0.7, 0.5), ("per-layer", "uniform"), ("heads", "both")):
        plan = shape_plan(of, variant)
        layers = plan.layers(of)
        assert 0.1 < plan.kept <= variant.keep
        assert all(layer.regular for layer in layers)
        assert (len(set(layers)) == 1) == (variant.layout == "uniform")
        channels = {layer.channels for layer in layers}
        assert (channels == {of.channels}) == (variant.units == "heads")
        assert plan.plan == shape_plan(of, variant).plan


def test_variants_are_named_and_checked():
    (default,) = variants(None, None, None)
    assert default == Variant(0.8, "per-layer", "heads")
    assert Variant(0.5, "uniform", "both").name == "uniform-both-0.5"
    with pytest.raises(UsageError, match="--layout ragged: expected per-layer or uniform"):
        variants(None, ["ragged"], None)
    with pytest.raises(UsageError, match="--units neurons"):
        variants(None, None, ["neurons"])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        small_rates(patch)
        path = tmp_path_factory.mktemp("shape") / "r.json"
        request = replace(QUICK, contexts=(8, 12))
        return bench_shape("tiny", [Variant(0.7)], request=request, results=path), path


def test_a_document_of_a_shape_is_of_the_schema(measured):
    document, path = measured
    check(document)
    assert json.loads(path.read_text()) == json.loads(json.dumps(document))
    assert [cell["context"] for cell in document["cells"]] == [8, 12]
    rows = document["cells"][0]["rows"]
    assert [row["name"] for row in rows] == ["dense eager", "per-layer-heads-0.7 eager"]
    assert {"prefill", "decode", "name"} == rows[1].keys()
    slim = document["candidates"][1]
    assert slim["plan"] | {"kept": 0} == {
        **{"layout": "per-layer", "units": "heads"},
        **{"keep": 0.7, "kept": 0},
    }
    assert slim["parameters"] < document["candidates"][0]["parameters"]
    (gate,) = document["gate"]
    assert gate["checks"][0]["distance"] <= gate["checks"][0]["limit"]


def test_a_run_goes_on_with_its_cells(measured, tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    path.write_bytes(measured[1].read_bytes())
    monkeypatch.setattr(shape_bench, "Models", lambda *_: pytest.fail("nothing was missing"))
    request = replace(QUICK, contexts=(12,))
    document = bench_shape("tiny", [Variant(0.7)], request=request, results=path)
    assert [cell["context"] for cell in document["cells"]] == [8, 12]
    with pytest.raises(OutputError, match="other"):
        bench_shape("tiny", [Variant(0.6)], request=request, results=path)


@pytest.mark.slow
def test_memory_is_measured_in_a_process_each_and_as_predicted():
    request = replace(QUICK, memory=True)
    document = bench_shape("tiny", [Variant(0.5, "uniform", "both")], request=request)
    assert document["problems"] == []
    for record in document["memory"]:
        assert record["weight_bytes"] == record["predicted_weight_bytes"]
        assert [c["kv_bytes"] for c in record["cells"]] == [
            c["predicted_kv_bytes"] for c in record["cells"]
        ]
    dense, slim = document["memory"]
    assert slim["weight_bytes"] < dense["weight_bytes"]


def test_a_slim_model_that_is_not_the_masked_one_gives_no_figures(monkeypatch, tmp_path):
    real = shape_bench.Models.slim

    def broken(self, plan):
        model = real(self, plan)
        projection = model.model.layers[1].self_attn.o_proj
        projection.weight.data = projection.weight.data.flip(1)
        return model

    monkeypatch.setattr(shape_bench.Models, "slim", broken)
    with pytest.raises(ParityError, match="masked dense model"):
        bench_shape("tiny", [Variant(0.7)], request=QUICK, results=tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


def test_the_command_takes_a_shape():
    grid = ["--context", "6", "--new-tokens", "2", "--rounds", "1", "--no-memory"]
    asked = ["--shape", "tiny", "--keep", "0.6", "--units", "both", *grid]
    shown = CliRunner().invoke(app, ["bench", *asked])
    assert shown.exit_code == 0, shown.output
    assert "per-layer-both-0.6 eager" in shown.stdout
    for wrong in ([], ["out", "--shape", "tiny"]):
        shown = CliRunner().invoke(app, ["bench", *wrong, *grid])
        assert isinstance(shown.exception, UsageError)
        assert "--shape" in str(shown.exception)


def test_a_card_that_is_not_there_is_said_in_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="no CUDA card"):
        bench_shape("tiny", [Variant(0.7)], request=replace(QUICK, device="cuda"))
    assert gpu.main(["--json", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no CUDA card" in error


class Fake:
    """Notes what it is asked; every call takes a second."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def clock(self, work):
        work()
        return 1.0

    def reserve(self, length):
        self.length = length

    def prefill(self, ids):
        self.log.append((self.name, "prefill"))

    def fill(self, batch, length):
        self.log.append((self.name, "fill", batch, length))

    def decode(self, ids):
        self.log.append((self.name, "decode"))


def test_parts_are_timed_in_turns_and_in_their_rounds():
    log = []
    eager, graph = Fake("eager", log), Fake("graph", log)
    parts = [
        Part(eager, frozenset({"prefill"}), 1),
        Part(graph, frozenset({"decode"}), 3),
    ]
    found = measure_parts(parts, tokens(Cell(2, 5), 4, 9))
    assert found == {"eager": Samples([1.0], []), "graph": Samples([], [0.25] * 3)}
    step = [("graph", "fill", 2, 5), ("graph", "decode")]
    assert log == [*step, ("eager", "prefill"), ("eager", "prefill"), *step, *step, *step]
    assert graph.length == 9


def test_the_graphs_of_a_card_have_rows_of_their_own(monkeypatch):
    """With stand-ins for the card: what is timed of it, and what its rows are compared with."""
    import torch

    from spp_bench import graphs
    from spp_bench.shapes import random_models

    monkeypatch.setattr(graphs, "cuda_graph", lambda work: work)
    monkeypatch.setattr(shape_bench.provenance, "machine", lambda device: {"cpu": "x", "gpu": "y"})
    of = published("tiny")
    plan = shape_plan(of, Variant(0.5))
    card = replace(QUICK, device="cuda", dtype="float32", rounds=3)
    run = shape_bench.ShapeRun(of, [plan], card)
    assert [one.name for one in run.candidates][::2] == [
        "dense eager",
        f"{plan.variant.name} eager",
    ]
    run.request = replace(card, device="cpu")
    models = shape_bench.Models(of, "cpu", "float32", 0)
    slim = random_models.slim_of(models.dense, of, plan.plan, plan.config)
    assert slim.dtype == torch.float32
    document = run.open(False, lambda: shape_bench.Rates(1e12, 1e12))
    document |= run.check(models, [slim])
    assert {one["name"] for one in document["agreement"]} == {
        "dense graph",
        f"{plan.variant.name} graph",
    }
    runners = run.runners(models, [slim])
    run.measure(document, runners, Cell(1, 8), Timed(rounds=2))
    run.measure(document, runners, Cell(1, 16), Timed(frozenset({"prefill"}), 1))
    run.measure(document, runners, Cell(2, 8), Timed(frozenset()))
    run.keep(document)
    check(document)
    shown = {
        (cell["batch"], cell["context"]): {
            row["name"].split()[-1]: sorted(row.keys() - {"name"}) for row in cell["rows"]
        }
        for cell in document["cells"]
    }
    assert shown == {
        (1, 8): {"eager": ["decode", "prefill"], "graph": ["decode"]},
        (1, 16): {"eager": ["prefill"], "graph": ["decode"]},
        (2, 8): {"graph": ["decode"]},
    }
    both = {row["name"]: row for row in document["cells"][0]["rows"]}
    graph = both[f"{plan.variant.name} graph"]["decode"]
    assert len(graph["samples_ms"]) == 3
    # Dense, launched from Python, was timed in two rounds.
    assert {"speedup", "over_dense_torch"} <= graph.keys()
    assert "prefill, batch 2" not in str([*panels(document)])
    rows = list(gpu.summary_rows(document))
    assert len(rows) == 3 + 2 + 1
    assert all("x of" in gpu.line(row) for row in rows)


def test_graphs_that_compute_something_else_are_caught(monkeypatch):
    of = published("tiny")
    run = shape_bench.ShapeRun(of, [], replace(QUICK, dtype="float32"))
    run.engines = ("torch", "graph")
    rows = [run._candidate(None, engine) for engine in run.engines]
    models = shape_bench.Models(of, "cpu", "float32", 0)
    other = shape_bench.Models(of, "cpu", "float32", 1)
    monkeypatch.setattr("spp_bench.graphs.cuda_graph", lambda work: work)
    runners = [models.runner(rows[0], models.dense), models.runner(rows[1], other.dense)]
    with pytest.raises(ParityError, match="not the same model"):
        check_agreement(runners, {row.name: row for row in rows}, 263, 2)


def test_a_batch_is_as_large_as_there_is_room_for():
    request = replace(QUICK, device="cuda", new_tokens=8)

    def largest(name, gigabytes):
        cells = gpu.cells_of(published(name), request, int(gigabytes * 1e9))
        return max(cell.batch for cell in cells)

    assert [largest(name, 84) for name in BACKBONES] == [16, 16, 16, 4]
    assert largest("qwen2.5-14b", 70) == 4
    assert largest("llama-2-13b", 60) == 1
    cells = gpu.cells_of(published("llama-2-13b"), request, None)
    assert max(cell.context for cell in cells) == 4096


BARE = """
import sys
for name in %r:
    sys.modules[name] = None  # as if it were not installed
from spp_bench import device_rates
from spp_campaigns import gpu
device_rates._BYTES, device_rates._WIDTH = {"cpu": 1 << 16}, {"cpu": 16}
gpu._SHORT, gpu._LONG, gpu._MANY, gpu._MANY_CONTEXT = 6, 8, 2, 6
from spp_campaigns import ragged
ragged.too_fast = lambda results: ()
sys.exit(gpu.main(sys.argv[1:]))
"""
MISSING = ["typer", "rich", "psutil", "platformdirs", "matplotlib", "onnx", "onnx_ir"]
MISSING += ["onnxruntime", "gguf", "accelerate", "pytest"]


def bare(directory, *options):
    arguments = ["--json", str(directory), "--device", "cpu", "--shape", "tiny"]
    tiny = ["--keep", "0.7", "--units", "heads", "--new-tokens", "2", "--rounds", "1"]
    return subprocess.run(
        [sys.executable, "-c", BARE % MISSING, *arguments, *tiny, *options],
        cwd=ROOT,
        env={"PYTHONPATH": ".:cli:kernels:benchmarks", "PATH": "/usr/bin:/bin", "HOME": "/tmp"}
        | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_what_there_is_no_time_for_is_listed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "Models", lambda *_: pytest.fail("there is no time"))
    grid = ["--keep", "0.7", "--units", "heads", "--device", "cpu", "--shape", "tiny"]
    assert gpu.main(["--json", str(tmp_path), "--budget-s", "0", *grid]) == 0
    left_out = json.loads((tmp_path / "summary.json").read_text())["left_out"]
    assert [one["why"] for one in left_out] == ["time"] * 3
    assert left_out[1]["what"] == "tiny uniform-heads-0.7"
    assert "0 rows, 3 left out" in capsys.readouterr().out


def test_what_fails_on_a_card_is_a_problem_and_stops_nothing_else(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("capture failed\nwith a long reason")

    monkeypatch.setattr(gpu.ShapeRun, "check", fails)
    monkeypatch.setattr("spp_campaigns.ragged.measure", fails)
    grid = ["--keep", "0.7", "--units", "heads", "--device", "cpu", "--shape", "tiny"]
    assert gpu.main(["--json", str(tmp_path), *grid]) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    places = ["tiny per-layer-heads-0.7", "tiny uniform-heads-0.7", "ragged attention"]
    for place, problem in zip(places, summary["problems"], strict=True):
        assert problem.startswith(place)
        assert problem.endswith(": capture failed")
    assert [one["why"] for one in summary["left_out"]] == ["capture failed"] * 3
    assert "error: tiny per-layer-heads-0.7: capture failed" in capsys.readouterr().out


def test_a_dense_model_for_which_there_is_no_memory_is_left_out(tmp_path, monkeypatch):
    import torch

    def full(*_):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr("spp_campaigns.ragged.too_fast", lambda _: ())
    monkeypatch.setattr(gpu, "Models", full)
    grid = ["--keep", "0.7", "--units", "heads", "--device", "cpu", "--shape", "tiny"]
    assert gpu.main(["--json", str(tmp_path), "--layout", "uniform", *grid]) == 0
    (left,) = json.loads((tmp_path / "summary.json").read_text())["left_out"]
    assert left == {"what": "tiny uniform-heads-0.7", "why": "memory"}


def test_a_graph_that_was_captured_before_keeps_its_peak():
    of = published("tiny")
    run = shape_bench.ShapeRun(of, [shape_plan(of, Variant(0.7))], QUICK)
    models = shape_bench.Models(of, "cpu", "float32", 0)
    dense, slim = run.candidates
    models.dense_runner(dense)
    found = []
    for bytes_held in (50, 3):
        peaks = {dense.name: bytes_held, slim.name: bytes_held}
        models.note_peaks(Cell(1, 8), peaks)
        found.append(peaks)
    assert found == [{dense.name: 50, slim.name: 50}, {dense.name: 50, slim.name: 3}]


@pytest.mark.slow
def test_the_matrix_needs_little_of_python_and_goes_on_where_it_was(tmp_path):
    first = bare(tmp_path, "--layout", "per-layer")
    assert first.returncode == 0, first.stderr
    done = (tmp_path / "tiny" / "per-layer-heads-0.7.json").read_bytes()
    second = bare(tmp_path)
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "tiny" / "per-layer-heads-0.7.json").read_bytes() == done
    for name in ("per-layer-heads-0.7", "uniform-heads-0.7"):
        document = json.loads((tmp_path / "tiny" / f"{name}.json").read_text())
        check(document)
        assert [(c["batch"], c["context"]) for c in document["cells"]] == [(1, 6), (1, 8), (2, 6)]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["left_out"] == summary["problems"] == []
    assert len(summary["rows"]) == 2 * 3 * 2
    assert json.loads((tmp_path / "ragged-float32.json").read_text())["results"]


def test_the_way_from_a_text_to_a_plan_is_a_row(measured, monkeypatch):
    from spp_bench import plan_time

    times = TimeFromText((0.5, 0.25), 27)
    monkeypatch.setattr(plan_time, "from_text", lambda *_: times)
    rows = claim_rows(measured[0], published("tiny").shape, demo=True)
    (row,) = [row for row in rows if "27 prompts" in row["what"]]
    assert row["measured"] == [0.25, 0.5]
    assert "scores to plan" in rows[0]["what"]
    assert not any("prompts" in row["what"] for row in measured[0]["claims"])

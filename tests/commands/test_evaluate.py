"""`evaluate` on a tiny model, with the planner that exports use."""

from __future__ import annotations

import json

import pytest
from exporting import texts, write_texts

import spp_campaigns.probe_pruning  # noqa: F401  registers its rows
import spp_export
from spp_cli.main import run
from spp_export import EvalRequest
from spp_export.common.errors import OutputError, UsageError
from spp_export.evaluation.harness.rows import BASELINES

NAME = "llama-gqa-bias"
REQUEST = {"keep": (0.7,), "criterion": ("energy",), "compensate": ("none",), "curves": False}


@pytest.fixture(scope="module")
def common(workshop, tmp_path_factory):
    """Arguments of an evaluation: model, artifacts, another scenario and the pools."""
    root = tmp_path_factory.mktemp("evaluate")
    return {
        "model": str(workshop.dense(NAME)),
        "artifacts": workshop.artifacts(NAME),
        "wrong": write_texts(root / "letters.txt", texts("small", 8, 9)),
        "pools": workshop.pools,
    }


@pytest.fixture(scope="module")
def first(workshop, common, tmp_path_factory):
    """An evaluation with everything that is cheap."""
    root = tmp_path_factory.mktemp("evaluated")
    quiz = root / "quiz.jsonl"
    quiz.write_text('{"prompt": "3 + 4 =", "answer": "7"}\n{"prompt": "1 + 1 =", "answer": "2"}\n')
    request = {
        "keep": (0.7,),
        "criterion": ("energy", "probe-pruning"),
        "compensate": ("none", "lstsq"),
        "ablations": True,
        "domain": ("figures",),
        "generate": True,
        "max_new_tokens": 3,
        "answer_tokens": 0,  # as the exports that are compared with
    }
    plan = workshop.exported(NAME, "per-layer", "lstsq").path / "plan.json"
    arguments = {
        **common,
        **request,
        "other_artifacts": {"same": common["artifacts"]},
        "eval_set": [quiz],
        "plan": [plan],
    }
    return spp_export.evaluate(workshop.scenario, root / "out", **arguments), arguments


def test_every_row_is_measured_on_every_text(first):
    result, _ = first
    assert result.results.texts == ("scenario, held out", "figures pool", "quiz.jsonl")
    assert result.results.failed == ()
    labels = {record.row.label for record in result.results.records}
    assert {"dense", "energy", "random, seed 2", "whitelist only", "probe-pruning"} <= labels
    assert {"energy, wrong scenario", "energy, domain mean", "energy, single domain"} <= labels
    assert {"energy, no whitelist", "energy, artifacts same"} <= labels
    assert any(label.startswith("plan ") for label in labels)


def test_files_and_summary_say_the_same(first):
    result, _ = first
    assert (result.directory / "table.md").read_text().startswith("# Evaluation of ")
    assert (result.directory / "curves.png").read_bytes()[:4] == b"\x89PNG"
    found = json.loads(json.dumps(result.to_dict()))
    dense = next(row for row in found["rows"] if row["kind"] == "dense")
    assert dense["ratio"]["figures pool"] == [1, 1, 1]
    random = [row for row in found["rows"] if row["criterion"] == "random"]
    assert {row["seed"] for row in random} == {0, 1, 2}
    assert all(row["kept"] <= 0.7 for row in random)
    assert any(each["second"] == "energy, wrong scenario" for each in found["comparisons"])
    answered = {row["label"]: bool(row["answers"]) for row in found["rows"]}
    assert answered["energy"]
    assert not answered["probe-pruning"]


def test_a_given_plan_scores_as_its_export_does(first, workshop):
    """The figure of `verify.json` on the same held-out text, from the slim model."""
    result, _ = first
    exported = workshop.exported(NAME, "per-layer", "lstsq")
    expected = exported.result.report["quality"]["ratio"]
    given = next(r for r in result.results.measured if r.row.plan)
    found = given.data["texts"]["scenario, held out"]["summary"]["ratio"][0]
    assert found == pytest.approx(expected, abs=5.1e-4)  # the report has three decimals


def test_the_same_artifacts_under_another_name_change_nothing(first):
    result, _ = first
    by_label = {(r.row.label, r.row.compensation): r.data["texts"] for r in result.results.measured}
    for compensation in ("none", "lstsq"):
        same = by_label["energy, artifacts same", compensation]
        assert same == by_label["energy", compensation]


def test_a_finished_evaluation_is_only_drawn_again(first, workshop, monkeypatch):
    result, arguments = first
    before = (result.directory / "results.jsonl").read_bytes()
    (result.directory / "table.md").unlink()
    monkeypatch.setattr("spp_export.models.loader.load_dense", None)  # no model is loaded
    again = spp_export.evaluate(workshop.scenario, result.directory, **arguments)
    assert (again.directory / "results.jsonl").read_bytes() == before
    assert (again.directory / "table.md").exists()


def test_answers_are_compared_greedily_beside_yardsticks(workshop, common, tmp_path, capsys):
    request = {**REQUEST, "answer_tokens": 6, "criterion": ("energy", "probe-pruning")}
    options = {**common, "pools": None}
    result = spp_export.evaluate(workshop.scenario, tmp_path / "out", **request, **options)
    rows = {record.row.label: record.data for record in result.results.measured}
    assert {"dense", "dense in bf16", "dense in int8", "dense in int4", "energy"} <= set(rows)
    kl = {
        name: data["texts"]["scenario, held out"]["summary"]["kl"][0] for name, data in rows.items()
    }
    assert 0 == kl["dense"] < kl["dense in int8"] < kl["dense in int4"]
    assert "greedy" not in rows["probe-pruning"]
    dense, slim = (rows[name]["greedy"] for name in ("dense", "energy"))
    assert dense["agreed"] == dense["tokens"] == slim["tokens"]
    assert all(a <= b for a, b in zip(slim["agreed"], slim["tokens"], strict=True))
    assert dense["summary"]["prompts"] == len(dense["agreed"])
    found = json.loads(json.dumps(result.to_dict()))
    assert {row["kind"]: row["greedy"] is None for row in found["rows"]}["dynamic"]
    assert any("greedy answer" in note for note in found["notes"])
    assert (
        "| # | chosen by |  | compensation | kept | KL | same token | greedy |"
        in (result.directory / "table.md").read_text()
    )
    assert run(["show", str(result.directory)]) == 0
    assert "greedy" in capsys.readouterr().out


def test_another_evaluation_needs_force(workshop, common, tmp_path):
    out = tmp_path / "out"
    spp_export.evaluate(workshop.scenario, out, **REQUEST, **common)
    changed = {**common, "pools": None}
    with pytest.raises(OutputError, match="different set of texts"):
        spp_export.evaluate(workshop.scenario, out, **REQUEST, **changed)
    found = spp_export.evaluate(workshop.scenario, out, **REQUEST, force=True, **changed)
    assert found.results.texts == ("scenario, held out",)


def test_a_directory_of_something_else_is_left_alone(workshop, common, tmp_path):
    (tmp_path / "table.md").write_text("mine")
    with pytest.raises(OutputError, match=r"no results\.jsonl"):
        spp_export.evaluate(workshop.scenario, tmp_path, **REQUEST, force=True, **common)
    assert (tmp_path / "table.md").read_text() == "mine"


def test_text_that_was_calibrated_on_judges_nothing(workshop, common, tmp_path):
    trained = (workshop.pools / "figures" / "train.txt").read_text().split("\n\n")[0]
    quiz = tmp_path / "quiz.jsonl"
    quiz.write_text(json.dumps({"prompt": trained.strip(), "answer": "7"}))
    with pytest.raises(UsageError, match=r"figures pool, such as .*, so they cannot judge"):
        spp_export.evaluate(
            workshop.scenario, tmp_path / "out", **REQUEST, eval_set=[quiz], **common
        )
    with pytest.raises(UsageError, match="scenario's calibration prompts"):
        spp_export.evaluate(
            workshop.scenario,
            tmp_path / "out",
            **REQUEST,
            eval_set=[workshop.scenario],
            **common,
        )


@pytest.mark.parametrize(
    ("request_changes", "arguments", "message"),
    [
        ({"keep": (1.5,)}, {}, "keep"),
        ({"criterion": ("best",)}, {}, "--criterion best"),
        ({"units": ("rows",)}, {}, "--units rows"),
        ({"units": ()}, {}, "at least one"),
        ({"compensate": ("magic",)}, {}, "--compensate magic"),
        ({"comparable": "odd"}, {}, "--comparable odd"),
        ({"max_new_tokens": 0}, {}, "--max-new-tokens"),
        ({"domain": ("figures",)}, {"pools": None}, "--domain needs"),
        ({"generate": True}, {}, "give --eval-set"),
    ],
)
def test_refused_before_any_work(workshop, common, tmp_path, request_changes, arguments, message):
    with pytest.raises(UsageError, match=message):
        spp_export.evaluate(
            workshop.scenario,
            tmp_path / "out",
            **{**REQUEST, **request_changes, **common, **arguments},
        )


def test_texts_that_cannot_judge_are_refused(workshop, common, tmp_path):
    questions = write_texts(tmp_path / "quiz.txt", ["1 + 1 =", "2 + 3 ="])
    run = {**common, "generate": True, "curves": False}
    with pytest.raises(UsageError, match=r"quiz\.txt: holds no answer"):
        spp_export.evaluate(workshop.scenario, tmp_path / "o", eval_set=[questions], **run)
    changed = {**common, "wrong": workshop.scenario}
    with pytest.raises(UsageError, match="is the scenario itself"):
        spp_export.evaluate(workshop.scenario, tmp_path / "o", **REQUEST, **changed)
    with pytest.raises(UsageError, match=r"named quiz\.txt"):
        spp_export.evaluate(
            workshop.scenario,
            tmp_path / "o",
            **REQUEST,
            eval_set=[questions, questions],
            **common,
        )
    short = write_texts(tmp_path / "short.txt", ["1 + 2 ="])
    with pytest.raises(UsageError, match="keep some for judging"):
        spp_export.evaluate(short, tmp_path / "o", **REQUEST, **common)


def test_all_criteria_begin_with_the_default():
    names = EvalRequest(criterion=("all",)).criterion_names("energy")
    assert names[0] == "energy"
    assert len(names) == len(set(names))
    assert {"obs", "flap", "axis", "probe-pruning", "full-batch-probing", "random"} <= set(names)
    assert EvalRequest(criterion=("flap", "all")).criterion_names("obs")[:2] == ("flap", "obs")


def test_without_the_benchmarks_their_baselines_are_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("spp_cli.commands.eval.find_spec", lambda name: None)
    for name in tuple(BASELINES):
        monkeypatch.delitem(BASELINES, name)
    names = EvalRequest(criterion=("all",)).criterion_names("obs")
    assert "pp-scenario" in names
    assert {"probe-pruning", "full-batch-probing"}.isdisjoint(names)
    command = ["eval", "--scenario", "nowhere.txt", "-o", str(tmp_path), "--criterion"]
    assert run([*command, "all"]) == 2
    left_out, error = capsys.readouterr().err.splitlines()
    assert left_out.startswith("warning: probe-pruning and full-batch-probing are left out")
    assert "nowhere.txt" in error
    assert run([*command, "probe-pruning"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: --criterion probe-pruning: a baseline of the repository's")


def test_eval_is_evaluate():
    assert spp_export.eval is spp_export.evaluate


def test_each_scenario_is_evaluated_against_the_next(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        "spp_export.commands.evaluate.evaluate",
        lambda scenario, output, **options: asked.append((scenario, output, options["wrong"])),
    )
    spp_export.evaluate_scenarios(["a/x.txt", "y.json"], tmp_path)
    spp_export.evaluate_scenarios(["a/x.txt", "y.json"], tmp_path, wrong="w.txt")
    assert asked == [
        ("a/x.txt", tmp_path / "x", "y.json"),
        ("y.json", tmp_path / "y", "a/x.txt"),
        ("a/x.txt", tmp_path / "x", "w.txt"),
        ("y.json", tmp_path / "y", "w.txt"),
    ]
    with pytest.raises(UsageError, match="two files have one name"):
        spp_export.evaluate_scenarios(["a/x.txt", "x.json"], tmp_path)


def test_show_tells_what_an_evaluation_is(first):
    result, _ = first
    for path in (result.directory, result.directory / "results.jsonl"):
        shown = spp_export.show(path)
        assert shown.kind == "evaluation"
        assert shown.facts["rows"] == len(result.results.measured)
        assert any(name.startswith("best at 0.7 of heads") for name in shown.facts)


def test_a_row_that_a_plan_would_refuse_is_refused(workshop, common, tmp_path):
    """`obs` compares layers in one way only: a row that says another must not be measured."""
    request = {**REQUEST, "criterion": ("obs",), "comparable": "share"}
    result = spp_export.evaluate(workshop.scenario, tmp_path / "out", **common, **request)
    failed = {record.row.criterion: record.error for record in result.results.failed}
    assert set(failed) == {"obs"}
    assert "obs weighs losses in one currency" in failed["obs"]

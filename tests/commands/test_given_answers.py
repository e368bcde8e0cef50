"""`--answers`: what commands do with answers that are known."""

from __future__ import annotations

import json

import pytest
from exporting import texts, write_texts

import spp_export
from spp_cli.main import run
from spp_export.calibration import answers
from spp_export.calibration.answers import Answering, scenario_traffic
from spp_export.common.errors import ScenarioError, UsageError
from spp_export.data.answer_file import with_answers
from spp_export.data.scenario import read_scenario
from spp_export.models.session import open_session

NAME = "llama-gqa-bias"


@pytest.fixture(scope="module")
def options(workshop):
    return {
        "model": str(workshop.dense(NAME)),
        "artifacts": workshop.artifacts(NAME),
    }


@pytest.fixture
def log(workshop, tmp_path):
    """Answers to all prompts of the scenario."""
    return answer_to(read_scenario(workshop.scenario).prompts, tmp_path / "log.jsonl")


@pytest.fixture
def silent(monkeypatch):
    """The dense model answers nothing."""

    def refuse(*_, **__):
        pytest.fail("the dense model was asked")

    monkeypatch.setattr(answers, "answer", refuse)


def answer_to(prompts, path):
    records = ({"prompt": prompt, "completion": f"{prompt[:9]} 0"} for prompt in prompts)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_an_export_is_made_for_and_judged_on_them(workshop, options, log, silent, tmp_path):
    result = spp_export.export(
        workshop.scenario, tmp_path / "out", answers=log, compensate="lstsq", **options
    )
    plan = json.loads((result.path / "plan.json").read_text())
    prompts = len(read_scenario(workshop.scenario).conversations)
    digest = read_scenario(log).sha256
    assert plan["scenario"]["answers"] == {
        "name": "log.jsonl",
        "sha256": digest,
        "answered": prompts,
    }
    scenario = with_answers(read_scenario(workshop.scenario), log)
    held_out = scenario_traffic(
        open_session(options["model"]), scenario, 1 << 15, Answering()
    ).held_out.texts
    said = sum(sum(text.answers[0]) for text in held_out)
    assert result.report["quality"]["tokens"] == said > 0


def test_the_dense_model_answers_the_others(workshop, options, tmp_path, caplog, monkeypatch):
    asked = []
    made = answers.answer
    monkeypatch.setattr(answers, "answer", lambda *a: asked.extend(a[1]) or made(*a))
    prompts = read_scenario(workshop.scenario).prompts
    some = answer_to(prompts[:5], tmp_path / "some.jsonl")
    scenario = {"scenario": workshop.scenario, "answer_tokens": 6, "criterion": "energy"}
    spp_export.plan(**scenario, answers=some, compensate="none", **options)
    assert len(asked) == len(prompts) - 5
    assert f"without an answer in some.jsonl: {len(asked)} of {len(prompts)}." in caplog.text


def test_a_plan_made_with_answers_wants_them_again(workshop, options, log, tmp_path, caplog):
    plan = spp_export.plan(workshop.scenario, answers=log, criterion="energy", **options).plan
    again = {"plan": plan, "output": tmp_path / "out", "dry_run": True, **options}
    spp_export.export(workshop.scenario, answers=log, **again)
    assert "the plan was made with" not in caplog.text
    text = {"scenario": workshop.scenario, "artifacts": options["artifacts"]}
    spp_export.load(options["model"], plan, answers=log, **text)
    assert "the plan was made with" not in caplog.text
    spp_export.export(workshop.scenario, **again)
    spp_export.load(options["model"], plan, **text)
    assert caplog.text.count("the plan was made with the answers in log.jsonl") == 2


def test_an_evaluation_and_a_frontier_read_them(workshop, options, log, silent, tmp_path):
    spp_export.evaluate(
        workshop.scenario,
        tmp_path / "eval",
        answers=log,
        keep=0.7,
        criterion="energy",
        compensate="none",
        curves=False,
        **options,
    )
    results = (tmp_path / "eval" / "results.jsonl").read_text().splitlines()
    header = json.loads(results[0])
    assert header["context"]["file of answers"] == read_scenario(log).sha256
    assert header["scenario"]["answers"]["name"] == "log.jsonl"
    drawn = spp_export.frontier(
        workshop.scenario, tmp_path / "frontier", answers=log, share=0.8, **options
    )
    assert drawn.plans[0].result.plan.scenario["answers"]["name"] == "log.jsonl"


def test_a_recovery_learns_from_them(workshop, options, silent, tmp_path):
    data = write_texts(tmp_path / "more.txt", texts("figures", 12, 40))
    log = answer_to(read_scenario(data).prompts, tmp_path / "log.jsonl")
    result = spp_export.recover(
        workshop.exported(NAME).path,
        data,
        tmp_path / "out",
        answers=log,
        model=options["model"],
        steps=4,
        train="weights",
        learning_rate=1e-3,
        keep_failed=True,
    )
    record = json.loads((result.path / "recovery.json").read_text())
    assert record["data"]["answers"]["answered"] == 12


def test_refused_in_one_line_before_any_work(workshop, log, tmp_path, capsys):
    other = answer_to(["Something else?"], tmp_path / "other.jsonl")
    scenario = ["--scenario", str(workshop.scenario), "--quiet"]
    for command in ("export", "plan", "eval", "frontier"):
        place = ["-o", str(tmp_path / "out")]
        assert run([command, *scenario, *place, "--answers", str(other)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "1 answers are to none of the" in line
    assert not any(path.is_file() for path in (tmp_path / "out").rglob("*"))
    with pytest.raises(UsageError, match="--answer-tokens 0 reads prompts alone"):
        spp_export.plan(workshop.scenario, answers=log, answer_tokens=0)
    with pytest.raises(UsageError, match="Add --scenario"):
        spp_export.export(plan=tmp_path / "plan.json", answers=log)
    with pytest.raises(UsageError, match="--learn text asks no prompts"):
        spp_export.recover(tmp_path, workshop.scenario, answers=log, learn="text")
    with pytest.raises(ScenarioError, match="holds no answer"):
        spp_export.plan(workshop.scenario, answers=workshop.scenario)

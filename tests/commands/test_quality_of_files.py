"""What quantising costs is measured on text, shown as quality, and can be a limit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from exporting import refused
from factories import format_options
from onnx_exports import exported_onnx
from transformers import AutoTokenizer

import spp_export
from spp_export.calibration.reading import chat_text
from spp_export.commands.quality import (
    DEFAULT_ANSWERS,
    DEFAULT_TEXT,
    default_texts,
    dense_at_hand,
    judged_texts,
)
from spp_export.common.errors import CheckFailed, QualityError, UsageError
from spp_export.data.scenario import read_scenario
from spp_export.evaluation.batches import check_batches, slim_reference
from spp_export.evaluation.quality import ANSWERS, HELD_OUT
from spp_export.formats.dequantised import write_dequantised
from spp_export.formats.onnx import OnnxOptions
from spp_export.formats.onnx.checks import check_quantised
from spp_export.formats.onnx.read import GraphWeights
from spp_export.formats.onnx.runtime.model import OrtModel
from spp_export.models.checkpoint.checkpoint import open_checkpoint
from spp_export.models.hub import DEMO_NAME, stored_model
from spp_export.planning import read_plan

NAME = "llama-gqa-bias"
OPTIONS = OnnxOptions(quant="int4")


def convert(slim, target, **request):
    return spp_export.convert(slim.path, target, **format_options(OPTIONS), **request)


@pytest.mark.usefixtures("all_conversations")
def test_without_a_scenario_it_is_measured_on_conversations(workshop, tmp_path):
    result = convert(workshop.exported(NAME), tmp_path / "x")
    cost = result.report["quantisation"]
    assert cost["source"] == DEFAULT_TEXT
    assert cost["texts"] == 24
    assert cost["mean_kl"] > 0
    low, high = cost["intervals"]["mean_kl"]
    assert low <= cost["mean_kl"] <= high
    card = (tmp_path / "x" / "README.md").read_text()
    assert (
        f"Beside the unquantised model, on {cost['tokens']} tokens (default conversations)" in card
    )
    names = [check["name"] for check in result.report["checks"]]
    assert not [name for name in names if "unquantised" in name]


def test_of_the_plans_own_scenario_only_what_was_held_out_judges(workshop, tmp_path):
    slim = workshop.exported(NAME)
    scenario, plan = read_scenario(workshop.scenario), read_plan(slim.path / "plan.json")
    assert judged_texts(None, scenario, plan) == (scenario.split()[1], HELD_OUT)
    other = tmp_path / "other.txt"
    other.write_text("A first text.\n\nAnd a second one, which is longer.\n")
    texts, source = judged_texts(None, read_scenario(other), plan)
    assert (len(texts), source) == (2, "text of the scenario")
    assert judged_texts(None, None, plan) == (default_texts(), DEFAULT_TEXT)
    few = tmp_path / "few.txt"
    few.write_text("Only one.\n")
    short = read_scenario(few)
    made = replace(plan, scenario={"sha256": short.sha256})
    assert judged_texts(None, short, made)[1] == DEFAULT_TEXT
    result = convert(slim, tmp_path / "x", scenario=workshop.scenario)
    assert result.report["quantisation"]["source"] == HELD_OUT


@pytest.fixture(scope="module")
def answered(workshop, tmp_path_factory):
    """An export whose plan was made of the dense model's answers."""
    target = tmp_path_factory.mktemp("answered") / "slim"
    return workshop.export(NAME, target, compensate="none", answer_tokens=6)


def test_it_is_measured_on_the_answers_that_the_export_was(
    workshop, answered, tmp_path, monkeypatch
):
    """The same prompts and answers, in every format, whenever the scenario is given."""
    expected = answered.report["quality"]
    assert expected["source"] == ANSWERS
    dense = str(workshop.dense(NAME))
    scenario = workshop.scenario
    checked = spp_export.verify(answered.path, model=dense, scenario=scenario, max_kl=99.0)
    assert checked.context["quality"] == expected
    assert convert(answered, tmp_path / "a", scenario=scenario).report["quantisation"][
        "source"
    ] == (HELD_OUT)
    monkeypatch.setattr("spp_export.commands.quality.stored_model", lambda name: dense)
    cost = convert(answered, tmp_path / "b", scenario=scenario).report["quantisation"]
    assert (cost["source"], cost["tokens"]) == (ANSWERS, expected["tokens"])
    of_slim = answered.report["quality"]["slim_perplexity"]
    assert cost["dense_perplexity"] == pytest.approx(of_slim, rel=1e-3)
    checked = spp_export.verify(tmp_path / "b", model=dense, scenario=scenario)
    assert checked.context["quality"]["tokens"] == expected["tokens"]


def test_without_the_scenario_the_dense_model_answers_prompts_that_come_with_spp(
    workshop, answered, tmp_path, monkeypatch
):
    dense = workshop.dense(NAME)
    found = spp_export.verify(answered.path, model=str(dense), max_kl=99.0).context["quality"]
    assert found["source"] == DEFAULT_ANSWERS
    assert found["tokens"] <= 6 * found["texts"]
    cost = convert(answered, tmp_path / "a").report["quantisation"]
    assert cost["source"] == DEFAULT_TEXT
    other = workshop.dense("llama-mqa")
    monkeypatch.setattr("spp_export.commands.quality.stored_model", lambda name: other)
    plan = read_plan(answered.path / "plan.json")
    assert dense_at_hand(open_checkpoint(answered.path), plan) is None
    whole = dense_at_hand(open_checkpoint(dense), plan)
    assert whole.source.path == dense


def test_a_model_that_was_not_fetched_is_not_at_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("SPP_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in (DEMO_NAME, "nobody/nothing", "a-directory"):
        assert stored_model(name) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("all_conversations")
def test_conversations_are_in_the_models_own_template(workshop):
    tokenizer = AutoTokenizer.from_pretrained(workshop.dense(NAME))
    tokenizer.chat_template = None
    plain = [chat_text(tokenizer, text) for text in default_texts()]
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    )
    chat = [chat_text(tokenizer, text) for text in default_texts()]
    assert len(plain) == len(chat) == 24
    for alone, within in zip(plain, chat, strict=True):
        prompt, answer = alone.split("\n\n", 1)
        assert within == f"<user>{prompt}</user><assistant>{answer}</assistant>"


def test_a_limit_refuses_to_publish(workshop, tmp_path, caplog):
    slim = workshop.exported(NAME)
    with refused(QualityError, "--max-kl 1e-09 is not held"):
        convert(slim, tmp_path / "x", max_kl=1e-9)
    assert list(tmp_path.iterdir()) == []
    with refused(CheckFailed, "Published all the same"):
        convert(slim, tmp_path / "x", max_kl=1e-9, keep_failed=True)
    report = json.loads((tmp_path / "x" / "verify.json").read_text())
    assert (report["passed"], report["distance_gate"]) == (False, {"max_kl": 1e-9, "passed": False})
    assert convert(slim, tmp_path / "y", max_kl=100.0).report["distance_gate"]["passed"]
    with refused(UsageError, "--max-kl: nothing is measured then"):
        convert(slim, tmp_path / "z", max_kl=1.0, verify=False)


def test_an_export_has_the_same_limit(workshop, tmp_path):
    with refused(QualityError, "--max-kl 1e-12 is not held"):
        workshop.export(NAME, tmp_path / "x", compensate="none", max_kl=1e-12)
    assert list(tmp_path.iterdir()) == []
    result = workshop.export(NAME, tmp_path / "y", compensate="none", max_kl=50.0)
    assert result.report["distance_gate"] == {"max_kl": 50.0, "passed": True}
    with refused(QualityError, "same token .*; --same-token 0.9999 is not held"):
        workshop.export(NAME, tmp_path / "z", compensate="none", same_token=0.9999, keep=0.5)


def test_noticeable_distances_are_a_warning(workshop, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("spp_export.commands.quality.NOTICEABLE_KL", 1e-9)
    convert(workshop.exported(NAME), tmp_path / "x")
    assert "answers will differ noticeably" in caplog.text
    caplog.clear()
    monkeypatch.setattr("spp_export.commands.quality.NOTICEABLE_KL", 1e9)
    convert(workshop.exported(NAME), tmp_path / "y")
    assert "noticeably" not in caplog.text


def test_verify_measures_what_was_quantised(workshop):
    out = exported_onnx(workshop, NAME, "per-layer", "none", OPTIONS)
    report = spp_export.verify(out.path, model=str(out.dense))
    assert report.passed
    quality = report.context["quality"]
    assert quality["source"] == DEFAULT_TEXT
    assert quality["mean_kl"] > 0
    worse = spp_export.verify(out.path, model=str(out.dense), max_kl=quality["mean_kl"] / 2)
    assert [check.name for check in worse.failures] == ["distance from the dense model"]
    plain = workshop.exported(NAME)
    assert "quality" not in spp_export.verify(plain.path, model=str(plain.dense)).context


def test_the_check_that_is_left_can_fail(workshop, tmp_path):
    """Weights that are off by two percent are found, although their KL is tiny."""
    out = exported_onnx(workshop, NAME, "per-layer", "none", OPTIONS)
    slim = open_checkpoint(workshop.exported(NAME, "per-layer", "none").path)
    weights = GraphWeights(out.path, slim.family, slim.shape, slim.layers)
    batches = check_batches(slim, (), None, seed=3)

    def reference(name, change):
        place = write_dequantised(
            slim,
            lambda key: weights.read(key) * (change if "o_proj" in key else 1),
            tmp_path / name,
        )
        return slim_reference(place, batches, torch.float64, torch.float32)

    model = OrtModel.load(out.path)
    good = check_quantised(model, reference("same", 1), OPTIONS)
    assert all(check.passed for check in good)
    assert len(good) > 1
    bad = check_quantised(model, reference("other", 1.02), OPTIONS)
    assert not bad[0].passed
    assert bad[-1].found < 0.01

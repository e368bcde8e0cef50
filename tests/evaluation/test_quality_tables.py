"""The tables of the results page: answers' figures first, perplexity second."""

from __future__ import annotations

import json

import pytest
from evaluating import TEXTS, method, record, write_results

from spp_campaigns.quality_tables import main
from spp_export.evaluation.harness.rows import standard_rows
from spp_export.models.hub import DEMO_NAME

MAIN = method(criterion="obs")
MEAN = method(criterion="obs", text="mean", kind="control")
ROWS = [(MAIN, 0.02), (MEAN, 0.03), (method(keep=0.7, criterion="obs"), 0.05)]


def page(path, capsys, *arguments):
    main([str(path.parent), *arguments])
    return capsys.readouterr().out


@pytest.fixture
def path(tmp_path):
    return write_results(tmp_path / "results.jsonl", ROWS)


@pytest.fixture
def answered(path):
    """The same of answers, with the dense model in int8 and greedy answers."""
    (stick,) = standard_rows([], [], yardsticks=["int8"])[1:]
    greedy = {
        "tokens": [90],
        "agreed": [30.5],
        "summary": {"prompts": 9, "tokens": 90.0, "agreed": [30.5, 20.0, 41.0]},
    }
    lines = [record(stick, 0.001), record(method(criterion="flap"), 0.2, greedy=greedy)]
    text = path.read_text().replace('"context": {', '"context": {"number of answer tokens": 96, ')
    path.write_text(text + "".join(json.dumps(line) + "\n" for line in lines))
    return path


def headings(shown):
    return [line for line in shown.splitlines() if line.startswith("###")]


def test_text_without_answers_has_perplexity_alone(path, capsys):
    shown = page(path, capsys)
    panel = f"### Heads, compensation lstsq: perplexity over dense, {TEXTS[0]}"
    assert headings(shown) == [panel]
    assert "| chosen by |  | 20% removed | 30% removed |" in shown
    assert "| units | removed | comp. | over | perplexity ratio," in shown
    assert "KL" not in shown


def test_answers_lead_with_kl_and_the_same_token(answered, capsys):
    shown = page(answered, capsys)
    whole, *panels = headings(shown)
    assert whole == f"### Nothing removed: the dense model in fewer bits, {TEXTS[0]}"
    titles = [heading.split(": ")[1].split(",")[0] for heading in panels]
    assert titles == [
        "KL to the dense model in nats",
        "share of tokens that both find likeliest",
        "greedy tokens before the first difference",
        "perplexity over dense",
    ]
    assert shown.index("| dense in int8 |") < shown.index(panels[0])
    assert shown.count("dense in int8 |") == 1
    assert "| flap |  | 30.5 [20.0, 41.0] |" in shown
    assert "| over | KL less | perplexity ratio," in shown
    assert "- greedy: how many tokens" in shown
    other = page(answered, capsys, "--text", TEXTS[1])
    assert [heading.split(": ")[1].split(",")[0] for heading in headings(other)[1:]] == titles[3:]


def test_a_model_that_was_quantised_is_named_as_such(path, capsys):
    path.write_text(path.read_text().replace('"a-model"', json.dumps(DEMO_NAME), 1))
    assert page(path, capsys).startswith("- The model's weights were quantised to 4 bits before")

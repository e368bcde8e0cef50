"""Answers to a scenario's prompts, from another file."""

from __future__ import annotations

import json

import pytest

from spp_export.common.errors import ScenarioError
from spp_export.data.answer_file import read_answers, with_answers
from spp_export.data.scenario import read_scenario

TEXT = "What is it?\n\nWhy is that so?\n\nAnd then?\n"
# The same conversation, as each kind of file tells it.
LOGS = {
    "messages": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "what  is it?"},
            {"role": "assistant", "content": "A dog."},
            {"role": "user", "content": "Why is that so?"},
            {"role": "assistant", "content": "It barks."},
        ]
    },
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "What is it?"},
            {"from": "gpt", "value": "A dog."},
        ]
    },
    "Alpaca": {"instruction": "What is it?", "output": "A dog."},
    "TRL": {"prompt": "What is it?", "completion": "A dog."},
    "text with an answer": {"prompt": "What is it?", "answer": "A dog."},
    "turns": {"turns": [{"prompt": "Other?"}, {"prompt": "What is it?", "answer": "A dog."}]},
}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def scenario(tmp_path):
    path = tmp_path / "s.txt"
    path.write_text(TEXT)
    return read_scenario(path)


@pytest.mark.parametrize("kind", LOGS)
def test_every_kind_of_log_answers_what_asks_the_same(tmp_path, scenario, caplog, kind):
    """Up to case and spacing, and only what a conversation asks first: what follows depends on
    it."""
    path = write(tmp_path / "log.jsonl", LOGS[kind])
    given = with_answers(scenario, path)
    first, second, third = given.conversations
    (dialogue,) = first.dialogues
    assert [(m.role, m.text) for m in dialogue.messages] == [
        ("user", "What is it?"),
        ("assistant", "A dog."),
    ]
    assert dialogue.answered
    assert (second, third) == scenario.conversations[1:]
    assert given.answers.name == "log.jsonl"
    assert given.answers.sha256 == read_scenario(path).sha256
    assert given.answers.answered == 1
    (line,) = caplog.messages
    assert line == (
        "prompts of s.txt without an answer in log.jsonl: 2 of 3. The dense model answers them."
    )


def test_the_scenario_decides_what_is_held_out(tmp_path, scenario):
    """And what it is told to be: an answer changes neither the text nor the split of prompts."""
    many = tmp_path / "many.txt"
    many.write_text("\n\n".join(f"Question number {n}?" for n in range(8)))
    plain = read_scenario(many)
    records = [{"prompt": text, "completion": "Yes."} for text in plain.prompts]
    given = with_answers(plain, write(tmp_path / "log.jsonl", *records))
    parts = zip(plain.split(), given.split(), strict=True)
    for before, after in parts:
        assert [one.content for one in before] == [one.content for one in after]
        assert all(part.answered for one in after for part in one.dialogues)


def test_chats_and_several_prompts_of_a_record(tmp_path, caplog):
    chat = {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "One?"}]}
    told = {"prompt": "Two?", "completion": "Its own."}
    turns = {"turns": [{"prompt": "One?"}, {"prompt": "Three?"}]}
    scenario = read_scenario(write(tmp_path / "s.jsonl", chat, told, turns))
    records = [{"prompt": f"{n}?", "completion": f"To {n}."} for n in ("One", "Two", "One")]
    records[-1]["completion"] = "Another."
    given = with_answers(scenario, write(tmp_path / "log.jsonl", *records))
    said = [
        [message.text for message in part.messages if message.role != "user"]
        for one in given.conversations
        for part in one.dialogues
    ]
    assert said == [["S", "To One."], ["Its own."], ["To One."], []]
    assert given.answers.answered == 2
    assert "in log.jsonl: 1 of 3." in caplog.text


@pytest.mark.parametrize(
    ("records", "match"),
    [
        ([{"prompt": "Never asked?", "completion": "No."}], "1 answers are to none of the 3 prom"),
        ([{"prompt": "What is it?"}], "holds no answer. Expected records"),
        ([{"nothing": 1}], "answers .*log.jsonl: line 1: expected one of the keys"),
    ],
)
def test_refused(tmp_path, scenario, records, match):
    path = write(tmp_path / "log.jsonl", *records)
    with pytest.raises(ScenarioError, match=match) as refused:
        with_answers(scenario, path)
    assert "\n" not in str(refused.value)


def test_where_none_has_to_be_answered(tmp_path, scenario, caplog):
    path = write(tmp_path / "log.jsonl", {"prompt": "Never asked?", "completion": "No."})
    assert with_answers(scenario, path, required=False).answers.answered == 0
    assert "3 of 3" in caplog.text
    assert with_answers(scenario, None) is scenario
    assert list(read_answers(path).answers.values()) == ["No."]

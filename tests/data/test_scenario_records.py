"""Chat logs of every kind as scenarios, from every kind of file."""

from __future__ import annotations

import csv
import io
import json
import sys

import pytest

from spp_export.common.errors import ScenarioError
from spp_export.data.conversation import Conversation, Message, Turn
from spp_export.data.scenario import read_scenario

USER, SAID = Message("user", "Wie hart ist Wasser?"), Message("assistant", "Das hängt vom Kalk ab.")
SYSTEM, TOOL = Message("system", "Antworte kurz."), Message("tool", '{"dH": 14}')
CHAT = Conversation((USER, SAID), chat=True)


def openai(*messages):
    return [{"role": message.role, "content": message.text} for message in messages]


def sharegpt(*messages):
    names = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}
    return [{"from": names[message.role], "value": message.text} for message in messages]


def read(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_scenario(path)


# A record, and what is said in it.
KINDS = {
    "openai": ({"messages": openai(SYSTEM, USER, SAID)}, (SYSTEM, USER, SAID)),
    "openai with a tool": (
        {"messages": openai(USER, SAID, TOOL, SAID), "id": 3},
        (USER, SAID, TOOL, SAID),
    ),
    "developer": (
        {"messages": [{"role": "Developer", "content": SYSTEM.text}, *openai(USER)]},
        (SYSTEM, USER),
    ),
    "sharegpt": ({"conversations": sharegpt(SYSTEM, USER, SAID)}, (SYSTEM, USER, SAID)),
    "sharegpt with a system": (
        {"conversations": sharegpt(USER, SAID), "system": SYSTEM.text},
        (SYSTEM, USER, SAID),
    ),
    "roles in conversations": ({"conversations": openai(USER, SAID)}, (USER, SAID)),
    "alpaca": (
        {"instruction": "Übersetze.", "input": USER.text, "output": SAID.text},
        (Message("user", f"Übersetze.\n\n{USER.text}"), SAID),
    ),
    "alpaca without input": (
        {"instruction": USER.text, "input": "", "output": SAID.text},
        (USER, SAID),
    ),
    "alpaca without output": ({"instruction": USER.text}, (USER,)),
    "completion": ({"prompt": USER.text, "completion": SAID.text}, (USER, SAID)),
    "completion of messages": (
        {"prompt": openai(SYSTEM, USER), "completion": openai(SAID)},
        (SYSTEM, USER, SAID),
    ),
    "chosen": ({"prompt": USER.text, "chosen": SAID.text, "rejected": "no"}, (USER, SAID)),
    "chosen with its prompt": (
        {"chosen": openai(USER, SAID), "rejected": openai(USER, Message("assistant", "no"))},
        (USER, SAID),
    ),
    "prompt of messages": ({"prompt": openai(SYSTEM, USER)}, (SYSTEM, USER)),
    "messages alone": (openai(USER, SAID), (USER, SAID)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_record_in_every_kind_of_json(tmp_path, kind):
    record, said = KINDS[kind]
    expected = (Conversation(said, chat=True),) * 2
    lines = "\n\n".join([json.dumps(record)] * 2)
    for name, content in (
        ("a.jsonl", lines),
        ("lines.json", lines),
        ("b.json", json.dumps([record] * 2)),
        ("c.json", json.dumps([record] * 2, indent=2)),
        ("array.jsonl", json.dumps([record] * 2, indent=1)),
        ("no suffix", lines),
        ("array", json.dumps([record] * 2)),
    ):
        assert read(tmp_path, name, content).conversations == expected, name
    alone = read(tmp_path, "one.json", json.dumps(record, indent=2))
    assert alone.conversations == expected[:1]
    prompt = next(message.text for message in said if message.role == "user")
    assert alone.prompts[0] == prompt


def test_what_the_assistant_says_next_is_a_turns_answer(tmp_path):
    more = Message("user", "Und Tee?")
    record = {"messages": openai(SYSTEM, USER, SAID, more)}
    scenario = read(tmp_path, "s.jsonl", json.dumps(record) + "\n" + '{"prompt": "plain"}')
    assert scenario.turns == (
        Turn(0, USER.text, SAID.text),
        Turn(0, more.text),
        Turn(1, "plain"),
    )
    assert [each.chat for each in scenario.conversations] == [True, False]


def test_parts_and_calls_of_a_message(tmp_path):
    call = {"id": "1", "type": "function", "function": {"name": "härte", "arguments": "{}"}}
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Was"}, image, "ist das?"]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": [{"type": "text", "text": "14"}], "tool_call_id": "1"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "function_call": {"name": "alt", "arguments": "{}"}},
    ]
    (found,) = read(tmp_path, "s.json", json.dumps({"messages": messages})).conversations
    assert found.messages == (
        Message("user", "Was\nist das?"),
        Message("assistant", '{"name": "härte", "arguments": "{}"}'),
        Message("tool", "14"),
        Message("assistant", '{"name": "alt", "arguments": "{}"}'),
    )


def table(rows, delimiter=","):
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter).writerows(rows)
    return out.getvalue()


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tables_with_a_header(tmp_path, delimiter):
    rows = [
        ["id", " Prompt ", "completion"],
        ["1", USER.text, SAID.text],
        ["2", 'Zeile, eins;\nund "zwei"', ""],
    ]
    scenario = read(tmp_path, "s.csv", "\ufeff" + table(rows, delimiter))
    assert scenario.conversations == (CHAT, Conversation((Message("user", rows[2][1]),)))
    assert read(tmp_path, "s.tsv", table(rows, delimiter)).prompts == scenario.prompts


def test_messages_in_a_cell(tmp_path):
    cell = json.dumps(openai(USER, SAID))
    scenario = read(tmp_path, "s.csv", table([["messages"], [cell]]))
    assert scenario.conversations == (CHAT,)
    long = [["text"], ["x" * 200_000]]  # more than Python's own limit
    assert len(read(tmp_path, "long.csv", table(long)).prompts[0]) == 200_000


def parquet(tmp_path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "s.parquet")
    return tmp_path / "s.parquet"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "messages alone"])
def test_parquet(tmp_path, kind):
    record, said = KINDS[kind]
    path = parquet(tmp_path, [{**record, "extra": n} for n in range(200)])
    assert read_scenario(path).conversations == (Conversation(said, chat=True),) * 200
    nameless = path.rename(tmp_path / "nameless")
    assert len(read_scenario(nameless).conversations) == 200


def test_bad_parquet(tmp_path):
    path = parquet(tmp_path, [{"question": "a", "id": 1}])
    with pytest.raises(ScenarioError, match=r"expected one of the keys .* it has 'question', 'id'"):
        read_scenario(path)
    path.write_bytes(path.read_bytes()[:50] + b"PAR1")
    with pytest.raises(ScenarioError, match="is not valid Parquet"):
        read_scenario(path)
    huge = parquet(tmp_path, [{"text": "x" * (1 << 20)}] * 100)
    assert huge.stat().st_size < 1 << 20
    with pytest.raises(ScenarioError, match="holds more than 64 MiB"):
        read_scenario(huge)


def test_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ScenarioError, match=r"Run: .* pyarrow, or write the file as \.jsonl"):
        read(tmp_path, "s.parquet", b"PAR1")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("s.jsonl", {"messages": "hello"}, "line 1: expected a list 'messages', got a string"),
        ("s.jsonl", {"messages": []}, "holds no text that anybody says"),
        ("s.jsonl", {"messages": openai(SYSTEM)}, "holds no text that anybody says"),
        ("s.jsonl", {"messages": [3]}, "message 1: expected an object, got a number"),
        ("s.jsonl", {"messages": [{"content": "a"}]}, "expected the keys 'role' and 'content'"),
        ("s.jsonl", {"messages": [{"role": "oracle", "content": "a"}]}, "'oracle' is no role"),
        ("s.jsonl", {"messages": [{"role": "user", "content": 3}]}, "'content' to be a string"),
        (
            "s.jsonl",
            {"messages": [{"role": "user", "content": [{"text": 3}]}]},
            "'text' to be a string",
        ),
        ("s.jsonl", {"messages": [{"role": "user", "content": "a\0"}]}, "NUL"),
        ("s.jsonl", {"conversations": None}, "line 1: 'conversations' is empty"),
        ("s.jsonl", {"prompt": "a", "completion": 3}, "expected a list 'completion'"),
        ("s.jsonl", {"instruction": " ", "output": "a"}, "'instruction' is empty"),
        ("s.jsonl", {f"key{n}": 1 for n in range(40)}, "'key11' and 28 more. Rename one"),
        ("s.json", [{"text": "a"}, {"Frage": "b"}], "conversation 2: .* it has 'Frage'"),
        ("s.csv", "Frage,Antwort\na,b\n", "the first line names the columns: .* it has 'frage'"),
        ("s.csv", "text,id\na,1,2\n", "line 2: has 3 cells, and the first line 2"),
        ("s.csv", 'text\n"a"b\n', "is not valid CSV"),
        ("s.csv", "text\n", "holds no prompt"),
        ("s.csv", "text,messages\n,[3\n", "is not valid JSON"),
    ],
)
def test_bad_records_get_one_line(tmp_path, name, content, match):
    text = content if isinstance(content, str) else json.dumps(content)
    with pytest.raises(ScenarioError, match=match) as caught:
        read(tmp_path, name, text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


LISTS = {
    "questions": [f"What is the melting point of compound {n}?" for n in range(20)],
    "queries": [f"{'very ' * (n % 5)}cheap flights {n}" for n in range(20)],
    "German": [f"Wie beantrage ich Formular {n}." for n in range(9)],
    "Chinese": [f"第{n}条规定了什么\uff1f" for n in range(9)],
}
TEXTS = {
    "wrapped": ["so many words that the line is full, and then it goes on to"] * 20 + ["the end."],
    "code": ["def f(x):", "    y = x + 1", "    return y * 2", "total = 0"] * 5,
    "imports": ["import re", "from os import path", "import sys", "from json import dumps"] * 4,
    "a list": [f"- item {n}." for n in range(20)],
    "few lines": ["What is an acid?", "What is a base?"],
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_paragraph_that_looks_like_a_list_of_prompts_is_warned_of(tmp_path, caplog, kind):
    content = "First of all.\n\n" + "\n".join(LISTS[kind])
    scenario = read(tmp_path, "s.txt", content)
    assert len(scenario.prompts) == 2
    (record,) = caplog.records
    count = len(LISTS[kind])
    assert f"the {count} lines of paragraph 2 look like prompts" in record.getMessage()
    assert "blank line between" in record.getMessage()


@pytest.mark.parametrize("kind", TEXTS)
def test_other_paragraphs_are_not(tmp_path, caplog, kind):
    read(tmp_path, "s.txt", "\n".join(TEXTS[kind]))
    assert not caplog.records

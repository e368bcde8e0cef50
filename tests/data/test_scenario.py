"""Reading scenarios of every format, and refusing what is none."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random

import pytest

from spp_export.common.errors import ScenarioError, UsageError
from spp_export.data.conversation import Turn, plain
from spp_export.data.duplicates import normalised
from spp_export.data.scenario import Scenario, read_scenario


def write(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_text_paragraphs(tmp_path):
    data = "\ufeff\n\nWhat is pH?\nExplain.\r\n\r\n  \t\r\nName an acid.\n   \nZürich \x85 here\n"
    scenario = read_scenario(write(tmp_path, "chemistry.txt", data))
    assert scenario.name == "chemistry.txt"
    assert scenario.sha256 == hashlib.sha256(data.encode()).hexdigest()
    assert scenario.prompts == ("What is pH?\nExplain.", "Name an acid.", "Zürich \x85 here")
    assert scenario.description is None
    assert scenario.turns == ()


def test_old_line_ends(tmp_path):
    assert read_scenario(write(tmp_path, "a.TXT", "one\rtwo\r\rthree")).prompts == (
        "one\ntwo",
        "three",
    )


def test_json_lines(tmp_path):
    lines = [
        '{"prompt": " one\\n\\ntwo ", "answer": "x", "id": 7}',
        "  ",
        '{"text": "line\u2028separator", "answer": ["first", "second"]}',
        '{"prompt": null, "text": "three", "answer": []}',
    ]
    scenario = read_scenario(write(tmp_path, "s.jsonl", "\r\n".join(lines)))
    assert scenario.prompts == (" one\n\ntwo ", "line\u2028separator", "three")
    assert scenario.turns == (
        Turn(0, " one\n\ntwo ", "x"),
        Turn(1, "line\u2028separator", "first"),
        Turn(2, "three"),
    )


def published(description, *turns):
    return {"scenario_id": "c_1", "topic_description": description, "turns": list(turns)}


def test_published_format(tmp_path):
    first = {"turn": 1, "prompt": "P1?", "answer": "A", "task_type": "factual", "difficulty": 0.1}
    scenarios = [
        published("About acids", first, {"turn": 2, "query": "P2?", "answer": ["B", "C"]}),
        published("Other", {"turn": 1, "prompt": "P3?"}),
    ]
    scenario = read_scenario(write(tmp_path, "c.json", json.dumps(scenarios)))
    assert scenario.prompts == ("P1?", "P2?", "P3?")
    assert scenario.description == "About acids"
    assert scenario.turns == (
        Turn(0, "P1?", "A", "factual"),
        Turn(0, "P2?", "B"),
        Turn(1, "P3?"),
    )
    alone = read_scenario(write(tmp_path, "d.json", json.dumps(scenarios[1])))
    assert (alone.prompts, alone.description) == (("P3?",), "Other")
    empty = read_scenario(write(tmp_path, "e.json", json.dumps(published("", {"prompt": "P"}))))
    assert empty.description is None


def test_standard_input():
    text = read_scenario("-", stdin=io.BytesIO(b"one\n\n{two}"))
    assert (text.name, text.prompts) == ("stdin", ("one", "{two}"))
    lines = read_scenario("-", stdin=io.BytesIO(b'\n {"prompt": "one"}\n{"text": "two"}\n'))
    assert lines.prompts == ("one", "two")
    assert lines.sha256 == hashlib.sha256(b'\n {"prompt": "one"}\n{"text": "two"}\n').hexdigest()
    with pytest.raises(ScenarioError, match=r"^scenario on standard input: line 1: .*JSON"):
        read_scenario("-", stdin=io.BytesIO(b'{\n"prompt": "one"}'))


def test_a_pipe_without_a_suffix_is_read_like_standard_input():
    reader, writer = os.pipe()
    os.write(writer, b'{"prompt": "one"}')
    os.close(writer)
    try:
        assert read_scenario(f"/dev/fd/{reader}").prompts == ("one",)
    finally:
        os.close(reader)


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("s.txt", b"", "is empty"),
        ("s.txt", b"\xef\xbb\xbf \r\n\t\n", "is empty"),
        ("s.txt", b"caf\xe9", "byte 0xe9 at offset 3"),
        ("s.txt", b"\xef\xbb\xbfcaf\xe9", "byte 0xe9 at offset 6"),
        ("s.txt", "text".encode("utf-16"), "byte 0xff at offset 0"),
        ("s.txt", b"one\r\ntwo\0", "line 2 holds a NUL"),
        ("s.pdf", b"text", "got '.pdf'"),
        ("s.jsonl", b'{"prompt": "a"}\n{"prompt": }', "line 2: is not valid JSON"),
        ("s.jsonl", b'\n\n{"prompt": "a", "prompt": "b"}', "line 3: the key 'prompt' appears"),
        ("s.jsonl", b'{"prompt": "a"}\n"b"', "line 2: expected an object, got a string"),
        (
            "s.jsonl",
            b'{"question": "a"}',
            "line 1: expected one of the keys messages, .*chosen.* it has 'question'. Rename one",
        ),
        ("s.jsonl", b'{"prompt": 3}', "expected 'prompt' to be a string, got a number"),
        ("s.jsonl", b'{"prompt": true}', "got a boolean"),
        ("s.jsonl", b'{"prompt": " "}', "'prompt' is empty"),
        ("s.jsonl", b'{"prompt": "a\\u0000"}', "'prompt' holds a NUL"),
        ("s.jsonl", b'{"prompt": "a", "answer": [3]}', "'answer' to be a string, got a number"),
        ("s.jsonl", b'{"prompt": "\\udc00"}', "surrogate"),
        ("s.jsonl", b'{"prompt": ' + b"[" * 70 + b"]" * 70 + b"}", "nested deeper"),
        ("s.json", b"[]", "is an empty list"),
        ("s.json", b"3", "conversation 1: expected an object, got a number"),
        ("s.json", b'["a"]', "conversation 1: expected an object, got a string"),
        ("s.json", b"{}", "conversation 1: expected one of the keys .* it has none"),
        ("s.json", b'{"turns": {}}', "expected a list 'turns', got an object"),
        ("s.json", b'{"turns": []}', "holds no prompt"),
        ("s.json", b'{"turns": [{"prompt": "a"}, {}]}', "conversation 1, turn 2: expected the key"),
        ("s.json", b'{"turns": [{"prompt": ""}]}', "turn 1: 'prompt' is empty"),
        (
            "s.json",
            b'{"topic_description": 1, "turns": [{"prompt": "a"}]}',
            "'topic_description' to be a string",
        ),
    ],
)
def test_bad_files_get_one_line(tmp_path, name, data, match):
    path = write(tmp_path, name, data)
    with pytest.raises(ScenarioError, match=match) as caught:
        read_scenario(path)
    assert str(caught.value).startswith(f"scenario {path}: ")
    assert "\n" not in str(caught.value)


def test_missing_directory_and_huge(tmp_path):
    with pytest.raises(ScenarioError, match="no such file"):
        read_scenario(tmp_path / "absent.txt")
    with pytest.raises(ScenarioError, match="got a directory"):
        read_scenario(tmp_path)
    with open(tmp_path / "huge.txt", "wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(ScenarioError, match="larger than 64 MiB"):
        read_scenario(tmp_path / "huge.txt")


def test_a_file_name_that_is_not_unicode(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt")
    with open(path, "wb") as file:
        file.write(b"one")
    assert read_scenario(os.fsdecode(path)).name == "caf\ufffd.txt"


@pytest.mark.parametrize(
    ("count", "share", "held_out"),
    [
        (1, 0.25, []),
        (3, 0.25, []),
        (3, 0.5, []),
        (4, 0.25, [3]),
        (9, 0.25, [3, 7]),
        (8, 0.5, [1, 3, 5, 7]),
        (8, 0.0, []),
        (10, 0.3, [3, 6, 9]),
    ],
)
def test_split(count, share, held_out):
    prompts = tuple(plain(f"p{index}") for index in range(count))
    calibration, reserved = Scenario("s", "", prompts).split(share)
    assert reserved == tuple(prompts[index] for index in held_out)
    assert calibration == tuple(p for p in prompts if p not in reserved)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_split_refuses(share):
    with pytest.raises(UsageError, match="held-out share"):
        Scenario("s", "", (plain("a"),) * 8).split(share)


def sides(*prompts, share=0.25):
    calibration, reserved = Scenario("s", "", tuple(map(plain, prompts))).split(share)
    return [part.content for part in calibration], [part.content for part in reserved]


def test_what_is_repeated_is_on_one_side_and_counts_once():
    prompts = [f"Frage {n} zur Mehrwertsteuer?" for n in range(12)]
    written = [
        text
        for prompt in prompts
        for text in (prompt, prompt.upper(), f" {prompt}\n", prompt.replace("F", "\uff26"))
    ]
    random.Random(3).shuffle(written)
    calibration, reserved = sides(*written)
    assert {normalised(text) for text in calibration}.isdisjoint(map(normalised, reserved))
    assert (len(calibration), len(reserved)) == (36, 3)


def test_three_prompts_hold_nothing_out_however_often_they_are_repeated():
    calibration, reserved = sides(*["Wo?", "Wann?", "Wie?"] * 20)
    assert (len(calibration), reserved) == (60, [])
    assert Scenario("s", "", tuple(map(plain, ["Wo?", "WO?", "Wie?"]))).distinct == 2


def test_what_holds_another_is_on_its_side():
    inner = [f"Explain reaction number {n} to me." for n in range(8)]
    outer = [f"A user asks: {text} Answer briefly." for text in inner]
    _, reserved = sides(*inner, *outer)
    assert len(reserved) == 4
    held = {text for text in inner if text in reserved}
    assert {text for text in outer if text in reserved} == {
        f"A user asks: {text} Answer briefly." for text in held
    }


def test_a_large_group_is_not_held_out():
    _, reserved = sides("one", "two", "three", *["four"] * 30, "five", "six")
    assert "four" not in reserved
    assert len(reserved) == 1
    assert sides("one", "two", "three", *["four"] * 30)[1] == ["three"]


def test_conversations_are_never_split(tmp_path):
    scenarios = [
        published(f"Topic {n}", *({"prompt": f"Topic {n}, question {turn}?"} for turn in range(3)))
        for n in range(8)
    ]
    scenario = read_scenario(write(tmp_path, "c.json", json.dumps(scenarios)))
    calibration, reserved = scenario.split()
    assert (len(calibration), len(reserved)) == (6, 2)
    assert all(len(each.prompts) == 3 for each in (*calibration, *reserved))

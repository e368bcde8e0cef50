"""Scenarios made to be trouble, read by the command."""

from __future__ import annotations

import os
import tracemalloc

import pytest

from spp_cli.main import run
from spp_export.common.errors import ScenarioError
from spp_export.data import scenario
from spp_export.data.scenario import read_scenario

# Name and content; what the line must say.
HOSTILE = {
    "not UTF-8": ("s.txt", b"a\n\n\xff\xfe", "not UTF-8"),
    "UTF-16": ("s.txt", "What is it?".encode("utf-16"), "not UTF-8"),
    "empty": ("s.txt", b"", "is empty"),
    "blank": ("s.txt", b"\n \t\n" * 10**6, "is empty"),
    "NUL": ("s.txt", b"a\n\nb\0c", "NUL character"),
    "binary": ("s.txt", bytes(range(128)) * 100, "NUL character"),
    "NUL in JSON": ("s.jsonl", b'{"prompt": "a\\u0000b"}', "NUL character"),
    "deep line": ("s.jsonl", b'{"prompt":' * 10**5, "nested deeper"),
    "deep": ("s.json", b"[" * 10**6, "nested deeper"),
    "unfolding": ("s.json", b"[" + b"{}," * 3_000_000 + b"{}]", "more than 1048576 objects"),
    "prompt without end": ("s.json", b'{"turns": "' + b"x" * (17 << 20) + b'"}', "larger than"),
    "no turns": ("s.json", b'{"turns": []}', "holds no prompt"),
    "turns that are numbers": ("s.json", b'{"turns": [1]}', "expected an object, got a number"),
    "prompts that are lists": ("s.jsonl", b'{"prompt": ["a"]}', "to be a string, got a list"),
    "infinite": ("s.jsonl", b'{"prompt": "a", "answer": NaN}', "not a finite number"),
    "half a pair": ("s.jsonl", b'{"prompt": "\\udfff"}', "half of a surrogate pair"),
    "keys twice": ("s.jsonl", b'{"prompt": "a", "prompt": "b"}', "appears twice"),
    "another kind": (
        "s.pt",
        b"PK",
        "expected a file named .txt, .jsonl, .json",
    ),
}


def refuses(path, capsys, monkeypatch, match):
    monkeypatch.chdir(path.parent)
    before = set(os.listdir("."))
    for command in ("export", "plan", "diagnose"):
        output = [] if command == "diagnose" else ["-o", "out"]
        assert run([command, "--scenario", str(path), *output, "--quiet"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert match in lines[0]
        assert len(lines[0]) < 1000
    assert set(os.listdir(".")) == before


@pytest.mark.parametrize("kind", HOSTILE)
def test_refused(tmp_path, capsys, monkeypatch, kind):
    name, content, match = HOSTILE[kind]
    (tmp_path / name).write_bytes(content)
    refuses(tmp_path / name, capsys, monkeypatch, match)


@pytest.mark.parametrize("kind", ["folder", "device", "loop", "nothing", "huge"])
def test_what_is_no_file(tmp_path, capsys, monkeypatch, kind):
    path = tmp_path / "s.txt"
    match kind:
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to("s.txt")
        case "huge":
            with path.open("wb") as file:
                file.truncate(1 << 40)
    refuses(path, capsys, monkeypatch, "s.txt")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_prompts_without_end(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(scenario, "MAX_PROMPTS", 1000)
    line = "a\n\n" if suffix == ".txt" else '{"prompt": "a"}\n'
    path = tmp_path / f"s{suffix}"
    path.write_text(line * 1000)
    assert len(read_scenario(path).prompts) == 1000
    path.write_text(line * 1001)
    with pytest.raises(ScenarioError, match="more than 1000 prompts"):
        read_scenario(path)


def test_lines_are_not_all_held_at_once(tmp_path):
    (tmp_path / "s.jsonl").write_bytes(b'{"prompt": "a"}' + b"\n" * (1 << 20))
    tracemalloc.start()
    try:
        assert read_scenario(tmp_path / "s.jsonl").prompts == ("a",)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()

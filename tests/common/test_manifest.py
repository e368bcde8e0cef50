from __future__ import annotations

import errno
import hashlib
import json
import os

import pytest

from spp_export.common import manifest
from spp_export.common.errors import OutputError
from spp_export.common.json_files import dump_json
from spp_export.common.manifest import (
    FileRecord,
    check_manifest,
    listed_names,
    write_manifest,
    wrote,
)


@pytest.fixture
def output(tmp_path):
    directory = tmp_path / "out"
    (directory / "sub").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "sub" / "b.txt").write_text("b")
    (directory / "a.bin").write_bytes(bytes(1000))
    write_manifest(directory)
    return directory


def test_content(output):
    content = json.loads((output / "manifest.json").read_text())
    assert content["tool"] == "spp"
    assert content["schema_version"] == 1
    assert list(content["files"]) == ["a.bin", "config.json", "sub/b.txt"]
    sha256 = hashlib.sha256(bytes(1000)).hexdigest()
    assert content["files"]["a.bin"] == {"bytes": 1000, "sha256": sha256}
    assert check_manifest(output) == []
    assert wrote(output)


def test_what_was_not_hashed_before_is_flushed_and_a_full_disk_is_told(output, monkeypatch):
    flushed = []
    monkeypatch.setattr(manifest, "sync", flushed.append)
    write_manifest(output, {"a.bin": FileRecord(1000, "0" * 64)})
    assert flushed == [output / "config.json", output / "sub" / "b.txt"]

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(manifest, "sync", full)
    with pytest.raises(
        OutputError, match=r"cannot write manifest.json \(No space left on device\)"
    ):
        write_manifest(output)


def test_same_files_same_manifest(output):
    before = (output / "manifest.json").read_bytes()
    write_manifest(output)
    assert (output / "manifest.json").read_bytes() == before


def test_known_records_are_used(output):
    write_manifest(output, {"a.bin": FileRecord(1000, "0" * 64)})
    found = hashlib.sha256(bytes(1000)).hexdigest()
    assert check_manifest(output) == [
        f"a.bin: its content has changed, SHA-256 {found}, the manifest says {'0' * 64}"
    ]


PROBLEMS = {
    "missing": (lambda d: (d / "a.bin").unlink(), ["a.bin: missing"]),
    "extra": (lambda d: (d / "new").write_text(""), ["new: not in the manifest"]),
    "longer": (
        lambda d: (d / "config.json").write_text("{} "),
        ["config.json: has 3 bytes, the manifest says 2"],
    ),
    "changed": (
        lambda d: (d / "sub/b.txt").write_text("c"),
        [
            f"sub/b.txt: its content has changed, SHA-256 {hashlib.sha256(b'c').hexdigest()}, "
            f"the manifest says {hashlib.sha256(b'b').hexdigest()}"
        ],
    ),
    "link": (
        lambda d: ((d / "a.bin").rename(d.parent / "x"), (d / "a.bin").symlink_to("../x")),
        ["a.bin: is not a regular file"],
    ),
    "empty directory": (
        lambda d: (d / "e" / "f").mkdir(parents=True),
        ["e/f/: not in the manifest"],
    ),
    "directory": (
        lambda d: ((d / "a.bin").unlink(), (d / "a.bin").mkdir()),
        ["a.bin: missing", "a.bin/: not in the manifest"],
    ),
    "pipe": (
        lambda d: ((d / "a.bin").unlink(), os.mkfifo(d / "a.bin")),
        ["a.bin: is not a regular file"],
    ),
    "linked directory": (lambda d: (d / "up").symlink_to(".."), ["up: not in the manifest"]),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_problems(output, case):
    change, problems = PROBLEMS[case]
    change(output)
    assert check_manifest(output) == problems


DAMAGED = {
    "no JSON": "x",
    "list": "[]",
    "other tool": '{"tool": "x", "schema_version": 1, "files": {}}',
    "other version": '{"tool": "spp", "schema_version": 2, "files": {}}',
    "files": '{"tool": "spp", "schema_version": 1, "files": []}',
    "entry": '{"tool": "spp", "schema_version": 1, "files": {"a.bin": 3}}',
    "size": '{"tool": "spp", "schema_version": 1, "files": {"a": {"bytes": true, "sha256": ""}}}',
    "hash": '{"tool": "spp", "schema_version": 1, "files": {"a": {"bytes": 1, "sha256": "A"}}}',
    "more": '{"tool": "spp", "schema_version": 1, "files": {}, "x": 1}',
    "less": '{"tool": "spp", "schema_version": 1}',
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_manifest(output, case):
    (output / "manifest.json").write_text(DAMAGED[case])
    (problem,) = check_manifest(output)
    assert "manifest.json" in problem


def test_hostile_names_are_not_opened(output):
    (output.parent / "secret").write_text("s")
    record = {"bytes": 1, "sha256": hashlib.sha256(b"s").hexdigest()}
    content = json.loads((output / "manifest.json").read_text())
    hostile = {"../secret": record, "/etc/passwd": record}
    (output / "manifest.json").write_text(
        dump_json({**content, "files": hostile | content["files"]})
    )
    assert check_manifest(output) == ["../secret: missing", "/etc/passwd: missing"]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + "\n",
        lambda text: "\ufeff" + text,
        lambda text: text.replace('"tool"', '"too\\u006c"'),
        lambda text: json.dumps(json.loads(text)),
        lambda text: text.replace('"schema_version": 1', '"schema_version": 1.0'),
        lambda text: dump_json(dict(reversed(json.loads(text).items()))),
    ],
    ids=["newline", "mark", "escape", "spaces", "float", "order"],
)
def test_the_same_said_otherwise_is_a_change(output, change):
    path = output / "manifest.json"
    before = path.read_text()
    assert change(before) != before
    path.write_text(change(before), encoding="utf-8")
    (problem,) = check_manifest(output)
    assert "so it was changed" in problem or "schema_version is 1.0, expected 1" in problem


def test_what_it_lists(output):
    assert listed_names(output) == {"a.bin", "config.json", "sub/b.txt"}
    (output / "manifest.json").write_text("{}")
    assert listed_names(output) == frozenset()


def test_an_older_or_newer_export_is_still_ours(output):
    (output / "manifest.json").write_text('{"tool": "spp", "schema_version": 2}')
    assert wrote(output)
    (output / "manifest.json").unlink()
    assert not wrote(output)
    assert "no such file" in check_manifest(output)[0]


def test_links_do_not_belong_in_an_output(output):
    (output / "link").symlink_to("a.bin")
    with pytest.raises(OutputError, match="only regular files"):
        write_manifest(output)


def test_nor_do_empty_directories(output):
    (output / "empty").mkdir()
    with pytest.raises(OutputError, match="only regular files"):
        write_manifest(output)

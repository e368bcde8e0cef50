from __future__ import annotations

import hashlib
import json

import pytest

from spp_export.checkpoint.manifest import FileRecord, check_manifest, write_manifest, wrote
from spp_export.errors import OutputError


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


def test_same_files_same_manifest(output):
    before = (output / "manifest.json").read_bytes()
    write_manifest(output)
    assert (output / "manifest.json").read_bytes() == before


def test_known_records_are_used(output):
    write_manifest(output, {"a.bin": FileRecord(1000, "0" * 64)})
    assert check_manifest(output) == ["a.bin: its content has changed"]


PROBLEMS = {
    "missing": (lambda d: (d / "a.bin").unlink(), ["a.bin: missing"]),
    "extra": (lambda d: (d / "new").write_text(""), ["new: not in the manifest"]),
    "longer": (
        lambda d: (d / "config.json").write_text("{} "),
        ["config.json: has 3 bytes, the manifest says 2"],
    ),
    "changed": (
        lambda d: (d / "sub/b.txt").write_text("c"),
        ["sub/b.txt: its content has changed"],
    ),
    "link": (
        lambda d: ((d / "a.bin").rename(d.parent / "x"), (d / "a.bin").symlink_to("../x")),
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
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_manifest(output, case):
    (output / "manifest.json").write_text(DAMAGED[case])
    (problem,) = check_manifest(output)
    assert "manifest.json" in problem


def test_hostile_names_are_not_opened(output):
    files = {"../secret": {"bytes": 1, "sha256": ""}, "/etc/passwd": 3}
    content = {"tool": "spp", "schema_version": 1, "files": files}
    (output / "manifest.json").write_text(json.dumps(content))
    problems = check_manifest(output)
    assert problems[:2] == ["../secret: missing", "/etc/passwd: missing"]


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

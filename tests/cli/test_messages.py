"""What a user reads who mistypes, names what is not there, or asks for nothing: by trying it."""

from __future__ import annotations

from pathlib import Path

import pytest

from spp_cli.main import run

NO_EXPORT = "Give one that 'spp export' or 'spp convert' wrote."
NO_PLAN = "expected a plan (.json), results of 'spp eval' (.jsonl), or a directory: an export, "


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to be in, with an empty one, a text and a sheet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "letter.txt").write_text("Dear model,")
    (tmp_path / "sheet.ods").write_bytes(b"PK\x03\x04")
    (tmp_path / "nothing.json").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("verfiy out", "No such command 'verfiy'. Did you mean 'verify'? See 'spp --help'."),
        ("artifacts inport x", "No such command 'inport'. Did you mean 'import'? See 'spp arti"),
        ("verify gone", f"gone: no such directory. {NO_EXPORT}"),
        ("recover gone --data letter.txt", f"gone: no such directory. {NO_EXPORT}"),
        ("bench gone --model empty", "empty/config.json: no such file."),
        ("verify letter.txt", "letter.txt: expected a directory that 'spp export' or 'spp conv"),
        ("recover letter.txt --data x", "letter.txt: expected a directory that 'spp export' or"),
        ("verify empty", "empty: no plan.json, so not an export of spp."),
        ("recover empty --data x", "empty: no plan.json, so not an export of spp."),
        ("push gone me/x", "gone: no such directory."),
        ("report gone", "gone: no such file or directory."),
        ("chat gone", "gone: no such directory. Give a directory that 'spp export' wrote"),
        ("chat letter.txt", "letter.txt: expected a directory, got a file. Give a directory that"),
        ("convert gone -o x", "gone: no such directory. Give a directory with config.json and"),
        ("export --scenario gone.txt", "scenario gone.txt: no such file."),
        ("show letter.txt", f"letter.txt: {NO_PLAN}artifacts, a model."),
        ("show sheet.ods", f"sheet.ods: {NO_PLAN}artifacts, a model."),
        ("show nothing.json", "plan nothing.json: is empty, expected JSON."),
        ("show empty", "empty: is neither an export, an artifacts directory, a model nor"),
    ],
)
def test_one_line_says_what_is_wrong(
    place: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    assert run(line.split()) == 2
    found = capsys.readouterr().err
    assert found.startswith(f"error: {message}")
    assert found.count("\n") == 1
    assert "?." not in found

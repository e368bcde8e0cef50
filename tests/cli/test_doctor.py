"""`spp doctor`: what is installed, and what stands in the way."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spp_cli.main import app
from spp_export.commands import doctor as module
from spp_export.commands.doctor import PARTS, doctor
from spp_export.common.installation import install_command
from spp_export.formats.format import Library


def run(*arguments: str):
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_it_names_versions_devices_caches_and_parts(monkeypatch, tmp_path):
    monkeypatch.setenv("SPP_CACHE", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "one").write_bytes(b"12345")
    result = run("--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["versions"]["torch"] == version("torch")
    assert found["devices"][0]["device"] == "cpu"
    assert found["devices"][0]["bytes"] >= found["devices"][0]["free_bytes"] > 0
    caches = {cache["name"]: cache["bytes"] for cache in found["caches"]}
    assert (caches["models"], caches["statistics"]) == (5, 0)
    assert {part["package"] for part in found["parts"]} == {part.package for part in PARTS}
    text = run().stdout
    assert version("transformers") in text
    assert "nothing stands in the way" in text


def installed(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    def answer(package: str) -> str:
        if package in versions:
            return versions[package]
        raise PackageNotFoundError(package)

    monkeypatch.setattr(module, "version", answer)


def test_what_cannot_be_imported_is_a_problem(monkeypatch, tmp_path):
    (tmp_path / "broken_engine.py").write_text("raise OSError('libcuda.so.1: cannot open\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    broken = Library("broken", "broken_engine", "testing")
    monkeypatch.setattr(module, "PARTS", (*PARTS, broken))
    installed(monkeypatch, {"broken": "1.0", "torch": "2", "transformers": "5", "gguf": "1"})
    problems = doctor().problems
    assert problems == (
        "broken 1.0 cannot be imported: OSError: libcuda.so.1: cannot open more. "
        f"Run: {broken.install}",
    )


def test_missing_libraries_and_two_of_one_kind_are_problems(monkeypatch):
    installed(monkeypatch, {"torch": "2", "onnxruntime": "1", "onnxruntime-gpu": "1"})
    problems = doctor().problems
    assert len(problems) == 3
    assert "transformers is missing" in problems[0]
    assert "gguf is missing" in problems[1]
    assert "one hides the other" in problems[2]
    result = run("--quiet")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == list(problems)


def test_it_ends_with_what_each_command_can_do(monkeypatch):
    installed(monkeypatch, {"torch": "2", "transformers": "5", "gguf": "1", "onnx": "1"})
    jobs = {job.what: job for job in doctor().jobs}
    works = {what for what, job in jobs.items() if job.works}
    assert works == {
        "export, plan, diagnose, probe, verify, eval, report, bench",
        "the same with the default model",
        "export --format gguf, convert --format gguf",
        "chat with safetensors",
    }
    assert jobs["recover"].missing == ("peft",)
    assert jobs["recover"].install == (install_command("recover"),)
    graphs = jobs["export --format onnx, convert --format onnx"]
    assert graphs.missing == ("onnx-ir", "onnxruntime")
    assert graphs.install == (install_command("onnx"),)
    shown = " ".join(run().stdout.split())
    assert "what commands can do here" in shown
    assert "recover no needs peft:" in shown
    found = json.loads(run("--json").stdout)["commands"]
    assert {command["what"]: command["works"] for command in found}["chat with GGUF"] is False


def test_a_cache_that_cannot_be_written_is_a_problem(monkeypatch, tmp_path):
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module.os, "access", lambda path, mode: Path(path) != tmp_path)
    assert [problem.split(":")[0] for problem in doctor().problems] == [
        str(tmp_path / "cache" / name) for name in ("models", "statistics")
    ]

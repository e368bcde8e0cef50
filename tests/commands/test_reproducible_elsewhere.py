"""Same bytes out in another process: directory, locale, umask, time zone, hash seed, user, name.

Another number of threads is another matter: it changes how BLAS rounds. The weights of a model as
small as these stay, and so does what the plan keeps; what was measured does not, to the last digit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from exporting import KEEP, tree

NAME = "llama-gqa-bias"
_EXPORT = """
import os, sys, time
os.umask(int(sys.argv[2], 8))
os.chdir(sys.argv[3])
time.tzset()
import locale
locale.setlocale(locale.LC_ALL, "")
from spp_cli.main import run
sys.exit(run(sys.argv[4:]))
"""
HERE = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "TZ": "UTC"}
ELSEWHERE = {
    "PYTHONHASHSEED": "4242",
    "LC_ALL": "C",
    "PYTHONUTF8": "0",
    "TZ": "Asia/Kathmandu",
    "COLUMNS": "40",
    "FORCE_COLOR": "1",
    "USER": "someone",
    "HOME": "/",
}
FORMS = {
    "safetensors": [],
    "onnx int4": ["--format", "onnx", "--quant", "int4"],
}


def export(
    workshop, target: Path, form: str, changes: dict[str, str], umask: str = "022"
) -> dict[str, bytes]:
    """An export with the re-fit by a process of its own, from an empty cache."""
    artifacts = workshop.artifacts(NAME)
    elsewhere = target.parent
    elsewhere.mkdir(parents=True, exist_ok=True)
    arguments = ["export", "--model", workshop.dense(NAME), "--artifacts", artifacts]
    arguments += ["--scenario", workshop.scenario, "--keep", KEEP, "--compensate", "lstsq"]
    # By a relative name: another directory to be in is another word for each of them.
    paths = [os.path.relpath(a, elsewhere) if isinstance(a, Path) else a for a in arguments]
    command = [sys.executable, "-c", _EXPORT, "-", umask, elsewhere, *paths]
    command += ["-o", target.name, "--quiet", *FORMS[form]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **HERE, **changes}
    environment["SPP_CACHE"] = str(elsewhere / "cache")
    result = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return tree(target)


@pytest.fixture(scope="module")
def first(workshop, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """The export of every form that others are compared with."""
    root = tmp_path_factory.mktemp("first")
    return {form: export(workshop, root / form / "out", form, {}) for form in FORMS}


@pytest.mark.parametrize("form", FORMS)
def test_another_process_writes_the_same_bytes(workshop, first, tmp_path, form):
    """But for the directory's name, which is the title of its card."""
    target = tmp_path / "deep" / "er" / "other name"
    found = export(workshop, target, form, ELSEWHERE, umask="077")
    assert found.keys() == first[form].keys()
    differs = {name for name in found if found[name] != first[form][name]}
    assert differs == {"README.md", "manifest.json"}
    card = found["README.md"].decode().replace("other name", "out")
    assert card == first[form]["README.md"].decode()
    listed, before = (json.loads(files["manifest.json"])["files"] for files in (found, first[form]))
    assert {name for name in listed if listed[name] != before[name]} == {"README.md"}


def test_the_number_of_threads_changes_what_was_measured_and_no_weights(workshop, first, tmp_path):
    files = export(workshop, tmp_path / "out", "safetensors", {"OMP_NUM_THREADS": "2"})
    before = first["safetensors"]
    differs = {name for name in files if files[name] != before[name]}
    assert differs <= {"README.md", "manifest.json", "plan.json", "verify.json"}
    plan, plan_before = (json.loads(each["plan.json"]) for each in (files, before))
    for score in ("score", "score_bound"):
        measured = plan["budget"]["realised"].pop(score)
        measured_before = plan_before["budget"]["realised"].pop(score)
        assert measured == pytest.approx(measured_before, rel=1e-12)
    assert plan == plan_before


def test_nothing_of_the_machine_is_in_an_export(first, tmp_path_factory):
    import getpass
    import socket

    root = str(tmp_path_factory.getbasetemp()).encode()
    for files in first.values():
        for name, data in files.items():
            assert root not in data, name
            assert str(Path.cwd()).encode() not in data, name
            for word in (socket.gethostname(), getpass.getuser()):
                assert f"/{word}/".encode() not in data, name

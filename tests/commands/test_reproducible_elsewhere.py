"""Same bytes out in another process: directory, locale, umask, time zone, hash seed, user, name.

Another number of threads is another matter: it changes how BLAS rounds. The weights of a model as
small as these stay, and so does what the plan keeps; what was measured does not, to the last digit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from exporting import KEEP, tree

NAME = "llama-gqa-bias"
_EXPORT = """
import json, os, sys, time
os.umask(int(sys.argv[2], 8))
os.chdir(sys.argv[3])
time.tzset()
import locale
locale.setlocale(locale.LC_ALL, "")
from spp_cli.main import run
for more in json.loads(sys.argv[4]):
    if status := run([*sys.argv[5:], *more]):
        sys.exit(status)
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
    workshop,
    root: Path,
    forms: Iterable[str],
    changes: dict[str, str],
    umask: str = "022",
    name: str = "out",
) -> dict[str, dict[str, bytes]]:
    """Exports with the re-fit, to `root` / form / `name`, by one process, from an empty cache."""
    artifacts = workshop.artifacts(NAME)
    root.mkdir(parents=True)
    arguments = ["export", "--model", workshop.dense(NAME), "--artifacts", artifacts]
    arguments += ["--scenario", workshop.scenario, "--keep", KEEP, "--compensate", "lstsq"]
    # By a relative name: another directory to be in is another word for each of them.
    paths = [os.path.relpath(a, root) if isinstance(a, Path) else a for a in arguments]
    runs = [["-o", f"{form}/{name}", *FORMS[form]] for form in forms]
    command = [sys.executable, "-c", _EXPORT, "-", umask, root, json.dumps(runs), *paths, "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **HERE, **changes}
    environment["SPP_CACHE"] = str(root / "cache")
    result = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return {form: tree(root / form / name) for form in forms}


@pytest.fixture(scope="module")
def first(workshop, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """The export of every form that others are compared with."""
    return export(workshop, tmp_path_factory.mktemp("first") / "here", FORMS, {})


def test_another_process_writes_the_same_bytes(workshop, first, tmp_path):
    """But for the directory's name, which is the title of its card."""
    root = tmp_path / "deep" / "er"
    other = export(workshop, root, FORMS, ELSEWHERE, umask="077", name="other name")
    for form, found in other.items():
        assert found.keys() == first[form].keys()
        differs = {name for name in found if found[name] != first[form][name]}
        assert differs == {"README.md", "manifest.json"}
        card = found["README.md"].decode().replace("other name", "out")
        assert card == first[form]["README.md"].decode()
        listed, before = (
            json.loads(files["manifest.json"])["files"] for files in (found, first[form])
        )
        assert {name for name in listed if listed[name] != before[name]} == {"README.md"}


@pytest.mark.slow
def test_the_number_of_threads_changes_what_was_measured_and_no_weights(workshop, first, tmp_path):
    form = "safetensors"
    files = export(workshop, tmp_path / "two", [form], {"OMP_NUM_THREADS": "2"})[form]
    before = first[form]
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

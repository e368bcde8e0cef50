"""The command that adds a library is right for how the package was installed."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
import shutil
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spp_export.common import installation as module
from spp_export.common.errors import UsageError
from spp_export.common.installation import install_command, require_package

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIRES = ["rich>=13", 'shapely>=2.1; extra == "maps"', "pyproj; python_version > '3' and "]
REQUIRES[2] += "extra == 'maps'"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Says how the package was installed, by its metadata; in site-packages, with pip at hand."""
    scripts = tmp_path / "bin"
    monkeypatch.setattr(module, "_ROOT", tmp_path / "site-packages")
    monkeypatch.setattr(sys, "executable", str(scripts / "python"))
    monkeypatch.setattr(shutil, "which", lambda _: str(scripts / "pip"))

    def install(direct_url: Any = None) -> None:
        text = None if direct_url is None else json.dumps(direct_url)
        made = SimpleNamespace(read_text=lambda _: text, requires=REQUIRES)
        monkeypatch.setattr(importlib.metadata, "distribution", lambda _: made)

    install()
    return install


def test_from_an_index_by_its_extra(here: Any) -> None:
    assert install_command("maps") == "pip install 'spp-export[maps]'"
    assert install_command("shapely", extra=False) == "pip install shapely"


@pytest.mark.parametrize(
    "address",
    [
        {"url": "file:///gone/spp_export-1-py3-none-any.whl", "archive_info": {}},
        {"url": "https://example.org/spp.git", "vcs_info": {"vcs": "git"}},
        {"url": "file:///gone/clone", "dir_info": {}},
    ],
    ids=["wheel", "repository", "folder that is gone"],
)
def test_from_elsewhere_by_the_parts_of_the_extra(here: Any, address: Any) -> None:
    here(address)
    assert shlex.split(install_command("maps")) == ["pip", "install", "shapely>=2.1", "pyproj"]


def test_from_a_clone_by_its_path(here: Any, tmp_path: Path) -> None:
    clone = tmp_path / "a clone"
    clone.mkdir()
    (clone / "pyproject.toml").touch()
    here({"url": clone.as_uri(), "dir_info": {}})
    assert shlex.split(install_command("maps")) == ["pip", "install", f"{clone}[maps]"]


def test_in_a_clone_as_editable(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROOT", ROOT)
    assert shlex.split(install_command("maps"))[2:] == ["-e", f"{ROOT}[maps]"]


def test_without_metadata(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> Any:
        raise PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert install_command("maps") == "pip install 'spp-export[maps]'"


def test_by_what_installs_into_this_environment(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/pip")  # another Python's
    own = [sys.executable, "-m", "pip", "install", "shapely"]
    assert shlex.split(install_command("shapely", extra=False)) == own
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    uv = ["uv", "pip", "install", "--python", sys.executable, "shapely"]
    assert shlex.split(install_command("shapely", extra=False)) == uv
    monkeypatch.setattr(sys, "prefix", "/home/someone/.local/pipx/venvs/spp-export")
    assert install_command("shapely", extra=False) == "pipx inject spp-export shapely"


def test_what_the_default_model_takes_is_a_dependency() -> None:
    names = {line.partition(">")[0] for line in PROJECT["dependencies"]}
    assert {"torch", "transformers", "gguf", "safetensors"} <= names
    assert "demo" not in PROJECT["optional-dependencies"]


def test_a_missing_library_is_one_line_and_a_broken_one_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"^Maps needs the package nowhere_at_all\. Run: get it$"):
        require_package("nowhere_at_all.inside", "Maps", lambda: "get it")
    (tmp_path / "half_installed.py").write_text("import nowhere_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        require_package("half_installed", "Maps", lambda: "get it")

"""How this package was installed, and the command that adds what is missing to it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from spp_export.common.errors import UsageError

if TYPE_CHECKING:
    from importlib.metadata import Distribution

_NAME = "spp-export"
_ROOT = Path(__file__).resolve().parents[2]
_PIPX = re.compile(r"/pipx/venvs/([^/]+)$")


def install_command(what: str, *, extra: bool = True) -> str:
    """The command that adds an extra of this package, or another package, to where it runs.

    A package that came from an index or a clone is named with its extra; one that came from a file
    or an address of its own, which may be gone, is left alone, and the extra's parts are named.
    """
    return shlex.join([*_installer(), *(_parts(what) if extra else [what])])


def require_package(module: str, title: str, install: Callable[[], str]) -> ModuleType:
    """An optional library by its import name; UsageError that says how to install it.

    install  gives the command, of `install_command`, which takes longer to find than a library that
             is there
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # The library's own missing parts are another matter than the library missing.
        if error.name != module.partition(".")[0]:
            raise
        raise UsageError(f"{title} needs the package {error.name}. Run: {install()}") from error


def _parts(extra: str) -> list[str]:
    clone = _clone()
    if clone is not None:
        place, editable = clone
        return [*(["-e"] if editable else []), f"{place}[{extra}]"]
    installed = _distribution()
    if installed is None or _address(installed) is None:
        return [f"{_NAME}[{extra}]"]
    of_extra = re.compile(rf"""extra\s*==\s*["']{re.escape(extra)}["']""")
    needed = (line.partition(";") for line in installed.requires or ())
    return [name.strip() for name, _, marker in needed if of_extra.search(marker)]


def _clone() -> tuple[Path, bool] | None:
    """The clone that this package runs in (True) or was installed from; None without one."""
    if (_ROOT / "pyproject.toml").is_file():
        return _ROOT, True
    from urllib.parse import unquote, urlsplit

    installed = _distribution()
    address = urlsplit((_address(installed) if installed else None) or "")
    place = Path(unquote(address.path))
    known = address.scheme == "file" and (place / "pyproject.toml").is_file()
    return (place, False) if known else None


def _distribution() -> Distribution | None:
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        return distribution(_NAME)
    except PackageNotFoundError:
        return None


def _address(installed: Distribution) -> str | None:
    """Where the package came from, if not from an index (PEP 610)."""
    try:
        url = json.loads(installed.read_text("direct_url.json") or "{}").get("url")
    except (ValueError, AttributeError):
        return None
    return url if isinstance(url, str) else None


def _installer() -> Sequence[str]:
    """What installs packages into the environment that runs: pipx's own has its name, and others
    may lack pip, as those of uv do."""
    import shutil

    if pipx := _PIPX.search(Path(sys.prefix).as_posix()):
        return ["pipx", "inject", pipx[1]]
    if importlib.util.find_spec("pip") is None:
        return ["uv", "pip", "install", "--python", sys.executable]
    first = shutil.which("pip")
    if first is not None and Path(first).parent == Path(sys.executable).parent:
        return ["pip", "install"]
    return [sys.executable, "-m", "pip", "install"]

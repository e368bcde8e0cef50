"""`doctor`: what this installation has, and what can therefore be loaded, checked and run."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from spp_export.common.disk import nearest
from spp_export.common.errors import reason_of
from spp_export.common.versions import cpu_name, library_versions
from spp_export.formats.format import Library
from spp_export.formats.registry import FORMATS
from spp_export.models.hub import cache_directory

PARTS = (
    Library("torch", "torch", "everything that runs a model"),
    Library("transformers", "transformers", "models and tokenizers"),
    *(library for made in FORMATS.values() for library in made.libraries),
    Library("peft", "peft", "spp recover", "recover"),
    Library("lm-eval", "lm_eval", "lm-evaluation-harness"),
    Library("triton", "triton", "kernels on CUDA"),
)
# What the main job takes, by import names; the default model is a GGUF file.
_BASE = ("torch", "transformers")
_DEFAULT_MODEL = (*_BASE, "gguf")


def _jobs() -> Iterator[tuple[str, tuple[str, ...]]]:
    """What commands do, and the libraries that they need for it."""
    yield "export, plan, diagnose, probe, verify, eval, report, bench", _BASE
    yield "the same with the default model", _DEFAULT_MODEL
    for made in FORMATS.values():
        if made.converted:
            yield f"export --format {made.name}, convert --format {made.name}", made.required
    for made in FORMATS.values():
        yield f"chat with {made.title}", made.runs or _BASE
    yield "recover", (*_BASE, "peft")


@dataclass(frozen=True)
class InstalledLibrary:
    """One of `PARTS`: its version, None where it is missing, and why it cannot be imported."""

    library: Library
    version: str | None
    problem: str | None = None


@dataclass(frozen=True)
class Job:
    """What commands do; `missing` are the packages that they need for it and do not find, and
    `install` the commands that add these."""

    what: str
    missing: tuple[str, ...] = ()
    install: tuple[str, ...] = ()

    @property
    def works(self) -> bool:
        """Whether it can be done here."""
        return not self.missing


@dataclass(frozen=True)
class CacheFolder:
    """A directory that spp keeps files in; `nbytes` is 0 if it does not exist yet."""

    name: str
    path: Path
    nbytes: int


@dataclass(frozen=True)
class Examination:
    """The state of this installation; `problems` are what would stop an export, `jobs` what can be
    done."""

    versions: dict[str, str]
    devices: tuple[dict[str, Any], ...]
    parts: tuple[InstalledLibrary, ...]
    caches: tuple[CacheFolder, ...]
    problems: tuple[str, ...]
    jobs: tuple[Job, ...]

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "versions": self.versions,
            "devices": list(self.devices),
            "parts": [
                {
                    **asdict(part.library),
                    "install": part.library.install,
                    "version": part.version,
                    "problem": part.problem,
                }
                for part in self.parts
            ],
            "caches": [
                {"name": cache.name, "path": str(cache.path), "bytes": cache.nbytes}
                for cache in self.caches
            ],
            "problems": list(self.problems),
            "commands": [{**asdict(job), "works": job.works} for job in self.jobs],
        }


def doctor() -> Examination:
    """Versions, devices, caches and installed engines; each library is imported to see that it can
    be. Nothing is downloaded and nothing is written.

        print(spp_export.doctor().problems)
    """
    parts = tuple(map(_examine, PARTS))
    caches = tuple(_caches())
    return Examination(
        library_versions(),
        tuple(_devices()),
        parts,
        caches,
        tuple(_problems(parts, caches)),
        tuple(_examined_jobs(parts)),
    )


def _examined_jobs(parts: Sequence[InstalledLibrary]) -> Iterator[Job]:
    working = {part.library.module for part in parts if part.version and part.problem is None}
    for what, modules in _jobs():
        libraries = [
            next(part.library for part in parts if part.library.module == module)
            for module in modules
            if module not in working
        ]
        yield Job(
            what,
            tuple(library.package for library in libraries),
            tuple(dict.fromkeys(library.install for library in libraries)),
        )


def _examine(library: Library) -> InstalledLibrary:
    try:
        installed = version(library.package)
    except PackageNotFoundError:
        return InstalledLibrary(library, None)
    try:
        importlib.import_module(library.module)
    except Exception as error:  # whatever a broken installation raises is what we are here to tell
        problem = f"{type(error).__name__}: {reason_of(error)}"
        return InstalledLibrary(library, installed, problem)
    return InstalledLibrary(library, installed)


def _devices() -> Sequence[dict[str, Any]]:
    import psutil

    memory = psutil.virtual_memory()
    cpu = {
        "device": "cpu",
        "name": cpu_name(),
        "cores": os.cpu_count(),
        "bytes": memory.total,
        "free_bytes": memory.available,
    }
    return [cpu, *_cards()]


def _cards() -> Sequence[dict[str, Any]]:
    try:
        import torch
    except ImportError:
        return []
    cards = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        cards.append({"device": f"cuda:{index}", "name": name, "bytes": total, "free_bytes": free})
    return cards


def _caches() -> Sequence[CacheFolder]:
    from huggingface_hub.constants import HF_HUB_CACHE

    own = cache_directory()
    places = {
        "models": own / "models",
        "statistics": own / "statistics",
        "hub": Path(HF_HUB_CACHE),
    }
    return [CacheFolder(name, path, _size(path)) for name, path in places.items()]


def _size(directory: Path) -> int:
    """Bytes of the files below, links not followed."""
    total = 0
    for place, _, files in os.walk(directory):
        for name in files:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:  # gone since it was listed
                continue
    return total


def _same_module(parts: Sequence[InstalledLibrary]) -> Iterator[tuple[str, str]]:
    """Packages that are installed and are imported by the same name."""
    first: dict[str, str] = {}
    for installed in parts:
        if installed.version is not None:
            name = first.setdefault(installed.library.module, installed.library.package)
            if name != installed.library.package:
                yield name, installed.library.package


def _problems(parts: Sequence[InstalledLibrary], caches: Sequence[CacheFolder]) -> Sequence[str]:
    problems = [
        f"{installed.library.package} {installed.version} cannot be imported: {installed.problem}. "
        f"Run: {installed.library.install}"
        for installed in parts
        if installed.problem is not None
    ]
    names = {installed.library.package: installed for installed in parts}
    problems += [
        f"{name} is missing, and spp is not whole without it. Run: {names[name].library.install}"
        for name in _DEFAULT_MODEL
        if names[name].version is None
    ]
    problems += [
        f"{first} and {second} are both installed, and one hides the other. "
        "Uninstall both, then install the one you need."
        for first, second in _same_module(parts)
    ]
    problems += [
        f"{cache.path}: cannot be written. Set SPP_CACHE to a directory of your own."
        for cache in caches
        if cache.name != "hub" and not os.access(nearest(cache.path), os.W_OK)
    ]
    return problems

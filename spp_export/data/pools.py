"""Pools: the text per domain that probes are trained and validated on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp_export.common.errors import ScenarioError
from spp_export.common.json_files import decode_utf8, read_bytes
from spp_export.data.duplicates import normalised, shared_texts
from spp_export.data.scenario import paragraphs, read_scenario, warn_of_lists

MAX_POOL_BYTES = 1 << 30
# Of a domain that is added, so that some can validate.
MIN_TEXTS = 8
_EXCERPT = 60


@dataclass(frozen=True, slots=True)
class Pools:
    """Training and validation prompts per domain, in the order of `domains` (K entries each).

    `sha256` maps `<domain>/train.txt` and `<domain>/val.txt` to the hash of the file.
    """

    domains: tuple[str, ...]
    train: tuple[tuple[str, ...], ...]
    val: tuple[tuple[str, ...], ...]
    sha256: Mapping[str, str]

    def take(self, domains: Sequence[str]) -> Pools:
        """Only these of the domains, in this order."""
        places = [self.domains.index(name) for name in domains]
        return Pools(
            domains=tuple(domains),
            train=tuple(self.train[i] for i in places),
            val=tuple(self.val[i] for i in places),
            sha256={k: v for k, v in self.sha256.items() if k.rpartition("/")[0] in domains},
        )


def other_domains(directory: str | os.PathLike[str], domains: Sequence[str]) -> tuple[str, ...]:
    """Pools of the directory besides `domains`, sorted by name."""
    root = Path(directory)
    names = sorted(_subdirectories(root)) if root.is_dir() else []
    return tuple(name for name in names if name not in domains and _is_pool(root / name))


def _is_pool(folder: Path) -> bool:
    return all((folder / f"{part}.txt").is_file() for part in ("train", "val"))


def read_pools(directory: str | os.PathLike[str], domains: Sequence[str] | None = None) -> Pools:
    """The pools in `<directory>/<domain>/train.txt` and `val.txt`, paragraphs as in a scenario.

    `domains` gives the order; by default every sub-directory is a domain, sorted by name. No prompt
    may occur twice, neither in one domain nor in two: a prompt seen in training would make
    validation worthless. Raises ScenarioError for that and for missing, empty or unreadable files.
    """
    root = Path(directory)
    names = _names(root, domains)
    parts: dict[str, tuple[str, ...]] = {}
    hashes: dict[str, str] = {}
    for name in names:
        for part in ("train", "val"):
            file = f"{name}/{part}.txt"
            parts[file], hashes[file] = _read_part(root, file)
    _check_distinct(parts)
    return Pools(
        domains=names,
        train=tuple(parts[f"{name}/train.txt"] for name in names),
        val=tuple(parts[f"{name}/val.txt"] for name in names),
        sha256=hashes,
    )


def extended_pools(calibration: Sequence[tuple[str, str]], more: Mapping[str, Any]) -> Pools:
    """Pools of the texts that artifacts hold, (domain, text) pairs, and of files by domain.

    Of every domain each fourth text validates. Raises ScenarioError for a domain that is there
    already, one of too few texts, and a text that occurs twice.
    """
    texts: dict[str, list[str]] = {}
    for domain, text in calibration:
        texts.setdefault(domain, []).append(text)
    known = ", ".join(texts)
    for domain, path in more.items():
        if domain in texts:
            raise ScenarioError(f"--add-domain {domain}: the artifacts know it; they know {known}.")
        texts[domain] = list(read_scenario(path).prompts)
    for domain, pool in texts.items():
        if len(pool) < MIN_TEXTS:
            raise ScenarioError(
                f"domain {domain}: has {len(pool)} texts, expected at least {MIN_TEXTS}; a "
                "hundred and more make good probes. Separate them by blank lines."
            )
    parts = {}
    for domain, pool in texts.items():
        parts[f"{domain}/train.txt"] = tuple(t for i, t in enumerate(pool) if i % 4 != 3)
        parts[f"{domain}/val.txt"] = tuple(pool[3::4])
    _check_distinct(parts)
    return Pools(
        domains=tuple(texts),
        train=tuple(parts[f"{domain}/train.txt"] for domain in texts),
        val=tuple(parts[f"{domain}/val.txt"] for domain in texts),
        sha256={
            file: hashlib.sha256("\n\n".join(part).encode()).hexdigest()
            for file, part in parts.items()
        },
    )


def _names(root: Path, domains: Sequence[str] | None) -> tuple[str, ...]:
    if not root.is_dir():
        raise ScenarioError(f"pools {root}: no such directory.")
    if domains is None:
        domains = sorted(_subdirectories(root))
    if not domains:
        raise ScenarioError(f"pools {root}: expected a sub-directory per domain, found none.")
    for name in domains:
        if not name or name in (".", "..") or "/" in name or "\0" in name:
            raise ScenarioError(f"pools {root}: {name!r} cannot be the name of a domain.")
    if len(set(domains)) < len(domains):
        raise ScenarioError(f"pools {root}: a domain is named twice in {', '.join(domains)}.")
    return tuple(domains)


def _subdirectories(root: Path) -> Iterator[str]:
    for entry in root.iterdir():
        if entry.is_dir() and not entry.name.startswith("."):
            yield entry.name


def _read_part(root: Path, file: str) -> tuple[tuple[str, ...], str]:
    data = read_bytes(
        root / file, what="pool", max_bytes=MAX_POOL_BYTES, error=ScenarioError, pipe=False
    )
    label = f"pool {root / file}"
    prompts = paragraphs(decode_utf8(data, what=label, error=ScenarioError), what=label)
    if not prompts:
        raise ScenarioError(f"{label}: holds no prompt.")
    warn_of_lists(prompts, label)
    return prompts, hashlib.sha256(data).hexdigest()


def _check_distinct(parts: Mapping[str, tuple[str, ...]]) -> None:
    """Every prompt once, however it is spaced and spelt; and none of a validation pool that holds
    one that is trained on, or is held by it."""
    seen: dict[str, str] = {}
    for file, prompts in parts.items():
        for number, prompt in enumerate(prompts, start=1):
            place = f"{file} prompt {number}"
            first = seen.setdefault(normalised(prompt), place)
            if first != place:
                raise ScenarioError(
                    f"pools: {place} repeats {first}: {_excerpt(prompt)}. Remove one of them."
                )
    trained = [
        text for file, texts in parts.items() if file.endswith("/train.txt") for text in texts
    ]
    for file, prompts in parts.items():
        if file.endswith("/val.txt") and (shared := shared_texts(prompts, trained)):
            raise ScenarioError(
                f"pools: {len(shared)} of the prompts of {file} hold one that is trained on, or "
                f"are held by it, such as prompt {shared[0] + 1}: "
                f"{_excerpt(prompts[shared[0]])}. Remove them."
            )


def _excerpt(prompt: str) -> str:
    return repr(" ".join(prompt.split())[:_EXCERPT])

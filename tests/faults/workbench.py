"""What the campaign works on: a tiny model, two exports of each format, and what is whole."""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from exporting import Workshop
from zygote import Faults, run, steps

from spp_cli.main import run as here
from spp_export.common.manifest import check_manifest

CASE = "llama-gqa-bias"
FORMATS = ("safetensors", "onnx")
OLD_KEEP, NEW_KEEP = "0.9", "0.7"


class BrokenPromiseError(AssertionError):
    """What was found is not what DESIGN.md promises."""


def promise(holds: bool, what: str) -> None:
    """Raise BrokenPromiseError unless it holds."""
    if not holds:
        raise BrokenPromiseError(what)


@dataclass
class Workbench:
    """A model, and of every format the hashes of an older and of a newer export."""

    root: Path
    workshop: Workshop = field(init=False)
    hashes: dict[tuple[str, str], str] = field(default_factory=dict)
    steps: dict[tuple[str, bool, bool], tuple[str, ...]] = field(default_factory=dict)
    _cases: int = 0

    def __post_init__(self) -> None:
        self.workshop = Workshop(self.root / "workshop")
        self.dense = self.workshop.dense(CASE)
        self.artifacts = self.workshop.artifacts(CASE)
        for path in self.workshop.root.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # for the child that is nobody
        for form in FORMATS:
            for keep in (OLD_KEEP, NEW_KEEP):
                target = self.reference(form, keep)
                target.parent.mkdir()
                # In this process, whose children then have nothing left to import.
                with contextlib.redirect_stdout(io.StringIO()):
                    assert here([*map(str, self.export(form, target, keep))]) == 0
                self.hashes[form, keep] = tree_hash(target)

    def reference(self, form: str, keep: str) -> Path:
        """An export that nothing disturbed; its card has its name."""
        return self.root / f"{form}-{keep}" / "out"

    def export(
        self,
        form: str,
        target: Path,
        keep: str = NEW_KEEP,
        *,
        force: bool = False,
        model: Path | None = None,
    ) -> list[str | Path]:
        """The command line of an export."""
        return [
            *("export", "--quiet", "--scenario", self.workshop.scenario, "--keep", keep),
            *("--model", model or self.dense, "--artifacts", self.artifacts),
            *("--format", form, "-o", target, *(["--force"] if force else [])),
        ]

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """An empty folder for one case."""
        self._cases += 1
        path = self.root / f"case{self._cases}"
        path.mkdir()
        yield path
        shutil.rmtree(path)

    def put_older(self, form: str, target: Path) -> None:
        """An older export at the target."""
        shutil.copytree(self.reference(form, OLD_KEEP), target)

    def count_steps(self, form: str, older: bool, swap: bool = True) -> tuple[str, ...]:
        """The steps of an export, with an older one at its target or not."""
        key = (form, older, swap)
        if key not in self.steps:
            with self.folder() as folder:
                target = folder / "out"
                if older:
                    self.put_older(form, target)
                command = self.export(form, target, force=older)
                self.steps[key] = steps(command, folder, Faults(swap=swap))
        return self.steps[key]

    def state(self, form: str, target: Path) -> str:
        """ "none", "older" or "new"; anything else breaks the promise."""
        if not target.exists():
            return "none"
        problems = check_manifest(target)
        promise(not problems, f"{target.name} is there and not whole: {problems[:1]}")
        found = tree_hash(target)
        states = {self.hashes[form, OLD_KEEP]: "older", self.hashes[form, NEW_KEEP]: "new"}
        promise(found in states, f"{target.name} is of neither export")
        return states[found]

    def verify(self, target: Path) -> None:
        """`spp verify` of what is there."""
        ended = run(["verify", "--quiet", target, "--model", self.dense], target)
        promise(ended.status == 0, f"{target.name} does not verify: {ended.err[-2000:]}")


def tree_hash(directory: Path) -> str:
    """SHA-256 of every name, mode and content below a directory."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        digest.update(f"{path.relative_to(directory)} {path.stat().st_mode:o}\n".encode())
        if path.is_file():
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()

"""The corpus is small and can be made again, and what was once found stays mended."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fuzz_campaign import judge
from fuzz_seeds import CORPUS, NOT_REPRODUCED, REGRESSIONS, write_corpus
from fuzz_targets import TARGETS

CASES = sorted(path for path in REGRESSIONS.glob("*/*") if path.is_dir())


def _tree(root: Path) -> dict[str, bytes]:
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    skipped = (*NOT_REPRODUCED, REGRESSIONS.name)
    return {
        name: path.read_bytes()
        for name, path in found.items()
        if not name.startswith(tuple(f"{folder}/" for folder in skipped))
    }


def test_the_corpus_is_what_its_script_writes(tmp_path):
    write_corpus(tmp_path, without=NOT_REPRODUCED)
    made, stored = _tree(tmp_path), _tree(CORPUS)
    assert made.keys() == stored.keys()
    assert [name for name in made if made[name] != stored[name]] == []


def test_the_corpus_is_small():
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 200_000


@pytest.mark.parametrize("case", CASES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_regressions(tmp_path, case):
    """A case is the damaged file alone, in a folder named `<entry>-<what is wrong with it>`."""
    target = TARGETS[case.parent.name]
    entry = next(
        path
        for path in sorted((CORPUS / target.name).iterdir())
        if case.name.startswith(f"{path.name}-")
    )
    shutil.copytree(entry, tmp_path / "entry")
    (file,) = case.iterdir()
    shutil.copy(file, tmp_path / "entry" / file.name)
    outcome, problem = judge(target, tmp_path / "entry", file.name)
    assert not problem
    assert outcome

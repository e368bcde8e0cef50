"""What lies where an export goes, and what an interrupt leaves there."""

from __future__ import annotations

import shutil
from contextlib import contextmanager

import pytest
from exporting import refused, tree

import spp_export
from spp_export.common.errors import OutputError
from spp_export.common.progress import show_progress

NAME = "llama-gqa-bias"


def test_an_existing_directory_is_left_alone(workshop, tmp_path):
    target = tmp_path / "slim"
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    with refused(OutputError, "slim: is not empty"):  # before the model is looked for
        spp_export.export(workshop.scenario, target, model=str(tmp_path / "none"))
    with refused(OutputError, "slim: is not empty"):
        workshop.export(NAME, target)
    with refused(OutputError, "has no manifest.json of spp"):
        workshop.export(NAME, target, force=True)
    assert tree(target) == {"thesis.txt": b"mine"}
    assert list(tmp_path.iterdir()) == [target]


def test_force_replaces_an_export_of_ours_whole(workshop, tmp_path):
    target = tmp_path / "slim"
    workshop.export(NAME, target, compensate="none")
    older = tree(target)
    with refused(OutputError, "or use --force"):
        workshop.export(NAME, target, layout="uniform")
    assert tree(target) == older
    workshop.export(NAME, target, force=True, layout="uniform")
    workshop.export(NAME, tmp_path / "fresh" / "slim", layout="uniform")
    assert tree(target) == tree(tmp_path / "fresh" / "slim")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "slim"]


def test_the_source_is_never_replaced(workshop, tmp_path):
    dense = shutil.copytree(workshop.dense(NAME), tmp_path / "dense")
    before = tree(dense)
    for force in (False, True):
        with refused(OutputError, "is not empty|has no manifest.json of spp"):
            spp_export.export(
                workshop.scenario,
                dense,
                model=str(dense),
                artifacts=workshop.artifacts(NAME),
                force=force,
            )
    assert tree(dense) == before


@pytest.mark.parametrize("stage", ["slicing", "checking against the masked dense model"])
def test_an_interrupt_leaves_nothing(workshop, tmp_path, stage):
    @contextmanager
    def interrupted(description, total):
        if description == stage:
            raise KeyboardInterrupt
        yield lambda done: None

    with pytest.raises(KeyboardInterrupt), show_progress(interrupted):
        spp_export.export(
            workshop.scenario,
            tmp_path / "made" / "slim",
            model=str(workshop.dense(NAME)),
            artifacts=workshop.artifacts(NAME),
        )
    assert list(tmp_path.iterdir()) == []

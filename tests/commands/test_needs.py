"""What is checked before work begins: disk, memory, permissions, readable files."""

from __future__ import annotations

import logging
import os
from collections import namedtuple

import pytest

from spp_export.commands import needs as preflight
from spp_export.commands.needs import (
    Needs,
    check_disk,
    check_memory,
    check_place,
    check_readable,
    least_slim_bytes,
)
from spp_export.common import disk as working_place
from spp_export.common.disk import free_space
from spp_export.common.errors import ModelError, OutputError, ResourceError
from spp_export.models.shape import ModelShape

Usage = namedtuple("Usage", "total used free")
SHAPE = ModelShape("llama", 3, 64, 8, 4, 8, 96, 100, False, 2)


def needs(target, **changes):
    kept = {"disk": {"slim checkpoint": 3_000_000_000, "other files": 100_000_000, "graph": 0}}
    kept |= {"memory": {"dense model": 2_000_000_000}, "least_memory": 50_000_000}
    return Needs(target, **(kept | changes))


def test_a_full_disk_is_refused_with_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(working_place.shutil, "disk_usage", lambda path: Usage(0, 0, 3_100_000_000))
    check_disk(needs(tmp_path / "out"))
    monkeypatch.setattr(working_place.shutil, "disk_usage", lambda path: Usage(0, 0, 3_050_000_000))
    with pytest.raises(OutputError) as error:
        check_disk(needs(tmp_path / "out"))
    assert str(error.value) == (
        f"{tmp_path / 'out'}: needs 3.1 GB (slim checkpoint 3.0 GB, other files 100.0 MB), "
        "3.0 GB are free. Make room or choose another -o."
    )


def test_free_space_is_that_of_the_file_system_to_come(tmp_path):
    found = free_space(tmp_path / "not" / "yet" / "there")
    assert found == pytest.approx(os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize)


def test_memory_is_refused_only_where_it_cannot_suffice(tmp_path, monkeypatch, caplog):
    for free, outcome in ((2_000_000_000, "fits"), (60_000_000, "slow"), (49_000_000, "refused")):
        monkeypatch.setattr(preflight, "_memory", lambda free=free: free)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            if outcome == "refused":
                with pytest.raises(ResourceError, match=r"at least 50.0 MB, 49.0 MB are free"):
                    check_memory(needs(tmp_path))
            else:
                check_memory(needs(tmp_path))
        assert len(caplog.messages) == (outcome == "slow")
    assert "\n" not in "".join(caplog.messages)


def test_the_warning_says_what_will_be_done(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(preflight, "_memory", lambda: 1_500_000_000)
    check_memory(needs(tmp_path))
    check_memory(needs(tmp_path, from_disk=True))
    first, second = caplog.messages
    assert first == (
        "memory: all at once takes 2.0 GB (dense model 2.0 GB), 1.5 GB are free, swap included; "
        "it will be slow."
    )
    assert second.endswith("models run layer by layer from disk.")


def test_swap_counts(monkeypatch):
    Swap = namedtuple("Swap", "free")
    monkeypatch.setattr(preflight, "free_memory", lambda: 5)
    monkeypatch.setattr("psutil.swap_memory", lambda: Swap(7))
    assert preflight._memory() == 12


def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    check_place(tmp_path / "new" / "folders" / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file is not a directory"):
        check_place(tmp_path / "file" / "out")
    asked = []
    monkeypatch.setattr(preflight.os, "access", lambda path, mode: asked.append(path))
    with pytest.raises(OutputError, match=r"cannot be written\. Choose another -o\."):
        check_place(tmp_path / "new" / "out")
    assert asked == [tmp_path]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_others(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            check_place(tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


def test_unreadable_companions_are_named(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    check_readable(tmp_path, ("tokenizer.json", "vocab.json"))

    def refuse(self, *arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(preflight.Path, "open", refuse)
    with pytest.raises(ModelError, match=r"tokenizer.json: cannot be read \(Permission denied\)"):
        check_readable(tmp_path, ("tokenizer.json", "vocab.json"))


def test_numbers_for_machines(tmp_path):
    found = needs(tmp_path, from_disk=True).to_dict()
    assert found["disk"]["bytes"]["slim checkpoint"] == 3_000_000_000
    assert found["memory"]["least"] == 50_000_000
    assert found["disk"]["free"] > 0 < found["memory"]["free"]


@pytest.mark.parametrize("units", ["heads", "both"])
def test_the_least_is_below_what_a_budget_leaves(units):
    dense = SHAPE.element_bytes * SHAPE.parameters(SHAPE.layers)
    sizes = [least_slim_bytes(SHAPE, keep, units) for keep in (None, 0.2, 0.8, 1.0)]
    assert sizes == sorted(sizes)
    assert sizes[-1] < dense
    embeddings = SHAPE.element_bytes * SHAPE.parameters(())
    assert sizes[0] >= embeddings
    assert (sizes[0] > 2 * embeddings) == (units == "heads")

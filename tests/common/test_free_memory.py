"""Free memory is what the machine has, or what control groups leave of it."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest

from spp_export.common import memory

NAMES = {
    2: ("memory.max", "memory.current", "inactive_file", "active_file"),
    1: (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
        "total_active_file",
    ),
}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with a million bytes free, and a place for control groups."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1_000_000))
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_MEMBERSHIP", tmp_path / "membership")
    return tmp_path


def write_group(directory, version, limit, used, inactive=0, active=0):
    directory.mkdir(parents=True, exist_ok=True)
    names = NAMES[version]
    (directory / names[0]).write_text(f"{limit}\n")
    (directory / names[1]).write_text(f"{used}\n")
    (directory / "memory.stat").write_text(f"anon 5\n{names[2]} {inactive}\n{names[3]} {active}\n")


def test_without_groups_it_is_the_machines(machine):
    assert memory.free_memory() == 1_000_000
    (machine / "membership").write_text("0::/\n")
    assert memory.free_memory() == 1_000_000


def test_cached_files_can_be_taken_back(machine):
    (machine / "membership").write_text("0::/\n")
    write_group(machine / "cgroup", 2, limit=900, used=700, inactive=200, active=100)
    assert memory.free_memory() == 900 - (700 - 300)


def test_the_narrowest_group_counts(machine):
    (machine / "membership").write_text("0::/outer/inner\n")
    write_group(machine / "cgroup" / "outer" / "inner", 2, limit="max", used=700)
    write_group(machine / "cgroup" / "outer", 2, limit=5000, used=4000)
    write_group(machine / "cgroup", 2, limit=90_000, used=4000)
    assert memory.free_memory() == 1000


def test_a_group_seen_from_inside_its_container_is_the_root(machine):
    (machine / "membership").write_text("0::/../../docker/1234\n")
    write_group(machine / "cgroup", 2, limit=3000, used=1000)
    assert memory.free_memory() == 2000


def test_version_1(machine):
    (machine / "membership").write_text("5:cpu:/a\n4:memory:/docker/12\n")
    write_group(machine / "cgroup" / "memory", 1, limit=800, used=900, inactive=50)
    assert memory.free_memory() == 0
    write_group(machine / "cgroup" / "memory" / "docker" / "12", 1, limit=800, used=300)
    assert memory.free_memory() == 0

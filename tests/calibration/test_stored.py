"""The user's cache: what it holds, who uses it, and its limit."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import numpy as np
import pytest

from spp_export.calibration.cache import write
from spp_export.calibration.stored import cache_limit, cached_files, hold_for, noting, remove, trim
from spp_export.commands.cache import cache
from spp_export.common.errors import UsageError

BYTES = 4000


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPP_CACHE_LIMIT", raising=False)
    return tmp_path / "cache"


class Owner:
    """Something that uses a file."""


def files(place, *names, model="org/model"):
    """Files of statistics, each used a day after the one before it."""
    made = []
    for age, name in enumerate(reversed(names)):
        path = place / "statistics" / f"{name}.safetensors"
        write(path, {"x": np.zeros(BYTES // 4, np.float32)}, model)
        used = 1_700_000_000 - 86400 * age
        os.utime(path, (used, used))
        made.insert(0, path)
    return made


def names(found):
    return [file.path.stem for file in found]


def test_files_name_their_model_and_come_in_the_order_of_use(place):
    files(place, "a", "b", model="org/one")
    (place / "statistics" / "damaged.safetensors").write_bytes(b"no header")
    found = cached_files()
    assert names(found) == ["a", "b", "damaged"]
    assert [file.model for file in found] == ["org/one", "org/one", ""]
    assert found[0].nbytes >= BYTES


@pytest.mark.parametrize("room", [0, 1, 2, 3])
def test_the_limit_takes_what_was_used_longest_ago(place, monkeypatch, room):
    files(place, "a", "b", "c")
    monkeypatch.setenv("SPP_CACHE_LIMIT", str(room * (BYTES + 500)))
    assert names(trim()) == ["a", "b", "c"][: 3 - room]
    assert names(cached_files()) == ["a", "b", "c"][3 - room :]


def test_what_is_in_use_stays_and_using_it_makes_it_the_latest(place, monkeypatch, caplog):
    a, _, _ = files(place, "a", "b", "c")
    owner = Owner()
    assert hold_for(owner, a)
    assert names(cached_files()) == ["b", "c", "a"]
    monkeypatch.setenv("SPP_CACHE_LIMIT", "0")
    assert names(trim()) == ["b", "c"]
    assert "all of it is in use" in caplog.text
    del owner
    gc.collect()
    assert names(trim()) == ["a"]
    assert not hold_for(Owner(), a)


def test_what_another_process_uses_stays_until_it_ends(place):
    (path,) = files(place, "a")
    code = (
        "import sys; from pathlib import Path; from spp_export.calibration.stored import hold;"
        "print(hold(Path(sys.argv[1])), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline()
        (file,) = cached_files()
        assert not remove(file)
        contents = cache(clear=True)
        assert (names(contents.files), names(contents.in_use)) == (["a"], ["a"])
        process.communicate()
    assert remove(file)
    assert cached_files() == []


@pytest.mark.parametrize(
    ("request_", "left"),
    [
        ({}, []),
        ({"model": "org/one"}, ["c", "d"]),
        ({"older_than": 0.0}, []),
        ({"older_than": 1e12}, ["a", "b", "c", "d"]),
        ({"model": "org/none"}, ["a", "b", "c", "d"]),
    ],
)
def test_clearing_by_model_and_age(place, request_, left):
    files(place, "a", "b", model="org/one")
    files(place, "c", "d", model="org/two")
    listed = cache(**request_)
    assert listed.removed == ()
    assert len(cached_files()) == 4
    contents = cache(clear=True, **request_)
    assert sorted(names(contents.files)) == left
    assert sorted(names(cached_files())) == left
    assert contents.to_dict()["removed"] == [file.to_dict() for file in listed.files]


def test_a_model_is_listed_and_cleared_too(place):
    (place / "models" / "demo").mkdir(parents=True)
    (place / "models" / "demo" / "weights").write_bytes(b"12345")
    (place / "models" / ".working").mkdir()
    (file,) = cached_files()
    assert (file.kind, file.nbytes) == ("models", 5)
    assert cache(clear=True).files == ()
    assert not (place / "models" / "demo").exists()


def test_what_is_written_is_noted(place):
    files(place, "before")
    with noting() as kept:
        files(place, "a", "b")
        assert kept.nbytes == 0
    assert len(kept.files) == 2
    assert kept.nbytes == sum(path.stat().st_size for path in kept.files)
    with noting() as nothing:
        pass
    assert nothing.files == {}


@pytest.mark.parametrize(("text", "limit"), [("12k", 12_000), ("2Gi", 2 << 30), ("", 50 * 10**9)])
def test_the_limit_is_a_count(place, monkeypatch, text, limit):
    monkeypatch.setenv("SPP_CACHE_LIMIT", text)
    assert cache_limit() == limit


def test_a_limit_that_is_none_is_refused(place, monkeypatch):
    monkeypatch.setenv("SPP_CACHE_LIMIT", "much")
    with pytest.raises(UsageError, match=r"SPP_CACHE_LIMIT: 'much' is not a count such as 1500"):
        cache()

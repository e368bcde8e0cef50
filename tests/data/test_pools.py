"""Pools of domain text."""

from __future__ import annotations

import hashlib

import pytest

from spp_export.common.errors import ScenarioError
from spp_export.data.pools import other_domains, read_pools


@pytest.fixture
def pools(tmp_path):
    for domain in ("math", "art"):
        folder = tmp_path / domain
        folder.mkdir()
        (folder / "train.txt").write_text(f"{domain} one\n\n{domain} two\n")
        (folder / "val.txt").write_text(f"{domain} three\n")
    (tmp_path / "README.md").write_text("not a domain")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def test_sorted_by_name(pools):
    read = read_pools(pools)
    assert read.domains == ("art", "math")
    assert read.train == (("art one", "art two"), ("math one", "math two"))
    assert read.val == (("art three",), ("math three",))
    assert set(read.sha256) == {f"{d}/{p}.txt" for d in ("art", "math") for p in ("train", "val")}
    expected = hashlib.sha256((pools / "art" / "val.txt").read_bytes()).hexdigest()
    assert read.sha256["art/val.txt"] == expected


def test_given_order(pools):
    assert read_pools(pools, ["math", "art"]).val == (("math three",), ("art three",))
    assert read_pools(pools, ["math"]).domains == ("math",)


def test_some_of_the_domains_and_the_others(pools):
    read = read_pools(pools)
    taken = read.take(["math"])
    assert taken.domains == ("math",)
    assert (taken.train, taken.val) == ((("math one", "math two"),), (("math three",),))
    assert set(taken.sha256) == {"math/train.txt", "math/val.txt"}
    assert read.take(["math", "art"]) == read_pools(pools, ["math", "art"])
    (pools / "drafts").mkdir()
    assert other_domains(pools, ["math"]) == ("art",)
    assert other_domains(pools, ["math", "art"]) == ()
    assert other_domains(pools / "none", ["math"]) == ()


@pytest.mark.parametrize(
    ("file", "text", "match"),
    [
        ("art/val.txt", None, "art/val.txt: no such file"),
        ("art/val.txt", " \n\n", "art/val.txt: holds no prompt"),
        ("art/val.txt", b"\xff", "not UTF-8"),
        ("art/val.txt", b"a\0", "NUL"),
        (
            "art/val.txt",
            "art  two",
            "art/val.txt prompt 1 repeats art/train.txt prompt 2: 'art two'",
        ),
        (
            "math/train.txt",
            "a\n\nb\n\na",
            "math/train.txt prompt 3 repeats math/train.txt prompt 1",
        ),
        ("math/train.txt", "art one", "math/train.txt prompt 1 repeats art/train.txt prompt 1"),
    ],
)
def test_bad_pools(pools, file, text, match):
    path = pools / file
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ScenarioError, match=match) as caught:
        read_pools(pools)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("domains", "match"),
    [
        ([], "sub-directory per domain"),
        (["physics"], "physics/train.txt: no such file"),
        (["art", "art"], "named twice"),
        (["../art"], "cannot be the name"),
        ([""], "cannot be the name"),
    ],
)
def test_bad_names(pools, domains, match):
    with pytest.raises(ScenarioError, match=match):
        read_pools(pools, domains)


def test_missing_directory(tmp_path):
    with pytest.raises(ScenarioError, match="no such directory"):
        read_pools(tmp_path / "absent")

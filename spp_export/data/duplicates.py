"""Which texts are the same, or nearly: what must not be calibrated on and judged on as well."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from spp_export.common.arrays import IntArray

# A text is looked for in others by its rarest run of so many characters, the longest that it has.
_RUNS = (20, 10, 5)
# Shorter texts, such as a greeting, say nothing about the texts that hold them.
_LEAST_WIDTH = 10
# What more texts than this hold is a phrase of theirs, such as a greeting, and no prompt that they
# repeat.
_MOST_HOLDERS = 100
_MOST_BUCKET_BITS = 22
# Unsigned integers, which wrap around.
Codes = np.ndarray[Any, np.dtype[np.uint32]]
# Knuth's multiplier for hashing to 32 bits.
_FACTOR = np.uint32(2654435761)


def normalised(text: str) -> str:
    """A text without what does not make it another one: case, spacing, and forms of a character
    that Unicode takes for the same (NFKC)."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def likeness_groups(texts: Sequence[str]) -> list[int]:
    """The group of each text, numbered by their first texts.

    Texts are in one group where they are the same once `normalised`, or one contains the other,
    not within a word; and so on from text to text. One of less than ten characters (East Asian
    ones count twice), or whose every part is in more than a hundred others, counts as contained in
    none. Time and memory grow with the length of all texts together.
    """
    keys: dict[str, int] = {}
    own = [keys.setdefault(normalised(text), len(keys)) for text in texts]
    groups = _Groups(len(keys))
    for first, second in _contained(list(keys), groups):
        groups.unite(first, second)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(groups.of(key), len(numbers)) for key in own]


def shared_texts(texts: Sequence[str], others: Sequence[str]) -> list[int]:
    """Indices of the `texts` that are in a group with one of the `others`."""
    groups = likeness_groups([*others, *texts])
    theirs = set(groups[: len(others)])
    return [i for i, group in enumerate(groups[len(others) :]) if group in theirs]


class _Groups:
    """Disjoint sets."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def of(self, item: int) -> int:
        """The item that stands for the set."""
        parent = self._parent
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    def unite(self, first: int, second: int) -> None:
        """Make one set of two."""
        self._parent[self.of(second)] = self.of(first)


def _contained(keys: Sequence[str], groups: _Groups) -> Iterator[tuple[int, int]]:
    """Pairs of distinct texts of which one holds the other, less those that `groups` has united.

    Whoever holds a text has its rarest run of characters, and few texts have that.
    """
    codes = np.frombuffer("\0".join(keys).encode("utf-32-le"), dtype=np.uint32)
    lengths = np.array([len(key) for key in keys])
    starts = np.concatenate([[0], np.cumsum(lengths[:-1] + 1)]) if keys else lengths
    by_run = defaultdict(list)
    for index, key in enumerate(keys):
        if _width(key) >= _LEAST_WIDTH:
            by_run[next(run for run in _RUNS if len(key) >= run)].append(index)
    bits = min(len(codes).bit_length() + 1, _MOST_BUCKET_BITS)
    for run, members in by_run.items():
        buckets = _buckets(codes, run, bits)
        counts = np.bincount(buckets, minlength=1 << bits)
        rarest = defaultdict(list)
        for index in members:
            first = starts[index]
            own = buckets[first : first + lengths[index] - run + 1]
            bucket = own[counts[own].argmin()]
            if counts[bucket] > 1:
                rarest[int(bucket)].append(index)
        for bucket, holders in _holders(buckets, starts, list(rarest)):
            if len(holders) > _MOST_HOLDERS:
                continue
            for index in rarest[bucket]:
                for holder in holders:
                    together = groups.of(holder) == groups.of(index)
                    if not together and _holds(keys[holder], keys[index]):
                        yield index, holder


def _holds(text: str, part: str) -> bool:
    """Whether a part is in a text, beginning and ending where words do."""
    start = text.find(part)
    while start >= 0:
        if not (_within_word(text, start) or _within_word(text, start + len(part))):
            return True
        start = text.find(part, start + 1)
    return False


def _within_word(text: str, place: int) -> bool:
    """Whether letters or digits, not East Asian ones, which are words of their own, meet here."""
    around = text[max(place - 1, 0) : place + 1]
    return len(around) == 2 and all(letter.isalnum() and not _wide(letter) for letter in around)


def _width(key: str) -> int:
    """Characters, up to those that matter, East Asian ones twice."""
    return sum(2 if _wide(letter) else 1 for letter in key[:_LEAST_WIDTH])


def _wide(letter: str) -> bool:
    return unicodedata.east_asian_width(letter) in "WF"


def _buckets(codes: Codes, run: int, bits: int) -> Codes:
    """A hash, of so many bits, of the `run` characters from each place on."""
    count = len(codes) - run + 1
    values = np.zeros(count, dtype=np.uint32)
    for offset in range(run):
        values *= _FACTOR
        values += codes[offset : offset + count]
    # The low bits of a product know nothing of its factors' high bits.
    values ^= values >> np.uint32(15)
    values *= _FACTOR
    values >>= np.uint32(32 - bits)
    return values


def _holders(
    buckets: Codes, starts: IntArray, chosen: Sequence[int]
) -> Iterator[tuple[int, list[int]]]:
    """Each of the chosen buckets, with the texts that have a run in it."""
    marked = np.zeros(int(buckets.max()) + 1, dtype=bool)
    marked[list(chosen)] = True
    places = np.flatnonzero(marked[buckets])
    texts = np.searchsorted(starts, places, side="right") - 1
    pairs = np.unique(buckets[places].astype(np.int64) * len(starts) + texts)
    firsts = np.flatnonzero(np.diff(pairs // len(starts), prepend=-1))
    for part in np.split(pairs, firsts[1:]):
        if len(part):
            yield int(part[0] // len(starts)), (part % len(starts)).tolist()

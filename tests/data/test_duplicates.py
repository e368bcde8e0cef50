"""Which texts are alike: against comparing each with each, and what takes too long that way."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spp_export.data import duplicates
from spp_export.data.duplicates import likeness_groups, normalised, shared_texts

# Few letters and words, so that texts often hold one another.
TEXTS = st.lists(
    st.lists(st.sampled_from(["Zinc", "ore", "pH", "硫酸", "is", "a"]), max_size=9).map(" ".join),
    max_size=12,
)


def width(text):
    return sum(2 if letter in "硫酸" else 1 for letter in text)


def letter(text):
    return text.isalnum() and text not in "硫酸"


def holds(text, part):
    """As regular expressions with lookarounds would say it."""
    return any(
        text[place:].startswith(part)
        and not (place and letter(text[place - 1]) and letter(part[0]))
        and not (letter(part[-1]) and letter(text[place + len(part) :][:1] or " "))
        for place in range(len(text))
    )


def slow_groups(texts):
    keys = [normalised(text) for text in texts]
    groups = list(range(len(keys)))
    for i, first in enumerate(keys):
        for j, second in enumerate(keys):
            if first == second or (width(first) >= 10 and holds(second, first)):
                old, new = groups[j], groups[i]
                groups = [new if group == old else group for group in groups]
    numbers = {}
    return [numbers.setdefault(group, len(numbers)) for group in groups]


@settings(deadline=None)
@given(TEXTS)
def test_the_groups_are_those_of_comparing_each_with_each(texts):
    assert likeness_groups(texts) == slow_groups(texts)


@pytest.mark.parametrize(
    ("first", "second", "alike"),
    [
        ("Straße 5", "STRASSE  5", True),
        ("\ufb01ne \u2460", "Fine 1", True),
        ("e\u0301cole", "École", True),
        ("What is zinc?", "Tell me: what is ZINC?  Please.", True),
        ("铁为什么会生锈", "请问,铁为什么会生锈?", True),
        ("thanks", "Many thanks for the long answer.", False),
        ("Explain case 1", "Explain case 12 to me", False),
        ("Explain case 1", "explain case 12, then explain case 1.", True),
        ("What is zinc?", "What is tin?", False),
    ],
)
def test_what_is_alike(first, second, alike):
    assert (len(set(likeness_groups([first, second]))) == 1) == alike


def test_texts_in_a_long_one_are_found_wherever_they_are():
    rng = random.Random(5)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(3, 8))) for _ in range(500)]
    said = rng.choices(words, k=4000)
    text = " ".join(said)
    parts = [" ".join(said[start : start + rng.randint(3, 15)]) for start in range(0, 4000, 100)]
    apart = [" ".join(rng.choices(words, k=12)) for _ in range(40)]
    assert set(likeness_groups([text, *parts])) == {0}
    assert len(set(likeness_groups([text, *apart]))) == 41
    assert shared_texts([*apart, *parts], [text]) == list(range(40, 40 + len(parts)))


def test_what_very_many_texts_hold_is_a_phrase_of_theirs(monkeypatch):
    compared = []
    monkeypatch.setattr(duplicates, "_holds", lambda text, part: compared.append(1) or part in text)
    greeting = "How can I help you today?"
    few = [f"{greeting} With case {n}, please." for n in range(99)]
    assert set(likeness_groups([greeting, *few])) == {0}
    many = [f"{greeting} With case {n}, please." for n in range(1000)]
    assert len(set(likeness_groups([greeting, *many]))) == 1001
    # and texts are not compared each with each
    assert len(compared) < 3000


def test_no_text_and_empty_texts():
    assert likeness_groups([]) == []
    assert likeness_groups(["", " ", "a"]) == [0, 0, 1]
    assert shared_texts([], ["a"]) == []
    assert shared_texts(["a"], []) == []

"""Recall and options, case by case."""

from __future__ import annotations

import pytest

from spp_export.evaluation.harness.answers import (
    chosen_options,
    keyword_recall,
    keywords,
    option_match,
    options,
    right_option,
)

PROMPT = "Which acid is in batteries?\nA) citric acid\nB) sulfuric acid\nC) acid\nD) none of these"
INLINE = "Pick one: A. red, B. dark blue; C. green"


@pytest.mark.parametrize(
    ("answer", "response", "recall"),
    [
        ("Sodium chloride", "It is sodium CHLORIDE.", 1.0),
        ("the sodium and chloride", "sodium", 0.5),
        ("sodium", "sodium-chloride", 1.0),
        ("sodium", "sodiums", 0.0),
        ("3.5 grams", "It weighs 3.5 grams", 1.0),
        ("3.5 grams", "3 grams and 5", 0.5),
        ("1,000 m", "about 1,000 m.", 1.0),
        ("acid acid base", "acid", 0.5),
        ("no", "No, it is not.", 1.0),  # only stopwords: they are all there is
        ("no", "Yes.", 0.0),
        ("!?", "anything", 0.0),
        ("wasser ölig", "Wasser, ölig", 1.0),
    ],
)
def test_keyword_recall(answer, response, recall):
    assert keyword_recall(answer, response) == pytest.approx(recall)


def test_stopwords_are_no_keywords():
    assert keywords("What is the boiling point of it") == {"boiling", "point"}


def test_options_of_a_prompt():
    assert options(PROMPT) == {
        "A": "citric acid",
        "B": "sulfuric acid",
        "C": "acid",
        "D": "none of these",
    }
    assert options(INLINE) == {"A": "red", "B": "dark blue", "C": "green"}
    assert options("Is it (A) one (B) two?") == {"A": "one", "B": "two?"}
    assert options("A dog. Vitamin C: what for?") == {}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B) sulfuric acid", "B"),
        ("(B)", "B"),
        ("b", None),
        ("Sulfuric acid.", "B"),
        ("acid", "C"),
        ("D: none of these", "D"),
        ("water", None),
        ("E", None),
    ],
)
def test_the_right_option(answer, letter):
    assert right_option(answer, options(PROMPT)) == letter


@pytest.mark.parametrize(
    ("response", "letters"),
    [
        ("B", "B"),
        ("B) sulfuric acid", "B"),
        ("**B.** because", "B"),
        ("The answer is B.", "B"),
        ("I would take option (D)", "D"),
        ("It is sulfuric acid.", "B"),
        ("Sulfuric acid, not citric acid", "AB"),
        ("A) or B)", "AB"),
        ("A dog would know.", ""),
        ("It is vitamin C.", ""),
        ("nobody knows", ""),
        ("B) since C is acid", "B"),
        ("E", ""),
    ],
)
def test_chosen_options(response, letters):
    assert chosen_options(response, options(PROMPT)) == set(letters)


def test_option_match():
    assert option_match(PROMPT, "B) sulfuric acid", "Sulfuric acid") is True
    assert option_match(PROMPT, "B", "B or A)") is False
    assert option_match(PROMPT, "B", "who knows") is False
    assert option_match("What is it?", "water", "water") is None
    assert option_match(PROMPT, "helium", "B") is None

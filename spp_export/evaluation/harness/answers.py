"""How an answer is judged by its words, as SubspacePath Pruner is (ICML 2026). No model.

Published as accuracy, what is measured is keyword recall: the share of the reference's words,
stopwords aside, that the response holds; a match is a recall of at least 0.8. Which stopwords the
published figures leave out is not known; ours are those of the released diagnosis.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from spp_export.planning.published import COMMON_WORDS

MATCH = 0.8
DEFAULT_NEW_TOKENS = 48
MULTIPLE_CHOICE = "multiple_choice"

# 3.5 and 1,000 are one word each.
_WORD = re.compile(r"\d+(?:[.,]\d+)+|\w+")
# "A) text", "(B) text", "C. text" or "D: text", up to the next option, the line's end or a
# separator before the next option.
_OPTION = re.compile(
    r"(?:(?<=\s)|^)\(?([A-H])[).:]\s*(\S.*?)(?=[\s;,]+\(?[A-H][).:]\s|\s*(?:\n|$))"
)
_LEADING_LETTER = re.compile(r"\s*\(?([A-H])(?:[).:,]|\s*$)")
# "A dog" chooses nothing and "vitamin C" neither: a capital is a letter of an option at the
# beginning of a line, before a bracket, or where a word says so.
_STATED_LETTER = re.compile(
    r"^[\s(*]*([A-H])(?=[).:,*]|\s*$)|(?<=[\s(])([A-H])\)|"
    r"\b(?:option|choice|answer is|answer:)[\s*(]*([A-H])\b",
    re.MULTILINE,
)


def keywords(text: str) -> frozenset[str]:
    """Distinct lower-case words without stopwords; all words where nothing else is left."""
    words = frozenset(_WORD.findall(text.lower()))
    return words - COMMON_WORDS or words


def keyword_recall(answer: str, response: str) -> float:
    """Share of the answer's keywords in the response; 0 for an answer without a word."""
    expected = keywords(answer)
    if not expected:
        return 0.0
    return len(expected & frozenset(_WORD.findall(response.lower()))) / len(expected)


def options(prompt: str) -> dict[str, str]:
    """Letter to text of the options that a prompt offers; empty for fewer than two."""
    offered = {letter: text.strip(" .;,") for letter, text in _OPTION.findall(prompt)}
    return offered if len(offered) > 1 else {}


def right_option(answer: str, offered: Mapping[str, str]) -> str | None:
    """The letter that an answer such as "B", "(B) text" or "text" means; None if none."""
    leading = _LEADING_LETTER.match(answer)
    if leading and leading[1] in offered:
        return leading[1]
    same = [letter for letter, text in offered.items() if _plain(text) == _plain(answer)]
    return same[0] if len(same) == 1 else None


def chosen_options(response: str, offered: Mapping[str, str]) -> frozenset[str]:
    """Letters that a response states or, where it states none, options whose text it holds."""
    stated = {letter for groups in _STATED_LETTER.findall(response) for letter in groups}
    if letters := stated & offered.keys():
        return frozenset(letters)
    chosen = set()
    rest = f" {_plain(response)} "
    # The longest first: "acid" is no choice where it stands in "sulfuric acid".
    for letter, text in sorted(offered.items(), key=lambda item: -len(item[1])):
        phrase = f" {_plain(text)} "
        if phrase.strip() and phrase in rest:
            chosen.add(letter)
            rest = rest.replace(phrase, "  ")
    return frozenset(chosen)


def option_match(prompt: str, answer: str, response: str) -> bool | None:
    """Whether the right option and no other was chosen; None where the prompt offers none."""
    offered = options(prompt)
    right = right_option(answer, offered)
    if right is None:
        return None
    return chosen_options(response, offered) == {right}


def _plain(text: str) -> str:
    return " ".join(_WORD.findall(text.lower()))

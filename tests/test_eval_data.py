"""The evaluation sets: their format, their answers as far as arithmetic can tell, and that no
sentence of theirs is in a text that models are calibrated on."""

from __future__ import annotations

import ast
import json
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spp_export.data.pools import read_pools
from spp_export.data.scenario import read_scenario

DATA = Path(__file__).resolve().parents[1] / "benchmarks" / "data"
FILES = sorted((DATA / "eval").glob("*/*.json"))
CATALOGUE = sorted(path.name for path in (DATA / "pools").iterdir())
DEFAULT = {"chemistry", "finance", "history", "math", "philosophy", "technology"}
SCENARIO_KEYS = {
    *("scenario_id", "is_cross_domain", "topic_description", "num_turns", "difficulty_pattern"),
    *("task_type_change_count", "task_type_change_frequency", "turns"),
}
SINGLE_KEYS = {"domain", "domain_id"}
CROSS_KEYS = {"cross_domains", "cross_domain_id", "weight_pattern"}
TURN_KEYS = {
    *("turn", "prompt", "answer", "task_type", "difficulty", "domain_weights"),
    "theme_consistency_score",
}
TASK_TYPES = {"multiple_choice", "factual", "reasoning", "code"}
LETTERS = "ABCD"
LONGEST_ANSWER = 8  # words, the letter of an option aside
SHARED_WORDS = 8

OPTION = re.compile(r"\n([A-D])\) (.+)")
# 1,250 or 3/8 or 0.25, then no letter or power: "3x^2" is a formula.
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?(?![\w^.,/])")
OPERATIONS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
}

Item = dict[str, Any]


def scenarios_of(path: Path) -> list[Item]:
    return json.loads(path.read_text(encoding="utf-8"))


def all_scenarios() -> list[Item]:
    return [scenario for path in FILES for scenario in scenarios_of(path)]


def all_turns() -> Iterator[tuple[str, Item]]:
    """Every turn, after "scenario:turn" to name it by."""
    for scenario in all_scenarios():
        for turn in scenario["turns"]:
            yield f"{scenario['scenario_id']}:{turn['turn']}", turn


def options_of(turn: Item) -> dict[str, str]:
    return dict(OPTION.findall(turn["prompt"]))


def stated(turn: Item) -> str:
    """The answer without the letter of an option."""
    choice = turn["task_type"] == "multiple_choice"
    return turn["answer"][3:] if choice else turn["answer"]


def number_in(answer: str) -> float | None:
    """The number that an answer begins with; None where it begins with none."""
    found = NUMBER.match(answer)
    if found is None:
        return None
    above, _, below = found[0].replace(",", "").partition("/")
    return float(above) / float(below or 1)


def compute(expression: str) -> float:
    """Value of an expression of numbers and operators; ValueError for anything else."""

    def value(node: ast.AST) -> float:
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return number
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
                return OPERATIONS[type(op)](value(left), value(right))
            case ast.UnaryOp(operand=operand, op=op) if type(op) in OPERATIONS:
                return OPERATIONS[type(op)](value(operand))
        raise ValueError(f"not arithmetic: {expression}")

    return value(ast.parse(expression, mode="eval").body)


def runs(text: str) -> set[tuple[str, ...]]:
    """Every run of SHARED_WORDS words, and every shorter sentence of at least five words."""
    words = re.findall(r"\w+", text.lower())
    found = {tuple(words[i : i + SHARED_WORDS]) for i in range(len(words) - SHARED_WORDS + 1)}
    sentences = (tuple(re.findall(r"\w+", part)) for part in re.split(r"[.?!\n]", text.lower()))
    return found | {words for words in sentences if 5 <= len(words) < SHARED_WORDS}


def test_the_sets_are_complete() -> None:
    files: dict[str, list[Path]] = {}
    for path in FILES:
        files.setdefault(path.parent.name, []).append(path)
    assert {path.stem for path in files["selected_domain"]} == DEFAULT
    outside = {path.stem for path in files["out_of_domain"]}
    assert len(outside) >= 4
    assert outside <= set(CATALOGUE) - DEFAULT
    mixtures = [path.stem.split("-") for path in files["cross_domain"]]
    assert len(mixtures) >= 6
    assert all(2 <= len(names) <= 3 and DEFAULT.issuperset(names) for names in mixtures)
    least = {"selected_domain": 6, "out_of_domain": 4, "cross_domain": 3}
    assert least.keys() == files.keys()
    for category, paths in files.items():
        assert all(len(scenarios_of(path)) >= least[category] for path in paths)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_scenarios_have_the_published_format(path: Path) -> None:
    cross = path.parent.name == "cross_domain"
    for number, scenario in enumerate(scenarios_of(path), start=1):
        assert scenario.keys() == SCENARIO_KEYS | (CROSS_KEYS if cross else SINGLE_KEYS)
        assert scenario["scenario_id"] == f"{path.stem}_{number:02d}"
        assert scenario["is_cross_domain"] is cross
        names = scenario["cross_domains"] if cross else [scenario["domain"]]
        numbers = scenario["cross_domain_id"] if cross else [scenario["domain_id"]]
        assert "-".join(names) == path.stem
        assert [CATALOGUE[number] for number in numbers] == names
        assert scenario["num_turns"] == len(scenario["turns"]) == 4
        check_turns(scenario, names)


def check_turns(scenario: Item, names: list[str]) -> None:
    turns = scenario["turns"]
    assert [turn["turn"] for turn in turns] == [1, 2, 3, 4]
    assert scenario["difficulty_pattern"] == "-".join(turn["difficulty"] for turn in turns)
    kinds = [turn["task_type"] for turn in turns]
    changes = sum(kinds[i] != kinds[i + 1] for i in range(3))
    assert scenario["task_type_change_count"] == changes
    assert scenario["task_type_change_frequency"] == pytest.approx(changes / 3, abs=1e-4)
    for turn in turns:
        assert turn.keys() - {"check"} == TURN_KEYS
        assert turn["task_type"] in TASK_TYPES
        assert turn["difficulty"] in {"easy", "medium", "hard"}
        assert turn["domain_weights"].keys() <= set(names)
        assert all(weight > 0 for weight in turn["domain_weights"].values())
        assert sum(turn["domain_weights"].values()) == pytest.approx(1)
    assert set().union(*(turn["domain_weights"] for turn in turns)) == set(names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_our_reader_takes_them_as_they_are(path: Path) -> None:
    scenarios = scenarios_of(path)
    read = read_scenario(path)
    turns = [turn for scenario in scenarios for turn in scenario["turns"]]
    assert read.description == scenarios[0]["topic_description"]
    assert [(turn.prompt, turn.answer, turn.task_type) for turn in read.turns] == [
        (turn["prompt"], turn["answer"], turn["task_type"]) for turn in turns
    ]
    assert [turn.session for turn in read.turns] == [i // 4 for i in range(len(turns))]


def test_ids_topics_and_prompts_are_unique() -> None:
    scenarios = all_scenarios()
    for key in ("scenario_id", "topic_description"):
        assert max(Counter(scenario[key] for scenario in scenarios).values()) == 1
    assert max(Counter(turn["prompt"].casefold() for _, turn in all_turns()).values()) == 1


def test_answers_are_short_text() -> None:
    for name, turn in all_turns():
        assert turn["answer"] == turn["answer"].strip(), name
        assert 1 <= len(stated(turn).split()) <= LONGEST_ANSWER, name


def test_multiple_choice_answers_are_one_of_four_distinct_options() -> None:
    for name, turn in all_turns():
        if turn["task_type"] != "multiple_choice":
            assert not options_of(turn), name
            continue
        options = options_of(turn)
        assert "".join(options) == LETTERS, name
        # By their words, since answers are judged by words: a sign alone tells none apart.
        words = {tuple(re.findall(r"\w+", text.lower())) for text in options.values()}
        assert len(words) == len(LETTERS), name
        letter = turn["answer"][0]
        assert turn["answer"] == f"{letter}) {options[letter]}", name


def test_no_letter_is_right_much_more_often_than_another() -> None:
    turns = [turn for _, turn in all_turns() if turn["task_type"] == "multiple_choice"]
    right = Counter(turn["answer"][0] for turn in turns)
    assert len(turns) >= 60
    assert all(0.15 <= right[letter] / len(turns) <= 0.35 for letter in LETTERS)


def test_numeric_answers_are_what_their_check_computes() -> None:
    checked = 0
    for name, turn in all_turns():
        number = number_in(stated(turn))
        if "check" in turn:
            assert number == pytest.approx(compute(turn["check"])), name
            checked += 1
        else:
            # A year is recalled, not computed.
            assert number is None or turn["task_type"] == "factual", name
    assert checked >= 100


def test_a_checked_option_is_the_only_one_that_fits() -> None:
    for name, turn in all_turns():
        if "check" in turn and turn["task_type"] == "multiple_choice":
            value = compute(turn["check"])
            texts = options_of(turn).values()
            assert sum(number_in(text) == pytest.approx(value) for text in texts) == 1, name


@pytest.mark.parametrize("answer", ["3x^2", "O(log n)", "Na+", "It falls", "24a"])
def test_formulas_are_no_numbers(answer: str) -> None:
    assert number_in(answer) is None


def test_numbers_of_answers() -> None:
    answers = ("1,250 dollars", "3/8", "0.25 mol/L", "-4", "2.5", "2,073,600 pixels")
    expected = (1250, 0.375, 0.25, -4, 2.5, 2073600)
    assert tuple(map(number_in, answers)) == expected


@pytest.mark.parametrize("text", ["__import__('os')", "x + 1", "True", "'1'", "[1]", "abs(-1)"])
def test_only_arithmetic_is_computed(text: str) -> None:
    with pytest.raises(ValueError, match="not arithmetic"):
        compute(text)


def test_nothing_here_is_calibrated_on() -> None:
    evaluated = {name: runs(turn["prompt"]) for name, turn in all_turns()}
    own = set().union(*evaluated.values())
    for domain in CATALOGUE:
        pools = read_pools(DATA / "pools", [domain])
        for text in (*pools.train[0], *pools.val[0]):
            assert not runs(text) & own, text
    for path in (DATA / "scenarios").iterdir():
        for prompt in read_scenario(path).prompts:
            assert not runs(prompt) & own, prompt

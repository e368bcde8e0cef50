"""What a document refuses: the first defect alone, in one line, however many there are."""

from __future__ import annotations

import json
import tracemalloc
from typing import Annotated

import pytest
from pydantic import AfterValidator, Field

from spp_export.common.documents import Document, Rows, printable, validated
from spp_export.common.errors import PlanError
from spp_export.data.artifacts import ArtifactsDocument
from spp_export.planning.latency import LatencyDocument
from spp_export.planning.plan_file import PlanDocument


class Leaf(Document):
    heads: Rows[int]
    name: Annotated[str, Field(max_length=9), AfterValidator(printable)] = "x"


class Tree(Document):
    version = 1, "Write it again."

    schema_version: int
    leaves: Rows[Leaf]
    named: dict[str, Leaf] = Field(default_factory=dict)


def tree(**changes):
    return {"schema_version": 1, "leaves": [{"heads": [0, 1]}]} | changes


def test_lists_become_tuples():
    assert validated(Tree, tree(), what="t", error=PlanError).leaves[0].heads == (0, 1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "t: the document is a list of 0, expected a JSON object."),
        (tree(schema_version=2), "t: schema_version is 2, expected 1. Write it again."),
        (tree(schema_version=True), "t: schema_version is True, expected 1. Write it again."),
        ({"schema_version": 1}, "t: the document has no leaves."),
        (
            tree(more=1),
            "t: the document has the unknown key 'more'; known are schema_version, leaves, named.",
        ),
        (tree(leaves=[{"heads": [0, 1.0]}]), "t: leaves[0].heads[1] is 1.0, expected an integer."),
        (tree(leaves=[{"heads": "0"}]), "t: leaves[0].heads is '0', expected a list."),
        (
            tree(leaves=[{"heads": [], "name": "x" * 10}]),
            "t: leaves[0].name is 'xxxxxxxxxx', expected at most 9 characters.",
        ),
        (
            tree(leaves=[{"heads": [], "name": "\x1b[2J"}]),
            "t: leaves[0].name is '\\x1b[2J', expected one line of printable text.",
        ),
        (tree(named={"a\nb": 1}), "t: named.'a\\nb' is 1, expected a JSON object."),
    ],
)
def test_the_line(value, message):
    with pytest.raises(PlanError) as caught:
        validated(Tree, value, what="t", error=PlanError)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "value",
    [
        tree(**{f"key{index}": 1 for index in range(100_000)}),
        tree(leaves=[{"heads": ["0"] * 100_000}]),
        tree(leaves=[1] * 100_000),
    ],
    ids=["keys", "items", "objects"],
)
def test_a_hundred_thousand_defects_cost_no_memory(value):
    tracemalloc.start()
    try:
        with pytest.raises(PlanError):
            validated(Tree, value, what="t", error=PlanError)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [PlanDocument, ArtifactsDocument, LatencyDocument])
def test_schemas_can_be_printed(kind):
    schema = json.loads(json.dumps(kind.model_json_schema()))
    assert schema["additionalProperties"] is False
    assert "schema_version" in schema["required"]

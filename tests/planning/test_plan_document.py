"""plan.json: what is written, and what is refused."""

from __future__ import annotations

import json

import pytest
from planning import model_shape

from spp_export.common.errors import OutputError, PlanError
from spp_export.planning import LayerPlan, Plan, dense_plan, parse_plan, read_plan, write_plan

BY_HAND = """
{"schema_version": 1, "model": {"fingerprint": "f", "source": "org/model"}, "layout": "per-layer",
 "compensation": "lstsq",
 "layers": [{"kv_heads": [0, 2], "query_heads": [0, 2, 6, 7], "channels": null},
            {"kv_heads": [1], "query_heads": [3], "channels": [0, 5]}]}
"""
PLAN = Plan(
    "f",
    "org/model",
    "per-layer",
    "lstsq",
    (LayerPlan((0, 2), (0, 2, 6, 7)), LayerPlan((1,), (3,), (0, 5))),
)


def edited(*path, value):
    """BY_HAND with the value at `path` replaced."""
    document = json.loads(BY_HAND)
    *parents, last = path
    target = document
    for key in parents:
        target = target[key]
    target[last] = value
    return json.dumps(document)


def test_the_part_that_slicing_reads_parses_alone():
    assert parse_plan(BY_HAND) == PLAN


def test_round_trip_with_provenance():
    plan = Plan(
        **vars(PLAN)
        | {
            "scenario": {"name": "chémie", "sha256": "00"},
            "diagnosis": {"mixture": {"chemistry": 0.75, "history": 0.25}, "breadth": 0.81},
            "budget": {"asked": {"keep": 0.8}, "realised": {"keep": 0.79}},
        }
    )
    text = plan.to_json()
    assert parse_plan(text) == plan
    assert parse_plan(text).to_json() == text
    assert json.loads(text)["scenario"]["name"] == "chémie"


def test_one_layer_per_line():
    lines = PLAN.to_json().splitlines()
    assert lines[:4] == ["{", '  "schema_version": 1,', '  "model": {', '    "fingerprint": "f",']
    rows = [line for line in lines if "kv_heads" in line]
    assert rows == [
        '    {"kv_heads": [0, 2], "query_heads": [0, 2, 6, 7], "channels": null},',
        '    {"kv_heads": [1], "query_heads": [3], "channels": [0, 5]}',
    ]


def test_dense_plan_keeps_everything():
    shape = model_shape(2, 4, 2)
    plan = dense_plan(shape, "f", "org/model")
    assert plan.layer_shapes(shape) == shape.layers
    assert parse_plan(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty, expected JSON"),
        ("[]", "the document is a list of 0, expected a JSON object"),
        (BY_HAND.replace("[3]", "[NaN]"), "NaN is not a finite number"),
        (BY_HAND.replace("[3]", "[1e999]"), "1e999 is not a finite number"),
        (BY_HAND.replace("null", "[" * 100_000), "nested deeper"),
        (BY_HAND.replace('"layout"', '"model": 1, "layout"'), "'model' appears twice"),
        (edited("schema_version", value=2), "schema_version is 2, expected 1"),
        (edited("schema_version", value=True), "schema_version is True, expected 1"),
        (edited("schema_version", value=1.0), "schema_version is 1.0, expected 1"),
        ("{}", "schema_version is null, expected 1"),
        ('{"schema_version": 1}', "the document has no model"),
        (edited("heads", value=1), "the document has the unknown key 'heads'"),
        (edited("model", value="org/model"), "model is 'org/model', expected a JSON object"),
        (edited("model", value={"fingerprint": "f"}), "model has no source"),
        (
            edited("model", "fingerprint", value=""),
            "model.fingerprint is '', expected at least 1 ch",
        ),
        (edited("model", "source", value="/srv/m"), "model.source is the path '/srv/m'"),
        (
            edited("layout", value="square"),
            "layout is 'square', expected 'uniform', 'per-layer' or",
        ),
        (edited("padded", value=1), "padded is 1, expected true or false"),
        (edited("padded", value=True), "padded is true but layout is per-layer; only ragged"),
        (edited("layout", value=[]), "layout is a list of 0, expected 'uniform', 'per-layer'"),
        (edited("compensation", value=None), "compensation is null, expected 'none', 'bias' or"),
        (edited("scenario", value="chemistry"), "scenario is 'chemistry', expected a JSON object"),
        (edited("layers", value=[]), "layers is a list of 0, expected at least 1 item"),
        (edited("layers", value={}), "layers is a JSON object, expected a list"),
        (edited("layers", 1, value=7), r"layers\[1\] is 7, expected a JSON object"),
        (edited("layers", 1, value={"kv_heads": [0]}), r"layers\[1\] has no query_heads"),
        (edited("layers", 0, "channel", value=None), r"layers\[0\] has the unknown key 'channel'"),
        (
            edited("layers", 1, "kv_heads", value=None),
            r"layers\[1\].kv_heads is null, expected a list",
        ),
        (edited("layers", 1, "kv_heads", value=[True]), r"kv_heads\[0\] is True, expected an int"),
        (
            edited("layers", 1, "kv_heads", value=[1.0]),
            r"layers\[1\].kv_heads\[0\] is 1.0, expected an integer",
        ),
        (
            edited("layers", 1, "kv_heads", value=["1"]),
            r"layers\[1\].kv_heads\[0\] is '1', expected an integer",
        ),
        (
            edited("layers", 1, "kv_heads", value=[-1]),
            r"layers\[1\].kv_heads holds -1, expected an integer",
        ),
        (
            edited("layers", 0, "query_heads", value=[4, 4]),
            r"layers\[0\].query_heads holds 4 twice",
        ),
        (edited("layers", 0, "query_heads", value=[4, 2]), "query_heads holds 2 after 4; indices"),
        (edited("layers", 0, "query_heads", value=[-(10**200)]), r"holds -1000.*\.\.\., expected"),
        (edited("model", "source", value="\ud800"), "half of a surrogate pair"),
    ],
)
def test_malformed_plans_name_what_is_wrong(text, message):
    with pytest.raises(PlanError, match=message) as caught:
        parse_plan(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_files(tmp_path):
    path = tmp_path / "plan.json"
    write_plan(PLAN, path)
    assert read_plan(path) == PLAN
    with pytest.raises(OutputError, match="already exists"):
        write_plan(PLAN, path)
    write_plan(dense_plan(model_shape(), "f", "m"), path, force=True)
    assert read_plan(path).layout == "uniform"
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]
    with pytest.raises(OutputError, match="cannot be written"):
        write_plan(PLAN, tmp_path / "missing" / "plan.json")


def test_files_that_are_no_plan(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(PlanError, match="no such file"):
        read_plan(path)
    with pytest.raises(PlanError, match="directory"):
        read_plan(tmp_path)
    path.write_bytes(b'{"schema_version": "\xff"}')
    with pytest.raises(PlanError, match="is not UTF-8"):
        read_plan(path)
    with path.open("wb") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(PlanError, match="larger than 16 MiB"):
        read_plan(path)

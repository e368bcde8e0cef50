"""Latency tables as files: what is read, and the many things that are not."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from latency_tables import document, times, write
from planning import model_shape

from spp_export.common.errors import ProfileError
from spp_export.planning.latency import read_latency_table

SHAPE = model_shape(2, 4, 2, channels=12)


@pytest.fixture
def valid():
    return document(SHAPE, np.random.default_rng(0), [4, 8, 12])


def test_what_is_written_is_read(tmp_path, valid):
    valid |= {"machine": {"cpu": "x"}, "versions": {}, "git": None, "options": {"seed": 1}}
    path = write(tmp_path / "t.json", valid)
    table = read_latency_table(path)
    assert table.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (table.phase, table.batch, table.context) == ("decode", 2, 33)
    assert table.attention[2, 1] == valid["attention"][1]["seconds"]
    assert list(table.mlp) == [4, 8, 12]
    assert table.rest == valid["rest"]["seconds"]
    table.check_model(SHAPE)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", 9),
        ("head_dim", 4),
        ("num_layers", 3),
        ("model_type", "llama"),
        ("qkv_bias", True),
        ("vocab_size", 12),
    ],
)
def test_a_table_of_another_model(tmp_path, valid, name, value):
    table = read_latency_table(write(tmp_path / "t.json", valid))
    with pytest.raises(ProfileError, match=f"measured for a model with {name} "):
        table.check_model(replace(SHAPE, **{name: value}))


def changed(path, value):
    """A change at a path of keys; None removes what is there."""

    def apply(valid):
        *parents, last = path
        for key in parents:
            valid = valid[key]
        if value is None:
            del valid[last]
        else:
            valid[last] = value

    return apply


NO_NUMBER = "expected a number greater than 0"
TOO_MUCH = "expected a number less than or equal to 1000"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["schema_version"], 2, "schema_version is 2, expected 1"),
        (["schema_version"], True, "schema_version is True, expected 1"),
        (["extra"], 1, "the document has the unknown key 'extra'"),
        (["rest"], None, "the document has no rest"),
        (["model"], [1], "model is a list of 1, expected a JSON object"),
        (["model", "head_dim"], None, "model has no head_dim"),
        (
            ["model", "head_dim"],
            0,
            "model.head_dim is 0, expected a number greater than or equal to 1",
        ),
        (["model", "head_dim"], 1.0, r"model.head_dim is 1\.0, expected an integer"),
        (["model", "channels"], 1 << 60, "model.channels is .*, expected a number less than"),
        (["model", "kv_heads"], 3, "model has 4 query_heads, expected a multiple of its 3 kv"),
        (["model", "qkv_bias"], 1, "model.qkv_bias is 1, expected true or false"),
        (["model", "name"], "a\nb", "model.name is 'a.*', expected one line"),
        (["phase"], "both", "phase is 'both', expected 'decode' or 'prefill'"),
        (["batch"], True, "batch is True, expected an integer"),
        (["context"], -1, "context is -1, expected a number greater than or equal to 1"),
        (["device"], "x" * 101, "device is 'xxx.*, expected at most 100 characters"),
        (["dtype"], "\x1b[2J", "dtype is .*, expected one line"),
        (["attention"], [], "0 shapes in attention, expected each of 1 to 2 KV"),
        (["attention", 0], None, "has 3 shapes in attention, expected each of 1 to 2 KV heads"),
        (["attention", 0], 7, r"attention\[0\] is 7, expected a JSON object"),
        (
            ["attention", 0, "query_heads"],
            2,
            r"attention\[1\] of 2 query heads and 1 KV heads, .* once",
        ),
        (
            ["attention", 0, "query_heads"],
            3,
            r"attention\[0\] of 3 query heads and 1 KV heads, expected",
        ),
        (
            ["attention", 2, "query_heads"],
            3,
            r"attention\[2\] of 3 query heads and 2 KV heads, expected",
        ),
        (
            ["attention", 3, "kv_heads"],
            3,
            r"attention\[3\] of 4 query heads and 3 KV heads, expected",
        ),
        (["attention", 3, "extra"], 1, r"attention\[3\] has the unknown key 'extra'"),
        (["attention", 1, "seconds"], 0, rf"attention\[1\].seconds is 0, {NO_NUMBER}"),
        (["attention", 1, "seconds"], "1", "seconds is '1', expected a number"),
        (["attention", 1, "seconds"], 1001, f"seconds is 1001, {TOO_MUCH}"),
        (["attention", 1, "seconds"], 10**400, "seconds is 1000.*, expected a number"),
        (["attention", 1, "p80"], True, "p80 is True, expected a number"),
        (["attention", 1, "p20"], 1, r"attention\[1\] has seconds .*, expected p20 1.0 to p80"),
        (["mlp", 1, "channels"], 4, r"mlp\[1\] of 4 channels after 4, expected ascending widths"),
        (["mlp", 2, "channels"], 13, "mlp of at most 13 channels, expected all 12"),
        (["mlp", 2], None, "mlp of at most 8 channels, expected all 12"),
        (["rest"], {"seconds": 1}, "rest has no p20"),
    ],
)
def test_refusals(tmp_path, valid, path, value, message):
    changed(path, value)(valid)
    file = write(tmp_path / "t.json", valid)
    with pytest.raises(ProfileError, match=message) as caught:
        read_latency_table(file)
    assert str(caught.value).startswith(f"profile {file}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty, expected JSON"),
        ("[]", "the document is a list of 0"),
        ('{"a": 1, "a": 2}', "appears twice"),
        ('{"rest": NaN}', "not a finite number"),
        ('{"rest": 1e999}', "not a finite number"),
        ("[" * 99, "nested deeper"),
        (" " * (5 << 20), "is larger than 4 MiB"),
    ],
)
def test_what_is_no_table(tmp_path, text, message):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ProfileError, match=message) as caught:
        read_latency_table(tmp_path / "t.json")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ProfileError, match="no such file"):
        read_latency_table(tmp_path / "t.json")
    with pytest.raises(ProfileError, match="got a directory"):
        read_latency_table(tmp_path)


def test_the_slowest_table_still_adds_up_exactly(tmp_path):
    """The most that the reader lets through, a layer's two blocks for each layer there may be."""
    shape = model_shape(1024, 1, 1, channels=2)
    valid = document(shape, np.random.default_rng(0))
    for row in (*valid["attention"], *valid["mlp"], valid["rest"]):
        row |= times(500.0) | {"seconds": 999.999999999, "p80": 1000.0}
    table = read_latency_table(write(tmp_path / "t.json", valid))
    assert table.step_cost(shape.layers) == 2049 * 999_999_999_999
    assert table.step_cost(shape.layers) < 2**53
    assert math.isclose(float(table.step_cost(shape.layers)), 2049e12, rel_tol=1e-9)
    assert json.dumps(table.predict(shape, shape.layers).to_dict())

"""Plans made to be trouble, given to the command beside a model that they do not reach."""

from __future__ import annotations

import json
import os

import pytest
from bounded import refused

from spp_cli.main import run
from spp_export.common.errors import PlanError
from spp_export.models.shape import ModelShape
from spp_export.planning import read_plan, validate_plan

LAYER = {"kv_heads": [0], "query_heads": [0, 1]}
SHAPE = ModelShape("llama", 2, 64, 8, 4, 8, 96, 100, True, 4)
HUGE = 10**4000


def document(**changes):
    plan = {
        "schema_version": 1,
        "model": {"fingerprint": "f" * 64, "source": "org/name"},
        "layout": "per-layer",
        "compensation": "none",
        "layers": [LAYER, LAYER],
    }
    return plan | changes


def layers(**changes):
    return document(layers=[LAYER, LAYER | changes])


# What cannot be a plan of any model.
MALFORMED = {
    "a version without end": document(schema_version=HUGE),
    "a half version": document(schema_version=1.0),
    "a true version": document(schema_version=True),
    "a fingerprint of two lines": document(model={"fingerprint": "a\nb", "source": "x"}),
    "a fingerprint without end": document(model={"fingerprint": "f" * 10**6, "source": "x"}),
    "a source of two lines": document(model={"fingerprint": "f", "source": "x\n# title"}),
    "a source on a drive": document(model={"fingerprint": "f", "source": "C:/models/x"}),
    "a source that is a path": document(model={"fingerprint": "f", "source": "/models/x"}),
    "a layout of lists": document(layout=["per-layer"]),
    "a layout without end": document(layout="x" * 10**6),
    "another layout": document(layout="diagonal"),
    "another compensation": document(compensation="magic"),
    "padded in words": document(padded="true"),
    "padded and regular": document(padded=True),
    "a key without end": document(**{"k" * 10**6: 1}),
    "provenance that is a list": document(diagnosis=[1]),
    "no layers": document(layers=[]),
    "layers in words": document(layers="x" * 10**6),
    "a layer that is a list": document(layers=[[0]]),
    "true heads": layers(query_heads=[True]),
    "half heads": layers(query_heads=[0.0]),
    "heads in words": layers(query_heads=["0"]),
    "heads below": layers(query_heads=[-1]),
    "heads far below": layers(query_heads=[-HUGE]),
    "the same head twice": layers(query_heads=[1, 1]),
    "heads in another order": layers(query_heads=[1, 0]),
    "heads that are a number": layers(query_heads=2),
    "channels that are true": layers(channels=True),
    "channels of lists": layers(channels=[[0]]),
}
# What is a plan, but not of this model.
MISFITS = {
    "a head beyond": layers(query_heads=[0, 8]),
    "a head far beyond": layers(query_heads=[0, HUGE]),
    "a group beyond": layers(kv_heads=[0, 4]),
    "a channel beyond": layers(channels=[96]),
    "a million heads": layers(query_heads=list(range(10**6))),
    "layers without end": document(layers=[LAYER] * 20_000),
    "a layer less": document(layers=[LAYER]),
    "a head without its group": layers(query_heads=[0, 2]),
    "a group without heads": layers(kv_heads=[0, 1]),
    "groups of other sizes": layers(kv_heads=[0, 1], query_heads=[0, 1, 2]),
    "unlike layers": document(layout="uniform", layers=[LAYER, {**LAYER, "query_heads": [0]}]),
    "another fingerprint": document(),
}


def message(action):
    """The line, said after few calls."""
    with refused(PlanError, megabytes=1024) as caught:
        action()
    assert len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed(tmp_path, capsys, kind):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(MALFORMED[kind]))
    assert "plan" in message(lambda: read_plan(path))
    assert run(["show", str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("kind", MISFITS)
def test_misfits(tmp_path, kind):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(MISFITS[kind]))
    plan = read_plan(path)
    message(lambda: validate_plan(plan, SHAPE, "e" * 64))


TEXTS = {
    "deep": b'{"a":' * 10**6,
    "deep inside": json.dumps(document()).encode()[:-1] + b', "budget": ' + b"[" * 10**5,
    "unfolding": b'{"layers":[' + b"[]," * 1_200_000 + b"[]]}",
    "infinite": json.dumps(document(budget={"keep": 1})).encode().replace(b"1}", b"Infinity}"),
    "not a number": json.dumps(document(budget={"keep": 1})).encode().replace(b"1}", b"NaN}"),
    "keys twice": json.dumps(document()).encode()[:-1] + b', "layout": "uniform"}',
    "too large": b" " * (17 << 20),
    "empty": b"",
    "not UTF-8": b'{"a": "\xff"}',
}


@pytest.mark.parametrize("kind", TEXTS)
def test_texts(tmp_path, capsys, kind):
    path = tmp_path / "plan.json"
    path.write_bytes(TEXTS[kind])
    message(lambda: read_plan(path))
    assert run(["show", str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("kind", ["folder", "device", "loop", "nothing"])
def test_what_is_no_file(tmp_path, kind):
    path = tmp_path / "plan.json"
    match kind:
        case "folder":
            path.mkdir()
        case "device":
            os.symlink("/dev/zero", path)
        case "loop":
            os.symlink("plan.json", path)
    message(lambda: read_plan(path))

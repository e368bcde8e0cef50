"""The artifacts directory: there and back, and every way it can be wrong."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from spp_export.common.errors import ArtifactsError
from spp_export.data.artifacts import (
    Artifacts,
    Dialogue,
    check_model,
    read_artifacts,
    write_artifacts,
)
from spp_export.models.shape import ModelShape

FILES = (
    "artifacts.json",
    "calibration.jsonl",
    "importance.safetensors",
    "probes.safetensors",
    "whitelist.json",
)
LAYERS, DOMAINS, HEADS, CHANNELS, HIDDEN = 3, 2, 4, 6, 8
SIZES = {"fingerprint": "", "num_layers": 3, "query_heads": 4, "hidden_size": 8, "channels": 6}


def make(**changes):
    rng = np.random.default_rng(0)

    def array(*shape):
        return rng.random(shape, dtype=np.float32)

    record = Artifacts(
        fingerprint="f" * 64,
        domains=("chemistry", "math"),
        regimes=("in-domain", "cross-domain"),
        weight=array(LAYERS, DOMAINS, HIDDEN),
        bias=array(LAYERS, DOMAINS),
        temperature=array(2, LAYERS) + 0.5,
        axes=array(DOMAINS, HIDDEN),
        importance={
            "head/energy": array(DOMAINS, LAYERS, HEADS),
            "head/axis": array(DOMAINS, LAYERS, HEADS),
            "channel/energy": array(DOMAINS, LAYERS, CHANNELS),
        },
        whitelist=((0, 1), (2, 3)),
        calibration=(("math", "What is 2+2?\nShow it."), ("chemistry", "Säure \u2028 \x85")),
        manifest={"seed": 0, "pools": {"math/train.txt": "ab"}, "accuracy": [0.5, 1.0]},
    )
    return replace(record, **changes)


def shape(**changes):
    sizes = {
        "model_type": "llama",
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "query_heads": HEADS,
        "kv_heads": 2,
        "head_dim": 2,
        "channels": CHANNELS,
        "vocab_size": 10,
        "tied_embeddings": True,
        "element_bytes": 4,
    }
    return ModelShape(**{**sizes, **changes})


@pytest.fixture
def written(tmp_path):
    folder = tmp_path / "artifacts"
    folder.mkdir()
    write_artifacts(make(), folder)
    return folder


def test_there_and_back(written):
    expected, read = make(), read_artifacts(written)
    for name in ("fingerprint", "domains", "regimes", "whitelist", "calibration", "manifest"):
        assert getattr(read, name) == getattr(expected, name), name
    for name in ("weight", "bias", "temperature", "axes"):
        np.testing.assert_array_equal(getattr(read, name), getattr(expected, name))
    assert set(read.importance) == set(expected.importance)
    for name, array in expected.importance.items():
        np.testing.assert_array_equal(read.importance[name], array)
    sizes = (read.num_layers, read.hidden_size, read.query_heads, read.channels)
    assert sizes == (LAYERS, HIDDEN, HEADS, CHANNELS)
    assert read.probe_layers == (0, 1, 2)


def test_the_files_are_what_the_design_says(written):
    assert sorted(path.name for path in written.iterdir()) == list(FILES)
    header = json.loads((written / "artifacts.json").read_text())
    assert header["schema_version"] == 1
    assert header["domains"] == ["chemistry", "math"]
    assert header["model"]["fingerprint"] == "f" * 64
    assert json.loads((written / "whitelist.json").read_text()) == [[0, 1], [2, 3]]
    probes = load_file(written / "probes.safetensors")
    assert {name: array.shape for name, array in probes.items()} == {
        "weight": (LAYERS, DOMAINS, HIDDEN),
        "bias": (LAYERS, DOMAINS),
        "temperature": (2, LAYERS),
        "axes": (DOMAINS, HIDDEN),
    }
    assert load_file(written / "importance.safetensors").keys() == make().importance.keys()
    lines = (written / "calibration.jsonl").read_text().split("\n")
    assert json.loads(lines[0]) == {"domain": "math", "text": "What is 2+2?\nShow it."}


def test_written_twice_is_the_same_bytes(written, tmp_path):
    again = tmp_path / "again"
    again.mkdir()
    shuffled = dict(reversed(make().importance.items()))
    # Column-major arrays hold the same values.
    record = make(importance=shuffled, weight=np.asfortranarray(make().weight))
    assert write_artifacts(record, again).sha256 == read_artifacts(written).sha256
    for name in FILES:
        assert (again / name).read_bytes() == (written / name).read_bytes()


def test_settings_have_defaults_until_they_are_measured():
    artifacts = make()
    assert artifacts.regime_rule == (0.5, 0.15)
    assert (artifacts.shrinkage, artifacts.scenario_weight) == (0.5, 0.3)
    measured = make(
        manifest={
            "regime_choice": {"known": 0.3, "share": 0.2},
            "shrinkage": {"chosen": 1},
            "scenario_weight": {"chosen": 0.15},
        }
    )
    assert measured.regime_rule == (0.3, 0.2)
    assert (measured.shrinkage, measured.scenario_weight) == (1.0, 0.15)


@pytest.mark.parametrize(
    ("manifest", "match"),
    [
        (
            {"shrinkage": {"chosen": 1.5}},
            "shrinkage.chosen is 1.5, expected a number less than or equal to 1",
        ),
        ({"shrinkage": 0.5}, "shrinkage is 0.5, expected a JSON object"),
        (
            {"scenario_weight": {"chosen": "0.5"}},
            "scenario_weight.chosen is '0.5', expected a number",
        ),
        ({"regime_choice": {"known": True}}, "regime_choice.known is True, expected a number"),
        (
            {"regime_choice": {"share": float("nan")}},
            "regime_choice.share is nan, expected a finite number",
        ),
    ],
)
def test_settings_that_are_no_shares(manifest, match, tmp_path):
    with pytest.raises(ArtifactsError, match=match):
        write_artifacts(make(manifest=manifest), tmp_path)


def test_the_hash_covers_names_and_bytes(written):
    lines = [
        f"{name}\0{hashlib.sha256((written / name).read_bytes()).hexdigest()}\n" for name in FILES
    ]
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert read_artifacts(written).sha256 == expected
    (written / "moments.safetensors").write_bytes(b"added later")
    assert read_artifacts(written).sha256 == expected
    (written / "whitelist.json").write_text("[[0, 1], [2, 2]]")
    assert read_artifacts(written).sha256 != expected


def test_writing_never_replaces(written):
    with pytest.raises(FileExistsError):
        write_artifacts(make(), written)


def test_without_channels_calibration_and_whitelist(tmp_path):
    importance = {"head/energy": make().importance["head/energy"]}
    record = make(importance=importance, whitelist=(), calibration=(), fingerprint="")
    write_artifacts(record, tmp_path)
    read = read_artifacts(tmp_path)
    assert (read.channels, read.whitelist, read.calibration) == (None, (), ())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"domains": ()}, "domains is a list of 0, expected at least 1 item"),
        ({"domains": ("a", " ")}, r"domains\[1\] is ' ', expected text that is not blank"),
        ({"domains": ("a", "b\n")}, r"domains\[1\] is 'b\\n', expected .* printable"),
        ({"domains": ("a", "a")}, "domains holds a, a, expected distinct names"),
        ({"regimes": ("in-domain", "in-domain")}, "regimes holds .*, expected distinct"),
        ({"domains": ("a", "b", "c")}, r"weight: expected the shape \(3, 3, 8\), got \(3, 2, 8\)"),
        ({"weight": np.zeros((3, 2), "f4")}, r"expected weight \[layers, domains, hidden\]"),
        ({"weight": np.zeros((0, 2, 8), "f4")}, r"expected weight \[layers, domains, hidden\]"),
        ({"weight": np.zeros((3, 2, 8))}, "weight: expected float32, got float64"),
        ({"weight": np.full((3, 2, 8), np.nan, "f4")}, "weight: holds a value that is not finite"),
        ({"bias": np.zeros((2, 3), "f4")}, "bias: expected the shape"),
        ({"bias": np.full((3, 2), np.inf, "f4")}, "bias: holds a value"),
        ({"temperature": np.ones((1, 3), "f4")}, r"temperature: expected the shape \(2, 3\)"),
        ({"temperature": np.zeros((2, 3), "f4")}, "temperatures above 0"),
        ({"axes": np.zeros((2, 7), "f4")}, "axes: expected the shape"),
        ({"importance": {}}, "importance of heads"),
        ({"importance": {"channel/energy": np.ones((2, 3, 6), "f4")}}, "importance of heads"),
        ({"importance": {"energy": np.ones((2, 3, 4), "f4")}}, "got 'energy'"),
        ({"importance": {"head/../x": np.ones((2, 3, 4), "f4")}}, "got 'head/../x'"),
        ({"importance": {"head/a": np.ones((2, 4), "f4")}}, r"expected \[domains, layers, units\]"),
        ({"importance": {"head/a": np.ones((2, 3, 0), "f4")}}, r"\[domains, layers, units\]"),
        ({"importance": {"head/a": np.ones((3, 3, 4), "f4")}}, "head/a: expected the shape"),
        (
            {
                "importance": {
                    "head/a": np.ones((2, 3, 4), "f4"),
                    "head/b": np.ones((2, 3, 5), "f4"),
                }
            },
            r"head/b: expected the shape \(2, 3, 4\), got \(2, 3, 5\)",
        ),
        ({"whitelist": ((3, 0),)}, "layer 3, head 0 does not exist"),
        ({"whitelist": ((0, -1),)}, "layer 0, head -1 does not exist"),
        ({"whitelist": ((0, 1), (0, 1))}, "listed twice"),
        ({"calibration": (("art", "x"),)}, "calibration text 1 is of the domain 'art'"),
        ({"manifest": {"probe_layers": [0, 3]}}, "probe_layers: expected ascending layers below 3"),
        ({"manifest": {"probe_layers": [1, 0]}}, "probe_layers: expected ascending"),
        ({"manifest": {"probe_layers": []}}, "probe_layers: expected ascending"),
        ({"manifest": {"probe_layers": ["1"]}}, r"probe_layers\[0\] is '1', expected an integer"),
    ],
)
def test_contradictions_are_refused_before_writing(tmp_path, changes, match):
    with pytest.raises(ArtifactsError, match=match) as caught:
        write_artifacts(make(**changes), tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def edit(folder, **changes):
    path = folder / "artifacts.json"
    header = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in header.items() if value is not ...}))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"schema_version": 2}, "schema_version is 2, expected 1"),
        ({"schema_version": True}, "schema_version is True, expected 1"),
        ({"schema_version": ...}, "schema_version is null, expected 1"),
        ({"domains": ...}, "the document has no domains"),
        ({"domains": "ab"}, "domains is 'ab', expected a list"),
        ({"domains": ["a"]}, "weight: expected the shape"),
        ({"domains": [["a"], "b"]}, r"domains\[0\] is a list of 1, expected a string"),
        ({"regimes": []}, "regimes is a list of 0, expected at least 1"),
        ({"manifest": []}, "manifest is a list of 0, expected a JSON object"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"model": {}}, "model has no fingerprint"),
        ({"model": {"fingerprint": ""}}, "model has no num_layers"),
        (
            {"model": {**SIZES, "query_heads": 5}},
            "says query_heads = 5, the tensors have 4",
        ),
        (
            {"model": {**SIZES, "hidden_size": "8"}},
            "model.hidden_size is '8', expected an integer",
        ),
    ],
)
def test_bad_header(written, changes, match):
    edit(written, **changes)
    with pytest.raises(ArtifactsError, match=match) as caught:
        read_artifacts(written)
    assert str(caught.value).startswith(f"artifacts {written}")
    assert "\n" not in str(caught.value)


def bf16_file(name):
    header = json.dumps({name: {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0\0"


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("artifacts.json", b"[]", "the document is a list of 0, expected a JSON object"),
        ("artifacts.json", b"{", "not valid JSON"),
        ("artifacts.json", b"\xff", "not UTF-8"),
        ("whitelist.json", b"{}", r"expected a list of \[layer, head\]"),
        ("whitelist.json", b"[[0]]", r"list of \[layer, head\], got \[0\]"),
        ("whitelist.json", b"[[0, true]]", r"list of \[layer, head\]"),
        ("whitelist.json", b"[[0, 1.0]]", r"list of \[layer, head\]"),
        ("whitelist.json", b"[[0, 4]]", "layer 0, head 4 does not exist"),
        ("whitelist.json", b"[" * 100, "nested deeper"),
        ("calibration.jsonl", b'{"domain": "math"}', "line 1: the document has no text"),
        (
            "calibration.jsonl",
            b'\n{"domain": 1, "text": "x"}',
            "line 2: domain is 1, expected a string",
        ),
        ("calibration.jsonl", b'"math"', "line 1: the document is 'math', expected a JSON"),
        ("calibration.jsonl", b"{]", "line 1: is not valid JSON"),
        ("calibration.jsonl", b'{"domain": "art", "text": "x"}', "of the domain 'art'"),
        ("probes.safetensors", b"", "is not a safetensors file"),
        ("probes.safetensors", b"\xff" * 8, "is not a safetensors file"),
        ("probes.safetensors", struct.pack("<Q", 99_000_000) + b"{}", "not a safetensors file"),
        ("probes.safetensors", struct.pack("<Q", 2) + b"{}", "expected the tensors .*, got none"),
        ("importance.safetensors", bf16_file("head/a"), "importance.safetensors|float32"),
        ("importance.safetensors", b"garbage garbage", "is not a safetensors file"),
    ],
)
def test_bad_files(written, name, data, match):
    (written / name).write_bytes(data)
    with pytest.raises(ArtifactsError, match=match) as caught:
        read_artifacts(written)
    assert "\n" not in str(caught.value)


def test_truncated_and_extra_tensors(written):
    path = written / "probes.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ArtifactsError, match="is not a safetensors file"):
        read_artifacts(written)
    path.write_bytes(whole)
    save_file({**load_file(path), "more": np.zeros(1, "f4")}, path)
    with pytest.raises(ArtifactsError, match=r"expected the tensors .* got 'axes', 'bias', 'more'"):
        read_artifacts(written)


@pytest.mark.parametrize("name", FILES)
def test_missing_file(written, name):
    (written / name).unlink()
    with pytest.raises(ArtifactsError, match=f"{name}: no such file"):
        read_artifacts(written)


def test_missing_directory(tmp_path):
    with pytest.raises(ArtifactsError, match=r"no such directory. Make it with 'spp probe'"):
        read_artifacts(tmp_path / "absent")


def test_check_model():
    assert check_model(make(), "f" * 64, shape()) is None
    with pytest.raises(ArtifactsError, match=r"made for the model ffff.*, this one is eeee"):
        check_model(make(), "e" * 64, shape())
    with pytest.raises(ArtifactsError, match=r"num_layers 3, .*; this one has num_layers 4, "):
        check_model(make(), "f" * 64, shape(num_layers=4))
    for size in ("query_heads", "hidden_size", "channels"):
        with pytest.raises(ArtifactsError, match=f"{size} 12"):
            check_model(make(), "f" * 64, shape(**{size: 12}))


def test_check_model_without_a_fingerprint():
    importance = {"head/energy": make().importance["head/energy"]}
    unknown = make(fingerprint="", importance=importance)
    note = check_model(unknown, "e" * 64, shape(channels=99))
    assert note is not None
    assert "only the numbers of layers and heads and the hidden size were compared" in note
    with pytest.raises(ArtifactsError, match="query_heads"):
        check_model(unknown, "e" * 64, shape(query_heads=2))


def dialogues():
    """Two of 3 and 2 tokens, whose gradients are told."""
    rng = np.random.default_rng(1)
    return tuple(
        Dialogue("math", tokens, 1, rng.random((len(tokens), LAYERS, 2)).astype(np.float16))
        for tokens in ((1, 2, 3), (4, 5))
    )


def test_dialogues_and_their_gradients_come_back(tmp_path):
    record = make(dialogues=dialogues())
    write_artifacts(record, tmp_path)
    read = read_artifacts(tmp_path).dialogues
    assert read == record.dialogues
    for one, expected in zip(read, record.dialogues, strict=True):
        np.testing.assert_array_equal(one.gradients, expected.gradients)


def test_artifacts_of_before_know_no_gradients(tmp_path):
    without = tuple(replace(one, gradients=None) for one in dialogues())
    write_artifacts(make(dialogues=without), tmp_path)
    assert [one.gradients for one in read_artifacts(tmp_path).dialogues] == [None, None]


@pytest.mark.parametrize(
    ("gradients", "words"),
    [
        (np.zeros((5, LAYERS, 2), np.float32), "expected float16"),
        (np.zeros((4, LAYERS, 2), np.float16), r"\[5, layers, 2\]"),
        (np.zeros((5, LAYERS), np.float16), r"\[5, layers, 2\]"),
        (np.zeros((5, LAYERS + 1, 2), np.float16), "of a dialogue"),
        (np.full((5, LAYERS, 2), -1, np.float16), "negative or not finite"),
        (np.full((5, LAYERS, 2), np.nan, np.float16), "negative or not finite"),
    ],
)
def test_gradients_that_are_not_of_the_dialogues(tmp_path, gradients, words):
    write_artifacts(make(dialogues=dialogues()), tmp_path)
    path = tmp_path / "probes.safetensors"
    save_file({**load_file(path), "gradients": gradients}, path)
    with pytest.raises(ArtifactsError, match=words):
        read_artifacts(tmp_path)

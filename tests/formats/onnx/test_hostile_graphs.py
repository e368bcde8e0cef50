"""ONNX directories of others: what a graph or a config asks for is not simply done."""

from __future__ import annotations

import json
import os
import shutil

import onnx
import pytest
from bounded import refused
from exported_onnx import WINDOWED, onnx_directory
from onnx import helper

from spp_cli.main import run
from spp_export.common.errors import SppError
from spp_export.formats.onnx.runtime import OrtModel
from spp_export.formats.onnx.untrusted import read_graph


@pytest.fixture
def directory(tmp_path):
    return shutil.copytree(onnx_directory(WINDOWED, "gqa"), tmp_path / "graph")


def change_graph(directory, change):
    path = directory / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())


def change_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refuses(directory, capsys, match):
    """One line, after few calls, in little memory; by the command too, with exit 2."""
    with refused(SppError, megabytes=200) as caught:
        OrtModel.load(directory)
    assert match in str(caught.value)
    assert run(["chat", str(directory), "--prompt", "x", "--quiet"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


CONFIGS = {
    "layers without end": ({"num_hidden_layers": 10**12}, "expected a size from 1 to 4096"),
    "fewer layers": ({"num_hidden_layers": 1}, "are not those of 1 layers"),
    "no layers": ({"num_hidden_layers": 0}, "expected a size from 1"),
    "half a layer": ({"num_hidden_layers": 2.5}, "expected a size from 1"),
    "true layers": ({"num_hidden_layers": True}, "num_hidden_layers in config.json is True"),
    "positions without end": ({"max_position_embeddings": 10**12}, "expected a size from 1"),
    "more positions than the table": ({"max_position_embeddings": 1 << 20}, "positions, config"),
    "words without end": ({"vocab_size": 10**12}, "expected a size from 1"),
    "more words than logits": ({"vocab_size": 264}, "vocab_size in config.json is 264"),
    "no form": ({"spp_onnx": None}, "has no spp_onnx"),
    "a form of lists": ({"spp_onnx": {"attention": []}}, "spp_onnx"),
    "another form": ({"spp_onnx": {"attention": "x" * 10**6}}, "attention"),
    "kernels": ({"attn_implementation": "org/kernels"}, "names code to fetch"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs(directory, capsys, kind):
    changes, match = CONFIGS[kind]
    change_config(directory, **changes)
    refuses(directory, capsys, match)


def test_a_deep_config(directory, capsys):
    (directory / "config.json").write_text('{"a":' * 10**5)
    refuses(directory, capsys, "nested deeper")


def operator(kind, domain="", **attributes):
    def change(model):
        node = helper.make_node(kind, ["input_ids"], ["x"], name="evil", domain=domain)
        node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
        model.graph.node.append(node)

    return change


def many_sides(model):
    model.graph.initializer[0].dims.extend([(1 << 62)] * 500_000)


def many_heads(model):
    past = next(value for value in model.graph.input if value.name.endswith(".key"))
    past.type.tensor_type.shape.dim[1].dim_param = "heads"


GRAPHS = {
    "a context from a file": (
        operator("EPContext", "com.microsoft", ep_cache_context="../secret"),
        "operator 'EPContext'",
    ),
    "code": (operator("PyOp", "ai.onnx.contrib", source="evil"), "domain 'ai.onnx.contrib'"),
    "tensors from nowhere": (operator("ConstantOfShape"), "operator 'ConstantOfShape'"),
    "a loop": (operator("Loop"), "operator 'Loop'"),
    "a number of a million digits": (many_sides, "type or shape that spp never writes"),
    "heads that are no number": (many_heads, ""),
}


@pytest.mark.parametrize("kind", GRAPHS)
def test_graphs(directory, capsys, kind):
    change, match = GRAPHS[kind]
    change_graph(directory, change)
    refuses(directory, capsys, match)


def test_a_large_graph_is_not_parsed(directory, capsys):
    with (directory / "model.onnx").open("ab") as file:
        file.truncate(1 << 40)
    refuses(directory, capsys, "larger than 32 MiB")


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx_data", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "device"])
def test_what_is_no_file_of_the_directory(directory, capsys, name, kind):
    path = directory / name
    path.rename(directory.parent / "secret")
    if kind == "link":
        path.symlink_to("../secret")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path) if kind == "pipe" else path.mkdir()
    assert run(["chat", str(directory), "--prompt", "x", "--quiet"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("form", ["gqa", "gqa-bias", "standard"])
def test_what_spp_writes_is_let_through(form):
    """Every operator of a graph of ours is known."""
    assert read_graph(onnx_directory(WINDOWED, form)).graph.node

"""What an ONNX directory says of itself."""

from __future__ import annotations

from pathlib import Path

from spp_export.common.errors import ModelError, UsageError
from spp_export.formats.onnx.options import GRAPH_VERSION, OnnxOptions
from spp_export.formats.onnx.write import GRAPH_NAME
from spp_export.models.checkpoint.source import read_config


def is_onnx(directory: Path) -> bool:
    """Whether a directory holds a graph of ours, or something of that name."""
    return (directory / GRAPH_NAME).exists()


def onnx_options(directory: Path) -> OnnxOptions:
    """The form of a directory's graph, from its config.json. Raises ModelError."""
    said = read_config(directory).get("spp_onnx")
    keys = ("attention", "precision", "quant")
    if not isinstance(said, dict) or not said.keys() >= set(keys):
        raise ModelError(
            f"{directory}: config.json has no spp_onnx, so the graph was not written by spp."
        )
    options = OnnxOptions(**{key: said[key] for key in keys})
    try:
        options.check()
    except UsageError as error:
        raise ModelError(f"{directory}: spp_onnx of config.json is malformed: {error}") from error
    return options


def check_version(directory: Path) -> None:
    """ModelError for a graph that another version of spp would have written otherwise."""
    said = read_config(directory).get("spp_onnx")
    version = said.get("version") if isinstance(said, dict) else None
    if version != GRAPH_VERSION:
        raise ModelError(
            f"{directory}: its graph is of version {version!r:.20}, this spp checks version "
            f"{GRAPH_VERSION}. Write it again, or verify it with the spp that wrote it."
        )


def graph_dtype(directory: Path) -> str:
    """The dtype in which PyTorch must compute to be compared with a graph."""
    return onnx_options(directory).torch_dtype

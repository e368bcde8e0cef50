"""ONNX directories of the workshop's plans, each made once, and ways to change one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
from exporting import Exported, Workshop
from factories import format_options

import spp_export
from spp_export import OnnxOptions
from spp_export.common.manifest import write_manifest

FORMS = ("gqa", "gqa-bias", "standard")
FILES = {
    "README.md",
    "config.json",
    "genai_config.json",
    "generation_config.json",
    "manifest.json",
    "model.onnx",
    "model.onnx_data",
    "plan.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "verify.json",
}


def export_onnx(
    workshop: Workshop, slim: Exported, target: Path, options: OnnxOptions, **request: Any
) -> spp_export.ExportResult:
    """The plan of a safetensors export once more, as ONNX."""
    return spp_export.export(
        workshop.scenario,
        target,
        model=str(slim.dense),
        artifacts=workshop.artifacts(slim.dense.parent.name),
        plan=slim.path / "plan.json",
        **format_options(options),
        **request,
    )


def exported_onnx(
    workshop: Workshop,
    name: str,
    layout: str = "per-layer",
    compensate: str = "none",
    options: OnnxOptions = OnnxOptions(),  # noqa: B008  frozen
) -> Exported:
    """A case's export as ONNX, made once."""
    slim = workshop.exported(name, layout, compensate)
    form = "-".join(str(value) for value in options.to_dict().values())
    path = workshop.root / name / f"{layout}-{compensate}-{form}"

    def make() -> Exported:
        return Exported(path, slim.dense, export_onnx(workshop, slim, path, options))

    return workshop.once(f"{name} {path.name}", make)


def seal(directory: Path) -> None:
    """What someone who wants to be believed would do after a change."""
    (directory / "manifest.json").unlink()
    write_manifest(directory)


@contextmanager
def changed_graph(directory: Path) -> Iterator[onnx.ModelProto]:
    """The graph of a directory, to be changed in place; weights stay outside."""
    path = directory / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    yield model
    path.write_bytes(model.SerializeToString())


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A JSON object with something else in it."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    """A weight or constant by its name."""
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def place(tensor: onnx.TensorProto) -> dict[str, str]:
    """Where an external tensor lies."""
    return {entry.key: entry.value for entry in tensor.external_data}


def copied(source: Path, target: Path) -> Path:
    """A directory that may be changed."""
    return Path(shutil.copytree(source, target))

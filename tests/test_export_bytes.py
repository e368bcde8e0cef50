"""Exports of fixed plans keep their bytes from version to version: export_hashes.json holds them.

`python tests/test_export_bytes.py` writes the file anew, for a change that is meant to change them.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf_cases
import pytest
from factories import CASES, format_options, ragged_layers, random_layers, shape_of, uniform_layers
from old_transformers import since_5

import spp_export
from spp_export import GgufOptions, OnnxOptions
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.planning import Plan

HASHES = Path(__file__).parent / "export_hashes.json"
# One case of every family, and what makes tensors or graphs differ: biases, windows, shards.
NAMES = ("llama-gqa-bias", "mistral-window-tied", "qwen2-gqa-tied", "qwen3-gqa-tied")
# What checks measured depends on the machine; the card repeats it.
MEASURED = {"verify.json", "README.md", "manifest.json"}


def plan_of(dense: Path, layout: str) -> Plan:
    """A random plan of a layout, always the same."""
    shape = shape_of(dense)
    if layout == "uniform":
        layers = uniform_layers(shape, 5, kv_heads=shape.kv_heads // 2, group_size=1)
    else:
        layers = {"per-layer": random_layers, "ragged": ragged_layers}[layout](shape, 5)
    return Plan(open_source(dense).fingerprint, "dense", layout, "none", layers)


def forms(name: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Label, layout and options of every form that a case can be written in."""
    for layout in ("per-layer", "uniform", "ragged"):
        yield layout, layout, {}
    yield "padded", "ragged", {"pad": True}
    for layout in ("per-layer", "uniform"):
        for attention in ("gqa", "gqa-bias", "standard"):
            options = OnnxOptions(attention=attention)
            yield f"{layout} onnx {attention}", layout, format_options(options)
        yield f"{layout} onnx int4", layout, format_options(OnnxOptions(quant="int4"))
        if name in gguf_cases.FAMILIES:
            for quant in (None, "q8_0", "q4_0"):
                options = GgufOptions(quant=quant)
                yield f"{layout} gguf {quant}", layout, format_options(options)


def hashes(name: str, root: Path) -> dict[str, dict[str, str]]:
    """SHA-256 of every file of every form of a case, less what was measured."""
    table = {}
    dense = gguf_cases.make(name, root) if name in gguf_cases.FAMILIES else CASE[name].make(root)
    for label, layout, options in forms(name):
        target = root / label.replace(" ", "-")
        plan = plan_of(dense, layout)
        # Checks change none of these files.
        spp_export.export(output=target, model=str(dense), plan=plan, verify=False, **options)
        table[label] = {
            str(path.relative_to(target)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(target.rglob("*"))
            if path.is_file() and path.name not in MEASURED
        }
    return table


CASE = {case.name: case for case in CASES}


@since_5("the models that are exported are not byte for byte those that 5 writes")
@pytest.mark.parametrize("name", NAMES)
def test_exports_have_the_bytes_of_before(name: str, tmp_path: Path) -> None:
    expected = json.loads(HASHES.read_text())[name]
    assert hashes(name, tmp_path) == expected


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        made = {name: hashes(name, Path(place) / name) for name in NAMES}
    HASHES.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
    sys.stdout.write(f"{HASHES}: {sum(map(len, made.values()))} exports\n")

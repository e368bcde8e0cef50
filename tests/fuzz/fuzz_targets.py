"""What is fuzzed: readers of files that nobody has checked, and what must hold of their answers."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import fuzz_seeds
import numpy as np
from fuzz_mutations import (
    Mutation,
    damage_bytes,
    damage_json,
    damage_lines,
    damage_protobuf,
    damage_safetensors,
)
from safetensors import deserialize, safe_open

from spp_export.common.errors import (
    ArtifactsError,
    CheckpointError,
    ModelError,
    PlanError,
    ProfileError,
    ScenarioError,
    SppError,
)
from spp_export.common.manifest import check_manifest, wrote
from spp_export.data.artifacts import read_artifacts
from spp_export.data.scenario import read_scenario
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.checkpoint.header import StoredTensor, read_header
from spp_export.models.checkpoint.reader import stored_tensors
from spp_export.planning import parse_plan, read_plan, validate_plan
from spp_export.planning.latency import read_latency_table
from spp_export.slicing.config import slim_config

_BY_SUFFIX: dict[str, Mutation] = {
    ".json": damage_json,
    ".jsonl": damage_lines,
    ".safetensors": damage_safetensors,
    ".onnx": damage_protobuf,
}
# The seed entry `no-suffix` holds JSON lines.
_BY_NAME = {"s": damage_lines}


def mutation_of(file: str) -> Mutation:
    """How a file of this name is damaged."""
    return _BY_NAME.get(file) or _BY_SUFFIX.get(Path(file).suffix, damage_bytes)


@dataclass(frozen=True)
class Target:
    """A reader. `victims` are the names of the files that are damaged, of those an entry has.

    `read` takes an entry's directory and the name of the damaged file; it may raise `refusal`, in
    one line, and nothing else. `weight` is its share of a campaign.
    """

    name: str
    victims: tuple[str, ...]
    read: Callable[[Path, str], object]
    refusal: type[SppError]
    weight: int = 10


def _header(entry: Path, file: str) -> None:
    check_with_library(read_header(entry / file).values())


def check_with_library(tensors: Iterable[StoredTensor]) -> None:
    """The safetensors library opens what we accept, and finds the same tensors and bytes in it."""
    by_file: dict[Path, list[StoredTensor]] = {}
    for tensor in tensors:
        by_file.setdefault(tensor.file, []).append(tensor)
    for file, ours in by_file.items():
        content = file.read_bytes()
        found = dict(deserialize(content))
        with safe_open(file, framework="np") as opened:
            assert set(opened.keys()) == set(found) == {tensor.name for tensor in ours}
            for tensor in ours:
                part = opened.get_slice(tensor.name)
                assert part.get_dtype() == tensor.dtype == found[tensor.name]["dtype"]
                assert tuple(part.get_shape()) == tensor.shape
                stored = content[tensor.offset : tensor.offset + tensor.nbytes]
                assert bytes(found[tensor.name]["data"]) == stored


def _index(entry: Path, file: str) -> None:
    tensors = stored_tensors(entry)
    for tensor in tensors.values():
        assert tensor.file.parent.resolve() == entry.resolve()
    check_with_library(tensors.values())


def _config(entry: Path, file: str) -> None:
    source = open_source(entry, "org/model")
    shape = source.shape
    assert 0 < shape.parameters(shape.layers) < 1 << 20  # the weights beside it have no more
    slim_config(source.config, source.family, shape, shape.layers, "per-layer")


def _plan(entry: Path, file: str) -> None:
    plan = read_plan(entry / file)
    assert parse_plan(plan.to_json()) == plan
    validate_plan(plan, fuzz_seeds.SHAPE, "f" * 64)
    for layer, written in zip(plan.layers, plan.written_shapes(fuzz_seeds.SHAPE), strict=True):
        assert set(layer.query_heads) <= set(range(fuzz_seeds.SHAPE.query_heads))
        assert written.query_heads >= len(layer.query_heads)


def _artifacts(entry: Path, file: str) -> None:
    found = read_artifacts(entry)
    for field in fields(found):
        value: Any = getattr(found, field.name)
        arrays = value.values() if field.name == "importance" else [value]
        assert all(np.isfinite(a).all() for a in arrays if isinstance(a, np.ndarray))
    assert 0 <= found.shrinkage <= 1
    assert 0 <= found.scenario_weight <= 1
    assert set(found.probe_layers) <= set(range(found.num_layers))


def _manifest(entry: Path, file: str) -> None:
    wrote(entry)
    check_problems(check_manifest(entry))


def check_problems(problems: Iterable[str]) -> None:
    """Every problem is one line."""
    for problem in problems:
        check_line(problem)


def check_line(text: str) -> None:
    """One line of bounded length that a terminal shows as it is."""
    assert text.isprintable(), f"not one printable line: {text[:400]!r}"
    assert 0 < len(text) < 2000, f"a line of {len(text)} characters: {text[:200]!r}"


def _scenario(entry: Path, file: str) -> None:
    scenario = read_scenario(entry / file)
    assert scenario == read_scenario(entry / file)
    assert all(prompt.strip() and "\0" not in prompt for prompt in scenario.prompts)


def _profile(entry: Path, file: str) -> None:
    table = read_latency_table(entry / file)
    assert table.rest > 0
    assert all(0 < seconds < float("inf") for seconds in table.mlp.values())


def _onnx(entry: Path, file: str) -> None:
    from spp_export.formats.onnx.untrusted import read_graph

    size = os.stat(entry / "model.onnx_data").st_size
    for tensor in read_graph(entry).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            assert place["location"] == "model.onnx_data"
            assert int(place.get("offset", 0)) + int(place.get("length", 0)) <= size


def _show(entry: Path, file: str) -> None:
    from rich.console import Console

    from spp_cli.render.look import ASCII
    from spp_cli.render.reports import shown_report
    from spp_export.commands.show import show

    shown = show(entry)
    check_problems(shown.problems or ())
    json.dumps(shown.to_dict(), allow_nan=False)
    Console(file=io.StringIO(), width=100).print(shown_report(shown, ASCII))


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("header", ("model.safetensors",), _header, CheckpointError, 20),
        Target("index", ("model.safetensors.index.json",), _index, CheckpointError),
        Target("config", ("config.json",), _config, ModelError),
        Target("plan", ("plan.json",), _plan, PlanError, 15),
        Target("manifest", ("manifest.json",), _manifest, SppError, 5),
        Target(
            "artifacts",
            (
                "artifacts.json",
                "calibration.jsonl",
                "importance.safetensors",
                "probes.safetensors",
                "whitelist.json",
            ),
            _artifacts,
            ArtifactsError,
            15,
        ),
        Target("scenario", ("s.txt", "s.jsonl", "s.json", "s"), _scenario, ScenarioError),
        Target("profile", ("t.json",), _profile, ProfileError),
        Target("onnx", ("model.onnx",), _onnx, CheckpointError),
        Target(
            "show",
            ("plan.json", "verify.json", "config.json", "manifest.json", "artifacts.json"),
            _show,
            SppError,
            5,
        ),
    )
}

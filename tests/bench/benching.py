"""A dense model and directories of it that pass `spp verify`, tiny."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from factories import CASES, random_layers, shape_of, write_slim
from gguf_cases import add_merges

from spp_bench import device_rates
from spp_bench.bench import BenchRequest
from spp_export.common.manifest import write_manifest
from spp_export.formats.gguf import GgufOptions, Quant
from spp_export.models.checkpoint.checkpoint import open_checkpoint, open_source
from spp_export.planning import LayerPlan, Plan, read_plan

CASE = {case.name: case for case in CASES}
QUICK = BenchRequest(contexts=(8,), new_tokens=3, rounds=2, threads=1, memory=False, genai=False)


def small_rates(monkeypatch) -> None:
    """Measure the device with arrays that take no time."""
    monkeypatch.setattr(device_rates, "_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(device_rates, "_WIDTH", {"cpu": 16})


def make_pair(
    root: Path, case: str = "llama-gqa-bias", seed: int = 1, *, merges: bool = False
) -> tuple[Path, Path]:
    """A dense model and an export of it, with the plan and manifest that an export has; with a
    tokenizer for llama.cpp where it has `merges`."""
    dense = CASE[case].make(root)
    if merges:
        add_merges(dense)
    layers = random_layers(shape_of(dense), seed)
    slim = write_slim(root / "slim", dense, layers)
    return dense, sealed(slim, dense, layers)


def make_graph(root: Path, dense: Path, slim: Path) -> Path:
    """The same export as an ONNX directory."""
    from spp_export.formats.onnx.options import OnnxOptions
    from spp_export.formats.onnx.write import write_onnx

    graph = root / "graph"
    graph.mkdir()
    write_onnx(slim, graph, OnnxOptions())
    (graph / "plan.json").write_bytes((slim / "plan.json").read_bytes())
    write_manifest(graph)
    return graph


def make_file(root: Path, slim: Path, quant: Quant | None = None) -> Path:
    """The same export as a GGUF directory, in fp32 if not quantised."""
    from spp_export.formats.gguf.files import GgufFiles

    out = root / (quant or "fp32")
    out.mkdir()
    options = GgufOptions(None if quant else "fp32", quant)
    GgufFiles(options, open_checkpoint(slim), read_plan(slim / "plan.json")).write(slim, out)
    (out / "plan.json").write_bytes((slim / "plan.json").read_bytes())
    write_manifest(out)
    return out


def sealed(slim: Path, dense: Path, layers: Sequence[LayerPlan]) -> Path:
    """Add plan and manifest to a slim directory."""
    source = open_source(dense)
    plan = Plan(source.fingerprint, source.name, "per-layer", "none", tuple(layers))
    (slim / "plan.json").write_text(plan.to_json())
    write_manifest(slim)
    return slim


class FakeRunner:
    """Takes as long as it is told, by a clock of its own, and notes what it is asked."""

    weight_bytes = 100

    def __init__(self, name: str, log: list, seconds: float = 1.0, logits=None) -> None:
        self.name, self.log, self.seconds = name, log, seconds
        self._logits = np.ones((1, 4), np.float32) if logits is None else logits

    def clock(self, work, /) -> float:
        work()
        return self.seconds

    def reserve(self, length: int) -> None:
        self.length = length

    def prefill(self, ids):
        self.log.append((self.name, "prefill", ids.tobytes()))

    def decode(self, ids):
        self.log.append((self.name, "decode", ids.tobytes()))

    def logits(self):
        return self._logits

    def kv_bytes(self) -> int:
        return 0

    def forget(self) -> None:
        pass

"""Runs an exporter in a process of its own, and looks at what it wrote."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from spp_bench.onnx_exporters.candidates import Candidate

_LONGEST_ERROR = 300
# The last line that names an exception. What follows it may be advice of several lines.
_EXCEPTION = re.compile(r"^(?:[\w.]*(?:Error|Exception|Interrupt|Exit|Fail\w*)): .*", re.MULTILINE)


def run_export(candidate: Candidate, slim: Path, out: Path, limit_s: float) -> dict[str, Any]:
    """Measurements of the export and its graphs, or {"error"} in one line. `out` is created."""
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        answer, log = Path(scratch, "answer.json"), Path(scratch, "log")
        command = [sys.executable, "-m", "spp_bench.onnx_exporters.child"]
        command += [candidate.name, str(slim), str(out), str(answer)]
        status = _run(command, log, limit_s)
        if status is None:
            return {"error": f"took more than {limit_s:g} s."}
        if status or not answer.exists():
            return {"error": _error(log.read_text(encoding="utf-8", errors="replace"), status)}
        measured: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return {**measured, **graph_facts(out, candidate.graphs)}


def _run(command: list[str], log: Path, limit_s: float) -> int | None:
    """Exit status of a command with all its children; None where they had to be killed."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _error(log: str, status: int) -> str:
    named = _EXCEPTION.findall(log)
    lines = named or [line for line in log.splitlines() if line.strip()]
    return lines[-1].strip()[:_LONGEST_ERROR] if lines else f"exit status {status}."


def graph_facts(directory: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Sizes of the graphs and their weights, what they are made of, and the batch they take."""
    import onnx

    facts: dict[str, Any] = {"file_mb": 0.0, "nodes": 0, "microsoft_ops": 0, "opset": 0}
    for name in names:
        model = onnx.load(directory / name, load_external_data=False)
        files = {name, *_data_files(model)}
        facts["file_mb"] += sum((directory / file).stat().st_size for file in files) / 1e6
        facts["nodes"] += len(model.graph.node)
        facts["microsoft_ops"] += sum(node.domain == "com.microsoft" for node in model.graph.node)
        facts["opset"] = max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        batch = model.graph.input[0].type.tensor_type.shape.dim[0]
        facts["batch"] = batch.dim_value or "any"
    facts["file_mb"] = round(facts["file_mb"], 1)
    return facts


def _data_files(model: Any) -> set[str]:
    return {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }

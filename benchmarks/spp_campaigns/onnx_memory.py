"""Memory and time of writing ONNX: `python -m spp_campaigns.onnx_memory --gigabytes 4 --dir TMP`.

Builds the random bf16 checkpoint of `make scale` and writes it as a graph, each time in a fresh
process: seconds are those after imports. Exits with 1 if the peak exceeds 1 GB plus twice the
largest tensor, as the graph has it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from spp_campaigns.big_checkpoints import build
from spp_campaigns.machine import machine
from spp_export.common.json_files import dump_json
from spp_export.formats.decoder import read_decoder
from spp_export.formats.onnx import OnnxOptions
from spp_export.formats.onnx.write import write_onnx
from spp_export.models.checkpoint.dtypes import ELEMENT_BYTES

FIXED_BYTES = 1_000_000_000
PRECISIONS = ("fp32", "fp16", "bf16")


def export(model: Path, out: Path, precision: Any) -> dict[str, Any]:
    """Write once, in this process, and tell seconds, peak memory and sizes."""
    import spp_export.models.modeling  # noqa: F401  torch and transformers, which are imports and not work

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    options = OnnxOptions(precision=precision)
    write_onnx(model, out, options)
    seconds = time.perf_counter() - start
    tensors = read_decoder(model).tensors.values()
    largest = max(tensor.nbytes // ELEMENT_BYTES[tensor.dtype] for tensor in tensors)
    return {
        "precision": precision,
        "seconds": round(seconds, 2),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "imports_bytes": before,
        "source_bytes": sum(tensor.nbytes for tensor in tensors),
        "graph_bytes": sum(path.stat().st_size for path in out.glob("model.onnx*")),
        "limit_bytes": FIXED_BYTES + 2 * largest * options.element_bytes,
    }


def _in_fresh_process(model: Path, precision: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=model.parent) as out:
        command = [sys.executable, "-m", "spp_campaigns.onnx_memory", "--export", str(model), out]
        result = subprocess.run(
            [*command, "--precision", precision], stdout=subprocess.PIPE, check=True
        )
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def main() -> int:
    """Measure every precision, print, and keep where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--model", type=Path, help="a checkpoint that exists, instead of a new one")
    parser.add_argument("--dir", type=Path, default=Path("build"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--precision", choices=PRECISIONS)
    parser.add_argument("--export", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.export:
        model, out = arguments.export
        print(json.dumps(export(model, out, arguments.precision)))
        return 0
    chosen = [arguments.precision] if arguments.precision else PRECISIONS
    with tempfile.TemporaryDirectory(dir=arguments.dir) as place:
        source = arguments.model or Path(place)
        if arguments.model is None:
            build(source, arguments.gigabytes)
        rows = [_in_fresh_process(source, precision) for precision in chosen]
    for row in rows:
        print(
            f"{row['precision']}: {row['source_bytes'] / 1e9:.2f} GB of tensors to "
            f"{row['graph_bytes'] / 1e9:.2f} GB in {row['seconds']:.1f} s, "
            f"peak memory {row['peak_bytes'] / 1e6:.0f} MB (limit {row['limit_bytes'] / 1e6:.0f}), "
            f"of which {row['imports_bytes'] / 1e6:.0f} by imports"
        )
    if arguments.json:
        arguments.json.write_text(dump_json({**machine(), "rows": rows}), encoding="utf-8")
    return int(any(row["peak_bytes"] > row["limit_bytes"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())

"""Memory and time of writing ONNX: `python -m spp_campaigns.onnx_memory --gigabytes 4 --dir TMP`.

Builds the random bf16 checkpoint of `make scale` and writes it as a graph, each time in a fresh
process; imports are not timed. Exits with 1 if the peak exceeds 1 GB plus twice the largest tensor
in the graph's precision.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from spp_bench.processes import held, peak, run_fresh
from spp_campaigns.big_checkpoints import build
from spp_campaigns.command import finish, machine, parser, scratch
from spp_export.formats.onnx import OnnxOptions
from spp_export.formats.onnx.write import write_onnx
from spp_export.models.checkpoint.checkpoint import open_checkpoint
from spp_export.models.checkpoint.dtypes import ELEMENT_BYTES

FIXED_BYTES = 1_000_000_000
PRECISIONS = ("fp32", "fp16", "bf16")


def export(model: Path, out: Path, precision: Any) -> dict[str, Any]:
    """Write once, in this process, and return seconds, peak memory and sizes."""
    import spp_export.models.modeling  # noqa: F401  torch and transformers, which are imports and not work

    before = held()
    start = time.perf_counter()
    options = OnnxOptions(precision=precision)
    write_onnx(model, out, options)
    seconds = time.perf_counter() - start
    tensors = open_checkpoint(model).tensors.values()
    largest = max(tensor.nbytes // ELEMENT_BYTES[tensor.dtype] for tensor in tensors)
    return {
        "precision": precision,
        "seconds": round(seconds, 2),
        "peak_bytes": peak(),
        "imports_bytes": before,
        "source_bytes": sum(tensor.nbytes for tensor in tensors),
        "graph_bytes": sum(path.stat().st_size for path in out.glob("model.onnx*")),
        "limit_bytes": FIXED_BYTES + 2 * largest * options.element_bytes,
    }


def main() -> int:
    """Measure every precision, print the results, and write them where asked."""
    made = parser(__doc__, writes=True)
    made.add_argument("--gigabytes", type=float, default=4.0)
    made.add_argument("--model", type=Path, help="an existing checkpoint instead of a new one")
    made.add_argument("--precision", choices=PRECISIONS, action="append", help="repeatable")
    options = made.parse_args()
    rows, lines = [], []
    with scratch(options) as place:
        if options.model is None:
            build(place, options.gigabytes)
        for precision in options.precision or PRECISIONS:
            with TemporaryDirectory(dir=options.dir) as out:
                row = run_fresh(export, options.model or place, Path(out), precision)
            if "error" in row:
                raise SystemExit(f"{precision}: {row['error']}")
            rows.append(row)
            lines.append(
                f"{precision}: {row['source_bytes'] / 1e9:.2f} GB of tensors to "
                f"{row['graph_bytes'] / 1e9:.2f} GB in {row['seconds']:.1f} s, peak memory "
                f"{row['peak_bytes'] / 1e6:.0f} MB (limit {row['limit_bytes'] / 1e6:.0f}), "
                f"of which {row['imports_bytes'] / 1e6:.0f} by imports"
            )
    finish(options, {**machine(), "rows": rows}, *lines)
    return int(any(row["peak_bytes"] > row["limit_bytes"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())

"""`python -m spp_bench OUT...`: the same as `spp bench`, without the command line's libraries."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spp_bench.bench import BenchRequest, bench
from spp_bench.report import plain
from spp_bench.shapes.bench import bench_shape
from spp_bench.shapes.plans import LAYOUTS, variants
from spp_export.common.errors import SppError, UsageError
from spp_export.models.shape import UNITS


def parser() -> argparse.ArgumentParser:
    """The options, under the names of `spp bench`."""
    default = BenchRequest()
    made = argparse.ArgumentParser(prog="python -m spp_bench", description=__doc__)
    made.add_argument("out", nargs="*", type=Path, help="slim safetensors or ONNX directories")
    made.add_argument("--model", default="demo", help="the dense model they were made from")
    made.add_argument("--batch", type=int, action="append", help="batch size; repeatable")
    made.add_argument("--context", type=int, action="append", help="prompt length; repeatable")
    made.add_argument("--new-tokens", type=int, default=default.new_tokens)
    made.add_argument("--rounds", type=int, default=default.rounds)
    made.add_argument("--threads", type=int, help="all physical cores by default")
    made.add_argument("--device", default=default.device)
    made.add_argument("--dtype")
    made.add_argument("--seed", type=int, default=default.seed)
    made.add_argument("--shape", help="instead of directories, a published model's sizes")
    made.add_argument("--keep", type=float, action="append", help="of a shape's plan; repeatable")
    made.add_argument("--layout", choices=LAYOUTS, action="append", help="of a shape's plan")
    made.add_argument("--units", choices=UNITS, action="append", help="of a shape's plan")
    made.add_argument("-o", "--output", type=Path, help="results file; continued if there is one")
    made.add_argument("--plot", type=Path, help="directory for the curves")
    made.add_argument("--no-memory", dest="memory", action="store_false")
    made.add_argument("--no-genai", dest="genai", action="store_false")
    made.add_argument("--json", action="store_true", help="print the results as JSON")
    made.add_argument("--quiet", "-q", action="store_true", help="print nothing")
    made.add_argument("--force", action="store_true", help="replace results of another run")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, and tell whether the figures hold."""
    options = parser().parse_args(arguments)
    request = BenchRequest(
        batches=tuple(options.batch or (1,)),
        contexts=tuple(options.context or (128,)),
        new_tokens=options.new_tokens,
        rounds=options.rounds,
        threads=options.threads,
        device=options.device,
        dtype=options.dtype,
        memory=options.memory,
        genai=options.genai,
        seed=options.seed,
    )
    try:
        document = _measured(options, request)
    except SppError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps(document, indent=1))
    elif not options.quiet:
        print(plain(document))
    return 1 if document["problems"] else 0


def _measured(options: argparse.Namespace, request: BenchRequest) -> dict[str, Any]:
    files = {"results": options.output, "plots": options.plot, "force": options.force}
    if bool(options.out) == (options.shape is not None):
        raise UsageError("give either directories written by spp, or --shape.")
    if options.shape is None:
        return bench(options.out, model=options.model, request=request, **files)
    requested = variants(options.keep, options.layout, options.units)
    return bench_shape(options.shape, requested, request=request, **files)


if __name__ == "__main__":
    sys.exit(main())

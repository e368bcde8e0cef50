"""Time from scores to a compiled plan: `python -m spp_campaigns.compile_time [--json]`.

One sample is scores to plan, for heads or for heads and channels together, on scores drawn from a
seeded generator, at one keep share. The plans are checked for optimality by their own bound before
any time is reported.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Sequence

from spp_bench.plan_time import from_scores
from spp_campaigns.machine import machine
from spp_export.models.shape import ModelShape, Units

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
CASES = {
    "48 layers x 40 heads x 8 KV heads, q/k/v biases": ModelShape(
        "qwen2", 48, 5120, 40, 8, 128, 13824, 152064, False, 2, qkv_bias=True
    ),
    "48 layers x 40 heads x 8 KV heads": ModelShape(
        "mistral", 48, 5120, 40, 8, 128, 13824, 131072, False, 2
    ),
    "30 layers x 9 heads x 3 KV heads": ModelShape(
        "llama", 30, 576, 9, 3, 64, 1536, 49152, True, 4
    ),
}


UNITS: tuple[Units, ...] = ("heads", "both")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table, or with --json one JSON object."""
    parser = argparse.ArgumentParser(prog="spp_campaigns.compile_time", description=__doc__)
    parser.add_argument("--seeds", type=int, default=40, help="samples per keep share")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    gc.freeze()
    results = [
        {"case": name} | from_scores(shape, units, keep, options.seeds)
        for name, shape in CASES.items()
        for units in UNITS
        for keep in KEEPS
    ]
    if options.json:
        print(json.dumps({"machine": machine(), "results": results}))
        return
    print(" ".join(f"{name}: {value}" for name, value in machine().items()))
    print(f"{'scores to plan':50} {'units':6} {'keep':>5} {'median':>8} {'p20':>8} {'p80':>8}  ms")
    for row in results:
        print(
            f"{row['case']:50} {row['units']:6} {row['keep']:5.2f} {row['median_ms']:8.2f} "
            f"{row['p20_ms']:8.2f} {row['p80_ms']:8.2f}"
        )


if __name__ == "__main__":
    main()

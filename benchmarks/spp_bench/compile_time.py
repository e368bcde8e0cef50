"""Time from scores to a compiled plan: `python -m spp_bench.compile_time [--json]`.

One sample is scores to plan, for heads or for heads and channels together, on scores drawn from a
seeded generator, at one keep share. The plans are checked for optimality by their own bound before
any time is reported.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from spp_bench.machine import machine
from spp_bench.timing import quantiles
from spp_export.models.shape import ModelShape, Units
from spp_export.planning import compile_units
from spp_export.planning.allocate import channel_options, layer_options, per_parameter
from spp_export.planning.budget import Budget

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


def measure(shape: ModelShape, units: Units, keep: float, seeds: int) -> dict[str, Any]:
    """Quantiles of the time, in milliseconds, of one compilation at this keep share."""
    times = []
    for seed in range(-1, seeds):
        rng = np.random.default_rng(max(seed, 0))
        heads = rng.gamma(2.0, size=(shape.num_layers, shape.query_heads))
        channels = rng.gamma(2.0, size=(shape.num_layers, shape.channels))
        head = shape.query_head_parameters + shape.kv_head_parameters / shape.group_size
        start = time.perf_counter()
        _, realised = compile_units(
            layer_options(per_parameter(heads, head), shape),
            channel_options(per_parameter(channels, shape.channel_parameters), shape)
            if units == "both"
            else None,
            shape,
            Budget(keep=keep, units=units),
        )
        elapsed = time.perf_counter() - start
        assert realised.score_bound == realised.score, "the plan is not proven optimal"
        if seed >= 0:  # the first run warms up
            times.append(elapsed * 1e3)
    return {
        "units": units,
        "keep": keep,
        "samples": seeds,
        **quantiles(times, "ms"),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table, or with --json one JSON object."""
    parser = argparse.ArgumentParser(prog="spp_bench.compile_time", description=__doc__)
    parser.add_argument("--seeds", type=int, default=40, help="samples per keep share")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    gc.freeze()
    results = [
        {"case": name} | measure(shape, units, keep, options.seeds)
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

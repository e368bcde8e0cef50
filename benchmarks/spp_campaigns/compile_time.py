"""Time from scores to a compiled plan: `python -m spp_campaigns.compile_time [--json FILE]`.

One sample goes from scores to a plan, for heads or for heads and channels together, at one keep
share; the scores come from a seeded generator. The plans are checked for optimality by their own
bound before any time is reported.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from spp_bench.plan_time import from_scores
from spp_campaigns.command import finish, machine, parser, table, words
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
_COLUMNS = {
    "scores to plan": "{case}",
    "units": "{units}",
    "keep": "{keep:.2f}",
    "median ms": "{median_ms:.2f}",
    "p20": "{p20_ms:.2f}",
    "p80": "{p80_ms:.2f}",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table."""
    made = parser(__doc__)
    made.add_argument("--seeds", type=int, default=40, help="samples per keep share")
    options = made.parse_args(arguments)
    gc.freeze()
    rows = [
        {"case": name} | from_scores(shape, units, keep, options.seeds)
        for name, shape in CASES.items()
        for units in UNITS
        for keep in KEEPS
    ]
    document: dict[str, Any] = {"machine": machine(), "results": rows}
    finish(options, document, words(document["machine"]), table(_COLUMNS, rows))


if __name__ == "__main__":
    main()

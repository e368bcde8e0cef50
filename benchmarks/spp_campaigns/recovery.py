"""What LoRA on text is worth: `python -m spp_campaigns.recovery --model demo --keep 0.6`.

Exports a scenario with and without compensation, recovers both on a pool's training text, and
measures perplexity on its validation text, on which nothing was chosen or trained: dense, slim,
recovered. A dense model would gain from this text, too. So it is trained in the same way, as a
plan that keeps everything, to tell the gain from the text alone from that of recovery.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import spp_export
from spp_campaigns.command import finish, machine, parser, scratch, table
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.hub import locate_model
from spp_export.planning import Plan, dense_plan

_COLUMNS = {
    "compensation": "{compensation}",
    "dense": "{dense:.2f}",
    "slim": "{before:.2f}",
    "recovered": "{after:.2f}",
    "s": "{seconds:.0f}",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if recovery does not lower perplexity."""
    made = parser(__doc__, writes=True)
    made.add_argument("--model", default="demo", help="directory or demo")
    made.add_argument("--artifacts", help="artifacts of the model; not needed for demo")
    made.add_argument("--scenario", required=True, help="scenario file")
    made.add_argument("--data", required=True, help="text to train on")
    made.add_argument("--validation", required=True, help="text to measure on")
    made.add_argument("--keep", type=float, default=0.6, help="share of head parameters")
    made.add_argument("--steps", type=int, default=60, help="steps of the optimiser")
    made.add_argument("--max-tokens", type=int, default=128, help="tokens read of each text")
    options = made.parse_args(arguments)
    with scratch(options) as place:
        rows = [_row(name, options, place) for name in ("lstsq", "none", "dense")]
    document = {
        "machine": machine(),
        "model": options.model,
        "scenario": Path(options.scenario).stem,
        "keep": options.keep,
        "units": "heads",
        "settings": {"steps": options.steps, "max_tokens": options.max_tokens},
        "rows": rows,
    }
    title = (
        f"{options.model}, {1 - options.keep:.0%} of head parameters removed for "
        f"{document['scenario']}, {options.steps} steps; dense is the dense model, trained alike"
    )
    finish(options, document, title, table(_COLUMNS, rows))
    return int(any(row["after"] >= row["before"] for row in rows))


def _row(name: str, options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """One model before and after; `name` is its compensation, or dense."""
    slim = place / name
    plan: Plan | None = None
    decided: dict[str, Any] = {}
    if name == "dense":
        dense = locate_model(options.model)
        source = open_source(dense.path, dense.name)
        plan = dense_plan(source.shape, source.fingerprint, source.name)
    else:
        decided = {"keep": options.keep, "compensate": name}
    spp_export.export(
        None if plan else options.scenario,
        slim,
        model=options.model,
        artifacts=options.artifacts,
        plan=plan,
        verify=False,
        **decided,
    )
    began = time.perf_counter()
    recovered = spp_export.recover(
        slim,
        options.data,
        place / f"{name}-recovered",
        model=options.model,
        validation=options.validation,
        learn="text",
        watch_every=0,
        steps=options.steps,
        max_tokens=options.max_tokens,
    )
    assert recovered.before is not None
    assert recovered.after is not None
    return {
        "compensation": name,
        "dense": round(recovered.before.dense_perplexity, 4),
        "before": round(recovered.before.slim_perplexity, 4),
        "after": round(recovered.after.slim_perplexity, 4),
        "tokens": recovered.before.tokens,
        "verified": recovered.report["passed"],
        "seconds": round(time.perf_counter() - began, 1),
    }


if __name__ == "__main__":
    raise SystemExit(main())

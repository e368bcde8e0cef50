"""Documents of latency tables for tiny models, with times at random."""

from __future__ import annotations

import json
from pathlib import Path

from spp_export.planning.latency import SIZES, read_latency_table


def times(seconds):
    return {"seconds": seconds, "p20": 0.5 * seconds, "p80": 2 * seconds}


def document(shape, rng, widths=None):
    """A valid table of a model; attention's times are of no order, as real ones may be."""
    widths = widths or [shape.channels]
    drawn = iter(rng.uniform(1e-6, 9e-6, shape.query_heads + len(widths) + 1).tolist())
    counts = [
        (groups * size, groups)
        for groups in range(1, shape.kv_heads + 1)
        for size in range(1, shape.group_size + 1)
    ]
    return {
        "schema_version": 1,
        "model": {"name": "tiny", **{name: getattr(shape, name) for name in SIZES}},
        "phase": "decode",
        "batch": 2,
        "context": 33,
        "device": "cpu",
        "dtype": "float32",
        "attention": [
            {"query_heads": query, "kv_heads": groups, **times(next(drawn))}
            for query, groups in counts
        ],
        "mlp": [{"channels": width, **times(next(drawn))} for width in widths],
        "rest": times(next(drawn)),
    }


def write(path: Path, value) -> Path:
    path.write_text(json.dumps(value))
    return path


def table(tmp_path, shape, rng, widths=None):
    return read_latency_table(write(tmp_path / "table.json", document(shape, rng, widths)))

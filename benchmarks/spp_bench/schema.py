"""The schema of a results file, as a function that refuses everything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NUMBER, TEXT, FLAG, COUNT = (int, float), (str,), (bool,), (int,)
NOTHING = type(None)


class Maybe:
    """A field that may be missing."""

    def __init__(self, shape: Any) -> None:
        self.shape = shape


_SPEEDUP = {
    **dict.fromkeys(("median", "p20", "p80", "low", "bound", "ceiling"), NUMBER),
    "term": TEXT,
    "efficiency": (*NUMBER, NOTHING),
    "above_bound": FLAG,
}
_PHASE = {
    **dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "tokens_per_second"), NUMBER),
    **dict.fromkeys(("bytes_per_second", "operations_per_second"), NUMBER),
    **dict.fromkeys(("of_bandwidth", "of_rate"), NUMBER),
    "samples_ms": [NUMBER],
    "speedup": Maybe(_SPEEDUP),
    "over_dense_torch": Maybe(NUMBER),
}
_MEMORY = {
    "name": TEXT,
    **dict.fromkeys(("weight_bytes", "before_bytes", "loaded_bytes"), COUNT),
    "loading_peak_bytes": COUNT,
    "predicted_weight_bytes": (int, NOTHING),
    "problems": [TEXT],
    "cells": [
        dict.fromkeys(("batch", "context", "kv_bytes", "peak_bytes", "predicted_kv_bytes"), COUNT)
    ],
}
DOCUMENT: dict[str, Any] = {
    "schema_version": COUNT,
    "machine": {...: (str, int, NOTHING)},
    "versions": {...: TEXT},
    "git": Maybe({"commit": TEXT, "modified": FLAG}),
    "model": {"name": TEXT, "fingerprint": TEXT, "parameters": COUNT},
    "options": {
        "device": TEXT,
        "dtype": TEXT,
        **dict.fromkeys(("threads", "rounds", "new_tokens", "seed"), COUNT),
    },
    "candidates": [
        {
            "name": TEXT,
            "engine": TEXT,
            "precision": TEXT,
            "baseline": (str, NOTHING),
            "plan_hash": (str, NOTHING),
            "parameters": COUNT,
            "read_bytes_per_step": COUNT,
            "plan": Maybe({"layout": TEXT, "units": TEXT, "keep": NUMBER, "kept": NUMBER}),
        }
    ],
    "rates": {"bytes_per_second": NUMBER, "operations_per_second": NUMBER},
    "gate": [{"name": TEXT, "manifest": (str, NOTHING), "checks": [{...: object}]}],
    "agreement": [{"name": TEXT, "as": TEXT, "distance": NUMBER, "limit": NUMBER}],
    "memory": [_MEMORY],
    "cells": [
        {
            "batch": COUNT,
            "context": COUNT,
            "rows": [{"name": TEXT, "prefill": Maybe(_PHASE), "decode": Maybe(_PHASE)}],
        }
    ],
    "claims": [
        {
            "claim": TEXT,
            "published": [NUMBER],
            "what": TEXT,
            "measured": [NUMBER],
            "bound": Maybe([NUMBER]),
        }
    ],
    "problems": [TEXT],
}


def check(value: Any, shape: Any = DOCUMENT, place: str = "results") -> None:
    """ValueError, with the place, where a document is not of the schema."""
    if isinstance(shape, Maybe):
        if value is not None:
            check(value, shape.shape, place)
    elif isinstance(shape, list):
        _require(value, (list,), place)
        for index, item in enumerate(value):
            check(item, shape[0], f"{place}[{index}]")
    elif isinstance(shape, Mapping):
        _require(value, (dict,), place)
        _check_object(value, shape, place)
    else:
        _require(value, shape, place)


def _check_object(value: Mapping[str, Any], shape: Mapping[Any, Any], place: str) -> None:
    if ... in shape:
        for key, item in value.items():
            check(item, shape[...], f"{place}.{key}")
        return
    if unknown := value.keys() - shape.keys():
        raise ValueError(f"{place}: unknown field {min(unknown)}")
    for key, wanted in shape.items():
        if key in value:
            check(value[key], wanted, f"{place}.{key}")
        elif not isinstance(wanted, Maybe):
            raise ValueError(f"{place}: {key} is missing")


def _require(value: Any, kinds: Any, place: str) -> None:
    wanted = kinds if isinstance(kinds, tuple) else (kinds,)
    # A flag is an int to Python, and none to us.
    misplaced = isinstance(value, bool) and bool not in wanted and object not in wanted
    if misplaced or not isinstance(value, wanted):
        names = " or ".join(kind.__name__ for kind in wanted)
        raise ValueError(f"{place}: expected {names}, got {type(value).__name__}")

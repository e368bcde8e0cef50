"""Exports as files written by hand, and a reader that stumbles where a browser forgives."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "link"}
FINGERPRINT, SCENARIO = "f" * 64, "a" * 64
# Two KV groups of two query heads, four layers.
LAYERS = [
    {"kv_heads": [0, 1], "query_heads": [0, 1, 2, 3], "channels": None},
    {"kv_heads": [0, 1], "query_heads": [1, 2], "channels": [0, 1, 5]},
    {"kv_heads": [1], "query_heads": [2, 3], "channels": None},
    {"kv_heads": [0], "query_heads": [1], "channels": [7]},
]
CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 8}


def plan(**changes: Any) -> dict[str, Any]:
    """A plan with everything that a page shows."""
    return {
        "schema_version": 1,
        "model": {"fingerprint": FINGERPRINT, "source": "org/model"},
        "layout": "per-layer",
        "compensation": "lstsq",
        "layers": LAYERS,
        "scenario": {"name": "sums.txt", "sha256": SCENARIO, "prompts": 10, "held_out": 2},
        "artifacts": {"sha256": "c" * 64, "domains": ["math", "law"]},
        "diagnosis": {
            "prompts": 8,
            "mixture": {"law": 0.25, "math": 0.75},
            "breadth": 0.8,
            "regime": "in-domain",
        },
        "calibration": {"shrinkage": 0.5, "scenario_weight": 0.15},
        "criterion": {"name": "obs"},
        "policy": {"name": "exact", "whitelist": 3},
        "budget": {
            "asked": {"keep": 0.6},
            "realised": {"kind": "parameters", "limit": 500, "cost": 490, "keep": 0.59},
        },
        "predicted": {
            "parameters": {"dense": 1000, "slim": 750},
            "file_bytes": {"dense": 4000, "slim": 3000},
            "kv_bytes_per_token": {"dense": 256, "slim": 192},
            "decode_bound": [{"batch": 1, "context": 128, "speedup": 1.3}],
        },
        "versions": {"python": "3.11", "torch": "2.13.0"},
        **changes,
    }


def verdict(**changes: Any) -> dict[str, Any]:
    """A report of checks that all hold."""
    return {
        "schema_version": 1,
        "passed": True,
        "checks": [
            {"name": "keys and shapes", "passed": True, "detail": "12 tensors"},
            {"name": "logits parity", "passed": True, "found": 2.5e-05, "limit": 0.0004},
        ],
        "reference": "float64",
        "computed_in": "float32",
        "quality": {
            "texts": 2,
            "tokens": 345,
            "dense_perplexity": 20.0,
            "slim_perplexity": 21.0,
            "mean_kl": 0.05,
            "top1": 0.9,
            "ratio": 1.05,
        },
        **changes,
    }


def write_export(directory: Path, **changes: Any) -> Path:
    """An export as far as a page reads it; `changes` replace files, and None leaves one out."""
    directory.mkdir(parents=True)
    manifest = {"tool": "spp", "schema_version": 1}
    manifest["files"] = {"model.safetensors": {"bytes": 3000, "sha256": "e" * 64}}
    files = {"plan": plan(), "verify": verdict(), "config": CONFIG, "manifest": manifest}
    for name, content in (files | changes).items():
        if content is not None:
            (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    (directory / "model.safetensors").write_bytes(b"x" * 3000)
    return directory


def bench(plan_hash: str, contexts: tuple[int, ...] = (128,), name: str = "out") -> dict[str, Any]:
    """Results of `spp bench`: a slim candidate beside the dense one."""
    names = ("dense torch", f"{name} torch")
    candidates = [
        {
            "name": each,
            "engine": "torch",
            "precision": "float32",
            "baseline": base,
            "plan_hash": hashed,
            "parameters": 1000,
            "read_bytes_per_step": 4000,
        }
        for each, base, hashed in zip(names, (None, names[0]), (None, plan_hash), strict=True)
    ]
    sizes = [{"batch": 1, "context": each, "kv_bytes": 192 * each} for each in contexts]
    rest = {"peak_bytes": 90_000_000, "predicted_kv_bytes": 0}
    memory = {
        "weight_bytes": 3_000_000,
        "before_bytes": 40_000_000,
        "loaded_bytes": 0,
        "loading_peak_bytes": 0,
        "predicted_weight_bytes": None,
        "problems": [],
        "cells": [each | rest for each in sizes],
    }
    return {
        "schema_version": 1,
        "machine": {"cpu": "Some CPU", "cores": 2},
        "versions": {"torch": "2.13.0"},
        "model": {"name": "model", "fingerprint": FINGERPRINT, "parameters": 1000},
        "options": {"device": "cpu", "dtype": "float32"}
        | {"threads": 2, "rounds": 9, "new_tokens": 32, "seed": 0},
        "candidates": candidates,
        "rates": {"bytes_per_second": 1, "operations_per_second": 1},
        "gate": [],
        "agreement": [],
        "memory": [{"name": each, **memory} for each in names],
        "cells": [
            {"batch": 1, "context": each, "rows": _rows(names, step)}
            for step, each in enumerate(contexts)
        ],
        "claims": [],
        "problems": [],
    }


def _rows(names: tuple[str, str], step: int) -> list[dict[str, Any]]:
    figures = ("tokens_per_second", "bytes_per_second", "operations_per_second")
    common = dict.fromkeys((*figures, "of_bandwidth", "of_rate", "p20_ms", "p80_ms"), 1.0)
    over = {"median": 1.21 + step / 10, "p20": 1.17, "p80": 1.52, "low": 1.1, "bound": 1.55}
    over |= {"ceiling": 1.55, "term": "bytes", "efficiency": 0.38, "above_bound": False}
    dense, slim = common | {"median_ms": 36.3}, common | {"median_ms": 30.0}
    return [
        {"name": names[0], "decode": dense | {"samples_ms": [36.3]}},
        {"name": names[1], "decode": slim | {"samples_ms": [30.0], "speedup": over}},
    ]


@dataclass
class Element:
    """One element with its attributes, and the text in it and below."""

    name: str
    attributes: dict[str, str | None]
    text: str = ""
    parents: tuple[str, ...] = ()


@dataclass
class Reader(HTMLParser):
    """All elements of a page; AssertionError where tags do not match."""

    elements: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._open: list[Element] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        parents = tuple(element.name for element in self._open)
        element = Element(tag, dict(attrs), parents=parents)
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> ends nothing"
        assert self._open[-1].name == tag, f"</{tag}> ends <{self._open[-1].name}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data

    def close(self) -> None:
        super().close()
        assert not self._open, f"<{self._open[-1].name}> has no end"

    def all(self, name: str, **attributes: str) -> list[Element]:
        """Elements of this name and with these attributes; class_ for class."""
        expected = {key.rstrip("_"): value for key, value in attributes.items()}
        return [
            one
            for one in self.elements
            if one.name == name and expected.items() <= one.attributes.items()
        ]

    def one(self, name: str, **attributes: str) -> Element:
        """The only such element."""
        (element,) = self.all(name, **attributes)
        return element


def read(page: Path | str) -> Reader:
    """A page, which must be well formed."""
    text = page.read_text(encoding="utf-8") if isinstance(page, Path) else page
    assert text.startswith("<!doctype html>\n")
    reader = Reader()
    reader.feed(text)
    reader.close()
    return reader

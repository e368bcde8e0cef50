"""Records and results as an evaluation writes them, made without a model."""

from __future__ import annotations

import json

import numpy as np

from spp_export.evaluation.bootstrap import DocumentScores
from spp_export.evaluation.harness.rows import DENSE, Row, row_key
from spp_export.evaluation.harness.runner import summary

TEXTS = ("scenario, held out", "chemistry pool")
CONTEXT = {"model": "abc", "dtype": "float32"}
HEADER = {
    "schema_version": 1,
    "model": {"name": "a-model", "fingerprint": "abc"},
    "scenario": {"name": "chemistry.txt"},
    "wrong": None,
    "texts": {name: {"documents": 40, "sha256": "0"} for name in TEXTS},
    "settings": {"dtype": "float32"},
    "machine": {"cpu": "a processor", "cores": 2},
    "versions": {},
    "context": CONTEXT,
}


def document_scores(loss, seed=0, documents=40, noise=0.01):
    """Documents of 20 to 60 tokens that lose about `loss` nats per token."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(20, 60, documents).astype(float)
    dense = tokens * rng.normal(3.0, 0.3, documents)
    lost = loss + (noise * rng.normal(0, 1, documents) if loss else 0)
    kl = np.abs(tokens * lost)
    return DocumentScores(tokens, dense, dense + tokens * lost, kl, np.round(tokens * 0.9))


def record(row, loss, seed=0, **data):
    """A line of a results file, as the runner writes it."""
    texts = {}
    for number, text in enumerate(TEXTS):
        scores = document_scores(loss, seed + number)
        texts[text] = {**scores.to_dict(), "summary": summary(scores)}
        if row.kind == "dense":
            texts[text]["tokens"] = scores.tokens.tolist()
    return {
        "key": row_key(row, "context"),
        "row": row.to_dict(),
        "realised": {"keep": row.keep},
        "texts": texts,
        **data,
    }


def write_results(path, rows):
    """A results file of the dense row and `rows`: pairs of a row and its loss in nats."""
    lines = [HEADER, record(DENSE, 0.0), *(record(row, loss) for row, loss in rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def method(keep=0.8, criterion="energy", **changes):
    return Row(keep, changes.pop("units", "heads"), criterion, **changes)

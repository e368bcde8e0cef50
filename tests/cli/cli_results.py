"""Results as the library returns them, for a model of the demo's size, made without it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from spp_export import ExportResult, PlanResult
from spp_export.domains.diagnosis import Diagnosis
from spp_export.models.shape import ModelShape
from spp_export.planning import Budget, Plan, compile_plan
from spp_export.planning.bound import predicted

DOMAINS = ("chemistry", "finance", "history", "math", "philosophy", "technology")
REPORT = {
    "schema_version": 1,
    "passed": True,
    "checks": [
        {"name": "keys, shapes, dtypes and finite values", "passed": True, "detail": "272 tensors"},
        {
            "name": "logits parity with the masked dense model",
            "passed": True,
            "found": 1.9e-05,
            "limit": 2.2e-04,
            "detail": "512 tokens",
        },
        {"name": "prefix causality", "passed": True, "found": 0.0, "limit": 4.5e-05},
    ],
    "quality": {
        "texts": 5,
        "tokens": 1234,
        "dense_perplexity": 18.2,
        "slim_perplexity": 18.75,
        "mean_kl": 0.0432,
        "top1": 0.912,
        "ratio": 1.03,
        "intervals": {"mean_kl": [0.031, 0.0559], "top1": [0.88, 0.94], "ratio": [1.01, 1.0512]},
        "source": "held-out text of the scenario",
        "uncertain": True,
    },
}


def model_shape(**changes):
    sizes = {
        "model_type": "llama",
        "num_layers": 30,
        "hidden_size": 576,
        "query_heads": 9,
        "kv_heads": 3,
        "head_dim": 64,
        "channels": 1536,
        "vocab_size": 49152,
        "tied_embeddings": True,
        "element_bytes": 4,
    }
    return ModelShape(**(sizes | changes))


def diagnosis(domains=DOMAINS):
    rng = np.random.default_rng(1)
    probabilities = rng.random((30, len(domains))) ** 4 * 0.3
    probabilities[:, 0] = 0.93
    return Diagnosis(domains, probabilities, "in-domain", 12, tuple(range(30)))


def compiled_plan(shape, found, keep=0.8):
    scores = np.random.default_rng(0).normal(size=(shape.num_layers, shape.query_heads))
    layers, realised = compile_plan(scores, shape, Budget(keep=keep))
    return Plan(
        "f" * 64,
        "SmolLM2-135M-Instruct",
        "per-layer",
        "lstsq",
        layers,
        diagnosis=found.to_dict() if found else {},
        budget={"asked": {"keep": keep}, "realised": realised.to_dict()},
    )


def plan_result(shape=None, found=None, keep=0.8):
    shape = shape or model_shape()
    found = found or diagnosis()
    plan = compiled_plan(shape, found, keep)
    return PlanResult(plan, shape, found, predicted(shape, plan.layer_shapes(shape)))


def export_result(shape=None, path=Path("out/chemistry"), **changes):
    result = plan_result(shape)
    fields = {
        "path": path,
        "plan": result.plan,
        "shape": result.shape,
        "diagnosis": result.diagnosis,
        "predicted": result.predicted,
        "engines": result.engines,
        "tensors": (),
        "report": REPORT,
        "seconds": {"plan": 3.21, "compensate": 41.0, "slice": 0.84, "verify": 125.2},
    }
    return ExportResult(**(fields | changes))

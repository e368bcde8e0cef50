"""The exporters that come with transformers."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim
from transformers import DynamicCache
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter

from spp_export.models.loader import load_slim

import_module("onnxscript")
SEQUENCE, PAST = 3, 5


def export_single_graph(slim: Path, out: Path, *, fused: bool, batch: int | None) -> None:
    """One graph for prompts and next tokens; `batch` None leaves the batch size open."""
    model: Any = load_slim(slim, dtype=torch.float32)
    rows = batch or 2
    ids = torch.arange(4, 4 + rows * (PAST + SEQUENCE)).reshape(rows, -1)
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[:, :PAST], past_key_values=cache, use_cache=True)
    inputs: dict[str, Any] = {
        "input_ids": ids[:, PAST:],
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(PAST, PAST + SEQUENCE).expand(rows, SEQUENCE),
        "past_key_values": cache,
    }
    any_batch = {} if batch else {0: Dim.AUTO}
    tokens, past = {**any_batch, 1: Dim.AUTO}, {**any_batch, 2: Dim.AUTO}
    shapes = {name: dict(tokens) for name in ("input_ids", "attention_mask", "position_ids")}
    config = OnnxConfig(
        dynamic=True,
        dynamic_shapes={**shapes, "past_key_values": [dict(past) for _ in 2 * cache.layers]},
        ort_fusions="cpu" if fused else None,
    )
    OnnxExporter().export(model, inputs, config).save_pretrained(out)


def export_stages(slim: Path, out: Path) -> None:
    """A graph for the prompt and one for the next token, any batch."""
    model: Any = load_slim(slim, dtype=torch.float32)
    ids = torch.arange(4, 20).reshape(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # without padding the graphs have no mask input
    config = OnnxConfig(dynamic=True, ort_fusions="cpu")
    exported = OnnxExporter().export_for_generation(
        model, {"input_ids": ids, "attention_mask": mask}, config
    )
    exported.save_pretrained(out)

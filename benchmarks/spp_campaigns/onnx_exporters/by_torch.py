"""torch.onnx.export(dynamo=True) of a slim model with a KV cache of growing length."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim
from transformers import DynamicCache, PreTrainedModel

from spp_export.models.loader import load_slim

import_module("onnxscript")  # torch imports it late, which is not what is measured
# Distinct sizes, none of them 1: a size of 1, or two equal ones, would be taken for constants.
BATCH, SEQUENCE, PAST = 2, 3, 5
Pairs = list[tuple[torch.Tensor, torch.Tensor]]


class Flat(torch.nn.Module):
    """The model with its cache as a list of (key, value) [B, KV_i, T, D], one pair a layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: Pairs,
    ) -> tuple[torch.Tensor, Pairs]:
        # Without a config, since with one it gives every layer the same heads.
        cache: Any = DynamicCache()
        for index, (key, value) in enumerate(past):
            cache.update(key, value, index)
        out: Any = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return out.logits, [(layer.keys, layer.values) for layer in cache.layers]


def export(slim: Path, path: Path, opset: int) -> None:
    """Write `path` and its weights beside it."""
    model: Any = load_slim(slim, dtype=torch.float32)
    head_dim = model.config.head_dim
    heads = [layer.self_attn.k_proj.out_features // head_dim for layer in model.model.layers]
    shapes = [(BATCH, count, PAST, head_dim) for count in heads]
    past = [(torch.zeros(shape), torch.zeros(shape)) for shape in shapes]
    ids = torch.ones(BATCH, SEQUENCE, dtype=torch.long)
    mask = torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.long)
    positions = torch.arange(PAST, PAST + SEQUENCE).expand(BATCH, SEQUENCE)
    names = [f"{i}.{kind}" for i in range(len(heads)) for kind in ("key", "value")]
    with torch.no_grad():
        torch.onnx.export(
            Flat(model),
            (ids, mask, positions, past),
            path,
            dynamo=True,
            opset_version=opset,
            external_data=True,
            dynamic_shapes=_dynamic(len(heads)),
            input_names=[
                "input_ids",
                "attention_mask",
                "position_ids",
                *(f"past_key_values.{name}" for name in names),
            ],
            output_names=["logits", *(f"present.{name}" for name in names)],
            verbose=False,
        )


def _dynamic(layers: int) -> tuple[Any, ...]:
    batch, sequence = Dim("batch_size"), Dim("sequence_length")
    past, total = Dim("past_sequence_length"), Dim("total_sequence_length")
    tokens, cache = {0: batch, 1: sequence}, {0: batch, 2: past}
    return tokens, {0: batch, 1: total}, dict(tokens), [(dict(cache), dict(cache))] * layers

"""Write slim checkpoints of every case with what they must compute, for check_loading.py to read.

    python tests/loading/build_loading.py OUT

makes OUT/<case>/model, the checkpoint, and OUT/<case>/expected.safetensors, computed in float64 by
the masked dense model: left-padded prompts, their logits, the greedy continuation without a cache.
The same of every other family, ragged and without a tokenizer, is below OUT/families.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from factories import (
    CASES,
    Case,
    mask_in_torch,
    ragged_layers,
    random_layers,
    shape_of,
    uniform_layers,
    write_slim,
)
from family_models import KNOWN, greedy, make_dense, make_slim, padded

from spp_export.common.progress import quiet_transformers
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.shape import ModelShape
from spp_export.planning import LayerPlan, Layout

PROMPTS = ("Sulfuric acid is", "The treaty of 1648 ended a war that")
NEW_TOKENS = 6


def build_all(out: Path) -> None:
    """Every case with a random per-layer plan, and of every family one uniform checkpoint, a ragged
    one, and one with biases on o_proj and down_proj, which few stock models have."""
    for seed, case in enumerate(CASES):
        dense = case.make(out / case.name)
        build(out / case.name, dense, random_layers(shape_of(dense), seed), "per-layer")
    families = sorted({case.family for case in CASES})
    for name in sorted({*KNOWN} - {*families}):
        build_family(name, out / "families" / name)
    for family in families:
        for kind in ("uniform", "ragged", "biased"):
            target = out / f"{family}-{kind}"
            dense = Case(family, family, {"kv_heads": 4, "query_heads": 8}).make(target)
            shape = shape_of(dense)
            if kind == "uniform":
                layers = uniform_layers(shape, 0, kv_heads=2, group_size=2, channels=40)
                build(target, dense, layers, "uniform")
            elif kind == "ragged":
                build(target, dense, ragged_layers(shape, 2), "ragged")
            else:
                layers = random_layers(shape, 1)
                build(target, dense, layers, "per-layer", random_biases(shape))


def build_family(name: str, target: Path) -> None:
    """A ragged checkpoint of any family, by its record, and what it must compute."""
    pair = make_slim(open_source(make_dense(name, target / "dense")), "ragged", target / "model")
    with torch.no_grad(), pair.masked() as model:
        prompt = padded(model)
        logits = model(**prompt).logits
        expected = {**prompt, "logits": logits, "tokens": greedy(model, use_cache=False)}
    save_file(expected, target / "expected.safetensors")


def random_biases(shape: ModelShape) -> dict[str, torch.Tensor]:
    """A bias for every o_proj and down_proj, by name."""
    generator = torch.Generator().manual_seed(3)
    return {
        f"model.layers.{index}.{module}.bias": torch.randn(shape.hidden_size, generator=generator)
        for index in range(shape.num_layers)
        for module in ("self_attn.o_proj", "mlp.down_proj")
    }


def build(
    target: Path,
    dense: Path,
    layers: Sequence[LayerPlan],
    layout: Layout,
    biases: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write one checkpoint and what it must compute below `target`."""
    write_slim(target / "model", dense, layers, layout, biases)
    tokenizer = AutoTokenizer.from_pretrained(dense, padding_side="left")
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float64)
    for name, bias in (biases or {}).items():
        model.get_submodule(name.removesuffix(".bias")).bias = torch.nn.Parameter(bias.double())
    with torch.no_grad(), mask_in_torch(model, layers):
        expected = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "logits": model(**batch).logits,
            "tokens": model.generate(
                **batch,
                do_sample=False,
                use_cache=False,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
            ),
        }
    save_file(expected, target / "expected.safetensors")


if __name__ == "__main__":
    build_all(Path(sys.argv[1]))

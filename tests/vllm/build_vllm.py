"""Write checkpoints for check_vllm.py to run, and what it is to find: `python build_vllm.py OUT`.

Each directory below OUT is a checkpoint with a `check.json`, a `Check` below. There is one per
layout of every family, with token ids alone, and some of the families that the plugin has layers
for, with a tokenizer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from factories import (
    CASES,
    Case,
    ragged_layers,
    random_layers,
    shape_of,
    uniform_layers,
    write_slim,
)
from family_models import KNOWN, make_dense, make_slim

from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.families import FAMILIES
from spp_export.models.families.served import BACKEND, NOT_BACKEND, PLUGIN, VLLM
from spp_export.models.shape import ModelShape
from spp_export.planning import LayerPlan, Layout
from spp_export.planning.plan import only_existing

# The narrowest heads that vLLM's attention on a CPU takes.
HEAD_DIM = 32
# Biases that no published model has, and vLLM neither.
OTHERWISE: dict[str, dict[str, Any]] = {
    "ernie4_5": {"use_bias": False},
    "ernie4_5_moe": {"use_bias": False},
}
# Of experts, half of which stay: vLLM has no kernel on a CPU for narrower ones, and that of
# transformers wants rows of a multiple of 16 bytes.
EXPERT_WIDTH = 128
SLIDING = {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}
MIXED = {"kv_heads": 4, "query_heads": 8, "use_sliding_window": True, "sliding_window": 6}


@dataclass(frozen=True)
class Check:
    """What vLLM is to do with a checkpoint.

    runs     how it is run: "plugin", "backend" (Transformers backend), "stock" (vLLM's choice),
             "promoted" (the plugin, all layers as if they had no window in the KV cache)
    refused  other ways, and words of the error that they end with
    kv_bytes_per_token  in fp32, as the plan has it
    wider    those of `runs` of which it is known that a token takes more
    """

    runs: Sequence[str]
    refused: dict[str, str]
    kv_bytes_per_token: int = 0
    wider: Sequence[str] = ()

    def write(self, directory: Path) -> None:
        """Beside the checkpoint."""
        (directory / "check.json").write_text(json.dumps(asdict(self), indent=2))


# Of biases that vLLM's own layers do not have.
REFUSED_BIAS = Check(["backend"], {"plugin": "--model-impl transformers"})


def build_all(out: Path) -> None:
    """Every checkpoint."""
    for seed, case in enumerate(CASES):
        dense = case.make(out / "dense" / case.name, head_dim=HEAD_DIM)
        check = REFUSED_BIAS if case.name == "qwen3-mqa-bias" else None
        build(out / case.name, dense, random_layers(shape_of(dense), seed), check=check)
    for family in sorted(PLUGIN):
        options = {"kv_heads": 4, "query_heads": 8, "head_dim": HEAD_DIM}
        dense = Case(family, family, options).make(out / "dense" / family)
        build_kinds(out, family, dense)
    for name in KNOWN:
        if name in BACKEND | NOT_BACKEND:
            build_family(out, name)
    build_windows(out)


def build_family(out: Path, name: str) -> None:
    """Per-layer, and uniform where the config says as much, without a tokenizer."""
    options = dict(OTHERWISE.get(name, {}))
    experts = FAMILIES[name].experts
    if experts is not None and experts.width:
        options[experts.width.partition("|")[0]] = EXPERT_WIDTH
    dense = make_dense(name, out / "dense" / f"{name}-32", HEAD_DIM, **options)
    source = open_source(dense)
    family = source.family
    ways: dict[Layout, str] = {"per-layer": "backend"}
    if not family.derived_head_dim or family.keys.get("intermediate_size", "any"):
        ways["uniform"] = "stock" if name in VLLM else "backend"
    # Of experts vLLM takes as many in every layer, and as wide.
    alone = random_layers(source.shape, 3, channels=bool(family.down))
    for layout, way in ways.items():
        layers = only_existing(alone, source.shape) if layout == "per-layer" else None
        slim = make_slim(source, layout, out / f"{name}-of-family-{layout}", layers)
        shapes = [layer.shape(source.shape) for layer in slim.plan.layers]
        lacking = way == "backend" and name in NOT_BACKEND
        # vLLM looks at the experts of phimoe without an end.
        refused = {way: ""} if lacking and name != "phimoe" else {}
        check = Check([] if lacking else [way], refused)
        planned = source.shape.kv_bytes_per_token(shapes, 4)
        replace(check, kv_bytes_per_token=planned).write(slim.slim)


def build_kinds(out: Path, family: str, dense: Path) -> None:
    """Of a family that the plugin has layers for: uniform, ragged, with biases of either kind."""
    shape = shape_of(dense)
    layers = uniform_layers(shape, 0, kv_heads=2, group_size=2, channels=40)
    way = "stock" if family in VLLM else "backend"
    build(out / f"{family}-uniform", dense, layers, "uniform", Check([way], {}))
    refused = dict.fromkeys(("plugin", "backend"), "--layout ragged --pad")
    build(out / f"{family}-ragged", dense, ragged_layers(shape, 2), "ragged", Check([], refused))
    layers = random_layers(shape, 1)
    output = random_biases(shape, "self_attn.o_proj")
    alone = REFUSED_BIAS if family == "qwen3" else None
    build(out / f"{family}-output-bias", dense, layers, "per-layer", alone, output)
    biases = output | random_biases(shape, "mlp.down_proj")
    build(out / f"{family}-biased", dense, layers, "per-layer", REFUSED_BIAS, biases)


def build_windows(out: Path) -> None:
    """Full and sliding layers in one model: KV heads of either kind alike and those of one a
    multiple of the other's, so that vLLM's pages suit both; and counts that suit none."""
    dense = Case("qwen2", "qwen2", {**MIXED, **SLIDING, "head_dim": HEAD_DIM}).make(
        out / "dense" / "qwen2-windows"
    )
    ways = ["plugin", "backend"]
    checks = {
        "windows-alike": ((4, 2, 2), Check(ways, {})),
        "windows-odd": ((4, 3, 2), Check([*ways, "promoted"], {}, wider=ways)),
    }
    for name, (counts, check) in checks.items():
        layers = [LayerPlan(tuple(range(n)), tuple(range(2 * n)), None) for n in counts]
        build(out / name, dense, layers, "per-layer", check)


def random_biases(shape: ModelShape, module: str) -> dict[str, torch.Tensor]:
    """A bias for a module of every layer, by name."""
    generator = torch.Generator().manual_seed(3)
    return {
        f"model.layers.{index}.{module}.bias": torch.randn(shape.hidden_size, generator=generator)
        for index in range(shape.num_layers)
    }


def build(
    target: Path,
    dense: Path,
    layers: Sequence[LayerPlan],
    layout: Layout = "per-layer",
    check: Check | None = None,
    biases: dict[str, torch.Tensor] | None = None,
) -> None:
    """One checkpoint with a tokenizer, and its check with the bytes of the plan."""
    write_slim(target, dense, layers, layout, biases)
    shape = shape_of(dense)
    check = check or Check(["plugin", "backend"], {})
    planned = shape.kv_bytes_per_token([layer.shape(shape) for layer in layers], 4)
    replace(check, kv_bytes_per_token=planned).write(target)


if __name__ == "__main__":
    build_all(Path(sys.argv[1]))

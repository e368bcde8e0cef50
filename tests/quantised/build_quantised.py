"""Write quantised checkpoints for check_quantised.py to run: `python build_quantised.py OUT`.

A script, not a test module: `make test-quantised` runs it where llm-compressor is. OUT gets a
directory for every family that vLLM runs on its own layers and every recipe: layers of three
shapes, quantised as `spp_campaigns.quantised` does it. Weights are checked here: none is further
from what it was than half a step.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from factories import Case, write_slim

from spp_campaigns.quantised import quantise
from spp_export.models.families.served import PLUGIN
from spp_export.planning import LayerPlan

# All sizes are multiples of 32: vLLM's kernel for 4 bits on a CPU takes no others.
OPTIONS = {"kv_heads": 4, "query_heads": 8, "head_dim": 32, "channels": 128}
LAYERS = (
    LayerPlan((0, 1, 3), (0, 1, 2, 3, 6, 7), tuple(range(96))),
    LayerPlan((2,), (4, 5), tuple(range(32, 96))),
    LayerPlan((0, 1, 2, 3), (0, 2, 4, 6), None),
)
# Values from one end of the range to the other.
STEPS = {"int8": 255, "int7": 127, "int4": 15}
GROUP = 32


def main(out: Path) -> None:
    """Every family by every recipe."""
    for family in sorted(PLUGIN):
        with TemporaryDirectory() as scratch:
            dense = Case(family, family, OPTIONS).make(Path(scratch))
            slim = write_slim(Path(scratch) / "slim", dense, LAYERS)
            for recipe in STEPS:
                quantise(slim, out / f"{family}-{recipe}", recipe)
                check_weights(slim, out / f"{family}-{recipe}", recipe)


def check_weights(slim: Path, quantised: Path, recipe: str) -> None:
    """AssertionError where a weight is further from the unquantised one than rounding explains."""
    before, after = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (slim, quantised)
    )
    after(torch.tensor([[3, 4, 5]]))  # unpacks the weights
    rounded = dict(after.named_parameters())
    changed = 0
    for name, weight in before.named_parameters():
        found = rounded[name]
        if not name.endswith("proj.weight"):
            assert torch.equal(found, weight), name
            continue
        groups = weight.unflatten(1, (-1, GROUP)) if recipe == "int4" else weight[:, None]
        step = 2 * groups.abs().amax(-1, keepdim=True) / STEPS[recipe]
        away = (found - weight).view_as(groups).abs()
        # The scales themselves are rounded, to the dtype of the weights.
        assert (away <= 0.501 * step).all(), f"{quantised.name} {name}: {(away / step).max():.3f}"
        changed += 1
    assert changed == 7 * len(LAYERS), changed


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Logits of the masked dense model:
`python -m spp_campaigns.peers.oracle MODEL PLAN LOGITS DTYPE FILE`.

LOGITS becomes a .npy file [1, T, V]; FILE says how large they are, and how far the plan moves them
from the dense model's: were that nothing, agreeing with them would show nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from spp_campaigns.peers.check import logits
from spp_export.evaluation.oracle import masked_dense
from spp_export.models.families import family_of
from spp_export.models.loader import load_dense
from spp_export.planning import read_plan


def main(arguments: Sequence[str]) -> None:
    """Run the dense model with and without the plan's mask."""
    model_dir, plan_file, target, precision, answer = arguments
    config = json.loads(Path(model_dir, "config.json").read_text(encoding="utf-8"))
    family, plan = family_of(config), read_plan(plan_file)
    model = load_dense(model_dir, dtype=getattr(torch, precision))
    dense = logits(model)
    with masked_dense(model, family, family.read_shape(config, 4), plan):
        masked = logits(model)
    np.save(target, masked)
    found = {
        "largest_logit": float(np.abs(masked).max()),
        "moved_by_plan": float(np.abs(masked - dense).max()),
    }
    Path(answer).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Families whose layers with experts stand beside layers with an ordinary MLP, whose channels go."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
from family_models import make_dense, make_slim
from old_transformers import FLOAT64, SINGLE, but_in_old

from spp_export.common.errors import PlanError
from spp_export.evaluation.contract import LIMIT, check, distances, narrow_experts, random_layers
from spp_export.models.checkpoint.checkpoint import Checkpoint, open_checkpoint, open_source
from spp_export.models.families import FAMILIES
from spp_export.planning import LayerPlan, Plan, dense_plan, validate_plan
from spp_export.planning.plan import layer_shapes, only_existing, sample_plan
from spp_export.planning.written import layers_losing, moment_kinds
from spp_export.models.families import Role
from spp_export.slicing.compensation import written_config

# Each with four layers, of which the second and the fourth have experts.
DENSE: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"mlp_only_layers": [0, 2]},
    "qwen3_moe": {"mlp_only_layers": [0, 2]},
    "qwen3_next": {"mlp_only_layers": [0, 2]},
    "glm4_moe": {},
    "dots1": {"first_k_dense_replace": 1},
    "llama4_text": {},
    "ernie4_5_moe": {},
    "deepseek_v2": {},
    "deepseek_v3": {},
}
CASES = but_in_old(list(DENSE), SINGLE | {"ernie4_5_moe"}, FLOAT64)


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    name = request.param
    layers = 2 if name == "qwen3_next" else 4  # it has three
    return open_source(make_dense(name, tmp_path / "dense", layers=layers, **DENSE[name]))

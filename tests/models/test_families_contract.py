"""What every family must do: sliced by its record alone, a model computes what the dense one does
with the removed units masked, in float64, whatever it computes otherwise than Llama."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import ragged_layers, random_layers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from spp_export.common.progress import quiet_transformers
from spp_export.evaluation.oracle import masked_dense
from spp_export.models.checkpoint.checkpoint import Checkpoint, open_checkpoint, open_source
from spp_export.models.families import FAMILIES
from spp_export.planning import Layout, Plan
from spp_export.slicing.compensation import written_config
from spp_export.slicing.config import MODELING_FILES
from spp_export.slicing.weights import write_slim_weights

# What shows more of a family than its defaults do.
MORE: dict[str, dict[str, Any]] = {
    "granite": {
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
        "logits_scaling": 3.0,
        "embedding_multiplier": 2.0,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "hyperclovax": {"residual_multiplier": 0.7, "logits_scaling": 3.0},
    "seed_oss": {"attention_out_bias": True},
    "smollm3": {"no_rope_layers": [1, 0]},
    "exaone4": {"layer_types": ["sliding_attention", "full_attention"]},
    "cohere": {"use_qk_norm": True},
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "ernie4_5": {"use_bias": True},
    "stablelm": {"use_qkv_bias": True, "use_parallel_residual": True},
    "olmo": {"clip_qkv": 2.0, "attention_bias": True},
}
# Of those, what this version of transformers has.
KNOWN = [name for name in FAMILIES if name in CONFIG_MAPPING]
LAYOUTS: tuple[Layout, ...] = ("per-layer", "ragged")


@dataclass(frozen=True)
class Pair:
    """A dense checkpoint, what is kept of it, and where that is."""

    source: Checkpoint
    plan: Plan
    slim: Path

    def masked(self) -> Any:
        """The dense model, masked, as a context."""
        dense = load(self.source.path)
        return masked_dense(dense, self.source.family, self.source.shape, self.plan)


def load(path: Path, **options: Any) -> PreTrainedModel:
    with quiet_transformers():
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float64, output_loading_info=True, **options
        )
    assert not any(report.values()), report
    return model


def make_dense(family: str, target: Path) -> Path:
    """A random model of a family, made by the stock classes."""
    sizes = {"hidden_size": 32, "intermediate_size": 24, "vocab_size": 97, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    settings = AutoConfig.for_model(family, **sizes, **heads, **tokens, **MORE.get(family, {}))
    if getattr(settings, "sliding_window", None):
        settings.sliding_window = 5
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 or "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
    with quiet_transformers():
        model.save_pretrained(target)
    return target


def make_slim(source: Checkpoint, layout: Layout, target: Path) -> Pair:
    """Sliced on disk, as an export is, by a random plan."""
    layers = (ragged_layers if layout == "ragged" else random_layers)(source.shape, 3)
    plan = Plan(source.fingerprint, source.name, layout, "none", layers)
    target.mkdir()
    write_slim_weights(source, plan, target)
    (target / "config.json").write_text(json.dumps(written_config(source, plan)))
    for file in MODELING_FILES:
        shutil.copy(file, target)
    return Pair(source, plan, target)


@pytest.fixture(scope="module", params=KNOWN)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    place = tmp_path_factory.mktemp(request.param)
    return open_source(make_dense(request.param, place / "dense"))


@pytest.fixture(scope="module", params=LAYOUTS)
def pair(source: Checkpoint, request: pytest.FixtureRequest) -> Pair:
    return make_slim(source, request.param, source.path.parent / request.param)


def tokens() -> torch.Tensor:
    return torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: PreTrainedModel, **options: Any) -> torch.Tensor:
    return model(tokens(), **options).logits


def test_a_slim_model_is_the_masked_dense_model(pair: Pair) -> None:
    assert open_checkpoint(pair.slim).layers == pair.plan.layer_shapes(pair.source.shape)
    slim = load(pair.slim)
    with pair.masked() as dense:
        expected = logits(dense)
    assert (logits(slim) - expected).abs().max().item() <= 1e-12
    assert expected.std().item() > 0.01


def test_generation_is_that_of_the_masked_dense_model(pair: Pair) -> None:
    """With a cache and without, of rows with padding before them."""
    ids, attends = tokens(), torch.ones(2, 11, dtype=torch.long)
    ids[0, :4], attends[0, :4] = 0, 0
    options = {"attention_mask": attends, "do_sample": False, "eos_token_id": None}
    options |= {"max_new_tokens": 6, "min_new_tokens": 6}
    with pair.masked() as dense:
        expected = dense.generate(ids, use_cache=False, **options).tolist()
    slim = load(pair.slim)
    assert slim.generate(ids, use_cache=True, **options).tolist() == expected
    assert slim.generate(ids, use_cache=False, **options).tolist() == expected


def test_saved_and_loaded_again_it_is_the_same(pair: Pair, tmp_path: Path) -> None:
    slim = load(pair.slim)
    with quiet_transformers():
        slim.save_pretrained(tmp_path)
    assert open_checkpoint(tmp_path).layers == open_checkpoint(pair.slim).layers
    again = load(tmp_path)
    assert type(again) is type(slim)
    assert (logits(again) - logits(slim)).abs().max().item() <= 1e-12


def test_parameters_are_those_of_the_stock_model(source: Checkpoint) -> None:
    dense = load(source.path)
    shape = source.shape
    buffers = sum(buffer.numel() for name, buffer in dense.named_buffers() if "act_fn" in name)
    assert shape.parameters(shape.layers) == dense.num_parameters() + buffers
    cached = dense(tokens(), use_cache=True).past_key_values
    layers = getattr(cached, "layers", None)
    assert layers is not None
    assert shape.kv_bytes_per_token(shape.layers, 1) == sum(
        (layer.keys.shape[1] * layer.keys.shape[3]) * 2 for layer in layers
    )

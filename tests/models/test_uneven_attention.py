"""`spp_ragged` attention against sdpa, on ragged and regular layers, with every cache."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from factories import CASES, ragged_layers, random_layers, shape_of, write_slim
from pairs import few

import spp_kernels.ragged_attention as kernels
from spp_export.models.loader import load_slim

pytestmark = pytest.mark.thinned(most=4)

CLOSE = 1e-12


GROUPED = [case for case in CASES if 1 < case.options["kv_heads"] < case.options["query_heads"]]
MADE = [(case, "ragged") for case in GROUPED] + [(GROUPED[0], "per-layer")]


@pytest.fixture(scope="module", params=MADE, ids=lambda made: f"{made[0].name}-{made[1]}")
def slim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    case, layout = request.param
    root = tmp_path_factory.mktemp(case.name)
    dense = case.make(root)
    make = ragged_layers if layout == "ragged" else random_layers
    return write_slim(root / "slim", dense, make(shape_of(dense), 0), layout)


def tokens(batch: int = 2, length: int = 14) -> torch.Tensor:
    return torch.randint(3, 259, (batch, length), generator=torch.Generator().manual_seed(7))


def padded(*counts: int, left: bool = True) -> dict[str, torch.Tensor]:
    """Rows with this many tokens of padding."""
    ids, attends = tokens(len(counts)), torch.ones(len(counts), 14, dtype=torch.long)
    for row, count in enumerate(counts):
        place = slice(0, count) if left else slice(14 - count, 14)
        ids[row, place], attends[row, place] = 0, 0
    return {"input_ids": ids, "attention_mask": attends}


def both(slim: Path, dtype: torch.dtype = torch.float64):
    return [load_slim(slim, dtype, attn_implementation=name) for name in ("sdpa", "spp_ragged")]


HOLES = {"input_ids": tokens(), "attention_mask": torch.ones(2, 14, dtype=torch.long)}
HOLES["attention_mask"][1, 4:7] = 0
INPUTS = {
    "whole": {"input_ids": tokens()},
    "all ones": padded(0, 0),
    "left": padded(5, 0),
    "right": padded(5, 0, left=False),
    "holes": HOLES,
}


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_logits_of_real_tokens_are_those_of_sdpa(slim, inputs):
    real = inputs.get("attention_mask", torch.ones(2, 14)).bool()
    with torch.no_grad():
        expected, found = (model(**inputs).logits[real] for model in both(slim))
    assert (found - expected).abs().max().item() < CLOSE


GENERATIONS = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "uncached": {"use_cache": False},
    "beams": {"num_beams": 2},
}


@pytest.mark.parametrize(
    ("inputs", "generation"), few(itertools.product(("whole", "left"), GENERATIONS), set)
)
def test_generation_is_that_of_sdpa(slim, inputs, generation):
    common = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    common |= GENERATIONS[generation]
    expected, found = (model.generate(**INPUTS[inputs], **common) for model in both(slim))
    assert found.tolist() == expected.tolist()


def test_the_kernels_get_the_cache_as_it_is(slim, monkeypatch):
    """And no layer attends in any other way, but for sliding windows."""
    seen, attend = [], kernels.ragged_attention

    def watched(query, key, value, groups, **options):
        seen.append((len(groups), key.shape[1]))
        return attend(query, key, value, groups, **options)

    monkeypatch.setattr(kernels, "ragged_attention", watched)
    _, model = both(slim)
    with torch.no_grad():
        model(tokens())
    layers = [layer.self_attn for layer in model.model.layers]
    wanted = [
        (module.q_proj.out_features // 16, module.k_proj.out_features // 16)
        for module in layers
        if getattr(module, "sliding_window", None) is None
        and (model.config.model_type != "mistral" or model.config.sliding_window is None)
    ]
    assert seen == wanted


def test_it_can_be_switched_to_and_from(slim):
    sdpa, model = both(slim)
    with torch.no_grad():
        expected = sdpa(tokens()).logits
        for name in ("sdpa", "spp_ragged", "eager"):
            model.set_attn_implementation(name)
            assert (model(tokens()).logits - expected).abs().max().item() < 1e-5


def test_gradients_reach_every_parameter(slim):
    _, model = both(slim, torch.float32)
    model.train()
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []

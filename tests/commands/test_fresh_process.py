"""What `export` writes loads where this package does not exist: another process, no network."""

from __future__ import annotations

import pytest
from exporting import load_elsewhere, logits, masked
from transformers import AutoTokenizer

pytestmark = pytest.mark.thinned(most=6)

PROMPT = "12 + 30 = 42"
CASES = (
    ("llama-gqa-bias", "per-layer", "lstsq"),
    ("llama-mha-tied", "per-layer", "bias"),
    ("mistral-window-tied", "per-layer", "none"),
    ("qwen2-gqa-tied", "per-layer", "lstsq"),
    ("qwen3-mqa-bias", "per-layer", "bias"),
    ("llama-gqa-bias", "ragged", "bias"),
    ("mistral-gqa", "ragged", "lstsq"),
    ("qwen2-gqa-tied", "ragged", "lstsq"),
    ("qwen3-gqa-tied", "ragged", "none"),
    ("qwen2-gqa-tied", "padded", "lstsq"),
    ("llama-mqa", "uniform", "bias"),
    ("mistral-gqa", "uniform", "lstsq"),
    ("qwen2-mha-window", "uniform", "none"),
    ("qwen3-gqa-tied", "uniform", "lstsq"),
)


@pytest.fixture(scope="module")
def loaded(workshop, tmp_path_factory):
    """Its class's module, greedy continuation and logits of each export, by a fresh interpreter."""
    out = tmp_path_factory.mktemp("elsewhere")
    jobs = []
    for name, layout, compensate in CASES:
        path = workshop.exported(name, layout, compensate).path
        jobs.append((str(path), layout != "uniform"))
    found = load_elsewhere(out, PROMPT, jobs)
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_it_loads_and_computes_what_it_should(workshop, loaded, case):
    """With its own code allowed, uniform without any."""
    name, layout, compensate = case
    out = workshop.exported(name, layout, compensate)
    module, ids, found = loaded[case]
    assert ("modeling_spp" in module) == (layout != "uniform")
    batch = AutoTokenizer.from_pretrained(out.dense)(PROMPT, return_tensors="pt")
    written = None if compensate == "none" else out.unpadded
    with masked(out.dense, out.result.plan.layers, written) as model:
        assert (logits(model, batch.input_ids) - found).abs().max().item() == 0.0
        greedy = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
        assert model.generate(**batch, **greedy, use_cache=False).tolist() == ids

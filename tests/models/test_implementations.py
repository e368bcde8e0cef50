"""Which attention and which way to compute experts runs is a matter of the stock class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_models import make_dense, make_slim, tokens
from old_transformers import since_5
from transformers import AutoModelForCausalLM, BloomForCausalLM, MixtralForCausalLM

from spp_export.common.progress import quiet_transformers
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.modeling import modeling_spp

CASES = [("mixtral", 24), ("mixtral", 11), ("gpt_oss", 24)]


@since_5("it has no choice of how experts are computed")
@pytest.mark.parametrize(("name", "width"), CASES)
@torch.no_grad()
def test_experts_run_in_the_order_of_any_width_and_can_be_switched(
    name: str, width: int, tmp_path: Path
) -> None:
    """Whatever was made before: transformers keeps on a stock class what it found out of it."""
    source = open_source(make_dense(name, tmp_path / "dense", intermediate_size=width))
    pair = make_slim(source, "ragged", tmp_path / "slim")
    with quiet_transformers():
        AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
        slim = AutoModelForCausalLM.from_pretrained(pair.slim, dtype=torch.float32)
    assert slim.config._experts_implementation == "eager"
    before = slim(tokens()).logits
    slim.set_experts_implementation("batched_mm")
    block = slim.model.layers[0].mlp.experts
    assert slim.config._experts_implementation == "batched_mm"
    assert block.config._experts_implementation == "batched_mm"
    torch.testing.assert_close(slim(tokens()).logits, before, rtol=1e-4, atol=1e-4)


@since_5("it asks other questions")
@pytest.mark.parametrize("stock", [BloomForCausalLM, MixtralForCausalLM])
def test_what_can_be_set_is_as_of_the_stock_class(stock: type) -> None:
    own = getattr(modeling_spp, f"Spp{stock.__name__}")
    for question in ("_can_set_attn_implementation", "_can_set_experts_implementation"):
        assert getattr(own, question)() is getattr(stock, question)()

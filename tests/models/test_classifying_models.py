"""Slim decoders under a head that classifies, which stock classes make by an auto class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_models import make_dense, make_slim, tokens

from spp_export.common.progress import quiet_transformers
from spp_export.evaluation.contract import LIMIT
from spp_export.evaluation.oracle import masked_dense
from spp_export.models.checkpoint.checkpoint import open_source

SEQUENCE, TOKEN = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
CASES = [
    ("llama", SEQUENCE),
    ("opt", "AutoModelForQuestionAnswering"),
    ("qwen3", TOKEN),
    ("gpt2", TOKEN),
    ("opt", SEQUENCE),
    ("gemma2", SEQUENCE),
]


def scores(model: Any) -> torch.Tensor:
    """What a head gives for a prompt."""
    with torch.no_grad():
        outputs = model(tokens())
    return outputs.start_logits if "start_logits" in outputs else outputs.logits


@pytest.mark.parametrize(("name", "auto"), CASES)
def test_scores_are_those_of_the_masked_dense_model(name: str, auto: str, tmp_path: Path) -> None:
    """Under the same head, made of a directory that has none, and after it was saved with it."""
    source = open_source(make_dense(name, tmp_path / "dense"))
    pair = make_slim(source, "ragged", tmp_path / "slim")
    load = getattr(transformers, auto).from_pretrained
    options = {"num_labels": 2, "dtype": torch.float64, "pad_token_id": 0}
    with quiet_transformers():
        dense, slim = load(source.path, **options), load(pair.slim, **options)
    assert type(slim).__qualname__ == f"Spp{type(dense).__qualname__}"
    for part, head in dense.named_children():
        if part != dense.base_model_prefix:
            slim.get_submodule(part).load_state_dict(head.state_dict())
    # Where the record has the decoder; models that answer questions name it otherwise.
    place = source.family.layers.partition(".")[0]
    if not hasattr(dense, place):
        setattr(dense, place, getattr(dense, dense.base_model_prefix))
    with masked_dense(dense, source.family, source.shape, pair.plan) as masked:
        expected = scores(masked)
    assert expected.std() > 1e-3
    assert (scores(slim) - expected).abs().max() <= LIMIT
    with quiet_transformers():
        slim.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", dtype=torch.float64)
    assert (scores(again) - scores(slim)).abs().max() <= LIMIT

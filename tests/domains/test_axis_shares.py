"""The axis share of heads against every head's write, materialised token by token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import CASES
from transformers import AutoTokenizer

from spp_export.calibration.activations import observe, token_batches
from spp_export.domains.scores import AxisShares
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.loader import load_dense

TEXTS = (
    ("Acids turn litmus red.", "H2O", "The noble gases hardly react with anything at all."),
    ("Is 91 prime? No, it is 7 times 13.", "x"),
    ("The dividend is paid in May.",),
)
EPS = 1e-6


@torch.no_grad()
def explicit(model, tokenizer, axes_LKd):
    """Mean axis share [K,L,H], one token and one head at a time."""
    config = model.config
    size = (len(TEXTS), config.num_hidden_layers, config.num_attention_heads)
    share = np.zeros(size)
    for k, texts in enumerate(TEXTS):
        tokens = 0
        for text in texts:
            inputs = []
            handles = [
                layer.self_attn.o_proj.register_forward_pre_hook(
                    lambda _, args, inputs=inputs: inputs.append(args[0][0])
                )
                for layer in model.model.layers
            ]
            ids = tokenizer(text)["input_ids"]
            model(torch.tensor([ids]))
            for handle in handles:
                handle.remove()
            tokens += len(ids)
            for layer, head in np.ndindex(size[1:]):
                columns = slice(head * config.head_dim, (head + 1) * config.head_dim)
                weight = model.model.layers[layer].self_attn.o_proj.weight[:, columns]
                unit = axes_LKd[layer, k] / np.linalg.norm(axes_LKd[layer, k])
                for a in inputs[layer]:
                    write = (weight @ a[columns]).numpy()
                    share[k, layer, head] += (unit @ write) ** 2 / (write @ write + EPS)
        share[k] /= tokens
    return share


# families, MHA and GQA, with and without a bias of o_proj (which belongs to no head)
@pytest.fixture(
    scope="module",
    params=[
        case for case in CASES if case.name in {"llama-gqa-bias", "mistral-gqa", "qwen3-mqa-bias"}
    ],
    ids=lambda case: case.name,
)
def observed(request, tmp_path_factory):
    path = request.param.make(tmp_path_factory.mktemp("writes"))
    model, source = load_dense(path, torch.float64), open_source(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    size = (source.shape.num_layers, len(TEXTS), source.shape.hidden_size)
    axes = np.random.default_rng(0).standard_normal(size) * 7
    domains = [k for k, texts in enumerate(TEXTS) for _ in texts]
    writes = AxisShares(source, torch.device("cpu"), axes, domains)
    # domains in any order, as they come
    for k in (2, 0, 1):
        start = domains.index(k)
        batches = [
            replace(batch, texts=tuple(start + text for text in batch.texts))
            for batch in token_batches(tokenizer, TEXTS[k], batch_tokens=60)
        ]
        observe(model, source.family, batches, [writes])
    return writes, explicit(model, tokenizer, axes)


def test_shares_are_the_part_of_the_write_along_the_domains_axis(observed):
    writes, share = observed
    found = writes.shares()
    np.testing.assert_allclose(found, share, rtol=1e-3, atol=1e-7)
    assert (found >= 0).all()
    assert (found <= 1).all()


def test_tokens_are_counted_per_domain(observed):
    writes, _ = observed
    assert writes.tokens == tuple(sum(len(t.encode()) for t in texts) for texts in TEXTS)


def test_directions_have_unit_length(observed):
    writes, _ = observed
    np.testing.assert_allclose(np.linalg.norm(writes.directions, axis=2), 1)

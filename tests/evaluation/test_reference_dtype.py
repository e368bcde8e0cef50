"""In which precision the oracle is exact: wider than the model's own, where there is room."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch

from spp_export.evaluation.batches import exact_dtype, wide_dtype
from spp_export.models.families import FAMILIES, Role
from spp_export.models.shape import ModelShape

SHAPE = ModelShape(
    model_type="llama",
    num_layers=2,
    hidden_size=64,
    query_heads=4,
    kv_heads=4,
    head_dim=16,
    channels=96,
    vocab_size=100,
    tied_embeddings=True,
    element_bytes=2,
)
PARAMETERS = SHAPE.parameters(SHAPE.layers)


def chosen(monkeypatch, device, dtype, free, compensated=()):
    """The reference dtype with `free` bytes on the accelerator and in memory each."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    source = SimpleNamespace(shape=SHAPE, family=FAMILIES["llama"])
    session = SimpleNamespace(device=device, torch_dtype=dtype, source=source, from_disk=False)
    return exact_dtype(session, dict.fromkeys(compensated))


@pytest.mark.parametrize(
    ("device", "dtype", "wide"),
    [
        ("cpu", torch.float32, torch.float64),
        ("cpu", torch.bfloat16, torch.float64),
        ("cuda", torch.bfloat16, torch.float32),
        ("cuda:1", torch.float16, torch.float32),
        ("cuda", torch.float32, torch.float64),
        ("mps", torch.float16, torch.float32),
    ],
)
def test_wider_than_its_own_where_memory_allows(monkeypatch, device, dtype, wide):
    needed = wide.itemsize * PARAMETERS
    assert chosen(monkeypatch, device, dtype, 2 * needed) == wide
    assert chosen(monkeypatch, device, dtype, needed) == dtype


def test_what_is_compensated_needs_room_too(monkeypatch):
    free = int(8 * PARAMETERS / 0.8) + 1
    assert chosen(monkeypatch, "cpu", torch.float32, free) == torch.float64
    for role in (Role.OUTPUT, Role.DOWN):
        found = chosen(monkeypatch, "cpu", torch.float32, free, [(1, role)])
        assert found == torch.float32


@pytest.mark.parametrize(("device", "dtype"), [("auto", torch.bfloat16), ("mps", torch.float32)])
def test_its_own_where_it_cannot_be_cast(monkeypatch, device, dtype):
    assert chosen(monkeypatch, device, dtype, 1 << 40) == dtype


def test_a_graph_asks_in_its_own_precision(monkeypatch):
    """`convert` knows no session."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert wide_dtype(torch.float16, FAMILIES["llama"], 50, "cpu") == torch.float64
    assert wide_dtype(torch.float16, FAMILIES["llama"], 100, "cpu") == torch.float16

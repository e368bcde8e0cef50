"""How matrices are multiplied: as precisely as asked, whatever the processor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from family_models import KNOWN, load, make_dense, tokens
from torch.nn import functional

from spp_export.calibration.activations import SecondMoments, TextMeans, TokenBatch, observe
from spp_export.calibration.gradients import gradient_lengths
from spp_export.common.errors import UsageError
from spp_export.models import products as module
from spp_export.models import session
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.products import Matmul, as_they_are, multiplies_bfloat16, products
from spp_export.models.session import open_session

NUMBERS = torch.Generator().manual_seed(1)
LEFT, RIGHT = torch.randn((2, 300, 300), generator=NUMBERS)
EXACT = LEFT.double() @ RIGHT.double()
FLOAT32, BFLOAT16 = 1e-6, 2.0**-7


def rounding() -> float:
    return float((LEFT @ RIGHT - EXACT).norm() / EXACT.norm())


def test_float32_keeps_its_digits_and_bfloat16_has_its_own():
    with products("cpu"):
        assert rounding() < FLOAT32
    with products("cpu", "bfloat16"):
        assert FLOAT32 < rounding() < BFLOAT16


def test_outside_all_is_as_it_was():
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    before = matmul and matmul.fp32_precision
    with pytest.raises(KeyError), products("cpu", "bfloat16"):
        raise KeyError
    assert (matmul and matmul.fp32_precision) == before
    assert not torch.is_autocast_enabled("cpu")


def test_what_looks_on_multiplies_numbers_as_they_are():
    with products("cpu", "bfloat16"), as_they_are("cpu"):
        assert (LEFT @ RIGHT).dtype == torch.float32
    with products("cpu", "bfloat16"):
        assert (LEFT @ RIGHT).dtype == torch.bfloat16


def test_sums_in_place_are_in_float32():
    """Moments of what is in bfloat16 already, as what a layer reads is by then."""
    values = LEFT.bfloat16().float()
    moments = SecondMoments(1, values.shape[1])
    with products("cpu", "bfloat16"), as_they_are("cpu"):
        moments.see(0, values, torch.zeros(len(values), dtype=torch.long))
    wanted = values.double().T @ values.double()
    assert float((moments.products(0)[0] - wanted).norm() / wanted.norm()) < FLOAT32


def test_where_onednn_rounds_float32_is_left_to_mkl(monkeypatch: pytest.MonkeyPatch):
    """As on processors with units for tiles."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        pytest.skip("this PyTorch has no switch between the two")
    for keeps, wanted in ((True, "bf16"), (False, "ieee")):
        monkeypatch.setattr(module, "_keeps_digits", lambda keeps=keeps: keeps)
        with products("cpu", "bfloat16"):
            assert matmul.fp32_precision == "bf16"
            with as_they_are("cpu"):
                assert matmul.fp32_precision == wanted
        with products("cpu"):
            assert (matmul.fp32_precision == "bf16") == keeps


def test_attention_over_short_sequences_is_left_to_mkl(monkeypatch: pytest.MonkeyPatch):
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        pytest.skip("this PyTorch has no switch between the two")
    attend, seen = functional.scaled_dot_product_attention, []

    def look(query, key, value, **options):
        seen.append((query.shape[-2], matmul.fp32_precision))
        return attend(query, key, value, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", look)
    monkeypatch.setattr(module, "_keeps_digits", lambda: True)
    queries, keys, values = torch.randn((3, 1, 2, 300, 8), generator=NUMBERS)
    with products("cpu"):
        for length in (1, 255, 256, 300):
            some = queries[..., :length, :]
            found = functional.scaled_dot_product_attention(some, keys, values)
            torch.testing.assert_close(found, attend(some, keys, values))
        assert matmul.fp32_precision == "bf16"
    assert seen == [(1, "ieee"), (255, "ieee"), (256, "bf16"), (300, "bf16")]
    assert functional.scaled_dot_product_attention is look


def test_what_no_device_is_known_to_have_is_not_taken():
    assert not multiplies_bfloat16("mps")


def test_a_session_takes_what_the_processor_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = str(make_dense("llama", tmp_path / "dense"))
    for native, wanted in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(session, "multiplies_bfloat16", lambda device, has=native: has)
        assert open_session(place, matmul="auto").matmul == wanted
        assert open_session(place, matmul="auto", dtype="float64").matmul == "float32"
        assert open_session(place, matmul="bfloat16").matmul == "bfloat16"
    with pytest.raises(UsageError, match=r"--matmul bfloat16: .* runs in float64"):
        open_session(place, matmul="bfloat16", dtype="float64")


@pytest.mark.parametrize("name", KNOWN)
def test_every_family_reads_text_in_bfloat16(name: str, tmp_path: Path):
    """The stream after each layer, and how much the loss feels a change: no further from float32
    than twice what the model in bfloat16 is, half of all values."""
    source = open_source(make_dense(name, tmp_path / "dense"))
    family, shape, ids = source.family, source.shape, tokens()
    model, batch = load(source.path).float(), TokenBatch(ids, torch.ones_like(ids), (0, 1))

    def seen(model: torch.nn.Module, matmul: Matmul) -> tuple[np.ndarray, np.ndarray]:
        stream = TextMeans("stream", len(ids), shape.num_layers, shape.hidden_size)
        observe(model, family, [batch], [stream], matmul=matmul)
        return stream.values, gradient_lengths(model, family, shape, [batch], matmul=matmul)

    exact, rounded = seen(model, "float32"), seen(model, "bfloat16")
    for wanted, found, low in zip(exact, rounded, seen(model.bfloat16(), "float32"), strict=True):
        there = wanted != 0
        apart, most = (np.median(np.abs(one - wanted)[there]) for one in (found, low))
        assert 0 < apart < 2 * most

"""Slim checkpoints beside their ONNX directories, each made once for all tests of the runner."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import factories
import numpy as np
import torch
from numpy.typing import NDArray
from pairs import few, of_family
from transformers import PreTrainedModel

from spp_export.formats.onnx import OnnxOptions
from spp_export.formats.onnx.options import ATTENTIONS, Attention, Precision
from spp_export.formats.onnx.runtime import OrtModel
from spp_export.formats.onnx.write import write_onnx
from spp_export.models.loader import load_slim

CASES = {case.name: case for case in factories.CASES}
# One case where not all are needed: its layers see six tokens only, so that positions matter.
WINDOWED = "mistral-window-tied"
ALL = [(name, form) for name in CASES for form in ATTENTIONS]


def few_of(rows: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Rows of a case's name and other things: with every family all of these."""
    return few(rows, lambda row: of_family((CASES[row[0]], *row[1:])))


_ROOT = Path(tempfile.mkdtemp(prefix="spp-onnx-"))
atexit.register(shutil.rmtree, _ROOT, ignore_errors=True)


@dataclass(frozen=True)
class Pair:
    """The same model twice."""

    directory: Path
    slim: Path
    model: OrtModel
    reference: PreTrainedModel

    def expected(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [B,S,V] by PyTorch, without padding or cache."""
        with torch.no_grad():
            found: NDArray[np.float32] = self.reference(torch.from_numpy(ids)).logits.numpy()
        return found


@cache
def slim(case: str) -> Path:
    """A per-layer checkpoint of a case."""
    folder = _ROOT / case
    dense = CASES[case].make(folder)
    layers = factories.random_layers(factories.shape_of(dense), seed=1)
    return factories.write_slim(folder / "slim", dense, layers)


def onnx_directory(case: str, form: Attention, precision: Precision = "fp32") -> Path:
    """Its ONNX directory in a form."""
    return _directory(case, form, precision)


@cache
def _directory(case: str, form: Attention, precision: Precision) -> Path:
    target = _ROOT / f"{case}-{form}-{precision}"
    target.mkdir()
    write_onnx(slim(case), target, OnnxOptions(form, precision))
    return target


@cache
def pair(case: str, form: Attention, precision: Precision = "fp32") -> Pair:
    """A case in PyTorch, fp32 always, and in ONNX Runtime."""
    directory = onnx_directory(case, form, precision)
    model = OrtModel.load(directory, threads=1)
    return Pair(directory, slim(case), model, load_slim(slim(case)))


def random_ids(*shape: int, seed: int = 0) -> NDArray[np.int64]:
    """Ids that are no special tokens."""
    return np.random.default_rng(seed).integers(3, 259, shape)


def assert_close(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Equal but for the order of sums in fp32."""
    assert found.shape == expected.shape
    assert abs(found - expected).max() < 1e-5 * abs(expected).max()

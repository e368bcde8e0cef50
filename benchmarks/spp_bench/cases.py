"""What is measured: cells of a grid of batch sizes and contexts, and the tokens fed in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from spp_export.common.errors import UsageError
from spp_export.common.options import DtypeName, check_word
from spp_export.models.devices import require_device

Ids = NDArray[np.int64]


@dataclass(frozen=True, order=True, slots=True)
class Cell:
    """`batch` sequences whose prompts have `context` tokens."""

    batch: int
    context: int

    @property
    def label(self) -> str:
        """For tables and progress."""
        return f"batch {self.batch}, context {self.context}"

    def to_dict(self) -> dict[str, Any]:
        """For the results file."""
        return {"batch": self.batch, "context": self.context}


@dataclass(frozen=True)
class Tokens:
    """Prompts [B,S], and the tokens [B,N] that are fed after them, whatever a model would
    choose."""

    prompt: Ids
    continuation: Ids


def grid(batches: Sequence[int], contexts: Sequence[int]) -> tuple[Cell, ...]:
    """Every batch size with every context, small cells first. Raises UsageError."""
    for option, values in (("--batch", batches), ("--context", contexts)):
        if not values or min(values) < 1:
            raise UsageError(f"{option} {list(values)}: expected numbers from 1 on.")
    return tuple(sorted({Cell(b, c) for b in batches for c in contexts}))


def tokens(cell: Cell, new_tokens: int, vocab_size: int, seed: int = 0) -> Tokens:
    """Random tokens, the same for every model: ordinary ids, so that nothing is padding."""
    random = np.random.default_rng([seed, cell.batch, cell.context])
    ids = random.integers(0, vocab_size, (cell.batch, cell.context + new_tokens), dtype=np.int64)
    return Tokens(ids[:, : cell.context].copy(), ids[:, cell.context :].copy())


def check_counts(counts: Mapping[str, int | None]) -> None:
    """UsageError for an option below 1; None is one that was left out."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} {value}: expected 1 or more.")


def check_device(device: str, dtype: str | None) -> None:
    """UsageError for an unknown device or precision, and for a card that is not there."""
    if device != "cpu" and not device.startswith("cuda"):
        raise UsageError(f"--device {device}: expected cpu, cuda or cuda:N.")
    if dtype is not None:
        check_word("--dtype", dtype, get_args(DtypeName))
    require_device(device)

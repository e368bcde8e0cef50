"""What a consumer of heads or channels reads, gathered here, and closed forms on it.

The moments are means over tokens of what transformers' own o_proj or down_proj reads, one text at
a time and hence without padding, summed in float64. The package's are fp32 sums over padded
batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from exporting import CONSUMERS, load
from transformers import AutoTokenizer

EPS = float(np.finfo(np.float32).eps)
RIDGE = 0.01


@dataclass(frozen=True)
class Inputs:
    """What a layer's consumer reads: E[a a^T] [m,m], E[a] [m] and the number of tokens."""

    second: np.ndarray
    mean: np.ndarray
    tokens: int


def inputs(
    dense: Path, prompts: Sequence[str], module: str = CONSUMERS[0], *, padded: bool = False
) -> list[Inputs]:
    """Per layer. `padded` counts padding as the tokens that it is not."""
    model = load(dense, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    seen: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for layer, rows in zip(model.model.layers, seen, strict=True):
        layer.get_submodule(module).register_forward_pre_hook(
            lambda _, args, rows=rows: rows.append(args[0].flatten(0, 1).double())
        )
    batches = [list(prompts)] if padded else [[prompt] for prompt in prompts]
    with torch.no_grad():
        for batch in batches:
            model(**tokenizer(batch, padding=True, return_tensors="pt"))
    found = []
    for rows in seen:
        values = torch.cat(rows).numpy()
        found.append(Inputs(values.T @ values / len(values), values.mean(axis=0), len(values)))
    return found


def mixed(parts: Sequence[tuple[float, list[Inputs]]]) -> list[Inputs]:
    """The weighted mean of several collections' moments."""
    return [
        Inputs(
            sum(weight * part[layer].second for weight, part in parts),
            sum(weight * part[layer].mean for weight, part in parts),
            max(part[layer].tokens for _, part in parts),
        )
        for layer in range(len(parts[0][1]))
    ]


def ridge(weight: np.ndarray, found: Inputs, kept: Sequence[int]) -> tuple[np.ndarray, float]:
    """W_S + W_R C_RS (C_SS + lam I)^-1 in float64, and how far fp32 moments may take it.

    The error of a solution X of A X = B is at most |A^-1| (|dB| + |dA| |X|). Moments summed in
    fp32 are off by a few eps |C|: 1.4 to 1.9 in these cases, 4 are allowed.
    """
    removed = np.setdiff1d(np.arange(weight.shape[1]), kept)
    among = found.second[np.ix_(kept, kept)].copy()
    among += RIDGE * np.mean(np.diag(among)) * np.eye(len(among))
    solution = np.linalg.solve(among, found.second[np.ix_(kept, removed)])
    off = 4 * EPS * np.linalg.norm(found.second)
    amplified = np.linalg.norm(np.linalg.inv(among), 2) * (1 + np.linalg.norm(solution, 2)) * off
    expected = weight[:, kept] + weight[:, removed] @ solution.T
    rounding = EPS * np.abs(expected).max()
    return expected, float(np.linalg.norm(weight[:, removed], 2) * amplified + rounding)


def mean_write(weight: np.ndarray, found: Inputs, kept: Sequence[int]) -> tuple[np.ndarray, float]:
    """W_R E[a_R], and how far a sum over T tokens in fp32, rounded once, may take it."""
    removed = np.setdiff1d(np.arange(weight.shape[1]), kept)
    write = weight[:, removed] @ found.mean[removed]
    size = np.abs(weight[:, removed]) @ np.sqrt(np.diag(found.second))[removed]
    return write, float(np.sqrt(found.tokens) * EPS * size.max() + EPS * np.abs(write).max())


def projection(
    tensors: dict[str, torch.Tensor], layer: int, module: str = CONSUMERS[0], kind: str = "weight"
) -> np.ndarray:
    """A weight or bias of a layer, in float64; a bias that is not there is zero."""
    name = f"model.layers.{layer}.{module}"
    if kind == "bias" and f"{name}.bias" not in tensors:
        return np.zeros(len(tensors[f"{name}.weight"]))
    return tensors[f"{name}.{kind}"].double().numpy()

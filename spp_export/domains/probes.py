"""Layer-wise linear probes: which domain the pooled residual stream belongs to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from spp_export.common.arrays import FloatArray, IntArray

# L2 penalty of the probes on standardised features: with about 130 texts per domain and hundreds
# of features the classes are separable, and without it the weights grow without end.
_PENALTY = 1e-2
_EPS = 1e-6


def fit_probes(pooled_NLd: FloatArray, labels_N: IntArray, domains: int) -> tuple[Any, Any]:
    """K one-vs-rest logistic probes per layer: weight [L,K,d] and bias [L,K], float32.

    L2-penalised, on standardised features, to convergence by L-BFGS in float64 from zero; the
    standardisation is folded back, so the probes take the pooled stream as it is.
    """
    targets = torch.nn.functional.one_hot(torch.from_numpy(labels_N), domains).double()
    weights, biases = [], []
    for layer in range(pooled_NLd.shape[1]):
        features = torch.from_numpy(pooled_NLd[:, layer]).double()
        mean, deviation = features.mean(0), features.std(0).clamp(min=_EPS)
        weight, bias = _logistic((features - mean) / deviation, targets)
        weight = weight / deviation
        weights.append(weight)
        biases.append(bias - weight @ mean)
    return torch.stack(weights).float().numpy(), torch.stack(biases).float().numpy()


def _logistic(features_Nd: Tensor, targets_NK: Tensor) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(
        (targets_NK.shape[1], features_Nd.shape[1]), dtype=torch.float64, requires_grad=True
    )
    bias = torch.zeros(targets_NK.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=200, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        logits = features_Nd @ weight.T + bias
        value = binary_cross_entropy_with_logits(logits, targets_NK, reduction="none")
        total = value.sum(1).mean() + 0.5 * _PENALTY * weight.square().sum()
        total.backward()
        return total

    optimiser.step(loss)
    return weight.detach(), bias.detach()

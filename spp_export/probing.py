"""The offline stage, once per model: pools of domain text to artifacts, the model frozen."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from spp_export.activations import TextMeans, input_device, observe, token_batches
from spp_export.artifacts import Artifacts
from spp_export.checkpoint.reader import read_float
from spp_export.checkpoint.source import Source
from spp_export.diagnosis import IN_DOMAIN
from spp_export.importance import CRITERIA, FloatArray, HeadStatistics
from spp_export.moments import observers, store
from spp_export.pools import Pools
from spp_export.progress import Progress, no_progress
from spp_export.versions import library_versions

IntArray = np.ndarray[Any, np.dtype[np.int64]]

# L2 penalty of the probes on standardised features: with about 130 texts per domain and hundreds
# of features the classes are separable, and without it the weights grow without end.
_PROBE_PENALTY = 1e-2
_EPS = 1e-6
# Whitelist: at least this far above its layer's mean, on average over domains and in standard
# deviations of the layer, and varying over domains by no more than this.
_WHITELIST_MEAN = 1.5
_WHITELIST_DEVIATION = 0.25


class HeadWrites:
    """Per-domain sums of what each head writes: its energy and its share along the probe axis.

    `||Wo_h a_h||^2 = a_h^T G_h a_h` with `G_h = Wo_h^T Wo_h` [dh,dh], so no write is materialised.
    """

    place = "output"

    def __init__(self, source: Source, device: torch.device, axes_LKd: FloatArray) -> None:
        shape, family = source.shape, source.family
        heads, dim = shape.query_heads, shape.head_dim
        self.domain = 0
        domains = axes_LKd.shape[1]
        self._gram: list[Tensor] = []
        self._along: list[Tensor] = []
        unit = axes_LKd / np.linalg.norm(axes_LKd, axis=2, keepdims=True).clip(min=1e-12)
        for layer in range(shape.num_layers):
            # From the files: a model spread over devices may not have its weights at hand.
            stored = source.tensors[f"{family.layer_name(layer, family.output)}.weight"]
            weight = torch.from_numpy(read_float(stored)).float().view(-1, heads, dim).to(device)
            axes = torch.from_numpy(unit[layer]).to(weight)
            self._gram.append(torch.einsum("ohi,ohj->hij", weight, weight))
            self._along.append(torch.einsum("ko,ohi->khi", axes, weight))
        size = (domains, shape.num_layers, heads)
        self._energy = torch.zeros(size, dtype=torch.float64)
        self._share = torch.zeros(size, dtype=torch.float64)
        self._tokens = torch.zeros(domains, dtype=torch.float64)

    def see(self, layer: int, values: Tensor, text_T: Tensor) -> None:
        """Add one batch of o_proj inputs [T,H*dh], all of `self.domain`."""
        gram, along = (part[layer].to(values.device) for part in (self._gram, self._along))
        values_HTi = values.float().view(values.shape[0], gram.shape[0], -1).transpose(0, 1)
        energy_TH = ((values_HTi @ gram) * values_HTi).sum(2).clamp(min=0).T
        along_HT = torch.einsum("hti,hi->ht", values_HTi, along[self.domain])
        share_TH = along_HT.T.square() / (energy_TH + _EPS)
        self._energy[self.domain, layer] += energy_TH.double().sum(0).cpu()
        self._share[self.domain, layer] += share_TH.double().sum(0).cpu()
        if layer == 0:
            self._tokens[self.domain] += len(energy_TH)

    def statistics(self) -> HeadStatistics:
        """Averages over each domain's tokens."""
        tokens = self._tokens.clamp(min=1)[:, None, None]
        return HeadStatistics(
            (self._energy / tokens).numpy(),
            (self._share / tokens).numpy(),
            tuple(int(n) for n in self._tokens),
        )


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
        total = value.sum(1).mean() + 0.5 * _PROBE_PENALTY * weight.square().sum()
        total.backward()
        return total

    optimiser.step(loss)
    return weight.detach(), bias.detach()


def fit_temperatures(logits_NLK: FloatArray, labels_N: IntArray) -> FloatArray:
    """One temperature per layer [L] that minimises the one-vs-rest loss on held-out text.

    The loss is convex in 1/T, so a golden-section search over log T finds its minimum.
    """
    domains = logits_NLK.shape[2]
    targets = torch.nn.functional.one_hot(torch.from_numpy(labels_N), domains).double()
    result = []
    for layer in range(logits_NLK.shape[1]):
        logits = torch.from_numpy(logits_NLK[:, layer]).double()

        def loss(log_t: float, logits: Tensor = logits) -> float:
            scaled = logits / np.exp(log_t)
            return float((softplus(scaled) - targets * scaled).mean())

        result.append(np.exp(_golden_section(loss, np.log(0.05), np.log(20.0))))
    return np.asarray(result, dtype=np.float32)


def _golden_section(function: Any, low: float, high: float, steps: int = 60) -> float:
    ratio = (5**0.5 - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(steps):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
    return (low + high) / 2


def choose_whitelist(importance_KLH: FloatArray) -> tuple[tuple[int, int], ...]:
    """Heads that matter alike in every domain: high mean, low deviation of the layer's z-score."""
    mean = importance_KLH.mean(axis=2, keepdims=True)
    deviation = importance_KLH.std(axis=2, keepdims=True)
    z = (importance_KLH - mean) / np.where(deviation > 0, deviation, 1.0)
    chosen = (z.mean(axis=0) >= _WHITELIST_MEAN) & (z.std(axis=0) <= _WHITELIST_DEVIATION)
    return tuple((int(layer), int(head)) for layer, head in np.argwhere(chosen))


def probe_model(
    model: nn.Module,
    tokenizer: Any,
    source: Source,
    pools: Pools,
    *,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Artifacts:
    """Artifacts of a model from domain pools, the moments of the training text go to the cache.

    Two passes: the pooled residual stream of all text for the probes, then head statistics and
    moments of the training text. Deterministic: nothing is sampled, `seed` is only recorded.
    """
    shape = source.shape
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    train = [(k, text) for k, texts in enumerate(pools.train) for text in texts]
    held_out = [(k, text) for k, texts in enumerate(pools.val) for text in texts]
    texts = [text for _, text in train + held_out]
    labels = np.asarray([k for k, _ in train + held_out], dtype=np.int64)
    means = TextMeans("residual", len(texts), shape.num_layers, shape.hidden_size)
    batches = token_batches(tokenizer, texts)
    observe(
        model, source.family, batches, [means], progress=progress, description="pooling the stream"
    )
    count = len(train)
    with progress("fitting probes", None):
        weight, bias = fit_probes(means.values[:count], labels[:count], len(pools.domains))
        logits = np.einsum("nld,lkd->nlk", means.values[count:], weight) + bias
        temperature = fit_temperatures(logits, labels[count:])
    accuracy = (logits.argmax(axis=2) == labels[count:, None]).mean(axis=0)

    writes = HeadWrites(source, input_device(model), weight)
    for k, domain in enumerate(pools.domains):
        # One domain at a time, so that the moments of only one are in memory; they are kept for
        # the exports to come.
        second, stream = observers(source)
        writes.domain = k
        batches = token_batches(tokenizer, pools.train[k])
        observe(
            model,
            source.family,
            batches,
            [writes, second, stream],
            progress=progress,
            description=f"scoring heads: {domain}",
        )
        store(source, pools.train[k], second, stream, dtype=dtype)
    statistics = writes.statistics()
    importance = {
        f"head/{name}": criterion(statistics).astype(np.float32)
        for name, criterion in CRITERIA.items()
    }
    whitelist = choose_whitelist(importance["head/energy"])
    manifest = {
        "model": source.name,
        "seed": seed,
        "pools": dict(pools.sha256),
        "counts": {
            name: {"train": len(pools.train[k]), "val": len(pools.val[k]), "tokens": tokens}
            for k, (name, tokens) in enumerate(zip(pools.domains, statistics.tokens, strict=True))
        },
        "validation_accuracy": [round(float(a), 6) for a in accuracy],
        "whitelist": {
            "units": len(whitelist),
            "rule": f"z-score of energy inside the layer: mean over domains >= {_WHITELIST_MEAN}, "
            f"deviation over domains <= {_WHITELIST_DEVIATION}",
        },
        "versions": library_versions(),
    }
    return Artifacts(
        fingerprint=source.fingerprint,
        domains=pools.domains,
        regimes=(IN_DOMAIN,),
        weight=weight,
        bias=bias,
        temperature=temperature[None, :],
        axes=domain_axes(means.values[:count, -1], labels[:count], len(pools.domains)),
        importance=importance,
        whitelist=whitelist,
        calibration=tuple((pools.domains[k], text) for k, text in train),
        manifest=manifest,
        sha256="",
    )


def domain_axes(pooled_Nd: FloatArray, labels_N: IntArray, domains: int) -> Any:
    """One unit axis per given domain [K,d]: its mean's offset from the mean over domains, in the
    last layer's pooled stream."""
    centres = np.stack([pooled_Nd[labels_N == k].mean(axis=0) for k in range(domains)])
    axes = centres - centres.mean(axis=0)
    return (axes / np.linalg.norm(axes, axis=1, keepdims=True).clip(min=1e-12)).astype(np.float32)

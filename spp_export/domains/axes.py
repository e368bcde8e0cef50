"""Domain axes (DBS): candidate domains in a shared low-dimensional space, one axis each.

A text's embedding is its residual stream after attention at one layer, averaged over its tokens.
Features are standardised, as a few of the stream's coordinates are hundreds of times the others,
and reduced to principal components of the candidates' training texts. A candidate's axis is the
unit vector of its centre's offset from the mean of all candidates' centres.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spp_export.common.arrays import FloatArray, IntArray

DIMENSIONS = 32
_TINY = 1e-12


@dataclass(frozen=True)
class Space:
    """The shared space of r dimensions, and the candidates in it.

    layer           whose pooled stream [d] is embedded
    mean [d], deviation [d], basis [r,d]   embedding(x) = basis @ ((x - mean) / deviation)
    variance        share of the standardised texts' variance that the r dimensions hold
    texts [N,r], labels [N]   training texts, and the candidate each is of
    centres [C,r], axes [C,r]   mean of a candidate's texts; unit offset from the centres' mean
    """

    layer: int
    mean: FloatArray
    deviation: FloatArray
    basis: FloatArray
    variance: float
    texts: FloatArray
    labels: IntArray
    centres: FloatArray
    axes: FloatArray

    def embed(self, pooled_Nd: FloatArray) -> FloatArray:
        """Pooled activations of `layer` [N,d] in the space [N,r]."""
        embedded: FloatArray = ((pooled_Nd - self.mean) / self.deviation) @ self.basis.T
        return embedded

    @property
    def cosines(self) -> FloatArray:
        """Cosines between all candidates' axes [C,C]."""
        product: FloatArray = self.axes @ self.axes.T
        return np.clip(product, -1.0, 1.0)

    def residual_axes(self) -> FloatArray:
        """The axes as directions of the residual stream [C,d], unit length, float32.

        An offset v of the space is the offset `deviation * (basis^T v)` of the stream.
        """
        return unit((self.axes @ self.basis) * self.deviation).astype(np.float32)

    def accuracy(self, pooled_Nd: FloatArray, labels_N: IntArray) -> float:
        """Share of texts whose nearest centre is their own; every candidate counts alike."""
        offset = self.embed(pooled_Nd)[:, None, :] - self.centres[None]
        right = (offset**2).sum(axis=2).argmin(axis=1) == labels_N
        return float(np.mean([right[labels_N == k].mean() for k in np.unique(labels_N)]))

    def separation(self) -> FloatArray:
        """How far the nearest other centre is, in deviations of the texts along the way [C].

        d' = |c_j - c_k| / sqrt((s_j^2 + s_k^2) / 2), s the deviation of a candidate's texts on the
        line between the centres, the least over j (Green and Swets, 1966; the root of twice
        Fisher's criterion on that line). Infinite where texts do not vary, or k is alone.
        """
        count = len(self.centres)
        result = np.full(count, np.inf)
        for k in range(count):
            for j in range(count):
                if j != k:
                    result[k] = min(result[k], self._distance(k, j))
        return result

    def to_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """Figures for the manifest. Cosines are of all candidates, in the order of `names`.

        Random directions of r dimensions have a mean |cosine| near sqrt(2 / (pi r)); centres that
        all lie equally far apart have -1 / (C - 1) each, as their offsets sum to nothing.
        """
        cosines = self.cosines
        pairs = np.abs(cosines[np.triu_indices(len(cosines), 1)])
        separation = zip(names, self.separation(), strict=True)
        return {
            "layer": self.layer,
            "dimensions": len(self.basis),
            "variance": round(self.variance, 6),
            "candidates": list(names),
            "cosines": [[round(float(c), 4) for c in row] for row in cosines],
            "mean_abs_cosine": round(float(pairs.mean()), 6) if len(pairs) else None,
            "max_abs_cosine": round(float(pairs.max()), 6) if len(pairs) else None,
            "separation": {
                n: round(float(d), 4) if np.isfinite(d) else None for n, d in separation
            },
        }

    def _distance(self, k: int, j: int) -> float:
        line = self.centres[j] - self.centres[k]
        length = float(np.linalg.norm(line))
        along = self.texts @ (line / max(length, _TINY))
        scatter = np.mean([along[self.labels == i].var() for i in (k, j)])
        if not length:
            return 0.0
        return length / float(np.sqrt(scatter)) if scatter > 0 else float("inf")


def domain_space(
    pooled_Nd: FloatArray,
    labels_N: IntArray,
    candidates: int,
    layer: int = 0,
    dimensions: int = DIMENSIONS,
) -> Space:
    """The space of one layer's pooled training texts [N,d] and the axes of its candidates.

    At most `dimensions`, texts or features, whichever is least. A candidate whose centre is at the
    mean of all, as that of a single one, has the axis zero.
    """
    pooled = pooled_Nd.astype(np.float64)
    mean, deviation = pooled.mean(axis=0), pooled.std(axis=0)
    # A feature that never changes carries nothing, whatever it is divided by.
    deviation = np.where(deviation > 0, deviation, 1.0)
    standard = (pooled - mean) / deviation
    _, values, vectors = np.linalg.svd(standard, full_matrices=False)
    basis = _signed(vectors[:dimensions])
    energy = values**2
    texts = standard @ basis.T
    centres = np.stack([texts[labels_N == k].mean(axis=0) for k in range(candidates)])
    return Space(
        layer=layer,
        mean=mean,
        deviation=deviation,
        basis=basis,
        variance=float(energy[:dimensions].sum() / max(energy.sum(), _TINY)),
        texts=texts,
        labels=labels_N,
        centres=centres,
        axes=unit(centres - centres.mean(axis=0)),
    )


def choose_space(
    train_NLd: FloatArray,
    train_N: IntArray,
    held_out_NLd: FloatArray,
    held_out_N: IntArray,
    candidates: int,
) -> tuple[Space, dict[int, float]]:
    """The space of the layer where held-out texts are nearest to their own centres most often.

    Tried are the layers at a quarter, half and three quarters of the depth and the last; among
    equals the earliest. Also the accuracy of each layer tried.
    """
    layers = train_NLd.shape[1]
    tried = sorted({layers // 4, layers // 2, 3 * layers // 4, layers - 1})
    spaces = {i: domain_space(train_NLd[:, i], train_N, candidates, i) for i in tried}
    accuracy = {i: spaces[i].accuracy(held_out_NLd[:, i], held_out_N) for i in tried}
    return spaces[max(tried, key=lambda i: (accuracy[i], -i))], accuracy


def unit(vectors_Cd: FloatArray) -> FloatArray:
    """Rows scaled to length one; rows that are zero stay so."""
    length = np.linalg.norm(vectors_Cd, axis=1, keepdims=True)
    # Rounding leaves an offset of nothing a little above zero, which has no direction.
    scaled: FloatArray = np.where(length > _TINY, vectors_Cd / np.maximum(length, _TINY), 0.0)
    return scaled


def _signed(basis_rd: FloatArray) -> FloatArray:
    """Each component with its largest element positive: its sign means nothing, but is recorded."""
    largest = np.abs(basis_rd).argmax(axis=1)
    signs = np.sign(basis_rd[np.arange(len(basis_rd)), largest])
    signed: FloatArray = basis_rd * np.where(signs == 0, 1.0, signs)[:, None]
    return signed

"""Pooled activations of overlapping classes, made up."""

from __future__ import annotations

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def clusters(domains=3, per=30, layers=2, width=5, spread=0.6, seed=0):
    """Pooled activations [N,L,d] of overlapping classes, features of unequal scale, and labels."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((layers, domains, width))
    labels = np.repeat(np.arange(domains), per)
    noise = spread * random.standard_normal((len(labels), layers, width))
    scale, offset = np.geomspace(0.1, 100, width), random.standard_normal(width) * 10
    pooled = (centres[:, labels].transpose(1, 0, 2) + noise) * scale + offset
    return pooled.astype(np.float32), labels

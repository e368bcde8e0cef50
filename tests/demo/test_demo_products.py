"""Statistics of the default model with products in bfloat16, beside those in float32."""

from __future__ import annotations

import numpy as np
import pytest

from spp_export.calibration.moments import gather
from spp_export.data.artifacts import bundled_artifacts, read_artifacts
from spp_export.models.hub import DEMO
from spp_export.models.session import open_session

pytestmark = pytest.mark.demo
TEXTS, TOKENS = 4, 48


@pytest.fixture(scope="module")
def found():
    """Collections of the beginnings of a few texts of the pools, by the precision of products."""
    session = open_session(DEMO)
    artifacts = read_artifacts(bundled_artifacts())
    texts = [text[: 4 * TOKENS] for _, text in artifacts.calibration[:TEXTS]]
    return {
        matmul: gather(
            session.source,
            texts,
            ("attention", "mlp", "attention loss", "mlp loss"),
            lambda: (session.reader, session.tokenizer),
            matmul=matmul,
        )
        for matmul in ("float32", "bfloat16")
    }


# Those in units of the loss have each token by its squared gradient, of which few are most.
@pytest.mark.parametrize(
    ("kind", "most"),
    [("attention", 0.03), ("mlp", 0.03), ("attention loss", 0.1), ("mlp loss", 0.1)],
)
def test_moments_differ_by_little_more_than_bfloat16_rounds(found, kind, most):
    for layer in (0, 14, 29):
        exact, rounded = (found[matmul].blocks(kind, layer) for matmul in ("float32", "bfloat16"))
        assert 0 < np.linalg.norm(rounded - exact) < most * np.linalg.norm(exact), layer

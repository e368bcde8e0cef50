"""What blocks of moments cost the re-fit of down_proj: `python -m spp_campaigns.blocked_moments`.

Wide MLPs keep their moments in blocks of at most 1536 channels. The default model's 1536 fit in
one, so it can show what smaller blocks lose against the whole: the share of down_proj's output
energy that is lost with a fifth of the channels removed, those that write least.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from spp_campaigns.command import finish, machine, parser
from spp_export.calibration.mixture import Mixing, calibration_parts, gather_parts
from spp_export.calibration.moments import layer_weights
from spp_export.calibration.refit import refit_blocks, residual
from spp_export.common.arrays import FloatArray
from spp_export.data.artifacts import open_artifacts
from spp_export.models.session import open_session

BLOCKS = (1536, 768, 384, 192, 96, 48)
_KEEP = 0.8


def diagonal_blocks(second: FloatArray, width: int) -> FloatArray:
    """The diagonal blocks [n,b,b] of a matrix [m,m]; b is `width`, which must divide m."""
    starts = range(0, len(second), width)
    return np.stack([second[i : i + width, i : i + width] for i in starts])


def lost(weight: FloatArray, second: FloatArray) -> dict[str, float]:
    """Share of the output energy lost by plain slicing and by a re-fit on blocks of each width."""
    energy = np.square(weight).sum(axis=0) * np.diagonal(second)
    kept = np.sort(np.argsort(-energy)[: int(_KEEP * len(energy))])
    shares = {"slice": residual(weight, second, kept, weight[:, kept])}
    for width in BLOCKS:
        refitted = refit_blocks(weight, diagonal_blocks(second, width), kept)
        shares[str(width)] = residual(weight, second, kept, refitted)
    return shares


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the mean over every fourth layer of the default model."""
    options = parser(__doc__).parse_args(arguments)
    session = open_session()
    parts = calibration_parts(open_artifacts(None, "demo", session.source), None, (), Mixing(1, 0))
    moments = gather_parts(session, parts, ("mlp",))
    layers = range(1, session.source.shape.num_layers, 4)
    rows = [
        lost(layer_weights(session.source, layer).down, moments.blocks("mlp", layer)[0])
        for layer in layers
    ]
    mean: dict[str, Any] = {
        name: round(float(np.mean([row[name] for row in rows])), 5) for name in rows[0]
    }
    lines = [
        f"{name if name == 'slice' else f'blocks of {name}':15} {share:8.4%} lost"
        for name, share in mean.items()
    ]
    finish(options, {"machine": machine(), "layers": list(layers), "lost": mean}, *lines)


if __name__ == "__main__":
    main()

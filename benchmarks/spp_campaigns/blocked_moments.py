"""What blocks of moments cost the re-fit of down_proj: `python -m spp_campaigns.blocked_moments`.

Wide MLPs keep their moments in blocks of at most 1536 channels. The default model's 1536 fit in
one, so it can show what smaller blocks lose against the whole: the share of down_proj's output
energy that is lost with a fifth of the channels removed, those that write least.

What the whole costs is measured on one layer of a 7B model's shape, 3584 x 18,944, with nine tenths
of its weights zero and inputs that are correlated: gathering moments over 2,048 tokens and the
re-fit, in blocks and whole, each in a fresh process.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from spp_bench.processes import held, peak, run_fresh
from spp_campaigns.command import finish, machine, parser
from spp_export.calibration.activations import SecondMoments, channel_block
from spp_export.calibration.mixture import Mixing, calibration_parts, gather_parts
from spp_export.calibration.moments import layer_weights
from spp_export.calibration.refit import refit_blocks, residual
from spp_export.common.arrays import FloatArray
from spp_export.data.artifacts import open_artifacts
from spp_export.models.session import open_session

BLOCKS = (1536, 768, 384, 192, 96, 48)
_KEEP = 0.8
# A layer of a 7B model, and the text that its moments are of.
_WIDE = {"hidden": 3584, "channels": 18_944, "tokens": 2048}
# What inputs of a wide layer have in common.
_FACTORS = 256


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


def wide_layer(block: int | None) -> dict[str, float]:
    """Moments and re-fit of the wide layer in this process, in blocks of so many channels or whole:
    seconds of each, peak memory, and the share of energy lost by the true moments of its inputs."""
    random = np.random.default_rng(0)
    hidden, channels, tokens = _WIDE.values()
    weight = random.standard_normal((hidden, channels), dtype=np.float32)
    weight *= random.random(weight.shape, dtype=np.float32) < 0.1
    mixing = random.standard_normal((_FACTORS, channels), dtype=np.float32)
    factors = random.standard_normal((tokens, _FACTORS), dtype=np.float32) / _FACTORS**0.5
    inputs = factors @ mixing + random.standard_normal((tokens, channels), dtype=np.float32)
    gathered = SecondMoments(1, channels, place="down", block=block)
    before, start = held(), time.perf_counter()
    values = torch.from_numpy(inputs)
    for first in range(0, tokens, 512):
        part = values[first : first + 512]
        gathered.see(0, part, torch.zeros(len(part), dtype=torch.long))
    blocks = gathered.products(0).div_(tokens).numpy()
    after = time.perf_counter()
    kept = np.sort(random.permutation(channels)[: int(_KEEP * channels)])
    refitted = refit_blocks(weight, blocks, kept)
    seconds, memory = time.perf_counter() - after, peak() - before
    change = weight.copy()
    change[:, kept] -= refitted
    # The inputs' covariance is F^T F / factors + 1.
    true = np.square(mixing @ change.T).sum() / _FACTORS + np.square(change).sum()
    energy = np.square(mixing @ weight.T).sum() / _FACTORS + np.square(weight).sum()
    return {
        "moments_s": round(after - start, 2),
        "refit_s": round(seconds, 2),
        "peak_bytes": memory,
        "moment_bytes": blocks.nbytes,
        "lost": round(float(true / energy), 5),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the mean over every fourth layer of the default model."""
    made = parser(__doc__)
    made.add_argument("--no-wide", action="store_true", help="without the layer of a 7B model")
    options = made.parse_args(arguments)
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
    wide = (
        {}
        if options.no_wide
        else {
            name: run_fresh(wide_layer, block)
            for name, block in (("blocks", channel_block(_WIDE["channels"])), ("whole", None))
        }
    )
    for name, row in wide.items():
        lines.append(
            f"{_WIDE['channels']} channels, {name}: moments {row['moments_s']} s, re-fit "
            f"{row['refit_s']} s, peak {row['peak_bytes'] / 1e9:.1f} GB, {row['lost']:.2%} lost"
        )
    document = {"machine": machine(), "layers": list(layers), "lost": mean}
    finish(options, {**document, "wide": {**_WIDE, **wide}}, *lines)


if __name__ == "__main__":
    main()

"""Yardsticks of an evaluation: the dense model in fewer bits, whose loss users know."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from spp_export.evaluation.harness.rows import HALF, ROUNDED
from spp_export.models.checkpoint.checkpoint import Checkpoint
from spp_export.models.checkpoint.reader import read_float
from spp_export.models.families import Feature, Role
from spp_export.models.hub import dequantised_record
from spp_export.models.session import Session
from spp_export.slicing.projections import Projection, Projections, ProjectionsOnDisk

# A weight [out, in] as a few bits store it.
Rounding = Callable[[NDArray[np.floating]], NDArray[np.float32]]
_FEW_BITS, _MOST_BITS = 4, 8
# The smallest group of weights with a scale of its own that is common.
_GROUP = 32


def yardsticks(session: Session) -> tuple[str, ...]:
    """Those that say something of a model: a dtype that it does not compute in anyway, and fewer
    bits than its weights were rounded to before."""
    half = (HALF,) if session.dtype != "bfloat16" else ()
    # Rounding knows the projections that are cut, and experts are most of a model.
    whole = session.source.family.down
    return half if not whole or quantised_bits(session.source) else (*half, *ROUNDED)


def quantised_bits(source: Checkpoint) -> int | None:
    """To how many bits a checkpoint's weights have been quantised before they were dequantised,
    whatever dtype they are stored in now; None where they have not.

    What `--dequantize` made says so. Elsewhere 4 bits are told by the weights, of which a group of
    32 in a row then has at most 16 values; more bits cannot be told.
    """
    recorded = (dequantised_record(source.path) or {}).get("bits")
    if type(recorded) is int and 1 <= recorded <= _MOST_BITS:
        return recorded
    family = source.family
    roles = tuple(name for name in (family.query, family.gate or family.up) if name)
    few = (_values_in_groups(source.weight(role, 0)) <= 2**_FEW_BITS for role in roles)
    return _FEW_BITS if all(few) else None


def _values_in_groups(weight: NDArray[np.floating]) -> int:
    """Most different values in a whole group of a weight [out, in]."""
    whole = weight.shape[1] // _GROUP * _GROUP
    if not whole:  # too narrow to tell
        return _GROUP
    groups = np.sort(weight[:, :whole].reshape(-1, _GROUP), axis=1)
    changes = np.count_nonzero(np.diff(groups, axis=1), axis=1)
    return int(changes.max()) + 1


def rounded_projections(source: Checkpoint, rounding: Rounding) -> Projections:
    """Every projection of every layer, rounded whenever it is asked for. Embeddings, norms and the
    language model head stay as they are."""

    source.family.refuse(
        (Feature.FUSED, Feature.NO_GATE, Feature.MIXERS, Feature.EXPERTS),
        "rounding of weights",
        "Compare with other criteria.",
    )

    def read(layer: int, role: Role) -> Projection:
        weight = read_float(source.tensor(source.family.projection(role), layer))
        return Projection(torch.from_numpy(np.ascontiguousarray(rounding(weight))))

    roles = [role for role in Role if source.family.projection(role)]
    return ProjectionsOnDisk(
        {
            (layer, role): partial(read, layer, role)
            for layer in range(source.shape.num_layers)
            for role in roles
        }
    )

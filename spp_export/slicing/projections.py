"""Re-fitted projections, in memory and on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from spp_export.models.families import Role


@dataclass(frozen=True)
class Projection:
    """Another weight of a projection: of o_proj and down_proj [d, kept inputs] in order, and maybe
    a bias [d]; of the others [kept outputs, d] in order, and their biases stay."""

    weight: Tensor
    bias: Tensor | None = None


# (layer, role) -> what stands in that projection's place.
Projections = Mapping[tuple[int, Role], Projection]


class ProjectionsOnDisk(Projections):
    """Projections that are read each time they are asked for: together they are as large as a
    good part of the model."""

    def __init__(self, read: Mapping[tuple[int, Role], Callable[[], Projection]]) -> None:
        self._read = read

    def __getitem__(self, key: tuple[int, Role]) -> Projection:
        return self._read[key]()

    def __contains__(self, key: object) -> bool:
        return key in self._read  # by itself a mapping would read, and hide a KeyError of that

    def __iter__(self) -> Iterator[tuple[int, Role]]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)

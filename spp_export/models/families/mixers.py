"""What mixes tokens beside softmax attention, as data: its tensors, and which layers have it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from spp_export.common.errors import ModelError
from spp_export.common.json_files import shown
from spp_export.models.families.experts import product, value_of
from spp_export.models.shape import Tensors


@dataclass(frozen=True)
class Mixers:
    """Layers with other mixers than softmax attention, none of which is cut.

    `name` is what plan and report call such mixers: a plural, of which they say that they stay.
    `tensors` are those of a layer that has one, as of `Experts`, `everywhere` those of every layer.
    The others are values of config.json's list `layer_types`, by which layers differ: `kinds` have
    one, all layers where there are none; `heads` have heads, all that have no such mixer where
    there are none; `channels` have an MLP, all where there are none. `by_kind` are further tensors
    of a kind, `cached` the elements that it caches of a token, `unread` what files may have of it
    that no model reads. `of_heads`: a mixer is as wide as the model's heads, so their number cannot
    be another for the whole model; `of_channels` the same of the width of MLPs.
    """

    name: str
    tensors: Mapping[str, str] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    of_heads: bool = False
    of_channels: bool = False
    everywhere: Mapping[str, str] = field(default_factory=dict)
    by_kind: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    cached: Mapping[str, str] = field(default_factory=dict)
    unread: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def modules(self) -> frozenset[str]:
        """The modules whose tensors these are, relative to a layer."""
        places = {*self.tensors, *(place for kind in self.by_kind.values() for place in kind)}
        return frozenset(place.partition("?")[0].rpartition(".")[0] for place in places)

    def read(self, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
        """What a `ModelShape` has of them: the tensors of every layer's mixer, the layers without
        heads and those without channels, what is cached beside heads, and what is not read.

        Raises ModelError for a kind of layer, or a size, of which nothing is known.
        """
        kinds = self._kinds(config, layers)
        tensors = {kind: self._of_kind(config, kind) for kind in kinds}
        cached = (product(config, self.cached[kind]) for kind in kinds if kind in self.cached)
        return {
            "mixers": tuple(tensors[kind] for kind in kinds),
            "without_heads": frozenset(
                i for i, kind in enumerate(kinds) if not self._has(kind, self.heads)
            ),
            "without_channels": frozenset(
                i for i, kind in enumerate(kinds) if self.channels and kind not in self.channels
            ),
            "cached_beside": sum(cached),
            "unread": frozenset(
                f"{i}.{name}" for i, kind in enumerate(kinds) for name in self.unread.get(kind, ())
            ),
        }

    def _of_kind(self, config: Mapping[str, Any], kind: str) -> Tensors:
        has_mixer = not self.kinds or kind in self.kinds
        listed = (self.tensors if has_mixer else {}, self.by_kind.get(kind, {}), self.everywhere)
        return tuple(x for tensors in listed for x in tensors_of(config, tensors))

    def _has(self, kind: str, heads: tuple[str, ...]) -> bool:
        return kind in heads if heads else not self.kinds or kind not in self.kinds

    def _kinds(self, config: Mapping[str, Any], layers: int) -> list[str]:
        if not self.kinds:
            return [""] * layers
        known = {*self.kinds, *self.heads, *self.channels}
        listed: Any = config.get("layer_types")
        named = isinstance(listed, list) and all(kind in list(known) for kind in listed)
        if not named or len(listed) != layers:
            raise ModelError(
                f"config.json: layer_types must name one of {', '.join(sorted(known))} for each of "
                f"{layers} layers, got {shown(listed)}. Fetch the model again."
            )
        kinds: list[str] = listed
        return kinds


def tensors_of(
    config: Mapping[str, Any], tensors: Mapping[str, str]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of tensors that are there, as of `Experts`."""
    for place, sizes in tensors.items():
        name, _, flag = place.partition("?")
        if not flag or value_of(config, flag):
            yield name, tuple(product(config, word) for word in sizes.split())

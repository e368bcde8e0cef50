"""Who exports, and how each of them is asked. Imports nothing that exports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from spp_export.planning import Plan

# (dense model, plan, empty directory)
Export = Callable[[Path, Plan, Path], None]


@dataclass(frozen=True)
class Candidate:
    """An exporter: `prepare`, given the dense model, imports what it needs and returns what is
    measured. `package` is what it needs installed beside this project."""

    name: str
    what: str
    prepare: Callable[[Path], Export]
    package: str | None = None


def _spp(model: Path) -> Export:
    from spp_campaigns.peers.by_spp import export

    return export


def _transformers(model: Path) -> Export:
    from spp_campaigns.peers.by_transformers import export
    from spp_campaigns.peers.dense import import_classes

    import_classes(model)
    return export


def _torch_pruning(
    model: Path,
    *,
    kv_heads: Literal["plan", "graph"],
    attention: Literal["eager", "sdpa"] = "eager",
    pickled: bool = False,
) -> Export:
    from spp_campaigns.peers.by_torch_pruning import export
    from spp_campaigns.peers.dense import import_classes

    import_classes(model)
    return partial(export, kv_heads=kv_heads, attention=attention, pickled=pickled)


TORCH_PRUNING = "torch-pruning"
_CANDIDATES = (
    Candidate("spp", "streams slices from safetensors to safetensors", _spp),
    Candidate("transformers", "from_pretrained, index_select, save_pretrained", _transformers),
    Candidate(
        "torch-pruning",
        "its graph, KV heads set to the plan's by hand, save_pretrained as in its LLM example",
        partial(_torch_pruning, kv_heads="plan"),
        TORCH_PRUNING,
    ),
    Candidate(
        "torch-pruning pickle",
        "the same, torch.save of the module as its README says",
        partial(_torch_pruning, kv_heads="plan", pickled=True),
        TORCH_PRUNING,
    ),
    Candidate(
        "torch-pruning graph",
        "its graph's own groups, eager attention, torch.save",
        partial(_torch_pruning, kv_heads="graph", pickled=True),
        TORCH_PRUNING,
    ),
    Candidate(
        "torch-pruning graph sdpa",
        "the same with transformers' default attention",
        partial(_torch_pruning, kv_heads="graph", attention="sdpa", pickled=True),
        TORCH_PRUNING,
    ),
)
CANDIDATES = {candidate.name: candidate for candidate in _CANDIDATES}

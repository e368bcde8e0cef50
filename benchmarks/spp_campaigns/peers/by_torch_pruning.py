"""Torch-Pruning by its low-level interface, since its pruners choose heads by themselves.

A group of its dependency graph says what goes with given rows of a projection. For grouped-query
attention the graph takes a KV head away with any one of its query heads. Its own pruner therefore
empties the group's entries for k_proj and v_proj; with `kv_heads="plan"` they are set to what the
plan removes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp  # type: ignore[import-untyped, import-not-found, unused-ignore]

from spp_campaigns.peers.check import PICKLE
from spp_campaigns.peers.in_memory import elements, load, note_sizes, removed
from spp_export.planning import Plan


def export(
    model: Path, plan: Plan, out: Path, *, kv_heads: str, attention: str, pickled: bool
) -> None:
    """Prune group by group, then save.

    Raises ValueError if the graph leaves nothing of a projection.
    """
    dense = load(model, attn_implementation=attention)
    head_dim = dense.model.layers[0].self_attn.head_dim
    graph = _graph(dense)
    for index, kept in enumerate(plan.layers):
        layer = dense.model.layers[index]
        attn = layer.self_attn
        query = removed(kept.query_heads, attn.q_proj.out_features // head_dim)
        kv = removed(kept.kv_heads, attn.k_proj.out_features // head_dim)
        rows = elements(kv, head_dim).tolist()
        by_hand = {attn.k_proj: rows, attn.v_proj: rows} if kv_heads == "plan" else {}
        what = f"layer {index}, query heads {query}"
        _prune(graph, attn.q_proj, elements(query, head_dim).tolist(), by_hand, what)
        if kept.channels is not None:
            gate = layer.mlp.gate_proj
            channels = removed(kept.channels, gate.out_features)
            _prune(graph, gate, channels, {}, f"layer {index}, {len(channels)} channels")
    note_sizes(dense)
    if pickled:
        torch.save(dense, out / PICKLE)
    else:
        dense.save_pretrained(out)


def _graph(model: Any) -> Any:
    """The traced graph, without the cache and with only the logits, since the tracer takes
    tensors."""
    tokens = torch.arange(4)[None]
    return tp.DependencyGraph().build_dependency(
        model,
        example_inputs={"input_ids": tokens, "use_cache": False},
        output_transform=lambda output: output.logits,
        verbose=False,
    )


def _prune(
    graph: Any, root: Any, rows: list[int], by_hand: dict[Any, list[int]], what: str
) -> None:
    if not rows:
        return
    group = graph.get_pruning_group(root, tp.prune_linear_out_channels, rows)
    for index, (dependency, _) in enumerate(group):
        if dependency.target.module in by_hand:
            group[index] = (dependency, by_hand[dependency.target.module])
    # Not check_pruning_group: it counts a KV head's rows once for each of its query heads.
    if emptied := _emptied(group):
        raise ValueError(f"{what}: with these the graph removes every row of {', '.join(emptied)}")
    group.prune()


def _emptied(group: Any) -> list[str]:
    """Projections that a group leaves without a row."""
    return [
        dependency.target.name.partition(" ")[0]
        for dependency, rows in group
        if isinstance(dependency.target.module, torch.nn.Linear)
        and dependency.handler == tp.prune_linear_out_channels
        and set(rows) >= set(range(dependency.target.module.out_features))
    ]

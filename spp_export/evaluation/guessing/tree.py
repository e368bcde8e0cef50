"""Where the parts of a tiny model live, by names of modules and shapes of weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spp_export.common.errors import ModelError
from spp_export.evaluation.guessing.stock import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    POSITIONS,
)

# The first letters of a projection's name, without the w of "wq".
_ROLES = (("query", r"q"), ("key", r"k"), ("value", r"v"), ("output", r"o|dense"))


@dataclass(frozen=True)
class Tree:
    """A model as a record has it.

    record    fields of `Family` that names and shapes tell; switches as true or false
    head_dim  elements of a head
    every_head  whether each query head has a KV head of its own
    norms     of the stream, relative to a layer, in the order in which they are made
    outside   the same beside the layers, with their full names
    tied      whether the head is the embedding
    """

    record: Mapping[str, Any]
    head_dim: int
    every_head: bool
    norms: tuple[str, ...]
    outside: tuple[str, ...]
    tied: bool


class _Tensors:
    """Names and shapes of stored tensors; what has been explained is taken out."""

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        self.left = {name: tuple(tensor.shape) for name, tensor in named}

    def take(self, modules: Sequence[str], kind: str) -> bool:
        """Whether modules have a weight or a bias. Raises ModelError where some have and others
        have not."""
        names = [f"{module}.{kind}" for module in modules]
        there = [name for name in names if self.left.pop(name, None) is not None]
        if there and len(there) < len(names):
            missing = next(name for name in names if name not in there)
            raise ModelError(f"it has {there[0]} and no {missing}; records have both or none.")
        return bool(there)

    def check_none_left(self) -> None:
        """Raises ModelError for a tensor that no field of a record describes."""
        for name, shape in self.left.items():
            raise ModelError(f"records have no field for {name}, of shape {list(shape)} here.")


def read_tree(model: Any, width: int) -> Tree:
    """Of a tiny model whose MLPs have so many channels. Raises ModelError, with the name of what no
    record can describe."""
    place, layers = _layers(model)
    here, other = (dict(_Tensors(layer.state_dict().items()).left) for layer in layers)
    for name in sorted(here.keys() | other.keys()):
        if here.get(name) != other.get(name):
            raise ModelError(
                f"{name} is {here.get(name)} in one layer and {other.get(name)} in another."
            )
    if experts := [n for n, shape in here.items() if len(shape) > 2 or ".experts." in n]:
        raise ModelError(f"it has experts, as in {experts[0]}; their records are not guessed.")
    layer, parameters = layers[0], _Tensors(layers[0].state_dict().items())
    linears = {
        name: _size(module)
        for name, module in layer.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    mlp, others = _mlp(linears, width)
    attention, head_dim, every_head = _attention(others)
    named = {**attention, **mlp}
    queries = list(dict.fromkeys(named[role] for role in ("query", "key", "value")))
    wide = [name for name in dict.fromkeys((named["gate"], named["up"])) if name]
    parameters.take(list(linears), "weight")
    record: dict[str, Any] = {
        **named,
        "layers": place,
        "attention": named["output"].partition(".")[0],
        "qkv_bias": parameters.take(queries, "bias"),
        "output_bias": parameters.take([named["output"]], "bias"),
        "mlp_bias": parameters.take([*wide, named["down"]], "bias"),
        "transposed": any(isinstance(module, Conv1D) for module in layer.modules()),
    }
    inside = (f"{record['attention']}.", f"{named['down'].rpartition('.')[0] or '?'}.")
    own = list(_norms(layer))
    norms = [(name, module) for name, module in own if not name.startswith(inside)]
    within = [(name, module) for name, module in own if name.startswith(inside)]
    record |= _head_norms(within, head_dim, parameters)
    record["wide_norms"] = _wide_norms(within, named, head_dim, parameters)
    outside, beside = _outside(model, place, record)
    for kind in ("weight", "bias"):
        inner = parameters.take([name for name, _ in norms], kind)
        outer = outside.take([name for name, _ in beside], kind)
        if norms and beside and inner != outer:
            raise ModelError(f"some of its norms have a {kind}; in records all have or none.")
        record[f"norm_{kind}"] = inner or outer
    for name, module in (*norms, *beside):
        if _weighted(module) and module.weight.shape != (HIDDEN,):
            raise ModelError(f"{name} is no norm of the stream: {module.weight.shape[0]} wide.")
    rest = parameters.left
    record["head_rows"] = tuple(name for name, shape in rest.items() if shape == (HEADS,))
    record["fixed"] = {name: shape for name, shape in rest.items() if prod(shape) == 1}
    for name in (*record["head_rows"], *record["fixed"]):
        del rest[name]
    parameters.check_none_left()
    outside.check_none_left()
    return Tree(
        record,
        head_dim,
        every_head,
        tuple(name for name, _ in norms),
        tuple(name for name, _ in beside),
        model.get_output_embeddings().weight is model.get_input_embeddings().weight,
    )


def _layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == LAYERS
            and list(module.parameters())
        ):
            return name, module
    raise ModelError("it has no list of layers.")


def _size(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """Inputs and outputs."""
    first, second = module.weight.shape
    return (first, second) if isinstance(module, Conv1D) else (second, first)


def _mlp(
    linears: Mapping[str, tuple[int, int]], width: int
) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """Gate, up and down, and the projections that are none of them."""
    wide = [
        name for name, size in linears.items() if size in ((HIDDEN, width), (HIDDEN, 2 * width))
    ]
    narrow = [name for name, size in linears.items() if size == (width, HIDDEN)]
    fused = [name for name in wide if linears[name][1] == 2 * width]
    if len(narrow) != 1 or len(wide) not in (1, 2) or (fused and len(wide) > 1):
        raise ModelError(
            f"of a layer's projections {len(wide)} widen the stream to the MLP's width and "
            f"{len(narrow)} narrow it; records have one or two, and one."
        )
    gate = next((name for name in wide if "gate" in name), wide[0])
    up = next((name for name in wide if name != gate), wide[0])
    record = {"gate": gate if fused or len(wide) > 1 else "", "up": up, "down": narrow[0]}
    return record, {name: size for name, size in linears.items() if name not in {*wide, *narrow}}


def _attention(sizes: Mapping[str, tuple[int, int]]) -> tuple[dict[str, str], int, bool]:
    """Query, key, value, output; elements of a head; whether each has a KV head of its own."""
    whole = {name: outs for name, (_, outs) in sizes.items()}
    if len(sizes) == 2:
        output = next((name for name, outs in whole.items() if outs == HIDDEN), "")
        fused = next(name for name in sizes if name != output)
        record = dict.fromkeys(("query", "key", "value"), fused) | {"output": output}
    elif len(sizes) == 4:
        record = _by_name(list(sizes))
    else:
        names = ", ".join(sizes) or "nothing"
        raise ModelError(f"its attention projects by {names}; records have q, k, v and o.")
    head_dim = sizes.get(record["output"], (0, 0))[0] // HEADS
    query = HEADS * head_dim
    parts = {
        every: sum(
            {"query": query, "key": kv * head_dim, "value": kv * head_dim}[role]
            for role in ("query", "key", "value")
        )
        for every, kv in ((False, KV_HEADS), (True, HEADS))
    }
    total = sum(whole[name] for name in dict.fromkeys(record[r] for r in ("query", "key", "value")))
    every_head = next((every for every, rows in parts.items() if rows == total), None)
    if head_dim not in (HEAD_DIM, HIDDEN // HEADS) or every_head is None:
        raise ModelError(
            f"the rows of {' and '.join(dict.fromkeys(record.values()))} are no whole heads, of "
            "queries as many as the config says and of keys and values as many as it says."
        )
    return record, head_dim, every_head


def _by_name(names: Sequence[str]) -> dict[str, str]:
    """By the letters of their names; where these say nothing, by the usual order."""
    last = {name: name.rpartition(".")[2].lower().removeprefix("w").lstrip("_") for name in names}
    found = {
        role: [name for name in names if re.match(letters, last[name])] for role, letters in _ROLES
    }
    if all(len(matching) == 1 for matching in found.values()):
        return {role: matching[0] for role, matching in found.items()}
    return {role: name for (role, _), name in zip(_ROLES, names, strict=True)}


def _norms(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, inner in module.named_modules():
        if "norm" in type(inner).__name__.lower() and not list(inner.children()):
            yield name, inner


def _head_norms(
    norms: Sequence[tuple[str, Any]], head_dim: int, parameters: _Tensors
) -> dict[str, Any]:
    """Norms of queries and keys head by head; those without weights are attention's own matter."""
    sizes = {name: tuple(module.weight.shape) for name, module in norms if _weighted(module)}
    of_heads = [n for n, size in sizes.items() if size[-1:] == (head_dim,)]
    letters = {name.rpartition(".")[2][0]: name for name in of_heads}
    if letters.keys() != {"q", "k"}:
        return {"qk_norm": False}
    modules = [letters["q"], letters["k"]]
    parameters.take(modules, "weight")
    return {
        "qk_norm": True,
        "query_norm": letters["q"],
        "key_norm": letters["k"],
        "head_norms": len(sizes[letters["q"]]) == 2,
        "qk_norm_bias": parameters.take(modules, "bias"),
    }


def _wide_norms(
    norms: Sequence[tuple[str, Any]],
    named: Mapping[str, str],
    head_dim: int,
    parameters: _Tensors,
) -> dict[str, str]:
    """Norms over all query heads, KV heads or channels at once, and which of them."""
    attention = f"{named['output'].partition('.')[0]}."
    wide = {}
    for name, module in norms:
        if not _weighted(module) or f"{name}.weight" not in parameters.left:
            continue
        (size,) = module.weight.shape
        of_keys = name.rpartition(".")[2].startswith("k") or size == KV_HEADS * head_dim
        wide[name] = ("K" if of_keys else "Q") if name.startswith(attention) else "C"
    parameters.take(list(wide), "weight")
    return wide


def _weighted(norm: Any) -> bool:
    return getattr(norm, "weight", None) is not None


def _outside(
    model: Any, place: str, record: dict[str, Any]
) -> tuple[_Tensors, list[tuple[str, Any]]]:
    """What is beside the layers, the head, embeddings and positions taken out, and its norms."""
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        raise ModelError("it has no head that writes logits.")
    parameters = _Tensors(
        (name, value)
        for name, value in model.state_dict().items()
        if not name.startswith(f"{place}.")
    )
    record |= {"embedding": names[embedding], "head": names[head]}
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not embedding]
    parameters.take([record["embedding"]], "weight")
    parameters.left.pop(f"{record['head']}.weight", None)
    record["head_bias"] = parameters.take([record["head"]], "bias")
    for table in tables[:1]:
        parameters.take([names[table]], "weight")
        record |= {"positions": names[table], "more_positions": len(table.weight) - POSITIONS}
    beside = [(n, m) for n, m in _norms(model) if not n.startswith(f"{place}.")]
    return parameters, beside

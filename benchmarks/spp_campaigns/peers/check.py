"""Whether a result loads and is right.

Loads it like a user who has torch and transformers but not this project: nothing of `spp_export`
is imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from spp_bench.processes import single_line

PICKLE = "model.pth"
TOKENS = 48


def check(
    out: Path, source: Path, plan: Path, reference: Path | None, precision: str
) -> dict[str, Any]:
    """Load, compare every tensor with the planned slice of the source, compare logits.

    reference: the file of the masked model's logits, computed in `precision`; without one the model
    is loaded as stored.
    """
    model, how = load(out, getattr(torch, precision) if reference else "auto")
    layers = json.loads(plan.read_text(encoding="utf-8"))["layers"]
    result = {"loads": how, **_tensors(model, source, layers)}
    return result | _difference(model, reference) if reference else result


def load(out: Path, dtype: Any) -> tuple[Any, str]:
    """The model, and what it was loaded with.

    Raises ValueError where from_pretrained would refuse tensors or make them up.
    """
    if (out / PICKLE).exists():
        model = torch.load(out / PICKLE, weights_only=False)
        # The same for every exporter: eager attention computes its softmax in float32 in any case.
        model.set_attn_implementation("sdpa")
        return (model if dtype == "auto" else model.to(dtype)).eval(), "torch.load"
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    own_code = "auto_map" in config
    # As without the last two options, but with a report of what it refuses.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        out,
        dtype=dtype,
        trust_remote_code=own_code,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model, report = loaded
    for key in ("mismatched_keys", "missing_keys", "unexpected_keys"):
        if report[key]:
            raise ValueError(
                f"from_pretrained: {len(report[key])} {key.replace('_', ' ')}, "
                f"such as {_first(report[key])}"
            )
    return model.eval(), "from_pretrained" + (", with the code beside it" if own_code else "")


def _first(keys: Any) -> str:
    """The first name, with the stored shape and the config's where both are known."""
    key = min(keys)
    if isinstance(key, str):
        return key
    return f"{key[0]} {list(key[1])}, by config.json {list(key[2])}"


def _difference(model: Any, reference: Path) -> dict[str, Any]:
    """How far the logits are from the reference's, or the reason why there are none."""
    try:
        difference = float(np.abs(logits(model) - np.load(reference)).max())
    except (RuntimeError, ValueError) as error:  # of layers whose sizes do not fit together
        return {"run_error": single_line(f"{type(error).__name__}: {error}")}
    if not np.isfinite(difference):
        return {"run_error": "logits are not finite"}
    return {"difference": difference}


def logits(model: Any) -> NDArray[np.floating[Any]]:
    """Logits [1, T, V] of random tokens, the same for every exporter."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, TOKENS), generator=random)
    with torch.no_grad():
        values: NDArray[np.floating[Any]] = model(input_ids=tokens, use_cache=False).logits.numpy()
    return values


def _tensors(model: Any, source: Path, layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many tensors are not what the plan asks for, and which is the first."""
    state = model.state_dict()
    head_dim = model.config.head_dim
    wrong, first, count = 0, "", 0
    for name, tensor in _stored(source):
        count += 1
        for axis, kept in _kept(name, layers, head_dim):
            tensor = tensor.index_select(axis, kept)
        got = state.get(name)
        if got is None or not torch.equal(got, tensor.to(got.dtype)):
            wrong += 1
            shape = None if got is None else list(got.shape)
            first = first or f"{name} {shape}, asked {list(tensor.shape)}"
    return {"tensors": count, "wrong_tensors": wrong, **({"first_wrong": first} if wrong else {})}


def _stored(source: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  not a mapping
                yield name, file.get_tensor(name)


def _kept(
    name: str, layers: Sequence[Mapping[str, Any]], head_dim: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """(axis, indices) that the plan keeps of a dense tensor, by its name."""
    parts = name.split(".")
    if parts[:2] != ["model", "layers"]:
        return
    layer, module = layers[int(parts[2])], parts[-2]
    if module in ("q_proj", "k_proj", "v_proj", "o_proj"):
        heads = layer["kv_heads" if module in ("k_proj", "v_proj") else "query_heads"]
        rows = torch.tensor([head * head_dim + i for head in heads for i in range(head_dim)])
    elif module in ("gate_proj", "up_proj", "down_proj") and layer["channels"] is not None:
        rows = torch.tensor(layer["channels"])
    else:
        return
    if module not in ("o_proj", "down_proj"):
        yield 0, rows
    elif parts[-1] == "weight":
        yield 1, rows

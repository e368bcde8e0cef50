"""Pools, scenarios, and every case's checkpoint, artifacts and exports, each made once."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import CASES, mask_in_torch, read_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import spp_export
from spp_export.common.errors import SppError
from spp_export.common.progress import quiet_transformers, show_progress
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.planning import LayerPlan, Plan

CASE = {case.name: case for case in CASES}
# Domains that no tokenizer can confuse.
ALPHABETS = {"capitals": "ABCDEFGHIJKLM", "figures": "0123456789+-=", "small": "abcdefghijklm"}
KEEP = 0.7
CONSUMERS = ("self_attn.o_proj", "mlp.down_proj")

# -I leaves out PYTHONPATH and the working directory; what is installed is refused by name.
_ALONE = """
import json, socket, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "spp_export":
            raise ImportError("the checkpoint asked for spp_export")

def no_network(*_):
    raise OSError("the checkpoint asked for the network")

sys.meta_path.insert(0, Refuse())
socket.socket.connect = no_network
out, prompt, jobs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
"""
_LOAD = """
import numpy, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

for index, (path, remote) in enumerate(jobs):
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, trust_remote_code=remote
    )
    # A tokenizer is found by way of the config's class.
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=remote)
    batch = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        numpy.save(f"{out}/{index}.npy", model(**batch).logits.numpy())
        ids = model.generate(**batch, do_sample=False, max_new_tokens=6, min_new_tokens=6)
    print(json.dumps([type(model).__module__, ids.tolist()]))
"""
_PIPELINE = """
import torch
from transformers import pipeline

for path, remote in jobs:
    generate = pipeline(
        "text-generation", model=path, dtype=torch.float64, trust_remote_code=remote
    )
    asked = dict(do_sample=False, max_new_tokens=6, min_new_tokens=6)
    ids = generate(prompt, return_tensors=True, **asked)[0]["generated_token_ids"]
    text = generate(prompt, return_full_text=False, **asked)[0]["generated_text"]
    print(json.dumps([type(generate.model).__module__, ids, text]))
"""


def texts(domain: str, count: int, seed: int, shortest: int = 12, longest: int = 50) -> list[str]:
    """Random prompts over a domain's alphabet, all different."""
    rng = random.Random(f"{domain} {seed}")
    letters = ALPHABETS[domain]
    return [
        rng.choice(letters)
        + "".join(rng.choices(letters + "  ", k=rng.randint(shortest, longest)))
        + rng.choice(letters)
        for _ in range(count)
    ]


def write_texts(path: Path, prompts: Sequence[str]) -> Path:
    """A file of paragraphs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(prompts) + "\n", encoding="utf-8")
    return path


def write_pools(root: Path) -> Path:
    """Three domains of ten training and five validation prompts."""
    for seed, domain in enumerate(ALPHABETS):
        write_texts(root / domain / "train.txt", texts(domain, 10, seed))
        write_texts(root / domain / "val.txt", texts(domain, 5, seed + 100))
    return root


@dataclass(frozen=True)
class Exported:
    """An export, what it was made from and what `export` returned."""

    path: Path
    dense: Path
    result: spp_export.ExportResult

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor on disk, as the safetensors library reads it."""
        return stored(self.path)

    @property
    def group_size(self) -> int:
        """Query heads per KV head of the dense model."""
        config = read_config(self.dense)
        return config["num_attention_heads"] // config["num_key_value_heads"]

    @property
    def unpadded(self) -> dict[str, torch.Tensor]:
        """`tensors` without the columns of o_proj that pad a layer."""
        tensors, dim = self.tensors, read_config(self.dense)["head_dim"]
        for index, layer in enumerate(self.result.plan.layers):
            heads = written_heads(self.result.plan, layer, self.group_size)
            real = [i * dim + j for i, head in enumerate(heads) if head >= 0 for j in range(dim)]
            name = f"model.layers.{index}.self_attn.o_proj.weight"
            tensors[name] = tensors[name][:, real]
        return tensors


# Of prompts the text alone is read, which is what most tests compute again; every layer of these
# tiny models keeps something that can be tested.
_PLANNED = {"answer_tokens": 0, "allow_empty_layers": False}


class Workshop:
    """Makes what tests ask for, once, for every process that works in `root`.

    Nobody changes what it returns; copies may be changed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._results: dict[str, Any] = {}
        self.pools = self.once("pools", lambda: write_pools(root / "pools"))
        scenario = texts("figures", 8, 7)
        self.scenario = self.once("scenario", lambda: write_texts(root / "sums.txt", scenario))

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returned to the first process that asked; the others wait for it."""
        if name not in self._results:
            record = self.root / "made" / name
            record.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{record}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if record.exists():
                    self._results[name] = pickle.loads(record.read_bytes())
                else:
                    self._results[name] = make()
                    record.write_bytes(pickle.dumps(self._results[name]))
        return self._results[name]

    def dense(self, name: str) -> Path:
        """The case's checkpoint."""
        return self.once(f"{name} dense", lambda: CASE[name].make(self.root / name))

    def artifacts(self, name: str) -> Path:
        """What `probe` finds in the pools."""

        def make() -> Path:
            path = self.root / name / "artifacts"
            spp_export.probe(self.pools, path, model=str(self.dense(name)), answer_tokens=0)
            return path

        return self.once(f"{name} artifacts", make)

    def exported(self, name: str, layout: str = "per-layer", compensate: str = "none") -> Exported:
        """The scenario's export of a case at `KEEP`; layout "padded" is ragged, with --pad."""

        def make() -> Exported:
            path = self.root / name / f"{layout}-{compensate}"
            padded = layout == "padded"
            options = {"layout": "ragged" if padded else layout, "compensate": compensate}
            result = self.export(name, path, pad=padded, **options)
            return Exported(path, self.dense(name), result)

        return self.once(f"{name} {layout}-{compensate}", make)

    def export(self, name: str, path: Path | None, **asked: Any) -> spp_export.ExportResult:
        """Export a case anew; `asked` are options of `export`."""
        text = {} if "plan" in asked else _PLANNED
        return spp_export.export(
            self.scenario,
            path,
            model=str(self.dense(name)),
            artifacts=self.artifacts(name),
            **{"keep": KEEP, **text, **asked},
        )

    def plan(self, name: str, **asked: Any) -> spp_export.PlanResult:
        """Plan for a case; `asked` are options of `plan`, and `artifacts` other ones."""
        artifacts = asked.pop("artifacts", None) or self.artifacts(name)
        return spp_export.plan(
            self.scenario,
            model=str(self.dense(name)),
            artifacts=artifacts,
            **{**_PLANNED, **asked},
        )


def write_plan(path: Path, dense: Path, layers, **changes) -> Path:
    """A plan as one would write it by hand: nothing that is not needed."""
    document = {
        "schema_version": 1,
        "model": {"fingerprint": open_source(dense).fingerprint, "source": "my-model"},
        "layout": "per-layer",
        "compensation": "none",
        "layers": [
            {"kv_heads": list(layer.kv_heads), "query_heads": list(layer.query_heads)}
            | ({} if layer.channels is None else {"channels": list(layer.channels)})
            for layer in layers
        ],
    }
    path.write_text(json.dumps(document | changes))
    return path


@contextmanager
def refused(error: type[SppError], match: str):
    """The error, in one line."""
    with pytest.raises(error, match=match) as caught:
        yield caught
    assert "\n" not in str(caught.value)


@contextmanager
def stages(begun: list[str]):
    """The stages of work that begin inside."""

    @contextmanager
    def listen(description, total):
        begun.append(description)
        yield lambda done: None

    with show_progress(listen):
        yield


@contextmanager
def nothing_begun():
    """No stage of work begins."""
    begun: list[str] = []
    with stages(begun):
        yield
    assert begun == []


def kept_heads(result: spp_export.PlanResult) -> set[tuple[int, int]]:
    """(layer, query head) pairs."""
    layers = result.plan.layers
    return {(index, head) for index, layer in enumerate(layers) for head in layer.query_heads}


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of every safetensors file of a directory."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, by relative name."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def load(path: Path, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A checkpoint by transformers alone; `spp_export` has been imported."""
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def load_elsewhere(
    out: Path, prompt: str, jobs: Sequence[tuple[str, bool]]
) -> list[tuple[str, list[list[int]], torch.Tensor]]:
    """Class, greedy continuation and logits in float64 of checkpoints, by one fresh interpreter
    without this package and without a network.

    `jobs` are (path, whether remote code is trusted); `out` is a folder to work in.
    """
    return [
        (*line, torch.from_numpy(np.load(out / f"{index}.npy")))
        for index, line in enumerate(_alone(_LOAD, out, prompt, jobs))
    ]


def pipelines_elsewhere(
    out: Path, prompt: str, jobs: Sequence[tuple[str, bool]]
) -> list[tuple[str, list[int], str]]:
    """Module of the class, ids of prompt and greedy continuation, and the continuation's text, by
    `transformers.pipeline` in an interpreter like that of `load_elsewhere`."""
    return [(*line,) for line in _alone(_PIPELINE, out, prompt, jobs)]


def _alone(script: str, out: Path, prompt: str, jobs: Sequence[tuple[str, bool]]) -> list[Any]:
    """What a script prints, one JSON value a line, without this package and without a network."""
    result = subprocess.run(
        [sys.executable, "-I", "-c", _ALONE + script, str(out), prompt, json.dumps(jobs)],
        cwd=out,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@contextmanager
def masked(
    dense: Path, layers: Sequence[LayerPlan], written: Mapping[str, torch.Tensor] | None = None
):
    """The dense model in float64 with removed units masked.

    `written` has the tensors of a compensated export, whose columns and biases of o_proj and
    down_proj then take the place of the dense model's.
    """
    model = load(dense)
    for index, layer in enumerate(layers if written else ()):
        for name in CONSUMERS:
            module = model.model.layers[index].get_submodule(name)
            prefix = f"model.layers.{index}.{name}"
            weight = torch.zeros_like(module.weight)
            stays = columns(layer, model.config.head_dim, name)
            weight[:, stays] = written[f"{prefix}.weight"].double()
            module.weight = torch.nn.Parameter(weight)
            if f"{prefix}.bias" in written:
                module.bias = torch.nn.Parameter(written[f"{prefix}.bias"].double())
    with mask_in_torch(model, layers):
        yield model


def written_heads(plan: Plan, layer: LayerPlan, group_size: int) -> list[int]:
    """Source indices of a layer's query heads in the order of the files, -1 for zeros."""
    groups = [
        [head for head in layer.query_heads if head // group_size == group]
        for group in layer.kv_heads
    ]
    widest = max(map(len, groups)) if plan.padded else 0
    return [head for heads in groups for head in heads + [-1] * (widest - len(heads))]


def columns(layer: LayerPlan, head_dim: int, module: str = CONSUMERS[0]) -> Any:
    """Columns of o_proj or down_proj that a layer keeps."""
    if module == CONSUMERS[1]:
        return slice(None) if layer.channels is None else list(layer.channels)
    return [head * head_dim + i for head in layer.query_heads for i in range(head_dim)]


def tokens(batch: int = 2, length: int = 23) -> torch.Tensor:
    """Random ids of bytes."""
    return torch.randint(3, 259, (batch, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B,S,V]."""
    return model(ids).logits

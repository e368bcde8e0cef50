"""Random checkpoints of any size, plans for them, and the time of `cp` on the same disk."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from spp_bench.processes import status_bytes
from spp_export.common.json_files import dump_json
from spp_export.models.checkpoint.checkpoint import Checkpoint
from spp_export.models.checkpoint.dtypes import Bits
from spp_export.models.checkpoint.writer import ShardWriter, TensorEntry, plan_shards
from spp_export.models.families import family_of
from spp_export.planning import LayerPlan, Plan

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 5632,
    "vocab_size": 32000,
    "dtype": "bfloat16",
}
# (KV groups, query heads in each) that layers keep in turn: 0.80, 0.875, 0.75 of the heads.
KEPT = ((8, 3), (7, 4), (6, 4))
SHARD_BYTES = 1_000_000_000
# Of the model, in memory at once at most: the page cache of what is read and written, and tensors.
_COPIES = 4


def build(directory: Path, gigabytes: float) -> None:
    """Write a random bf16 model of the Llama family of about this size, untied and sharded, one
    block at a time."""
    family = family_of(CONFIG)
    single = family.read_shape({**CONFIG, "num_hidden_layers": 1}, 2)
    outside = 2 * single.parameters(())
    layer = 2 * single.parameters(single.layers) - outside
    config = {**CONFIG, "num_hidden_layers": max(1, round((gigabytes * 1e9 - outside) / layer))}
    shape = family.read_shape(config, 2)
    entries = [
        TensorEntry(spec.name, "BF16", spec.shape) for spec in family.tensors(shape, shape.layers)
    ]
    with ShardWriter(directory, plan_shards(entries, SHARD_BYTES)) as writer:
        random = np.random.default_rng(0)
        for entry in writer.order:
            writer.write(entry.name, _random_blocks(entry, random))
    (directory / "config.json").write_text(dump_json(config), encoding="utf-8")


def _random_blocks(entry: TensorEntry, random: np.random.Generator) -> Iterator[Bits]:
    left = entry.nbytes // 2
    while left:
        count = min(left, 1 << 21)
        # Without the top bit of the exponent, every bit pattern is a number below 2.
        yield random.integers(0, 1 << 16, count, dtype=np.uint16) & np.uint16(0xBFFF)
        left -= count


def plan_for(source: Checkpoint, channels: float = 1.0) -> Plan:
    """A per-layer plan over regular layers; `channels` is the share of MLP channels kept."""
    shape, random = source.shape, np.random.default_rng(1)
    layers = []
    for index in range(shape.num_layers):
        groups, heads = KEPT[index % len(KEPT)]
        first = index % (shape.kv_heads - groups + 1)
        kept = tuple(range(first, first + groups))
        size = shape.group_size
        query = tuple(group * size + head for group in kept for head in range(size - heads, size))
        chosen = random.permutation(shape.channels)[: round(shape.channels * channels)]
        width = None if channels == 1 else tuple(sorted(chosen.tolist()))
        layers.append(LayerPlan(kept, query, width))
    return Plan(source.fingerprint, source.name, "per-layer", "none", tuple(layers))


def copy(model: Path, target: Path) -> tuple[float, float]:
    """Seconds of `cp`, and of `cp` with a flush of what it wrote."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(model), str(target)], check=True)
    copied = time.perf_counter()
    subprocess.run(["sync", *map(str, target.iterdir())], check=True)
    return copied - start, time.perf_counter() - start


def prepare(model: Path, cold: bool) -> None:
    """Let earlier writes reach the disk, and drop the model from the page cache or read it into
    it."""
    os.sync()
    for path in model.iterdir():
        with path.open("rb") as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 24):
                    pass
    touch_memory(_COPIES * sum(path.stat().st_size for path in model.iterdir()))


def touch_memory(nbytes: int) -> None:
    """Take so many bytes, or half of what is free, and give them back. The host of a virtual
    machine may have taken away what was long unused, and 2 s may pass until a GB is there again."""
    np.ones(min(nbytes, psutil.virtual_memory().available // 2), np.uint8)


@contextmanager
def watching_memory() -> Iterator[dict[str, int]]:
    """Yield an object whose `peak` is the most anonymous memory held meanwhile; what is mapped
    from files is not counted."""
    anonymous, done = {"peak": 0}, threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            anonymous["peak"] = max(anonymous["peak"], status_bytes("RssAnon"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield anonymous
    finally:
        done.set()
        thread.join()

"""Writes the weights of a slim model from a dense one and a plan, a few megabytes at a time.

One thread reads, checks and slices, one writes, one hashes and one flushes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from spp_export.common.errors import CheckpointError
from spp_export.common.manifest import FileRecord
from spp_export.common.publish import require_free_space
from spp_export.models.checkpoint.checkpoint import Checkpoint, outputs_first
from spp_export.models.checkpoint.dtypes import Bits, Floats, all_finite, from_float
from spp_export.models.checkpoint.header import show
from spp_export.models.checkpoint.reader import BLOCK_BYTES, blocks, read_float
from spp_export.models.checkpoint.writer import (
    DEFAULT_SHARD_BYTES,
    ShardWriter,
    TensorEntry,
    ahead,
    plan_shards,
)
from spp_export.models.families import Role, TensorSpec
from spp_export.planning import Plan, validate_plan
from spp_export.planning.written import kept_tensors, slim_shape
from spp_export.slicing.cut import (
    narrows_experts,
    real_elements,
    slice_experts,
    slice_rows,
    written_units,
)

# The whole dense weight [outputs, inputs] as floats -> the slim one.
Refit = Callable[[Floats], Floats]
# (layer, OUTPUT or DOWN) -> what is added to that projection's bias, [hidden_size].
Biases = Mapping[tuple[int, Role], Floats]

# Blocks that are read before they can be written.
_AHEAD = 4


@dataclass(frozen=True)
class WrittenWeights:
    """What was written: hash of each file by name, elements and bytes of all tensors."""

    records: Mapping[str, FileRecord]
    parameters: int
    nbytes: int


def write_slim_weights(
    source: Checkpoint,
    plan: Plan,
    out_dir: Path,
    *,
    replaced: Callable[[TensorSpec], Refit | None] = lambda spec: None,
    biases: Biases | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
    kept: bool = True,
) -> WrittenWeights:
    """Write what `plan` keeps of `source` to `out_dir` as safetensors, in the stored dtypes.

    Tensors pass through memory in blocks, copied ones too, since each value is checked and each
    byte hashed; the kernel's own copy (copy_file_range) then takes no less of the processor than
    writing what was read, 0.25 against 0.22 s per GB on ext4. Only a tensor for which `replaced`
    gives a function is in memory as a whole, and is rounded back to its stored dtype. `biases` are
    added to the output projections; where the source has none, those that `slim_shape` gives
    appear, zero where `biases` says nothing. `progress` is called with bytes done and bytes in all.
    What is not `kept` is read and thrown away: it is neither hashed nor flushed.

    Raises PlanError for a plan of another model or a bias that the family cannot hold,
    CheckpointError for a source tensor with a value that is not finite, OutputError where the
    disk does not take the data.
    """
    validate_plan(plan, source.shape, source.fingerprint)
    job = SlimTensors(source, plan, replaced, biases or {})
    shards = plan_shards(job.entries(), max_shard_bytes)
    total = sum(shard.nbytes for shard in shards)
    require_free_space(out_dir, total)
    done = 0

    def counted(blocks: Iterator[Bits]) -> Iterator[Bits]:
        nonlocal done
        for block in blocks:
            yield block
            done += block.nbytes
            if progress:
                progress(done, total)

    with (
        ShardWriter(out_dir, shards, kept=kept) as writer,
        ahead(job.blocks(writer.order), _AHEAD) as made,
    ):
        for entry, pairs in groupby(made, key=itemgetter(0)):
            writer.write(entry.name, counted(block for _, block in pairs))
    parameters = sum(int(np.prod(entry.shape)) for entry in writer.order)
    return WrittenWeights(writer.records, parameters, total)


class SlimTensors:
    """Where the data of each slim tensor comes from."""

    def __init__(
        self,
        source: Checkpoint,
        plan: Plan,
        replaced: Callable[[TensorSpec], Refit | None],
        biases: Biases,
    ) -> None:
        family, self._source, self._plan = source.family, source, plan
        self._replaced = replaced
        shape = slim_shape(source, plan.layout, {role for _, role in biases})
        pairs = list(kept_tensors(family, shape, plan))
        # By their names on disk.
        self._slim = {family.on_disk(slim.name): slim for slim, _ in pairs}
        self._dense = {family.on_disk(slim.name): dense for slim, dense in pairs}
        self._biases = {
            family.on_disk(f"{family.layer_name(layer, family.projection(role))}.bias"): value
            for (layer, role), value in biases.items()
        }
        assert self._biases.keys() <= self._slim.keys(), "a bias of a layer that does not exist"

    def entries(self) -> Iterator[TensorEntry]:
        """Every tensor of the slim checkpoint, in file order."""
        for name, spec in self._slim.items():
            yield TensorEntry(name, self._dtype(name), spec.shape)

    def blocks(self, entries: Iterable[TensorEntry]) -> Generator[tuple[TensorEntry, Bits]]:
        """The bits of tensors in blocks, in row order, each beside its tensor."""
        for entry in entries:
            for block in self._blocks(entry):
                yield entry, block

    def changes(self, entry: TensorEntry) -> bool:
        """Whether a slim tensor is another than the source's of its name."""
        spec = self._dense[entry.name]
        if spec.name not in self._source.tensors or entry.name in self._biases:
            return True
        if spec.name != self._slim[entry.name].name:  # an expert with another number
            return True
        units = written_units(spec, self._plan, self._source.shape)
        return units is not None or self._replaced(spec) is not None

    def _blocks(self, entry: TensorEntry) -> Iterator[Bits]:
        spec = self._dense[entry.name]
        stored, added = self._source.tensors.get(spec.name), self._biases.get(entry.name)
        if stored is None or added is not None:
            old = read_float(stored) if stored else np.zeros(entry.shape)
            yield from encoded(old if added is None else old + added, entry)
            return
        refit, units = self._replaced(spec), written_units(spec, self._plan, self._source.shape)
        if refit is not None:
            values = refit(outputs_first(self._source.family, read_float(stored)))
            if units is not None:
                values = _filled(values, units, spec.step)
            yield from encoded(outputs_first(self._source.family, values), entry)
            return
        row, layer = 0, self._plan.layers[spec.layer or 0]
        for block in blocks(stored):
            if units is None:
                yield block
            elif narrows_experts(spec, layer):
                yield slice_experts(block, spec, layer, row)
            else:
                yield slice_rows(block, spec, units, row)
            row += len(block)

    def _dtype(self, name: str) -> str:
        """The stored dtype; that of the weight beside it for a bias the source does not have."""
        tensors, name = self._source.tensors, self._dense[name].name
        stored = tensors.get(name) or tensors[f"{name.removesuffix('.bias')}.weight"]
        return stored.dtype


def _filled(values: Floats, units: Sequence[int], step: int) -> Floats:
    """The columns `values` of units of `step` each, and zeros where a `FILL` is among these."""
    width, real = len(units) * step, real_elements(units, step)
    if len(real) == width:
        return values
    whole = np.zeros((len(values), width), dtype=values.dtype)
    whole[:, real] = values
    return whole


def encoded(
    values: Floats,
    entry: TensorEntry,
    *,
    origin: str = "a compensated value",
    advice: str = "Use a larger ridge, or no compensation.",
) -> Iterator[Bits]:
    """`values` in the entry's dtype, in blocks of rows.

    Raises CheckpointError, with what they are and the advice, for one that does not fit.
    """
    assert values.shape == entry.shape, f"{entry.name}: {values.shape} is not {entry.shape}"
    step = max(1, BLOCK_BYTES * len(values) // values.nbytes)
    for start in range(0, len(values), step):
        bits = from_float(np.ascontiguousarray(values[start : start + step]), entry.dtype)
        if not all_finite(bits, entry.dtype):
            raise CheckpointError(
                f"tensor {show(entry.name)}: {origin} does not fit {entry.dtype}. {advice}"
            )
        yield bits

"""One export of a checkpoint of any size, in this process: seconds, peak memory, bytes.

`python -m spp_campaigns.scale_child JOB MODEL OUT`; JOB is one of `JOBS`. Imports are not timed.
"""

from __future__ import annotations

import importlib
import json
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spp_campaigns.big_checkpoints import plan_for
from spp_export.common.json_files import dump_json
from spp_export.common.manifest import write_manifest
from spp_export.common.publish import publish
from spp_export.models.checkpoint.checkpoint import Checkpoint, open_source
from spp_export.slicing.config import slim_config
from spp_export.slicing.weights import write_slim_weights

_STATUS = Path("/proc/self/status")


def slice_only(source: Checkpoint, target: Path) -> None:
    """Slice, write, hash, flush and publish."""
    with publish(target) as work:
        written = write_slim_weights(source, plan_for(source), work)
        write_manifest(work, written.records)


def as_onnx(source: Checkpoint, target: Path) -> None:
    """The same, then a graph in the stored precision instead of the slim checkpoint."""
    from spp_export.formats.onnx import OnnxOptions
    from spp_export.formats.onnx.write import write_onnx

    plan = plan_for(source)
    with publish(target) as work:
        slim = work / "slim"
        slim.mkdir()
        write_slim_weights(source, plan, slim)
        layers = plan.layer_shapes(source.shape)
        config = slim_config(source.config, source.family, source.shape, layers, plan.layout)
        (slim / "config.json").write_text(dump_json(config), encoding="utf-8")
        write_onnx(slim, work, OnnxOptions(precision="bf16"))
        shutil.rmtree(slim)
        write_manifest(work)


def verified(source: Checkpoint, target: Path) -> None:
    """The whole of `spp export --plan`, with every check."""
    import spp_export

    spp_export.export(output=target, model=str(source.path), plan=plan_for(source))


# Job -> what it does, and the modules whose import is not part of it.
JOBS: Mapping[str, tuple[Callable[[Checkpoint, Path], None], tuple[str, ...]]] = {
    "slice": (slice_only, ()),
    "onnx": (as_onnx, ("spp_export.models.modeling", "onnx", "onnx_ir")),
    "verify": (verified, ("spp_export.models.modeling", "spp_export.models.layerwise")),
}


def run(job: str, model: Path, target: Path) -> dict[str, Any]:
    """Do a job and tell what it took."""
    work, modules = JOBS[job]
    for module in modules:
        importlib.import_module(module)
    before = _resident()
    with watching_memory() as peak:
        start = time.perf_counter()
        source = open_source(model)
        work(source, target)
        seconds = time.perf_counter() - start
    shape = source.shape
    layer = shape.parameters((shape.layer,)) - shape.parameters(())
    layers = plan_for(source).layer_shapes(shape)
    return {
        "seconds": seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_anonymous_bytes": peak["RssAnon"],
        "imports_bytes": before,
        "source_bytes": sum(tensor.nbytes for tensor in source.tensors.values()),
        "out_bytes": sum(path.stat().st_size for path in target.iterdir()),
        "largest_tensor_bytes": max(tensor.nbytes for tensor in source.tensors.values()),
        "resident_parameters": 2 * layer + 2 * shape.vocab_size * shape.hidden_size,
        "head_parameters_kept": shape.head_parameters(layers) / shape.head_parameters(shape.layers),
    }


@contextmanager
def watching_memory() -> Iterator[dict[str, int]]:
    """Yield the most anonymous memory, without what is mapped from files, while this lasts."""
    peak, done = {"RssAnon": 0}, threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak["RssAnon"] = max(peak["RssAnon"], status_bytes("RssAnon"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _resident() -> int:
    return status_bytes("VmRSS")


def status_bytes(field: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return 0


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))

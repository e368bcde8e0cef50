"""What `spp bench` may be asked. Imports nothing heavy: a help page is made from its fields."""

from __future__ import annotations

import os
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from spp_export.common.errors import UsageError
from spp_export.common.options import (
    SHARE,
    Dtype,
    Force,
    Model,
    PathLike,
    Seed,
    argument,
    command,
    option,
    output_option,
)
from spp_export.models.shape import Units

GRID, MEASURING, PROFILE = "Grid", "Measuring", "Table of latency"
SHAPE = "Shape without weights"


@dataclass(frozen=True)
class BenchOptions(Force, Seed, Dtype, Model):
    """A benchmark of directories or of a shape, or a table of latency."""

    out: tuple[PathLike, ...] = argument(
        (), metavar="OUT...", help="Directories written by spp: safetensors, ONNX or GGUF."
    )
    _: KW_ONLY
    batch: tuple[int, ...] = option(
        (1,), panel=GRID, least=1, metavar="N", help="Batch size; repeatable, 1 by default."
    )
    context: tuple[int, ...] = option(
        (128,),
        panel=GRID,
        least=1,
        metavar="N",
        help="Tokens of a prompt; repeatable, 128 by default.",
    )
    new_tokens: int = option(
        32, panel=GRID, least=1, metavar="N", help="Tokens decoded after each prompt."
    )
    rounds: int = option(
        9,
        panel=MEASURING,
        least=1,
        metavar="N",
        help="Times that every model runs, in turn; one more round warms up.",
    )
    threads: int | None = option(
        None,
        panel=MEASURING,
        least=1,
        metavar="N",
        help="Threads of every engine; all physical cores by default.",
    )
    memory: bool = option(True, panel=MEASURING, help="Measure memory, a fresh process per model.")
    genai: bool = option(
        True,
        panel=MEASURING,
        help="Also run ONNX directories in onnxruntime-genai, where it is installed.",
    )
    output: PathLike | None = output_option(
        None, help="Results as JSON; cells that the file has are not measured again."
    )
    plot: PathLike | None = option(
        None, metavar="DIR", help="Draw speed-up and memory over context as PNGs."
    )
    shape: str | None = option(
        None,
        panel=SHAPE,
        metavar="NAME",
        help="Instead of OUT and --model, a published model's sizes with random weights: "
        "qwen2.5-7b, llama-3.1-8b, ...; a wrong name lists all.",
    )
    keep: tuple[float, ...] = option(
        (),
        panel=SHAPE,
        metavar="SHARE",
        numbers=SHARE,
        help="Share of the units' parameters that a plan keeps; repeatable, 0.8 by default.",
    )
    layout: tuple[Literal["per-layer", "uniform"], ...] = option(
        (),
        panel=SHAPE,
        metavar="per-layer|uniform",
        help="Layout of a plan; repeatable, per-layer by default.",
    )
    units: tuple[Units, ...] = option(
        (),
        panel=SHAPE,
        metavar="heads|channels|both",
        help="What a plan removes; repeatable, heads by default.",
    )
    profile: bool = option(
        False,
        panel=PROFILE,
        help="Instead, time the model's blocks of every size, and write the table to -o for "
        "'spp plan --cost latency'.",
    )
    phase: Literal["decode", "prefill"] = option(
        "decode", panel=PROFILE, help="Which steps the table is of."
    )

    def check(self) -> None:
        """UsageError for options that do not go together."""
        super().check()
        if self.dequantize and self.shape is not None:
            raise UsageError("--dequantize: a shape has no weights. Drop one of the two.")
        if not self.profile:
            if bool(self.out) == (self.shape is not None):
                raise UsageError(
                    "Give either directories written by 'spp export' as OUT, or --shape."
                )
            return
        for name, values in (("--batch", self.batch), ("--context", self.context)):
            if len(values) > 1:
                raise UsageError(f"{name}: a table is of one; got {', '.join(map(str, values))}.")
        if self.out:
            raise UsageError(
                f"{self.out[0]}: a table is of the dense model. Leave out the directories."
            )
        if self.output is None:
            raise UsageError("-o is missing: say where the table goes.")


@command(BenchOptions)
def bench(request: BenchOptions) -> dict[str, Any]:
    """Measure speed and memory of exports beside the dense model, with the bound on every gain.

    The document that is returned is kept in `output`; its `problems` say what makes the run fail.
    Raises ParityError, before any figure, for a model that does not compute what it should.

        document = spp_export.bench("out/chemistry", context=[128, 1024], output="bench.json")
    """
    if request.dequantize:
        from spp_export.models.dequantise import find_model

        place = find_model(request.model, dequantize=True).path
        request = replace(request, model=os.fspath(place), dequantize=False)
    if request.profile:
        return _profile(request)
    from spp_bench.bench import BenchRequest
    from spp_bench.bench import bench as bench_directories

    measured = BenchRequest(
        batches=request.batch,
        contexts=request.context,
        new_tokens=request.new_tokens,
        rounds=request.rounds,
        threads=request.threads,
        device=request.device,
        dtype=request.dtype,
        memory=request.memory,
        genai=request.genai,
        seed=request.seed,
    )
    files: dict[str, Any] = {
        "results": _path(request.output),
        "plots": _path(request.plot),
        "force": request.force,
    }
    if request.shape is None:
        return bench_directories(request.out, model=request.model, request=measured, **files)
    from spp_bench.shapes.bench import bench_shape
    from spp_bench.shapes.plans import variants

    plans = variants(request.keep, request.layout, request.units)
    return bench_shape(request.shape, plans, request=measured, **files)


def _profile(request: BenchOptions) -> dict[str, Any]:
    from spp_bench.profile import ProfileRequest, Target, profile

    assert request.output is not None
    shape = request.shape
    target = Target.of_model(request.model) if shape is None else Target.of_shape(shape)
    measured = ProfileRequest(
        phase=request.phase,
        batch=request.batch[0],
        context=request.context[0],
        threads=request.threads,
        device=request.device,
        dtype=request.dtype,
        seed=request.seed,
    )
    return profile(target, Path(request.output), request=measured, force=request.force)


def _path(path: PathLike | None) -> Path | None:
    return None if path is None else Path(path)

"""`convert`: a checkpoint that exists, slim or dense, as an ONNX or a GGUF directory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spp_export.commands.needs import (
    check_disk,
    check_memory,
    check_place,
    check_readable,
    convert_needs,
)
from spp_export.commands.requests import ConvertRequest
from spp_export.common.errors import CheckFailed, ModelError, OutputError
from spp_export.common.json_files import dump_json
from spp_export.common.manifest import check_manifest, write_manifest, wrote
from spp_export.common.options import command
from spp_export.common.publish import check_target, publish
from spp_export.data.scenario import read_scenario
from spp_export.formats.decoder import Decoder, read_decoder
from spp_export.formats.format import Job
from spp_export.formats.gguf.format import is_gguf
from spp_export.formats.gguf.options import GgufOptions
from spp_export.formats.onnx.format import is_onnx
from spp_export.formats.registry import ConvertOptions, converter, require_for
from spp_export.formats.safetensors.verify import RECOVERY_NAME
from spp_export.models.checkpoint.checkpoint import TOKENIZER_FILES, open_source
from spp_export.models.checkpoint.companions import companion, copy_companions
from spp_export.models.engines import Engine
from spp_export.models.hub import ModelLocation, locate_model
from spp_export.planning import LayerPlan, Plan, read_plan


@dataclass(frozen=True)
class ConvertResult:
    """What was written, how large it is, and what was found of it.

    form: what the card and `--json` say of the file
    """

    path: Path
    layout: str
    options: ConvertOptions
    engines: tuple[Engine, ...]
    nbytes: int
    report: Mapping[str, Any] | None
    form: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        name = "gguf" if isinstance(self.options, GgufOptions) else "onnx"
        return {
            "path": str(self.path),
            "format": name,
            "layout": self.layout,
            name: {**self.options.to_dict(), **self.form},
            "bytes": self.nbytes,
            "engines": [engine.to_dict() for engine in self.engines],
            "verify": self.report,
        }


@command(ConvertRequest)
def convert(request: ConvertRequest) -> ConvertResult:
    """Write an export of ours, or a dense model, as ONNX or GGUF; checked and published whole.

    Logits are compared with the PyTorch model's on the scenario's text, or on random tokens without
    one. Raises ParityError where they differ: then nothing is published unless `keep_failed`.

        spp_export.convert("out/chemistry", "out/chemistry-onnx", scenario="chemistry.txt")
    """
    options = request.onnx or request.gguf
    assert options
    verify = request.verify
    require_for(options, request.device if verify else None)
    prompts = () if request.scenario is None else read_scenario(request.scenario).prompts
    target = Path(request.output)
    check_target(target, request.force)
    check_place(target)
    place = locate_model(os.fspath(request.checkpoint))
    _check_source(place.path, target)
    decoder = read_decoder(place.path)
    plan = _plan(place, decoder.layout)
    made = converter(options, Job(place.path, decoder, plan, request.device, request.seed))
    _preflight(target, place.path, decoder, options, verify)
    failure: CheckFailed | None = None
    report: dict[str, Any] | None = None
    with publish(target, request.force) as work:
        made.write(work)
        if verify:
            report, failure = made.verify(work, prompts)
            (work / "verify.json").write_text(dump_json(report), encoding="utf-8")
            if failure and not request.keep_failed:
                raise failure
        (work / "plan.json").write_text(plan.to_json(), encoding="utf-8")
        copy_companions(place.path, ("LICENSE", RECOVERY_NAME), work)
        (work / "README.md").write_text(made.card(target.name, report), encoding="utf-8")
        write_manifest(work)
        files = (path for pattern in made.files for path in work.glob(pattern))
        nbytes = sum(path.stat().st_size for path in files)
    if failure:
        raise type(failure)(f"{failure} Published all the same, by --keep-failed: {target}")
    return ConvertResult(target, decoder.layout, options, made.engines, nbytes, report, made.form)


def _preflight(
    target: Path, checkpoint: Path, decoder: Decoder, options: ConvertOptions, verify: bool
) -> None:
    check_readable(checkpoint, (*TOKENIZER_FILES, "LICENSE"))
    needs = convert_needs(target, checkpoint, decoder, options, verify)
    check_disk(needs)
    check_memory(needs)


def _check_source(path: Path, target: Path) -> None:
    """ModelError for what was converted before, or for an export whose files have changed since;
    OutputError where the result would replace it."""
    if target.resolve() in (path.resolve(), *path.resolve().parents):
        raise OutputError(
            f"{target}: holds the checkpoint that is to be read. Choose another directory."
        )
    for name, converted in (("an ONNX", is_onnx(path)), ("a GGUF", is_gguf(path))):
        if converted:
            raise ModelError(
                f"{path}: is {name} directory already. Give the safetensors it was made from."
            )
    # A plan is the mark of an export whose manifest is gone or can no longer be read.
    ours = wrote(path) or (path / "plan.json").exists()
    if ours and (problems := check_manifest(path)):
        raise ModelError(f"{path}: {problems[0]}. Write the export again.")


def _plan(place: ModelLocation, layout: str) -> Plan:
    """The export's own plan; for a dense model one that keeps everything."""
    if stored := companion(place.path, "plan.json"):
        return read_plan(stored)
    if layout != "uniform":
        raise ModelError(
            f"{place.path}: has no plan.json, so not a whole export. Give the directory that "
            "'spp export' wrote."
        )
    source = open_source(place.path, place.name)
    everything = LayerPlan(
        tuple(range(source.shape.kv_heads)), tuple(range(source.shape.query_heads)), None
    )
    return Plan(
        model_fingerprint=source.fingerprint,
        model_source=source.name,
        layout="uniform",
        compensation="none",
        layers=(everything,) * source.shape.num_layers,
    )

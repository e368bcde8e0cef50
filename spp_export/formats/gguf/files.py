"""A slim or dense checkpoint as a checked GGUF directory."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from spp_export.common.errors import ModelError, OutputError, UsageError
from spp_export.common.json_files import dump_json
from spp_export.common.progress import progress
from spp_export.formats.card import gguf_card
from spp_export.formats.dequantised import write_dequantised
from spp_export.formats.format import CardFacts, Comparison, FileChecks, ModelFiles
from spp_export.formats.gguf.contents import Contents, gguf_contents
from spp_export.formats.gguf.engines import gguf_engines
from spp_export.formats.gguf.header import read_gguf
from spp_export.formats.gguf.options import FILE_VERSION, GgufOptions
from spp_export.formats.gguf.weights import GgufWeights
from spp_export.formats.gguf.write import stored_bytes, write_gguf
from spp_export.models.checkpoint.checkpoint import Checkpoint, open_checkpoint, read_config
from spp_export.models.checkpoint.reader import read_float
from spp_export.models.tokenizer import load_tokenizer, write_companions
from spp_export.planning import Plan

if TYPE_CHECKING:
    from spp_export.formats.gguf.checks import EngineResult

_KEY = "spp_gguf"


class GgufFiles(ModelFiles):
    """One GGUF file, and beside it what is needed to talk to it and to check it."""

    torch_dtype = "float32"

    def __init__(self, options: GgufOptions, checkpoint: Checkpoint, plan: Plan) -> None:
        self.contents = gguf_contents(checkpoint, options, shown_name(plan))
        self._base = plan.model_source
        self.engines = gguf_engines(self.contents.architecture.name)
        self.summary = self.contents.summary()
        self.element_bytes = self.contents.options.element_bytes
        self.nbytes = {"GGUF file": sum(stored_bytes(tensor) for tensor in self.contents.tensors)}

    def write(self, checkpoint: Path, out: Path) -> None:
        decoder = open_checkpoint(checkpoint)
        with progress("writing the GGUF file", 1.0) as bar:
            write_gguf(
                decoder,
                self.contents,
                out,
                progress=lambda done, total: bar(done / max(total, 1)),
            )
        try:
            config = gguf_config(decoder, self.contents)
            (out / "config.json").write_text(dump_json(config), encoding="utf-8")
            write_companions(checkpoint, out, config)
        except OSError as error:
            raise OutputError(f"{out}: cannot be written ({error.strerror}).") from error

    def check(self, out: Path, against: Comparison) -> FileChecks:
        """Every check. Where the file's weights are less exact than the checkpoint's, llama.cpp is
        compared with PyTorch's model of the file's, and so is a quality measured next."""
        from spp_export.formats.gguf.checks import check_engine, check_header, check_weights

        file = read_gguf(out)
        header = check_header(file, self.contents)
        if not header.passed:
            return FileChecks((header,))
        weights = GgufWeights(file, self.contents.tensors)
        checkpoint, model = open_checkpoint(against.checkpoint), None
        tensors = checkpoint.tensors
        held = check_weights(
            "weights as the checkpoint has them",
            weights,
            self.contents,
            lambda name: read_float(tensors[name]),
        )
        if not held.passed:
            return FileChecks((header, held))
        with progress("checking the file in llama.cpp", None):
            place = against.checkpoint
            tokenizer = load_tokenizer(place)
            if self.contents.options.kind != "f32":
                place = against.scratch / "dequantised"
                write_dequantised(checkpoint, weights.read, place)
                model = against.load(place)
            reference = partial(against.reference, place)
            engine = check_engine(out, self.contents, against.batches, reference, tokenizer)
        context = gguf_context(self.contents, engine)
        quantised = self.contents.options.quant is not None
        return FileChecks((header, held, *engine.checks), context, model, quantised)

    def card(self, facts: CardFacts) -> str:
        return gguf_card(
            facts.name,
            self._base,
            self.summary,
            facts.report,
            self.engines,
            facts.license_name,
            facts.slim,
            facts.converted,
        )


def gguf_context(contents: Contents, engine: EngineResult) -> dict[str, Any]:
    """What verify.json says of a file beside the checks."""
    name = engine.engine or "none: xllamacpp is not installed"
    return {"gguf": {**contents.summary(), "engine": name}}


def gguf_config(decoder: Checkpoint, contents: Contents) -> dict[str, Any]:
    """config.json of a GGUF directory, which says how the file was written."""
    recorded = {
        "architecture": contents.architecture.name,
        **contents.options.to_dict(),
        "layout": decoder.layout,
        "version": FILE_VERSION,
    }
    family = decoder.family
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        _KEY: recorded,
    }


def gguf_options(directory: Path) -> GgufOptions:
    """The form of a directory's file, from its config.json.

    Raises ModelError where spp did not write it, or another version that would write it otherwise.
    """
    recorded = read_config(directory).get(_KEY)
    if not isinstance(recorded, dict) or not recorded.keys() >= {"precision", "quant"}:
        raise ModelError(
            f"{directory}: config.json has no {_KEY}, so the file was not written by spp."
        )
    if recorded.get("version") != FILE_VERSION:
        raise ModelError(
            f"{directory}: its GGUF is of version {recorded.get('version')!r:.20}, this spp checks "
            f"version {FILE_VERSION}. Write it again, or verify it with the spp that wrote it."
        )
    options = GgufOptions(recorded["precision"], recorded["quant"])
    try:
        options.check()
    except UsageError as error:
        raise ModelError(f"{directory}: {_KEY} of config.json is malformed: {error}") from error
    if options == GgufOptions():
        raise ModelError(f"{directory}: {_KEY} of config.json names neither precision nor quant.")
    return options


def shown_name(compiled: Plan) -> str:
    """What programs that run the file call the model.

    llama.cpp takes a name with phi-3 in it to mean that special tokens swallow the spaces after
    them, so it is spelt in another way.
    """
    name = PurePosixPath(compiled.model_source).name
    return re.sub(r"(phi)-?(3)", r"\1 \2", name, flags=re.IGNORECASE) + " (spp)"

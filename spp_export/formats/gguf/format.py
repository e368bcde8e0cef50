"""GGUF, as the commands know it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_export.common.errors import ModelError, UsageError
from spp_export.formats.format import FileChecks, Format, Library, ModelFiles, Promise, RunningModel
from spp_export.formats.gguf.engines import gguf_engines
from spp_export.formats.gguf.options import BLOCK, GGUF_NAME, GgufOptions
from spp_export.models.engines import Engine

if TYPE_CHECKING:
    from spp_export.models.checkpoint.checkpoint import Checkpoint
    from spp_export.models.families import Family
    from spp_export.models.shape import LayerShape, Layout
    from spp_export.planning import Plan


class Gguf(Format[GgufOptions]):
    """A file for llama.cpp and what is built on it."""

    name = "gguf"
    title = "GGUF"
    kind = "GGUF export"
    engine = "llama.cpp"
    options = GgufOptions
    weights = "*.gguf"
    marker = GGUF_NAME
    libraries = (
        Library("gguf", "gguf", "the default model, --format gguf"),
        Library("xllamacpp", "xllamacpp", "llama.cpp, for GGUF files", "gguf"),
    )
    required = ("gguf",)
    runs = ("xllamacpp",)

    def refusal(self, family: Family, layout: Layout) -> str | None:
        from spp_export.formats.gguf.architecture import family_refusal

        return super().refusal(family, layout) or family_refusal(family, layout)

    def uniform_units(self, family: Family) -> str:
        from spp_export.formats.gguf.architecture import uniform_units

        return uniform_units(family)

    def prepare(self, options: GgufOptions, checkpoint: Checkpoint, plan: Plan) -> ModelFiles:
        from spp_export.formats.gguf.files import GgufFiles

        return GgufFiles(options, checkpoint, plan)

    def disk(
        self, options: GgufOptions, stored_dtype: str, parameters: int, verify: bool
    ) -> dict[str, int]:
        from spp_export.formats.gguf.encode import row_bytes

        kind = options.resolved(stored_dtype).kind
        return {"GGUF file": row_bytes(BLOCK, kind) * parameters // BLOCK}

    def verify(self, directory: Path, against: Promise) -> FileChecks:
        from spp_export.formats.gguf.verify import check_gguf_directory

        return check_gguf_directory(directory, against)

    def facts(self, directory: Path) -> dict[str, Any]:
        from spp_export.formats.gguf.files import gguf_options
        from spp_export.formats.gguf.header import read_gguf

        form, file = gguf_options(directory), read_gguf(directory)
        kinds = Counter(tensor.kind for tensor in file.tensors.values())
        architecture = file.metadata.get("general.architecture")
        return {
            "architecture": architecture.items if architecture else None,
            "precision": form.precision or "none",
            "quant": form.quant or "none",
            "tensors": ", ".join(f"{count} in {kind}" for kind, count in sorted(kinds.items())),
        }

    def engines_for(
        self, config: Mapping[str, Any], layout: str, layers: Sequence[LayerShape]
    ) -> tuple[Engine, ...]:
        written = config.get("spp_gguf")
        name = written.get("architecture") if isinstance(written, Mapping) else None
        return gguf_engines(name) if isinstance(name, str) else ()

    def describe(self, summary: Mapping[str, Any], size: str) -> list[str]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in summary["tensors"].items())
        lines = [f"GGUF file: architecture {summary['architecture']}, {size}; tensors: {kinds}"]
        if left := summary["not_quantised"]:
            lines.append(f"not quantised, for rows are no multiple of 32: {len(left)} tensors")
        return lines

    def refuse(self, path: Path) -> UsageError:
        """The error for a file outside of a directory that spp wrote."""
        return UsageError(
            f"{path}: of GGUF files 'spp chat' runs the directories that spp wrote. "
            "Talk to others with llama.cpp's llama-cli -m."
        )

    def run(
        self, directory: Path, *, device: str, dtype: str | None, threads: int | None
    ) -> RunningModel:
        from spp_export.formats.gguf.files import gguf_options
        from spp_export.formats.gguf.run import load_gguf

        path = min(directory.glob(self.weights))
        try:
            gguf_options(directory)
        except ModelError:
            raise self.refuse(path) from None
        return load_gguf(path, device, dtype, threads)

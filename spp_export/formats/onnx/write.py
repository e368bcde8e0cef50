"""A checkpoint as a directory that ONNX's users load: graph, weights and what stands beside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from spp_export.common.errors import ModelError, OutputError, SppError
from spp_export.common.json_files import dump_json, json_object, read_json
from spp_export.common.publish import require_free_space
from spp_export.formats.onnx.companions import genai_config, onnx_config, tokenizer_config
from spp_export.formats.onnx.graph import build_graph
from spp_export.formats.onnx.options import OnnxOptions
from spp_export.formats.onnx.recorder import share_aliases
from spp_export.formats.settings import settings_of
from spp_export.models.checkpoint.checkpoint import TOKENIZER_FILES, Checkpoint, open_checkpoint
from spp_export.models.checkpoint.companions import companion, copy_companions

GRAPH_NAME = "model.onnx"
# transformers.js asks for this very name; the others follow what the graph says.
DATA_NAME = "model.onnx_data"
# Smaller tensors stay in the graph.
_EXTERNAL_ABOVE = 1024

# bytes done, bytes in all
Advance = Callable[[int, int], None]


def write_onnx(
    checkpoint: Path, out: Path, options: OnnxOptions, *, progress: Advance | None = None
) -> None:
    """Write a dense, uniform or per-layer checkpoint to the empty directory `out`.

    Weights pass through memory one at a time. Raises ModelError or CheckpointError for a
    checkpoint that cannot be expressed, UsageError where a library is missing, OutputError where
    the disk does not take the data.
    """
    options.check()
    decoder = open_checkpoint(checkpoint)
    model = build_graph(decoder, options)
    tensors = (value.const_value for value in model.graph.initializers.values())
    total = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    require_free_space(out, total)
    done = 0

    def count(tensor: Any, _: Any) -> None:
        nonlocal done
        done += tensor.nbytes
        if progress:
            progress(done, total)

    import onnx_ir

    try:
        onnx_ir.external_data.unload_from_model(
            model, out, DATA_NAME, size_threshold_bytes=_EXTERNAL_ABOVE, callback=count
        )
        share_aliases(model, out)
        onnx_ir.save(model, out / GRAPH_NAME)
        _companions(checkpoint, out, decoder, options)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror}).") from error
    except onnx_ir.serde.SerdeError as error:
        raise _within(error) from error


def _within(error: BaseException) -> BaseException:
    """The error of ours, or of the disk, that an error of onnx_ir's wraps; else that itself."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, (SppError, OSError)):
        inner = inner.__cause__ or inner.__context__
    return error if inner is None else inner


def _companions(checkpoint: Path, out: Path, decoder: Checkpoint, options: OnnxOptions) -> None:
    config = onnx_config(
        decoder.config,
        decoder.family,
        decoder.shape,
        decoder.layers,
        decoder.layout,
        options,
        settings_of(decoder).context_length,
    )
    generation = optional_json(checkpoint, "generation_config.json")
    genai = genai_config(config, generation, decoder.layers, decoder.shape.head_dim, options)
    tokenizer = optional_json(checkpoint, "tokenizer_config.json")
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("genai_config.json", genai),
        ("tokenizer_config.json", tokenizer_config(tokenizer, options) if tokenizer else None),
    ):
        if content:
            (out / name).write_text(dump_json(content), encoding="utf-8")
    copy_companions(checkpoint, TOKENIZER_FILES, out)


def optional_json(directory: Path, name: str) -> dict[str, Any]:
    """A JSON object beside a model; empty where there is none. Raises ModelError."""
    path = companion(directory, name)
    if path is None:
        return {}
    content = read_json(path, what=name, error=ModelError)
    return json_object(content, f"{directory / name}: the document", ModelError)

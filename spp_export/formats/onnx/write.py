"""A checkpoint as a directory that ONNX's users load: graph, weights and what stands beside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from spp_export.common.errors import OutputError, SppError
from spp_export.common.json_files import dump_json
from spp_export.common.publish import require_free_space
from spp_export.formats.onnx.companions import genai_config, onnx_config, tokenizer_config
from spp_export.formats.onnx.graph import build_graph
from spp_export.formats.onnx.options import OnnxOptions, onnx_settings
from spp_export.formats.onnx.recorder import share_aliases
from spp_export.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from spp_export.models.checkpoint.companions import GENERATION_CONFIG, companion_object
from spp_export.models.families.served import GENAI
from spp_export.models.stop_tokens import stop_tokens
from spp_export.models.tokenizer import has_tokenizer, load_tokenizer, write_companions

GRAPH_NAME = "model.onnx"
# transformers.js asks for this very name; the others follow what the graph says.
DATA_NAME = "model.onnx_data"
# Smaller tensors stay in the graph.
_EXTERNAL_ABOVE = 1024

# Tensors that are read, turned and written at a time: what is gained beyond is little, and each
# is in memory.
_WRITERS = 2

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
            model,
            out,
            DATA_NAME,
            size_threshold_bytes=_EXTERNAL_ABOVE,
            callback=count,
            # Parts of a quantised weight are made together, and so one after the other.
            max_workers=1 if options.quant else _WRITERS,
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
        onnx_settings(decoder).context_length,
    )
    (out / "config.json").write_text(dump_json(config), encoding="utf-8")
    write_companions(
        checkpoint, out, config, adapt=lambda settings: tokenizer_config(settings, options)
    )
    genai = genai_config_beside(out, config, decoder, options)
    (out / "genai_config.json").write_text(dump_json(genai), encoding="utf-8")


def genai_config_beside(
    out: Path, config: dict[str, Any], decoder: Checkpoint, options: OnnxOptions
) -> dict[str, Any]:
    """genai_config.json of a directory with this config.json, by the tokenizer and the settings
    that are in it. Raises ModelError for files that are malformed."""
    generation = companion_object(out, GENERATION_CONFIG)
    tokenizer = load_tokenizer(out) if has_tokenizer(out) else None
    stop = stop_tokens(generation, config, tokenizer)
    shape, name = decoder.shape, decoder.family.model_type
    kind = name if name in GENAI else "decoder"
    return genai_config(config, generation, decoder.layers, shape.head_dim, options, stop, kind)

"""An ONNX directory as a decoder: ids in, logits out, its keys and values kept between calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spp_export.common.errors import CheckpointError, ModelError, UsageError
from spp_export.common.json_files import shown
from spp_export.formats.onnx.options import Attention, OnnxOptions
from spp_export.formats.onnx.runtime.cache import (
    ELEMENTS,
    Cache,
    GrowingCache,
    SharedCache,
    entries,
    to_float32,
)
from spp_export.formats.onnx.runtime.providers import cuda_index, runtime_errors, session
from spp_export.formats.onnx.untrusted import read_graph
from spp_export.models.checkpoint.checkpoint import read_config

GRAPH = "model.onnx"
_TABLES = ("cos_cache", "sin_cache")
_PRODUCTS = ("MatMulNBits", "MatMulInteger")
# Of MatMulNBits' accuracy levels, the one that computes in float32.
_EXACT = 1
_MOST_LAYERS, _MOST_TOKENS, _MOST_POSITIONS = 1 << 12, 1 << 24, 1 << 22

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class OrtModel:
    """A causal language model that ONNX Runtime runs.

    config          config.json, parsed
    attention       the form of the graph, which decides where rows may be padded
    kv_heads        per layer, as the graph has them; 0 for a layer without attention
    head_dim        elements of a head
    vocab_size      ids are below it
    context_length  tokens a row may have in all
    """

    path: Path
    session: Any
    device: str
    config: Mapping[str, Any]
    attention: Attention
    kv_heads: tuple[int, ...]
    head_dim: int
    vocab_size: int
    context_length: int

    @classmethod
    def load(
        cls, directory: str | Path, *, device: str = "cpu", threads: int | None = None
    ) -> OrtModel:
        """Open a directory that `spp export --format onnx` wrote.

        Raises ModelError where it is no such directory, CheckpointError where its graph is damaged,
        UsageError for a device that is missing or has no kernels for the graph's precision.
        """
        path = Path(directory)
        config = read_config(path)
        options = _options(config, path)
        options.check("cpu" if cuda_index(device) is None else "cuda")
        graph = read_graph(path).graph  # which refuses data outside the directory
        context_length = _context_length(config, graph, path)
        opened = session(path / GRAPH, device, threads)
        kv_heads, head_dim = _cache_shape(opened, config, path)
        return cls(
            path=path,
            session=opened,
            device=device,
            config=config,
            attention=options.attention,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=_vocab_size(opened, config, path),
            context_length=context_length,
        )

    def with_exact_products(self) -> OrtModel | None:
        """The same model, whose products of weights in few bits round nothing else; None where a
        product multiplies whole numbers alone."""
        graph = read_graph(self.path)
        products = [node for node in graph.graph.node if node.op_type in _PRODUCTS]
        if any(node.op_type == "MatMulInteger" for node in products):
            return None
        for node in products:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = _EXACT
        opened = session(self.path / GRAPH, self.device, None, graph.SerializeToString())
        return replace(self, session=opened)

    def logits(self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None) -> Logits:
        """Logits [B,S,V] of ids [B,S]. A mask [B,S] of 0 and 1 says which ids are real; the logits
        at the others mean nothing. Errors as of `Decoding.feed`."""
        ids = _ids(input_ids)
        return self.start(*ids.shape).feed(ids, attention_mask)

    def start(self, batch: int, capacity: int) -> Decoding:
        """An empty decoding of `batch` rows with room for `capacity` tokens each, padding counted.

        Raises UsageError for a capacity that the model was not made for.
        """
        if batch < 1 or capacity < 1:
            raise UsageError(f"{batch} rows of {capacity} tokens: expected at least one of each.")
        if capacity > self.context_length:
            raise UsageError(
                f"{capacity} tokens are more than the {self.context_length} that "
                f"{self.path} can attend to. Shorten the text or ask for fewer new tokens."
            )
        return Decoding(self, batch, capacity)


class Decoding:
    """Rows of tokens that grow call by call.

    In the form gqa each row goes on right behind its own last token, whatever the other rows'
    lengths. In the other forms all rows share their columns, and a padded column stays in the
    cache, hidden by the mask.
    """

    def __init__(self, model: OrtModel, batch: int, capacity: int) -> None:
        self.model = model
        self.batch = batch
        self.capacity = capacity
        self._binding = model.session.io_binding()
        self._logits_type = next(
            value.type for value in model.session.get_outputs() if value.name == "logits"
        )
        self._bind_logits(1)  # before the cache's outputs: the first is the logits
        self._cache = self._make_cache()
        # gqa: tokens per row. Other forms: the mask of all columns so far.
        self._lengths = np.zeros(batch, np.int64)
        self._mask = np.zeros((batch, 0), np.int64)

    def feed(self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None) -> Logits:
        """Append ids [B,S] and return their logits [B,S,V].

        A mask [B,S] of 0 and 1 says which of these ids are real; the logits at the others mean
        nothing. Padding is on the right for gqa, on either side for the other forms.

        Raises UsageError for ids or masks that the model cannot take, or where they do not fit,
        CheckpointError where the graph fails.
        """
        ids = _ids(input_ids)
        mask = np.ones_like(ids)
        if attention_mask is not None:
            mask = np.asarray(attention_mask, np.int64)
        self._check(ids, mask)
        rows = self.model.attention == "gqa"
        inputs = self._row_inputs(ids) if rows else self._column_inputs(ids, mask)
        logits = self._run(inputs)
        self._lengths = self._lengths + (mask.sum(1) if rows else ids.shape[1])
        if not rows:
            self._mask = inputs["attention_mask"]
        return logits

    def _row_inputs(self, ids: Ids) -> dict[str, Ids]:
        """Every id counts for this run, padding too: it lies behind its row's real tokens, which do
        not see it, and the row's next tokens will overwrite it."""
        ends = self._lengths + ids.shape[1]
        mask = (np.arange(ends.max()) < ends[:, None]).astype(np.int64)
        return {"input_ids": ids, "attention_mask": mask}

    def _column_inputs(self, ids: Ids, mask: Ids) -> dict[str, Ids]:
        seen = np.concatenate([self._mask, mask], axis=1)
        positions = np.maximum(seen.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        return {
            "input_ids": ids,
            "attention_mask": seen,
            "position_ids": np.ascontiguousarray(positions),
        }

    def _run(self, inputs: Mapping[str, Ids]) -> Logits:
        binding = self._binding
        with runtime_errors(str(self.model.path), self.model.device):
            for name, value in inputs.items():
                binding.bind_cpu_input(name, value)  # which keeps the array alive
            stored = self._bind_logits(inputs["input_ids"].shape[1])
            self._cache.before_run()
            self.model.session.run_with_iobinding(binding)
            self._cache.after_run()
        return to_float32(stored, self._logits_type)

    def _bind_logits(self, tokens: int) -> NDArray[Any]:
        """Memory for a run's logits; anew each time, since the caller may keep the last one's."""
        element, alike = ELEMENTS[self._logits_type]
        stored = np.empty((self.batch, tokens, self.model.vocab_size), alike)
        self._binding.bind_output("logits", "cpu", 0, element, stored.shape, stored.ctypes.data)
        return stored

    def _make_cache(self) -> Cache:
        model = self.model
        place = (model.session, self._binding, cuda_index(model.device), self.batch)
        with runtime_errors(str(model.path), model.device):
            if model.attention == "standard":
                return GrowingCache(*place)
            return SharedCache(*place, self.capacity)

    def _check(self, ids: Ids, mask: Ids) -> None:
        if ids.shape[0] != self.batch:
            raise UsageError(f"input_ids have {ids.shape[0]} rows, expected {self.batch}.")
        if ids.min() < 0 or ids.max() >= self.model.vocab_size:
            raise UsageError(f"input_ids go beyond the vocabulary of {self.model.vocab_size}.")
        if mask.shape != ids.shape or not ((mask == 0) | (mask == 1)).all():
            raise UsageError(
                f"attention_mask has shape {list(mask.shape)}, expected {list(ids.shape)} of "
                "0 and 1, for the new tokens alone."
            )
        past, new = int(self._lengths.max()), ids.shape[1]
        if past + new > self.capacity:
            raise UsageError(
                f"{new} tokens after {past} exceed the {self.capacity} that were asked for. "
                "Start with a greater capacity."
            )
        if self.model.attention == "gqa" and (np.diff(mask, axis=1) > 0).any():
            raise UsageError(
                f"{self.model.path}: attention gqa takes padding on the right only. "
                "Export with --onnx-attention gqa-bias for padding on the left or in between."
            )
        if self.model.attention != "standard" and past and new > 1 and self.batch > 1:
            raise UsageError(
                f"{self.model.path}: attention {self.model.attention} takes one token at a time "
                f"after the first call where there are several rows, got {new} for {self.batch}. "
                "Export with --onnx-attention standard, or feed the rows apart."
            )


def _ids(values: ArrayLike) -> Ids:
    ids = np.ascontiguousarray(values, np.int64)
    if ids.ndim != 2 or not ids.size:
        raise UsageError(f"input_ids have shape {list(ids.shape)}, expected [rows, tokens].")
    return ids


def _options(config: Mapping[str, Any], path: Path) -> OnnxOptions:
    stored = config.get("spp_onnx")
    if not isinstance(stored, dict):
        raise ModelError(
            f"{path}: config.json has no spp_onnx, expected a directory that "
            "'spp export --format onnx' wrote."
        )
    fields = {key: stored[key] for key in ("attention", "precision", "quant") if key in stored}
    if not all(value is None or isinstance(value, str) for value in fields.values()):
        raise ModelError(f"{path}: spp_onnx of config.json is malformed. Export it again.")
    return OnnxOptions(**fields)


def _size(config: Mapping[str, Any], key: str, path: Path, most: int) -> int:
    value = config.get(key)
    if type(value) is not int or not 1 <= value <= most:
        raise ModelError(
            f"{path}: {key} in config.json is {shown(value)}, expected a size from 1 to {most}."
        )
    return value


def _vocab_size(opened: Any, config: Mapping[str, Any], path: Path) -> int:
    """Ids by the config, for each of which the graph must give a logit."""
    size = _size(config, "vocab_size", path, _MOST_TOKENS)
    widths = [value.shape[-1:] for value in opened.get_outputs() if value.name == "logits"]
    if widths != [[size]]:
        raise CheckpointError(
            f"{path}: vocab_size in config.json is {size}, the graph gives {widths!r:.60} logits. "
            "Export it again."
        )
    return size


def _context_length(config: Mapping[str, Any], graph: Any, path: Path) -> int:
    """Tokens of a row by the config, for as many of which the graph must know a rotation."""
    length = _size(config, "max_position_embeddings", path, _MOST_POSITIONS)
    for tensor in graph.initializer:
        if tensor.name.startswith(_TABLES) and tensor.dims[:1] != [length]:
            raise CheckpointError(
                f"{path / GRAPH}: its table {tensor.name} is for {list(tensor.dims[:1])} "
                f"positions, config.json says {length}. Export it again."
            )
    return length


def _cache_shape(opened: Any, config: Mapping[str, Any], path: Path) -> tuple[tuple[int, ...], int]:
    """KV heads of every layer, and the elements of a head, from the graph's inputs."""
    layers = _size(config, "num_hidden_layers", path, _MOST_LAYERS)
    keys = {entry.past: entry for entry in entries(opened) if entry.past.endswith(".key")}
    per_layer = [keys.pop(f"past_key_values.{index}.key", None) for index in range(layers)]
    sizes = {entry.head_dim for entry in per_layer if entry}
    if keys or len(sizes) != 1:
        raise CheckpointError(
            f"{path / GRAPH}: its past_key_values are not those of {layers} layers. "
            "Export it again."
        )
    return tuple(entry.heads if entry else 0 for entry in per_layer), sizes.pop()

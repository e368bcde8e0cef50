"""A checkpoint on disk, dense or slim, checked against what its config says it must hold."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from spp_export.common.errors import CheckpointError, ModelError
from spp_export.common.json_files import read_json, shown
from spp_export.models.checkpoint.dtypes import ELEMENT_BYTES, FLOAT_DTYPES, Floats
from spp_export.models.checkpoint.header import StoredTensor, show
from spp_export.models.checkpoint.reader import model_file, read_float, same_bytes, stored_tensors
from spp_export.models.families import (
    OWN,
    Family,
    TensorSpec,
    family_of,
    known_types,
    layers_differ,
    record_of,
)
from spp_export.models.shape import LayerShape, Layout, ModelShape

CONFIG_NAME = "config.json"
# A tokenizer, whichever of these it consists of, beside its tokenizer_config.json.
TOKENIZER_FILES = (
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
# What transformers follows without being asked to trust anything: a model to put the weights on,
# repositories of kernels, another file of weights.
ADAPTER_NAME = "adapter_config.json"
_CODE_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation")
_WEIGHTS_KEY = "transformers_weights"
_MAX_PUBLIC_NAME = 120
# What changes when a model is only saved again, by another version or from another place.
_VOLATILE_KEYS = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")


_MAX_DIGITS = 9


@dataclass(frozen=True)
class Checkpoint:
    """A dense or slim checkpoint, of whose weights only headers were read.

    name     a hub id or a directory's name, never an absolute path, which would end in what users
             publish
    shape    the dense model's counts, with the biases that are in the files
    layers   what each layer really has
    layout   "uniform" where all layers are alike, as in a dense model
    tensors  those of the family, by name and in family order
    """

    path: Path
    name: str
    config: Mapping[str, Any]
    family: Family
    shape: ModelShape
    layers: tuple[LayerShape, ...]
    layout: Layout
    tensors: Mapping[str, StoredTensor]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of config, tensor names, dtypes and shapes."""
        return fingerprint(self.config, self.tensors.values())

    @property
    def dtype(self) -> str:
        """Stored dtype of the attention weights, as safetensors spells it ("BF16")."""
        first = next(index for index, layer in enumerate(self.layers) if layer.has_attention)
        return self.tensor(self.family.query, first).dtype

    @property
    def dtype_name(self) -> str:
        """The same as torch spells it ("bfloat16")."""
        return FLOAT_DTYPES[self.dtype]

    def tensor(self, module: str, layer: int | None = None, kind: str = "weight") -> StoredTensor:
        """The weight or bias of a module, by its name in the family."""
        return self.tensors[f"{self._module(module, layer)}.{kind}"]

    def weight(self, module: str, layer: int) -> Floats:
        """A projection's weight [outputs, inputs], however it is stored."""
        return outputs_first(self.family, read_float(self.tensor(module, layer)))

    def bias(self, module: str, layer: int) -> StoredTensor | None:
        """A projection's bias, where it has one."""
        return self.tensors.get(f"{self._module(module, layer)}.bias")

    def _module(self, module: str, layer: int | None) -> str:
        return module if layer is None else self.family.layer_name(layer, module)


def outputs_first(family: Family, weight: Floats) -> Floats:
    """A projection's weight [outputs, inputs] from one as the family stores it, and back."""
    return np.ascontiguousarray(weight.T) if family.transposed else weight


def open_checkpoint(path: Path, name: str | None = None) -> Checkpoint:
    """Open a checkpoint of any layout; headers and config are read, and no weights.

    Raises ModelError for a model we do not know or whose config is wrong, CheckpointError for files
    that are malformed or do not hold exactly the tensors of the config.
    """
    config = read_config(path)
    if layers_differ(config):
        return _open_slim(path, name, config)
    return _open_dense(path, name, config)


def open_source(path: Path, name: str | None = None) -> Checkpoint:
    """As `open_checkpoint`, of a dense model or a uniform slim one: what can be sliced."""
    return _open_dense(path, name, read_config(path))


def _open_dense(path: Path, name: str | None, config: Mapping[str, Any]) -> Checkpoint:
    family, stored = _stored_as(family_of(config), stored_tensors(path))
    stored = _whole_names(family, stored, config)
    shape = _shape(family, stored, config)
    _check_layers(path, shape, stored, "Fetch the model again.")
    specs = {spec.name: spec for spec in family.tensors(shape, shape.layers)}
    _check_names(path, family, shape, specs, stored, config)
    tensors = {name: stored[name] for name in specs}
    for spec in specs.values():
        _check_tensor(spec, tensors[spec.name])
    name = _public_name(path, name)
    return Checkpoint(path, name, config, family, shape, shape.layers, "uniform", tensors)


def _open_slim(path: Path, name: str | None, config: Mapping[str, Any]) -> Checkpoint:
    model_type = str(config.get("model_type"))
    family = record_of(config) if model_type.startswith(OWN) else None
    if family is None:
        raise ModelError(
            f"{path}: model_type {shown(model_type)} with per_layer_config is not supported; "
            f"known are {', '.join(f'{OWN}{name}' for name in known_types())}."
        )
    family, stored = _stored_as(family.of(config), stored_tensors(path))
    if config.get("quantization_config") is not None:
        raise ModelError(
            f"{path}: config.json has quantization_config, which spp never writes. "
            "Write the export again."
        )
    shape = _slim_shape(config, family, stored)
    _check_layers(path, shape, stored, "Write the export again.")
    listed = family.settings(config)["per_layer_config"]
    layers = _slim_layers(listed, family, shape, path)
    tensors = _slim_tensors(family, shape, layers, stored, path)
    layout: Layout = "per-layer" if all(layer.regular for layer in layers) else "ragged"
    return Checkpoint(
        path, _public_name(path, name), config, family, shape, layers, layout, tensors
    )


def _check_layers(
    path: Path, shape: ModelShape, stored: Mapping[str, StoredTensor], advice: str
) -> None:
    """Before anything is made for every layer."""
    if shape.num_layers > len(stored):
        raise CheckpointError(
            f"{path}: config.json says {shape.num_layers} layers, the files hold only "
            f"{len(stored)} tensors. {advice}"
        )


def read_config(path: Path) -> dict[str, Any]:
    """The parsed config.json of a model directory.

    Raises ModelError where it is malformed, or would have transformers load something else than
    the files that we check.
    """
    if not path.is_dir():
        raise ModelError(f"{path}: expected a model directory.")
    if os.path.lexists(path / ADAPTER_NAME):
        raise ModelError(_adapter(path))
    config = read_json(model_file(path, CONFIG_NAME), what="config", error=ModelError)
    if not isinstance(config, dict):
        raise ModelError(f"{path / CONFIG_NAME}: expected a JSON object.")
    for key in _CODE_KEYS:
        if not _names_no_code(config.get(key)):
            raise ModelError(
                f"{path}: config.json names code to fetch in {key}, and none is run. Remove it."
            )
    if config.get(_WEIGHTS_KEY) is not None:
        raise ModelError(
            f"{path}: config.json names other weights in {_WEIGHTS_KEY}, which are not read. "
            "Remove it."
        )
    return config


def _adapter(path: Path) -> str:
    if os.path.lexists(path / CONFIG_NAME):
        return (
            f"{path}: has {ADAPTER_NAME}, which would load another model in this one's place. "
            "Merge the adapter into its model, or remove the file."
        )
    return (
        f"{path}: is a LoRA adapter ({ADAPTER_NAME} and no {CONFIG_NAME}). Merge it into its "
        "model: peft.AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload()"
        ".save_pretrained(NEW_DIR), then copy the tokenizer's files."
    )


def _names_no_code(value: Any) -> bool:
    """Whether an implementation is one of the library's own; others are `repository/kernel`."""
    return value is None or (isinstance(value, str) and "/" not in value)


def fingerprint(config: Mapping[str, Any], tensors: Iterable[StoredTensor]) -> str:
    """SHA-256 of what makes a model this model: its config, and each tensor's name, dtype, shape.

    Keys of the config that change when a model is merely saved again do not count.
    """
    kept = {key: value for key, value in config.items() if key not in _VOLATILE_KEYS}
    listed = sorted((tensor.name, tensor.dtype, list(tensor.shape)) for tensor in tensors)
    text = json.dumps({"config": kept, "tensors": listed}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _element_bytes(family: Family, stored: Mapping[str, StoredTensor]) -> int:
    """Element size of the first query weights; any size where `stored` lacks them, since the check
    of names then fails."""
    last = f".{family.query}.weight"
    queries = (
        tensor
        for name, tensor in stored.items()
        if name.startswith(f"{family.layers}.") and name.endswith(last)
    )
    tensor = next(queries, None)
    return ELEMENT_BYTES[tensor.dtype] if tensor else 2


def _first_query(family: Family, stored: Mapping[str, StoredTensor]) -> StoredTensor | None:
    """The query weight of the first layer that has attention."""
    names = (f"{family.layer_name(layer, family.query)}.weight" for layer in range(len(stored)))
    return next((stored[name] for name in names if name in stored), None)


def written_tensors(directory: Path, family: Family) -> dict[str, StoredTensor]:
    """The tensors of a slice in a directory, by their names in memory; `family` is its source's.
    Errors as of `stored_tensors`."""
    return {family.in_memory(name): x for name, x in stored_tensors(directory).items()}


def _stored_as(
    family: Family, stored: Mapping[str, StoredTensor]
) -> tuple[Family, Mapping[str, StoredTensor]]:
    """The record of a decoder as it is stored, and tensors by their names in memory."""
    family = family.as_stored(stored)
    return family, {family.in_memory(name): tensor for name, tensor in stored.items()}


def _shape(
    family: Family, stored: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> ModelShape:
    """Sizes by the config; of a decoder beside a tower of vision, with what the files alone tell:
    the tensors of the tower, and whether there is a head, of which its config has two words."""
    shape = family.read_shape(config, _element_bytes(family, stored))
    if not family.inside:
        return shape
    decoder, head = f"{family.layers.rpartition('.')[0]}.", f"{family.head}."
    tower = (name for name in sorted(stored) if not name.startswith((decoder, head)))
    words = [part.get("tie_word_embeddings") for part in (config, family.settings(config))]
    tied = f"{head}weight" not in stored and words != [False, False]
    beside = tuple((name, stored[name].shape) for name in tower)
    return family.changed(shape, tied_embeddings=tied, beside=beside)


def _whole_names(
    family: Family, stored: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> Mapping[str, StoredTensor]:
    """Tensors by the names of the whole model, where they are stored by those of its decoder, as
    GPT-2 and BLOOM were published; transformers reads either."""
    first = f"{family.layer_name(0, family.query)}.weight"
    prefix = f"{first.partition('.')[0]}."
    named = config.get("architectures")
    whole = isinstance(named, list) and family.architecture in named
    if first in stored or not whole or first.removeprefix(prefix) not in stored:
        return stored
    outside = (prefix, f"{family.head}.")
    return {
        name if name.startswith(outside) else f"{prefix}{name}": tensor
        for name, tensor in stored.items()
    }


def _check_names(
    path: Path,
    family: Family,
    shape: ModelShape,
    specs: Mapping[str, TensorSpec],
    stored: Mapping[str, StoredTensor],
    config: Mapping[str, Any],
) -> None:
    head = f"{family.head}.weight"
    if specs.keys() != stored.keys():
        _check_architecture(path, family, config)
    if not shape.tied_embeddings and head not in stored:
        raise CheckpointError(
            f"{path}: tensor {show(head)} is missing, and config.json does not tie it to the "
            "embedding. If the model does, set tie_word_embeddings to true."
        )
    if missing := sorted(specs.keys() - stored.keys()):
        raise CheckpointError(
            f"{path}: {_named(missing)} missing, which a {family.model_type} model of this "
            "config has. Fetch the model again, or correct config.json."
        )
    unknown = [name for name in stored.keys() - specs.keys() if not family.is_obsolete(name, shape)]
    if shape.tied_embeddings and head in unknown:
        unknown.remove(head)
        _check_tied_copy(stored[head], stored[f"{family.embedding}.weight"])
    if unknown:
        raise CheckpointError(
            f"{path}: {_named(sorted(unknown))} unknown to the {family.model_type} family with "
            "this config. Nothing is skipped silently: remove it, or correct config.json."
        )


def _check_architecture(path: Path, family: Family, config: Mapping[str, Any]) -> None:
    """Of a model that lacks tensors, or has others: what else it may be."""
    named = config.get("architectures")
    kinds = [kind for kind in named if isinstance(kind, str)] if isinstance(named, list) else []
    if kinds and not any(kind.endswith(("ForCausalLM", family.architecture)) for kind in kinds):
        raise ModelError(
            f"{path}: is a {kinds[0]!s:.60}, which writes no text; expected "
            f"{family.architecture}. Give the causal language model that it was made from."
        )


def _check_tied_copy(head: StoredTensor, embedding: StoredTensor) -> None:
    """A head stored beside the embedding it is tied to is a second copy, and not written again."""
    if not same_bytes(head, embedding):
        raise CheckpointError(
            f"{head.file}: tensor {show(head.name)} differs from {show(embedding.name)}, and "
            "config.json ties them. Set tie_word_embeddings to false if the model has both."
        )


def _check_tensor(spec: TensorSpec, stored: StoredTensor) -> None:
    label = f"{stored.file}: tensor {show(stored.name)}"
    if stored.shape != spec.shape:
        raise CheckpointError(
            f"{label} has shape {list(stored.shape)}, expected {list(spec.shape)} from "
            "config.json. Config and weights are of different models."
        )
    if stored.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{label} is {stored.dtype}, expected one of {', '.join(FLOAT_DTYPES)}. "
            "Slice the full-precision model and quantise the result."
        )


def _named(names: list[str]) -> str:
    shown = ", ".join(show(name) for name in names[:3])
    if len(names) == 1:
        return f"tensor {shown} is"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensors {shown}{more} are"


def _slim_shape(
    config: Mapping[str, Any], family: Family, stored: Mapping[str, StoredTensor]
) -> ModelShape:
    shape = _shape(family, stored, config)
    biased = family.settings(config).get("biased_projections", [])
    known = tuple(name for name in (family.output, family.down) if name)
    if not isinstance(biased, list) or any(name not in known for name in biased):
        raise ModelError(
            f"config.json: biased_projections must be a list of {' and '.join(known)}, got "
            f"{shown(biased)}. Write the export again."
        )
    return family.changed(
        shape,
        output_bias=shape.output_bias or family.output in biased,
        down_bias=shape.down_bias or family.down in biased,
    )


def _slim_layers(
    listed: Any, family: Family, shape: ModelShape, path: Path
) -> tuple[LayerShape, ...]:
    wrong = ModelError(
        f"{path / 'config.json'}: per_layer_config must give every one of the "
        f"{shape.num_layers} layers its head counts and its width, and its experts and their width "
        "where these are less. Write the export again."
    )
    if not isinstance(listed, Mapping) or len(listed) != shape.num_layers:
        raise wrong
    digits = (key.isascii() and key.isdigit() and len(key) <= _MAX_DIGITS for key in listed)
    if not all(digits):
        raise wrong
    by_index = {int(key): value for key, value in listed.items()}
    layers = [
        _slim_layer(by_index.get(index), family, shape, sparse)
        for index, sparse in enumerate(shape.sparse)
    ]
    kept = tuple(layer for layer in layers if layer is not None)
    if len(kept) < len(layers):
        raise wrong
    existing = shape.existing(kept)
    if not any(layer.has_attention for layer in existing):
        raise ModelError(
            f"{path / 'config.json'}: no layer has attention heads. Write the export again."
        )
    return existing


def _slim_layer(entry: Any, family: Family, shape: ModelShape, sparse: bool) -> LayerShape | None:
    """One layer's entry; None where it is malformed. `sparse`: whether the layer has experts."""
    if not isinstance(entry, Mapping):
        return None
    heads: list[Any] = [entry.get(f"num_{kind}_heads") for kind in ("attention", "key_value")]
    # Where experts have the usual key, of MLPs that stay nothing is said.
    whole = shape.channels if family.width_key != "intermediate_size" else None
    sizes = [*heads, entry.get(family.width_key, whole)]
    groups = entry.get("query_groups", [])
    if not isinstance(groups, list):
        return None
    if any(type(size) is not int or size < 0 for size in (*sizes, *groups)):
        return None
    query, kv, channels = sizes
    if bool(query) != bool(kv) or 0 in groups:
        return None
    if groups and (len(groups) != kv or sum(groups) != query):
        return None
    experts, narrower = shape.experts, 0
    if sparse and family.experts:
        known = [entry[name] for name in family.experts.counts(experts) if name in entry]
        if any(type(count) is not int or count != known[0] for count in known):
            return None
        experts = known[0] if known else experts
        if not 1 <= experts <= shape.experts:
            return None
        if shape.expert_channels:
            width = entry.get(family.experts.width, shape.expert_channels)
            if type(width) is not int or not 1 <= width <= shape.expert_channels:
                return None
            narrower, channels = shape.expert_channels - width, shape.channels
    groups = tuple(groups) if len(set(groups)) > 1 else ()
    layer = LayerShape(query, kv, channels, groups, shape.experts - experts, narrower)
    return layer if layer.groups or layer.regular else None


def _slim_tensors(
    family: Family,
    shape: ModelShape,
    layers: tuple[LayerShape, ...],
    stored: Mapping[str, StoredTensor],
    path: Path,
) -> dict[str, StoredTensor]:
    expected = {spec.name: spec.shape for spec in family.tensors(shape, layers)}
    different = expected.keys() ^ stored.keys()
    odd = sorted(name for name in different if not family.is_obsolete(name, shape))
    if odd:
        more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
        where = "missing" if odd[0] in expected else "not of this model"
        raise CheckpointError(
            f"{path}: tensor {show(odd[0])}{more} is {where}. Write the export again."
        )
    for name, size in expected.items():
        tensor = stored[name]
        if tensor.shape != size:
            raise CheckpointError(
                f"{path}: tensor {show(name)} has shape {list(tensor.shape)}, "
                f"expected {list(size)} from config.json. Write the export again."
            )
        if tensor.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{path}: tensor {show(name)} is {tensor.dtype}, expected one of "
                f"{', '.join(FLOAT_DTYPES)}. Write the export again."
            )
    return {name: stored[name] for name in expected}


def _public_name(path: Path, name: str | None) -> str:
    """The name given, unless it is a path; else the directory's, or the id in a hub cache.

    It stands in plans and cards: on one line, and not longer than one.
    """
    return "".join(c if c.isprintable() else "?" for c in _name(path, name))[:_MAX_PUBLIC_NAME]


def _name(path: Path, name: str | None) -> str:
    if name and not name.startswith(("/", ".", "~")) and "\\" not in name:
        return name
    root = path.resolve()
    repository = root.parent.parent.name
    if root.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1)
    return root.name or "model"

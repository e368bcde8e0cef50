"""A dense model on disk, checked against what its config and its family say it must hold."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp_export.common.errors import CheckpointError, ModelError
from spp_export.common.json_files import read_json
from spp_export.models.checkpoint.dtypes import ELEMENT_BYTES, FLOAT_DTYPES
from spp_export.models.checkpoint.header import StoredTensor, show
from spp_export.models.checkpoint.reader import model_file, same_bytes, stored_tensors
from spp_export.models.families import Family, TensorSpec, family_of
from spp_export.models.shape import ModelShape

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
_ADAPTER_NAME = "adapter_config.json"
_CODE_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation")
_WEIGHTS_KEY = "transformers_weights"
_MAX_PUBLIC_NAME = 120
# What changes when a model is only saved again, by another version or from another place.
_VOLATILE_KEYS = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")


@dataclass(frozen=True)
class Source:
    """An opened dense model: `tensors` are those of its family, by name and in family order.

    `name` is a hub id or a directory's name, never an absolute path, which would end in what
    users publish. `fingerprint` identifies config, tensor names, dtypes and shapes (SHA-256).
    """

    path: Path
    name: str
    config: Mapping[str, Any]
    family: Family
    shape: ModelShape
    tensors: Mapping[str, StoredTensor]
    fingerprint: str

    @property
    def dtype(self) -> str:
        """Stored dtype of the attention weights, as safetensors spells it ("BF16")."""
        return self.tensors[f"{self.family.layer_name(0, self.family.query)}.weight"].dtype

    @property
    def dtype_name(self) -> str:
        """The same as torch spells it ("bfloat16")."""
        return FLOAT_DTYPES[self.dtype]


def open_source(path: Path, name: str | None = None) -> Source:
    """Open a dense model directory; headers and config are read, and no weights.

    Raises ModelError for a model we do not know or whose config is wrong, CheckpointError for
    files that are malformed or do not hold exactly the family's tensors.
    """
    config = read_config(path)
    family = family_of(config)
    stored = stored_tensors(path)
    shape = family.read_shape(config, _element_bytes(family, stored))
    if shape.num_layers > len(stored):
        raise CheckpointError(
            f"{path}: config.json says {shape.num_layers} layers, the files hold only "
            f"{len(stored)} tensors. Fetch the model again."
        )
    specs = {spec.name: spec for spec in family.tensors(shape, shape.layers)}
    _check_names(path, family, shape, specs, stored)
    tensors = {name: stored[name] for name in specs}
    for spec in specs.values():
        _check_tensor(spec, tensors[spec.name])
    return Source(
        path=path,
        name=_public_name(path, name),
        config=config,
        family=family,
        shape=shape,
        tensors=tensors,
        fingerprint=fingerprint(config, tensors.values()),
    )


def read_config(path: Path) -> dict[str, Any]:
    """The parsed config.json of a model directory.

    Raises ModelError where it is malformed, or would have transformers load something else than
    the files that we check.
    """
    if not path.is_dir():
        raise ModelError(f"{path}: expected a model directory.")
    config = read_json(model_file(path, CONFIG_NAME), what="config", error=ModelError)
    if not isinstance(config, dict):
        raise ModelError(f"{path / CONFIG_NAME}: expected a JSON object.")
    if os.path.lexists(path / _ADAPTER_NAME):
        raise ModelError(
            f"{path}: has {_ADAPTER_NAME}, which would load another model in this one's place. "
            "Merge the adapter into its model, or remove the file."
        )
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
    """Element size of the first layer's query weights; any size where `stored` lacks them, since
    the check of names then fails."""
    tensor = stored.get(f"{family.layer_name(0, family.query)}.weight")
    return ELEMENT_BYTES[tensor.dtype] if tensor else 2


def _check_names(
    path: Path,
    family: Family,
    shape: ModelShape,
    specs: Mapping[str, TensorSpec],
    stored: Mapping[str, StoredTensor],
) -> None:
    head = f"{family.head}.weight"
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
    unknown = [name for name in stored.keys() - specs.keys() if not family.is_obsolete(name)]
    if shape.tied_embeddings and head in unknown:
        unknown.remove(head)
        _check_tied_copy(stored[head], stored[f"{family.embedding}.weight"])
    if unknown:
        raise CheckpointError(
            f"{path}: {_named(sorted(unknown))} unknown to the {family.model_type} family with "
            "this config. Nothing is skipped silently: remove it, or correct config.json."
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

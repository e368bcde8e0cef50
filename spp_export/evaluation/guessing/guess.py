"""A record for an architecture that has none, put together and proven."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from spp_export.common.errors import ModelError, SppError, reason_of
from spp_export.common.json_files import shown
from spp_export.common.progress import quiet_transformers
from spp_export.evaluation.contract import prove, random_model, tokens, write_random
from spp_export.evaluation.guessing.arithmetic import computing
from spp_export.evaluation.guessing.stock import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    Stock,
    empty_model,
    read_stock,
)
from spp_export.evaluation.guessing.tree import Tree, read_tree
from spp_export.models import modeling
from spp_export.models.checkpoint.checkpoint import Checkpoint, open_source
from spp_export.models.checkpoint.reader import stored_tensors
from spp_export.models.families import Family, known
from spp_export.models.families.table import four_times
from spp_export.planning import Layout

DerivedHeadDim = Literal["", "config", "attention"]
_SWITCHED = ("qkv_bias", "output_bias", "mlp_bias", "qk_norm", "norm_weight", "head_bias")
# Fields that come with norms of queries and keys.
_HEAD_NORMS = ("query_norm", "key_norm", "head_norms", "qk_norm_bias")
# In the table, records stand in a tuple.
_LINE = 100 - 4
# One at which a line is not broken.
_SPACE = "\u00a0"


@dataclass(frozen=True)
class Guess:
    """A record, and the largest difference of logits with which each layout was proven."""

    family: Family
    proven: Mapping[Layout, float]


def guess(config: Mapping[str, Any], folder: Path) -> Guess:
    """The record of a parsed config.json's architecture, proven by tiny models in the empty
    directory `folder`.

    Raises ModelError, with what differs, for an architecture that is not transformers' own, that no
    record can describe, or whose proposal does not hold.
    """
    name = shown(config.get("model_type"))
    try:
        with quiet_transformers():
            return _guess(config, folder)
    except SppError as error:
        raise ModelError(f"no record can be guessed for {name}: {error}") from error
    except Exception as error:  # classes that nobody here knows can fail in any way
        raise ModelError(f"no record can be guessed for {name}: {reason_of(error)}") from error


def _guess(config: Mapping[str, Any], folder: Path) -> Guess:
    stock, derived = _running(read_stock(config))
    tree = read_tree(stock.model(), stock.width)
    dense = write_random(stock.config(), folder / "dense")
    model = random_model(stock.config())
    base = _with_switches(_record(stock, tree, model, derived), stock, tree, model)
    modeling.register(base.model_type)
    failed: list[ModelError] = []
    for number, family in enumerate(_orders(base)):
        computed = computing(family, tree, model, stock.config())
        family = replace(computed, more_norms=base.more_norms)
        family = _with_names_of_files(family, model, dense)
        _check_sizes(family, config, stock)
        try:
            return _proven(family, dense, folder / str(number))
        except ModelError as error:
            failed.append(error)
    raise failed[0]


def _running(stock: Stock) -> tuple[Stock, DerivedHeadDim]:
    """Tiny sizes with which the stock class runs, and what says how large a head is.

    Attention that reads a size of heads and yet is as wide as the stream has no other way to be
    narrower than attention without one.
    """
    dim = read_tree(stock.model(), stock.width).head_dim
    if dim == HEAD_DIM and _runs(stock):
        return stock, ""
    if "head_dim" in stock.keys and not stock.takes_head_dim:
        return stock.filling(), "config"
    grouped = stock.filling()
    return (grouped if _runs(grouped) else grouped.ungrouped()), "attention"


def _runs(stock: Stock) -> bool:
    try:
        random_model(stock.config())(tokens())
    except RuntimeError:  # sizes that do not fit
        return False
    return True


def _record(stock: Stock, tree: Tree, model: Any, derived: DerivedHeadDim) -> Family:
    """Names and keys, and what the stock config takes where config.json says nothing."""
    architecture, usual = type(model).__name__, stock.kind()
    if type(model).config_class is not stock.kind:
        raise ModelError(
            f"its class is {architecture}, whose config is {type(model).config_class.__name__}, "
            f"and not {stock.kind.__name__}; per-layer classes are made of a pair."
        )
    prefix = architecture.removesuffix("ForCausalLM")
    decoder = type(model.base_model).__name__
    sizes = [key for key in stock.keys if key != "max_position_embeddings"]
    sizes += ["max_position_embeddings"] if tree.record.get("positions") else []
    keys = {key: stock.keys[key] for key in sizes if key != stock.keys[key]}
    more: dict[str, Any] = {}
    if tree.every_head:
        keys["num_key_value_heads"] = ""
    width = stock.keys.get("intermediate_size", "")
    if not width:
        keys["intermediate_size"] = ""
    theta = getattr(usual, "rope_parameters", None) or {}
    more["rope_by_type"] = any(isinstance(value, Mapping) for value in theta.values())
    if not width or getattr(usual, width) is None:
        more["derive"] = four_times
    if not derived:
        more["heads_divide_hidden"] = _refuses_odd_heads(stock)
    if "sliding_window" in stock.settings:
        more["sliding"] = "listed" if "layer_types" in stock.settings else "all"
    ends = getattr(usual, "eos_token_id", None)
    return Family(
        stock.kind.model_type,
        architecture,
        **tree.record,
        **more,
        keys=keys,
        derived_head_dim=derived,
        defaults=_defaults(stock, tree, usual),
        rope_theta=_usual_theta(usual),
        config_class="" if stock.kind.__name__ == f"{prefix}Config" else stock.kind.__name__,
        decoder_class="" if decoder == f"{prefix}Model" else decoder,
        end_token=tuple(ends) if isinstance(ends, list) else ends,
        caches_queries=not tree.every_head and _cached_heads(model) == HEADS,
    )


def _refuses_odd_heads(stock: Stock) -> bool:
    """Whether the config takes no head count that does not divide the hidden size."""
    heads = {stock.keys["num_attention_heads"]: 3, stock.keys.get("num_key_value_heads", "_"): 3}
    try:
        stock.config(**heads)
    except Exception:  # each version of transformers has its own kinds
        return True
    return False


def _cached_heads(model: Any) -> int:
    with torch.no_grad():
        cache = model(tokens(), use_cache=True).past_key_values
    return int(cache.layers[0].keys.shape[1])


def _defaults(stock: Stock, tree: Tree, usual: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {}
    if getattr(usual, "tie_word_embeddings", False):
        defaults["tie_word_embeddings"] = True
    if "head_dim" in stock.keys and tree.head_dim * HEADS != HIDDEN:
        wider = stock.kind(**{stock.keys["hidden_size"]: 2 * usual.hidden_size})
        one, other = (getattr(settings, "head_dim", None) for settings in (usual, wider))
        if one is not None and one == other:
            defaults["head_dim"] = one
    if tree.record.get("positions"):
        defaults[stock.keys["max_position_embeddings"]] = usual.max_position_embeddings
    return defaults


def _usual_theta(usual: Any) -> float | None:
    """What a config takes for theta; None where it takes more than that, or other rotary settings
    by layer type."""
    settings = getattr(usual, "rope_parameters", None)
    if settings is None:
        return getattr(usual, "rope_theta", None)
    theta = settings.get("rope_theta")
    plain = settings.keys() == {"rope_theta", "rope_type"} and settings["rope_type"] == "default"
    return float(theta) if plain else None


def _with_switches(family: Family, stock: Stock, tree: Tree, model: Any) -> Family:
    """The record with the switches of config.json that bring biases and norms, or take them away.
    Turning others is refused where more changes than the record has fields for."""
    usual = stock.kind()
    family = computing(family, tree, model, stock.config())
    words: dict[str, list[str]] = {}
    changes: dict[str, Any] = {}
    refused, defaults = [], dict(family.defaults)
    for key, value in stock.switches.items():
        other = _turned(stock, key, not value)
        changed = _changed_switches(tree, other, family) if other else None
        if changed == [] and not _computes_alike(family, tree, stock, key, not value):
            changed = None
        if changed is None or other is None:
            refused.append(f"!{key}" if value else key)
        for name in changed or ():
            present = tree.record.get(name, True)
            words.setdefault(name, []).append(key if value == present else f"!{key}")
            if name == "qk_norm" and other and not present:
                changes |= {name: other.record[name] for name in _HEAD_NORMS}
        if changed != [] and getattr(usual, key) is True:
            defaults[key] = True
    flags = {
        name: "&".join(keys) if tree.record.get(name, True) else keys[0]
        for name, keys in words.items()
    }
    changes |= {name: flags[name] for name in _SWITCHED if name in flags}
    changes["more_norms"] = tuple(
        f"{norm}?{flags[norm]}" if norm in flags else norm for norm in family.more_norms
    )
    return replace(family, **changes, refused=tuple(refused), defaults=defaults)


def _computes_alike(family: Family, tree: Tree, stock: Stock, key: str, value: bool) -> bool:
    """Whether a model in which a switch is turned has the same features."""
    config = stock.config(**{key: value})
    try:
        return computing(family, tree, random_model(config), config) == family
    except Exception:  # each architecture refuses in its own way
        return False


def _turned(stock: Stock, key: str, value: bool) -> Tree | None:
    """The tree where a switch is turned; None for one that is no tree of a record."""
    try:
        return read_tree(stock.model(**{key: value}), stock.width)
    except Exception:  # each architecture refuses in its own way
        return None


def _changed_switches(tree: Tree, other: Tree, family: Family) -> list[str] | None:
    """Fields of the record, and norms of `more_norms`, that are there in one tree only; None where
    more than these differ."""
    names = tree.record.keys() | other.record.keys()
    changed = {name for name in names if tree.record.get(name) != other.record.get(name)}
    switches = changed & {*_SWITCHED}
    if "qk_norm" in switches:
        changed -= {*_HEAD_NORMS}
    norms = {*tree.norms} - {*other.norms}
    beside = replace(other, record=tree.record, norms=tree.norms) != tree
    if changed - switches or beside or not norms <= {*family.more_norms}:
        return None
    return [*switches, *norms] if {*other.norms} <= {*tree.norms} else None


def _orders(family: Family) -> Iterator[Family]:
    """Queries, keys and values of one tensor one after the other, or head by head."""
    yield family
    if family.query == family.key:
        yield replace(family, side_by_side=True)


def _with_names_of_files(family: Family, model: Any, dense: Path) -> Family:
    """The head by its name in files, which in memory may have another."""
    stored, in_memory = stored_tensors(dense), model.state_dict()
    size = stored[f"{family.embedding}.weight"].shape
    heads = [n for n, tensor in stored.items() if tensor.shape == size and n not in in_memory]
    return replace(family, head=heads[0].removesuffix(".weight")) if heads else family


def _check_sizes(family: Family, config: Mapping[str, Any], stock: Stock) -> None:
    """Raises ModelError where the record gives a tensor of this config.json another shape than the
    stock class does."""
    record = family.of(config)
    shape = record.read_shape(config, element_bytes=4)
    ours = {spec.name: spec.shape for spec in record.tensors(shape, shape.layers[:LAYERS])}
    model = empty_model(stock.kind(**stock.real))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name] != theirs[name]:
            raise ModelError(
                f"{name} would be {list(ours[name])} by this config.json, and is "
                f"{list(theirs[name])}."
            )


def _proven(family: Family, dense: Path, folder: Path) -> Guess:
    """Raises ModelError where layout per-layer does not hold; for the other two, the record says
    where they do not."""
    folder.mkdir()
    with known(family):
        source = open_source(dense)
        proven: dict[Layout, float] = {"per-layer": _holds(source, "per-layer", folder)}
        try:
            proven["ragged"] = _holds(source, "ragged", folder)
        except ModelError:
            family = replace(family, uneven_groups=False)
        if not family.derived_head_dim:
            proven["uniform"] = _holds(source, "uniform", folder)
    return Guess(family, proven)


def _holds(source: Checkpoint, layout: Layout, folder: Path) -> float:
    try:
        return prove(source, layout, folder / layout)
    except SppError:
        raise
    except Exception as error:  # a wrong slice can fail anywhere in foreign classes
        raise ModelError(f"layout {layout}: {reason_of(error)}") from error


def written(family: Family) -> str:
    """The record as `table.py` has it."""
    words = [f'"{family.model_type}"', f'"{family.architecture}"']
    if family.features:
        names = ", ".join(f"Feature.{feature.name}" for feature in sorted(family.features))
        words.append(f"_features({names})")
    for item in fields(Family)[3:]:
        value = getattr(family, item.name)
        usual = item.default if item.default_factory is MISSING else item.default_factory()
        if value != usual:
            text = value.__name__ if callable(value) else repr(value).replace("'", '"')
            together = len(text) < _LINE - 10
            words.append(f"{item.name}={text.replace(' ', _SPACE) if together else text}")
    text = f"Family({', '.join(words)}),"
    lines = textwrap.wrap(
        text, _LINE, subsequent_indent=" " * 7, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines).replace(_SPACE, " ")

"""Properties of what is read and written, for inputs that hypothesis makes up and makes small."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fuzz_seeds
import numpy as np
import pytest
from fuzz_targets import check_line, check_with_library
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from spp_cli.render.look import ASCII, UNICODE
from spp_cli.render.sections import mixture
from spp_export.common.errors import (
    ArtifactsError,
    CheckpointError,
    ModelError,
    PlanError,
    ProfileError,
    ScenarioError,
    SppError,
)
from spp_export.common.json_files import dump_json, parse_json
from spp_export.data.artifacts import read_artifacts, write_artifacts
from spp_export.data.scenario import paragraphs, read_scenario
from spp_export.models.checkpoint.dtypes import ELEMENT_BYTES
from spp_export.models.checkpoint.header import read_header
from spp_export.models.checkpoint.reader import INDEX_NAME, model_file, stored_tensors
from spp_export.models.families import FAMILIES
from spp_export.planning import COMPENSATIONS, LayerPlan, Plan, parse_plan, validate_plan
from spp_export.planning.latency import read_latency_table
from spp_export.planning.plan import PROVENANCE
from spp_export.slicing.config import slim_config

pytestmark = pytest.mark.thinned

# The same inputs every time, none kept on disk, and no verdict by the clock.
_FIXED = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
}
SHORT, LONG = settings(max_examples=25, **_FIXED), settings(max_examples=500, **_FIXED)

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text(max_size=6), VALUES, max_size=4)
INDICES = st.sets(st.integers(0, 1 << 40), min_size=1, max_size=6).map(lambda s: tuple(sorted(s)))
NAMES = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=12)


@st.composite
def plans(draw: Callable[[SearchStrategy[Any]], Any]) -> Plan:
    """Valid plans, for whatever model."""
    layout = draw(st.sampled_from(("uniform", "per-layer", "ragged")))
    layers = st.builds(LayerPlan, INDICES, INDICES, st.none() | INDICES)
    return Plan(
        draw(NAMES),
        draw(NAMES),
        layout,
        draw(st.sampled_from(COMPENSATIONS)),
        tuple(draw(st.lists(layers, min_size=1, max_size=4))),
        **{name: draw(OBJECTS) for name in PROVENANCE},
        padded=layout == "ragged" and draw(st.booleans()),
    )


@st.composite
def edited(draw: Callable[[SearchStrategy[Any]], Any], document: Any) -> Any:
    """A JSON document in which one value is another or missing."""
    document = json.loads(json.dumps(document))
    holder = document
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = draw(st.sampled_from(keys))
        inner = holder[key]
        if not isinstance(inner, (dict, list)) or not inner or draw(st.booleans()):
            break
        holder = inner
    if draw(st.booleans()):
        holder[key] = draw(VALUES)
    else:
        del holder[key]
    return document


def refused(error: type[SppError], read: Callable[[], object]) -> bool:
    """Whether reading ended in this error, which then was one line; any other error passes."""
    try:
        read()
    except error as problem:
        text = str(problem)
        check_line(text.encode("unicode_escape").decode() if "\n" not in text else text)
        return True
    return False


def folder() -> tempfile.TemporaryDirectory[str]:
    """A directory per example: hypothesis runs many in one test."""
    return tempfile.TemporaryDirectory(prefix="spp-fuzz-")


def written(directory: str, name: str, content: Any) -> Path:
    """A file of bytes, or of a JSON document."""
    path = Path(directory) / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def json_comes_back(value: Any) -> None:
    assert parse_json(dump_json(value), what="value") == value


def json_is_what_python_reads(text: str) -> None:
    """What we read is what the standard library reads; it only reads more."""
    with suppress(SppError):
        assert parse_json(text, what="text") == json.loads(text)
        return
    refused(SppError, lambda: parse_json(text, what="text"))


def plans_come_back(plan: Plan) -> None:
    text = plan.to_json()
    assert parse_plan(text) == plan
    assert parse_plan(text).to_json() == text


def any_document_is_a_plan_or_refused(document: Any) -> None:
    if not refused(PlanError, lambda: parse_plan(json.dumps(document))):
        plan = parse_plan(json.dumps(document))
        plans_come_back(plan)
        refused(PlanError, lambda: validate_plan(plan, fuzz_seeds.SHAPE, "f" * 64))


def valid_plans_name_what_is_there(layers: list[LayerPlan]) -> None:
    shape = fuzz_seeds.SHAPE
    plan = fuzz_seeds.plan(layout="ragged", layers=tuple(layers))
    if refused(PlanError, lambda: validate_plan(plan, shape, "f" * 64)):
        return
    for layer in layers:
        groups = {head // shape.group_size for head in layer.query_heads}
        assert groups == set(layer.kv_heads)
        assert max(layer.query_heads) < shape.query_heads
        assert layer.channels is None or max(layer.channels) < shape.channels


def scenario_lines_come_back(turns: list[tuple[str, str | None]]) -> None:
    lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in turns]
    with folder() as directory:
        read = read_scenario(written(directory, "s.jsonl", "\n".join(lines).encode()))
    assert [(turn.prompt, turn.answer) for turn in read.turns] == turns
    assert read.prompts == tuple(prompt for prompt, _ in turns)


def paragraphs_stay_paragraphs(text: str) -> None:
    found = paragraphs(text, what="text")
    assert paragraphs("\n\n".join(found), what="text") == found


def any_bytes_are_a_scenario_or_refused(data: bytes, suffix: str) -> None:
    with folder() as directory:
        path = written(directory, f"s{suffix}", data)
        if not refused(ScenarioError, lambda: read_scenario(path)):
            assert read_scenario(path) == read_scenario(path)


def artifacts_come_back(manifest: Mapping[str, Any], domains: list[str], seed: int) -> None:
    rng = np.random.default_rng(seed)
    made = fuzz_seeds.artifacts()
    made = replace(
        made,
        domains=tuple(domains),
        calibration=tuple((domain, f"{domain}?") for domain in domains),
        manifest={"probe_layers": [1], **manifest},
        weight=rng.standard_normal(made.weight.shape, dtype=np.float32),
    )
    with folder() as directory:
        wrote = write_artifacts(made, directory)
        read = read_artifacts(directory)
    assert read.sha256 == wrote.sha256
    assert (read.domains, read.calibration, read.manifest, read.probe_layers) == (
        made.domains,
        made.calibration,
        made.manifest,
        (1,),
    )
    assert np.array_equal(read.weight, made.weight)


def any_header_of_artifacts_is_read_or_refused(document: Any) -> None:
    with folder() as directory:
        write_artifacts(fuzz_seeds.artifacts(), directory)
        written(directory, "artifacts.json", document)
        refused(ArtifactsError, lambda: read_artifacts(directory))


def headers_are_what_the_library_reads(tensors: list[tuple[str, str, list[int]]]) -> None:
    entries, end = {}, 0
    for name, dtype, shape in tensors:
        begin, end = end, end + ELEMENT_BYTES[dtype] * int(np.prod(shape))
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    with folder() as directory:
        content = struct.pack("<Q", len(text)) + text + bytes(end)
        found = read_header(written(directory, "m.safetensors", content))
        assert {t.name: (t.dtype, list(t.shape)) for t in found.values()} == {
            name: (dtype, shape) for name, dtype, shape in tensors
        }
        check_with_library(found.values())


def any_header_that_we_read_the_library_reads(document: Any) -> None:
    text = json.dumps(document).encode()
    with folder() as directory:
        content = struct.pack("<Q", len(text)) + text + bytes(16)
        path = written(directory, "m.safetensors", content)
        if not refused(CheckpointError, lambda: read_header(path)):
            check_with_library(read_header(path).values())


def an_index_never_leads_out(weight_map: Any, names: list[str]) -> None:
    with folder() as directory:
        inside = Path(directory) / "model"
        inside.mkdir()
        written(directory, "secret", b"")
        written(str(inside), INDEX_NAME, {"weight_map": weight_map})
        assert refused(CheckpointError, lambda: stored_tensors(inside))
        for name in names:
            if not refused(CheckpointError, lambda name=name: model_file(inside, name)):
                assert model_file(inside, name) == (inside / name).resolve()


def any_config_is_a_shape_or_refused(family: str, changes: Mapping[str, Any]) -> None:
    record = FAMILIES[family]
    config = {**_CONFIG, **changes}

    def read() -> None:
        shape = record.read_shape(config, 4)
        assert min(shape.num_layers, shape.head_dim, shape.kv_heads, shape.vocab_size) > 0
        assert shape.query_heads == shape.group_size * shape.kv_heads
        if shape.num_layers < 8:
            slim = slim_config(config, record, shape, shape.layers, "per-layer")
            assert json.loads(json.dumps(slim)) == slim

    refused(ModelError, read)


def any_profile_is_a_table_or_refused(document: Any) -> None:
    with folder() as directory:
        path = written(directory, "t.json", document)
        if not refused(ProfileError, lambda: read_latency_table(path)):
            table = read_latency_table(path)
            assert list(table.mlp) == sorted(table.mlp)
            assert len(table.attention) == table.sizes["query_heads"]


def any_diagnosis_can_be_shown(diagnosis: Mapping[str, Any]) -> None:
    """A plan's diagnosis is not checked when it is read."""
    for look in (ASCII, UNICODE):
        for line in mixture(diagnosis, look):
            assert line.plain.isprintable()


_CONFIG = {
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 12,
    "vocab_size": 11,
}
_CONFIG_KEYS = (*_CONFIG, "head_dim", "tie_word_embeddings", "attention_bias", "mlp_bias")
_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "layer_types", "dtype")
_HEADS = st.sets(st.integers(0, 5), min_size=1, max_size=5).map(lambda s: tuple(sorted(s)))
_PROMPTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(
    lambda text: bool(text.strip())
)
_SHARES = st.floats(0, 1) | SCALARS
_OFFSETS = st.lists(st.integers(-1, 17), max_size=3)
_TENSORS = st.tuples(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.sampled_from(sorted(ELEMENT_BYTES)),
    st.lists(st.integers(0, 3), max_size=4),
)
_ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*sorted(ELEMENT_BYTES), "F4", "f32", ""]) | VALUES,
        "shape": st.lists(st.integers(-1, 16), max_size=3) | VALUES,
        "data_offsets": st.sampled_from([[0, 16], [0, 8], [8, 16], [4, 16], [0, 4]]) | _OFFSETS,
    }
)


@dataclass(frozen=True)
class Property:
    """A function that must not fail, and what its arguments may be."""

    holds: Callable[..., None]
    arguments: tuple[SearchStrategy[Any], ...]

    def check(self, how: settings) -> None:
        """Try it on many arguments."""
        how(given(*self.arguments)(self.holds))()


PROPERTIES = {
    found.holds.__name__: found
    for found in (
        Property(json_comes_back, (VALUES,)),
        Property(json_is_what_python_reads, (st.text() | VALUES.map(json.dumps),)),
        Property(plans_come_back, (plans(),)),
        Property(
            any_document_is_a_plan_or_refused,
            (VALUES | edited(json.loads(fuzz_seeds.plan().to_json())),),
        ),
        Property(
            valid_plans_name_what_is_there,
            (st.lists(st.builds(LayerPlan, _HEADS, _HEADS, st.none() | _HEADS), max_size=3),),
        ),
        Property(
            scenario_lines_come_back,
            (st.lists(st.tuples(_PROMPTS, st.none() | _PROMPTS), min_size=1, max_size=4),),
        ),
        Property(
            paragraphs_stay_paragraphs,
            (st.text(st.sampled_from("a \n\r\t\v\x85\u2028é")) | _PROMPTS,),
        ),
        Property(
            any_bytes_are_a_scenario_or_refused,
            (
                st.binary() | VALUES.map(lambda value: json.dumps(value).encode()),
                st.sampled_from(("", ".txt", ".json", ".jsonl", ".JSON", ".pt")),
            ),
        ),
        Property(
            artifacts_come_back,
            (OBJECTS, st.lists(NAMES, min_size=2, max_size=2, unique=True), st.integers(0, 99)),
        ),
        Property(any_header_of_artifacts_is_read_or_refused, (VALUES,)),
        Property(
            headers_are_what_the_library_reads,
            (st.lists(_TENSORS, max_size=5, unique_by=lambda tensor: tensor[0]),),
        ),
        Property(
            any_header_that_we_read_the_library_reads,
            (st.dictionaries(st.sampled_from(("a", "b", "__metadata__")), _ENTRIES | VALUES),),
        ),
        Property(
            an_index_never_leads_out,
            (
                st.dictionaries(NAMES, st.text() | SCALARS, min_size=1) | VALUES,
                st.lists(st.text() | st.sampled_from(("../secret", "..", ".", "/etc/passwd"))),
            ),
        ),
        Property(
            any_config_is_a_shape_or_refused,
            (
                st.sampled_from(sorted(FAMILIES)),
                st.dictionaries(st.sampled_from(_CONFIG_KEYS), st.integers(-1, 9) | VALUES)
                | st.dictionaries(st.sampled_from(_ROPE_KEYS), OBJECTS | VALUES),
            ),
        ),
        Property(
            any_diagnosis_can_be_shown,
            (
                st.fixed_dictionaries(
                    {
                        "mixture": st.dictionaries(st.text(max_size=9), _SHARES) | VALUES,
                        "breadth": _SHARES,
                        "regime": st.text(max_size=9) | VALUES,
                    }
                )
                | OBJECTS,
            ),
        ),
        Property(any_profile_is_a_table_or_refused, (edited(fuzz_seeds.latency_table()),)),
    )
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name):
    PROPERTIES[name].check(SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPERTIES)
def test_property_at_length(name):
    PROPERTIES[name].check(LONG)

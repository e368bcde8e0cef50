"""The schema of a results file; `benchmarks/README.md` says what every field means."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationError

from spp_export.common.documents import Document, Rows, explained


class _Speedup(Document):
    median: float
    p20: float
    p80: float
    low: float | None
    bound: float
    ceiling: float
    term: str
    efficiency: float | None
    above_bound: bool


class _Phase(Document):
    median_ms: float
    p20_ms: float
    p80_ms: float
    samples_ms: Rows[float]
    tokens_per_second: float
    bytes_per_second: float
    operations_per_second: float
    of_bandwidth: float
    of_rate: float
    speedup: _Speedup | None = None
    over_dense_torch: float | None = None


class _MemoryCell(Document):
    batch: int
    context: int
    kv_bytes: int
    peak_bytes: int
    predicted_kv_bytes: int


class _Memory(Document):
    name: str
    weight_bytes: int
    before_bytes: int
    loaded_bytes: int
    loading_peak_bytes: int
    predicted_weight_bytes: int | None
    problems: Rows[str]
    cells: Rows[_MemoryCell]


class _Git(Document):
    commit: str
    modified: bool


class _Model(Document):
    name: str
    fingerprint: str
    parameters: int


class _Options(Document):
    device: str
    dtype: str
    threads: int
    rounds: int
    new_tokens: int
    seed: int


class _Plan(Document):
    layout: str
    units: str
    keep: float
    kept: float


class _Candidate(Document):
    name: str
    engine: str
    precision: str
    baseline: str | None
    plan_hash: str | None
    parameters: int
    read_bytes_per_step: int
    plan: _Plan | None = None


class _Rates(Document):
    bytes_per_second: float
    operations_per_second: float


class _Gate(Document):
    name: str
    manifest: str | None
    checks: Rows[dict[str, Any]]


class _Agreement(Document):
    name: str
    reference: Annotated[str, Field(alias="as")]
    distance: float
    limit: float


class _Row(Document):
    name: str
    prefill: _Phase | None = None
    decode: _Phase | None = None


class _Cell(Document):
    batch: int
    context: int
    rows: Rows[_Row]


class _Claim(Document):
    claim: str
    published: Rows[float]
    what: str
    measured: Rows[float]
    bound: Rows[float] | None = None


class ResultsDocument(Document):
    """What a run measured."""

    schema_version: int
    machine: dict[str, str | int | None]
    versions: dict[str, str]
    git: _Git | None = None
    model: _Model
    options: _Options
    candidates: Rows[_Candidate]
    rates: _Rates
    gate: Rows[_Gate]
    agreement: Rows[_Agreement]
    memory: Rows[_Memory]
    cells: Rows[_Cell]
    claims: Rows[_Claim]
    problems: Rows[str]


def check(value: Any) -> None:
    """Raise ValueError, naming the place, where a document does not follow the schema."""
    try:
        ResultsDocument.model_validate(value)
    except ValidationError as problem:
        raise ValueError(explained(problem)) from None

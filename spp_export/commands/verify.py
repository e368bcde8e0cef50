"""`verify`: whether a written directory is what its plan and the dense model promise."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_export.commands.gguf_files import is_gguf
from spp_export.commands.onnx_files import graph_dtype, is_onnx
from spp_export.common.errors import CheckpointError, OutputError, UsageError
from spp_export.common.manifest import check_manifest, listed_names
from spp_export.common.memory import free_memory, resident_parameters
from spp_export.common.progress import Progress, no_progress
from spp_export.data.scenario import read_scenario
from spp_export.models.checkpoint.header import StoredTensor
from spp_export.models.checkpoint.reader import blocks, read_float, stored_tensors
from spp_export.models.checkpoint.source import Source, read_config
from spp_export.models.families import Role
from spp_export.models.hub import DEMO
from spp_export.models.session import Session, open_session
from spp_export.models.tokenizer import load_tokenizer
from spp_export.planning import Plan, read_plan, validate_plan
from spp_export.slicing.compensation import (
    CONSUMERS,
    loses,
    real_columns,
    written_config,
    written_shape,
)
from spp_export.slicing.cut import Indices

if TYPE_CHECKING:
    import torch
    from torch import nn

    from spp_export.calibration.activations import TokenBatch
    from spp_export.evaluation.oracle import Projection, Projections
    from spp_export.evaluation.parity import Check, ReferenceLogits, VerifyReport
    from spp_export.slicing.compensation import Compensation

# What `recover` writes beside a plan whose weights were trained further.
RECOVERY_NAME = "recovery.json"
_TEXTS = 8
_TOKENS_PER_TEXT = 96
_RANDOM_ROWS = 4
_RANDOM_TOKENS = 48


def verify(
    out: str | os.PathLike[str],
    *,
    model: str = DEMO,
    scenario: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    layerwise: bool | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> VerifyReport:
    """Integrity and parity of an exported directory against the dense model it came from.

    Logits are compared on the scenario's text, or on seeded random tokens without one: parity does
    not depend on the text. `layerwise` runs the models layer by layer, their weights staying on
    disk; None does so where they do not fit in memory. Raises OutputError where the directory is no
    export.
    """
    from spp_export.evaluation.parity import Check, VerifyReport

    directory = Path(out)
    if not (directory / "plan.json").is_file() and "plan.json" not in listed_names(directory):
        raise OutputError(f"{directory}: no plan.json, so not an export of spp.")
    problems = check_manifest(directory)
    integrity = Check("files as the manifest lists them", not problems, detail="; ".join(problems))
    if problems:
        # Nothing more can be said of files that are not the ones that were written.
        return VerifyReport((integrity,))
    converted = is_onnx(directory) or is_gguf(directory)
    if converted and (directory / RECOVERY_NAME).is_file():
        raise UsageError(
            f"{directory}: was converted from an export that was trained further, so its weights "
            "do not follow from the dense model. They were compared with that export's when it was "
            "converted; its files are as they were written."
        )
    if dtype is None and is_onnx(directory):
        dtype = graph_dtype(directory)
    session = open_session(
        model, device=device, dtype=dtype, layerwise=layerwise, progress=progress
    )
    compiled = read_plan(directory / "plan.json")
    validate_plan(compiled, session.source.shape, session.source.fingerprint)
    prompts = read_scenario(scenario).prompts if scenario is not None else ()
    if is_onnx(directory):
        from spp_export.commands.onnx_verify import check_onnx_directory

        report = check_onnx_directory(directory, session, compiled, prompts, seed)
    elif is_gguf(directory):
        from spp_export.commands.gguf_verify import check_gguf_directory

        report = check_gguf_directory(directory, session, compiled, prompts, seed)
    else:
        report = check_directory(directory, session, compiled, prompts, seed).report
    return VerifyReport((integrity, *report.checks), report.context)


@dataclass(frozen=True)
class Checked:
    """A directory's checks, the slim model if it loads, and the logits it was compared with."""

    report: VerifyReport
    slim: nn.Module | None = None
    reference: ReferenceLogits | None = None


def check_batches(
    vocab_size: int, prompts: Sequence[str], tokenizer: Any, seed: int
) -> list[TokenBatch]:
    """The tokens that parity is checked on: the first prompts, or random tokens without any."""
    import torch

    from spp_export.calibration.activations import TokenBatch, token_batches

    if prompts:
        return token_batches(tokenizer, prompts[:_TEXTS], max_tokens=_TOKENS_PER_TEXT)
    generator = torch.Generator().manual_seed(seed)
    size = (_RANDOM_ROWS, _RANDOM_TOKENS)
    ids = torch.randint(vocab_size, size, generator=generator)
    return [TokenBatch(ids, torch.ones_like(ids), tuple(range(_RANDOM_ROWS)))]


def session_batches(session: Session, prompts: Sequence[str], seed: int) -> list[TokenBatch]:
    """`check_batches` for a session's model, whose tokenizer is read only for prompts."""
    tokenizer = session.tokenizer if prompts else None
    return check_batches(session.source.shape.vocab_size, prompts, tokenizer, seed)


def check_directory(
    directory: Path,
    session: Session,
    compiled: Plan,
    prompts: Sequence[str],
    seed: int = 0,
    compensation: Compensation | None = None,
    *,
    batches: Sequence[TokenBatch] | None = None,
) -> Checked:
    """Every check on a directory's weights and tokenizer; on `batches`, by default on those of
    `check_batches`.

    The oracle takes re-fitted projections as they were written, so `compensation`, which knows what
    they were fitted to, is asked about them; only an export has it.
    """
    from spp_export.evaluation.parity import (
        VerifyReport,
        check_cache,
        check_causality,
        check_parity,
    )

    source = session.source
    tensors = _check_tensors(directory, source, compiled)
    if not tensors.passed:
        return Checked(VerifyReport((tensors,)))
    compensated = _compensated(directory, source, compiled)
    exact = exact_dtype(session, compensated)
    batches = batches or session_batches(session, prompts, seed)
    with session.progress("checking against the masked dense model", None):
        reference = oracle_logits(session, compiled, batches, compensated, exact)
        slim = session.slim_model(directory)
        longest = max(batches, key=lambda batch: int(batch.attention_mask[0].sum()))
        checks = [
            tensors,
            check_parity(slim, reference),
            check_causality(slim, longest),
            check_cache(slim, longest, reference.rounding),
        ]
        if compensation is not None and compiled.compensation == "lstsq":
            checks.append(_check_refit(directory, session.source, compensation))
        if prompts:
            checks.append(check_tokenizer(directory, session, prompts))
    context = {
        "reference": str(exact).removeprefix("torch."),
        "computed_in": session.dtype,
        "layerwise": session.from_disk,
    }
    return Checked(VerifyReport(tuple(checks), context), slim, reference)


def _check_refit(directory: Path, source: Source, compensation: Compensation) -> Check:
    """Re-fitted projections lose no more of their layer's output than plain slices would."""
    import torch

    from spp_export.evaluation.parity import Check

    # What rounding to the stored dtype can lose by itself, as a share of the output's energy.
    rounding = torch.finfo(getattr(torch, source.dtype_name)).eps ** 2
    shares = list(compensation.lost(directory))
    worst = max((written - plain - rounding for written, plain in shares), default=0.0)
    return Check(
        "re-fitted projections against plain slices",
        worst <= 0,
        detail=f"lost energy {sum(written for written, _ in shares) / max(len(shares), 1):.1%}, "
        f"plain slices {sum(plain for _, plain in shares) / max(len(shares), 1):.1%}, "
        f"{len(shares)} projections",
    )


def oracle_logits(
    session: Session,
    compiled: Plan,
    batches: Sequence[TokenBatch],
    compensated: Projections,
    exact: torch.dtype,
) -> ReferenceLogits:
    """`reference_logits` of a session's model under a plan."""
    from spp_export.evaluation.parity import reference_logits

    source = session.source
    return reference_logits(
        session.model,
        source.family,
        source.shape,
        compiled,
        batches,
        compensated,
        exact_dtype=exact,
    )


def exact_dtype(session: Session, compensated: Projections) -> torch.dtype:
    """A dtype for the oracle that is wider than its own, where the model fits in memory that wide.

    What is compensated stands beside the dense weights, at their full size; where these stay on
    disk, only a layer's do.
    """
    if session.from_disk:
        return wide_dtype(
            session.torch_dtype, resident_parameters(session.source.shape), session.device
        )
    shape = session.source.shape
    query, kv = (heads * shape.head_dim for heads in (shape.query_heads, shape.kv_heads))
    widths = {
        **dict.fromkeys((Role.QUERY, Role.OUTPUT), query),
        **dict.fromkeys((Role.KEY, Role.VALUE), kv),
        **dict.fromkeys((Role.GATE, Role.UP, Role.DOWN), shape.channels),
    }
    beside = sum(shape.hidden_size * widths[role] for _, role in compensated)
    parameters = shape.parameters(shape.layers) + beside
    return wide_dtype(session.torch_dtype, parameters, session.device)


def wide_dtype(own: torch.dtype, parameters: int, device: str) -> torch.dtype:
    """float64 on the CPU, and elsewhere for a model in float32; float32 for one in half precision;
    `own` where so many parameters do not fit in memory that wide."""
    import torch

    halves = (torch.bfloat16, torch.float16)
    wide = torch.float32 if device != "cpu" and own in halves else torch.float64
    if not _casts(device, wide):
        return own
    return wide if wide.itemsize * parameters < 0.8 * free_memory(device) else own


def _casts(device: str, dtype: torch.dtype) -> bool:
    """Whether a model on `device` can be cast to `dtype`: not one that is spread over devices, and
    Apple's have no float64."""
    import torch

    return device != "auto" and not (device.startswith("mps") and dtype == torch.float64)


def check_tokenizer(directory: Path, session: Session, prompts: Sequence[str]) -> Check:
    """The tokenizer that travels gives the source's token ids."""
    from spp_export.evaluation.parity import Check

    ours = load_tokenizer(directory)
    some = list(prompts[:_TEXTS])
    same = ours(some)["input_ids"] == session.tokenizer(some)["input_ids"]
    return Check("token ids as the source's tokenizer gives them", same)


def _check_tensors(directory: Path, source: Source, compiled: Plan) -> Check:
    """Names, shapes, dtypes and config are those of the plan, and every value is finite."""
    from spp_export.evaluation.parity import Check

    name = "keys, shapes, dtypes and finite values"
    layers = compiled.written_shapes(source.shape)
    config = read_config(directory)
    wanted = written_config(source, compiled)
    different = sorted(k for k in config.keys() | wanted.keys() if config.get(k) != wanted.get(k))
    if different:
        return Check(name, False, detail=f"config.json differs from the plan in {different[0]}")
    shape = written_shape(source, compiled)
    expected = {spec.name: spec for spec in source.family.tensors(shape, layers)}
    stored = stored_tensors(directory)
    if stored.keys() != expected.keys():
        odd = sorted(stored.keys() ^ expected.keys())[0]
        return Check(name, False, detail=f"{odd}: in the files or in the plan but not in both")
    for key, tensor in stored.items():
        original = source.tensors.get(key)
        dtype = original.dtype if original else source.dtype
        if tensor.shape != expected[key].shape or tensor.dtype != dtype:
            return Check(
                name,
                False,
                detail=f"{key}: {tensor.dtype} {list(tensor.shape)}, expected {dtype} "
                f"{list(expected[key].shape)}",
            )
        try:
            for _ in blocks(tensor):  # which refuses a value that is not finite
                pass
        except CheckpointError as error:
            return Check(name, False, detail=_within(error, tensor))
    return Check(name, True, detail=f"{len(stored)} tensors")


def _within(error: CheckpointError, tensor: StoredTensor) -> str:
    """An error without the path of the file, which would end in what users publish."""
    return str(error).removeprefix(f"{tensor.file}: ").rstrip(".")


def _compensated(directory: Path, source: Source, compiled: Plan) -> Projections:
    """The projections that no slicing gives, as written, for the oracle to put in place: the
    compensated ones, and all of a model that was trained further."""
    from spp_export.evaluation.oracle import ProjectionsOnDisk

    stored = stored_tensors(directory)
    trained = (directory / RECOVERY_NAME).is_file()
    roles = tuple(role for role in Role if role is not Role.OTHER) if trained else CONSUMERS
    return ProjectionsOnDisk(
        {
            (index, role): partial(
                _projection,
                stored,
                source.family.layer_name(index, source.family.projection(role)),
                real_columns(compiled, index, role, source.shape),
                role in CONSUMERS,
            )
            for index, layer in enumerate(compiled.layers)
            for role in roles
            if trained or (compiled.compensation != "none" and loses(layer, role, source.shape))
        }
    )


def _projection(
    stored: Mapping[str, StoredTensor], module: str, columns: Indices | slice, with_bias: bool
) -> Projection:
    import torch

    from spp_export.evaluation.oracle import Projection

    # Of o_proj and down_proj only: the biases of the others are cut, and never changed.
    bias = stored.get(f"{module}.bias") if with_bias else None
    return Projection(
        torch.from_numpy(read_float(stored[f"{module}.weight"])[:, columns]),
        None if bias is None else torch.from_numpy(read_float(bias)),
    )

"""Checks of a safetensors export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from spp_export.calibration.reading import Text, token_texts
from spp_export.common.errors import CheckpointError
from spp_export.common.progress import progress
from spp_export.evaluation.batches import _TEXTS, exact_dtype, oracle_logits, session_batches
from spp_export.models.checkpoint.checkpoint import (
    Checkpoint,
    outputs_first,
    read_config,
    written_tensors,
)
from spp_export.models.checkpoint.header import StoredTensor
from spp_export.models.checkpoint.reader import blocks, read_float
from spp_export.models.families import Family, Role
from spp_export.models.session import Session
from spp_export.models.tokenizer import load_tokenizer
from spp_export.planning import Plan
from spp_export.planning.written import CONSUMERS, loses, written_shape
from spp_export.slicing.compensation import real_columns, written_config
from spp_export.slicing.cut import Indices

if TYPE_CHECKING:
    from torch import nn

    from spp_export.calibration.activations import TokenBatch
    from spp_export.evaluation.parity import Check, ReferenceLogits, VerifyReport
    from spp_export.slicing.compensation import Compensator
    from spp_export.slicing.projections import Projection, Projections


# What `recover` writes beside a plan whose weights were trained further.
RECOVERY_NAME = "recovery.json"


@dataclass(frozen=True)
class Checked:
    """A directory's checks, the slim model if it loads, and the logits it was compared with."""

    report: VerifyReport
    slim: nn.Module | None = None
    reference: ReferenceLogits | None = None


def check_directory(
    directory: Path,
    session: Session,
    compiled: Plan,
    prompts: Sequence[Text],
    seed: int = 0,
    compensation: Compensator | None = None,
    *,
    batches: Sequence[TokenBatch] | None = None,
) -> Checked:
    """Every check on a directory's weights and tokenizer; on `batches`, by default on those of
    `check_batches`.

    The oracle takes re-fitted projections as they were written, so `compensation`, which knows what
    they were fitted to, is asked about them; only an export has it.
    """
    from spp_export.evaluation.oracle import masked_dense
    from spp_export.evaluation.parity import (
        VerifyReport,
        cached_logits,
        check_cache,
        check_cached_like,
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
    with progress("checking against the masked dense model", None):
        reference = oracle_logits(session, compiled, batches, compensated, exact)
        slim = session.slim_model(directory)
        longest = max(batches, key=lambda batch: int(batch.attention_mask[0].sum()))
        checks = [
            tensors,
            check_parity(slim, reference),
            check_causality(slim, longest),
        ]
        if source.family.mixers:
            with masked_dense(
                session.model, source.family, source.shape, compiled, compensated
            ) as dense:
                expected = cached_logits(dense, longest)
            checks.append(check_cached_like(slim, expected, longest, reference.rounding))
        else:
            checks.append(check_cache(slim, longest, reference.rounding))
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


def _check_refit(directory: Path, source: Checkpoint, compensation: Compensator) -> Check:
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


def check_tokenizer(directory: Path, session: Session, prompts: Sequence[Text]) -> Check:
    """The tokenizer that travels gives the source's token ids."""
    from spp_export.evaluation.parity import Check

    ours = load_tokenizer(directory)
    some = prompts[:_TEXTS]
    same = token_texts(ours, some) == token_texts(session.tokenizer, some)
    return Check("token ids as the source's tokenizer gives them", same)


def _check_tensors(directory: Path, source: Checkpoint, compiled: Plan) -> Check:
    """Names, shapes, dtypes and config are those of the plan, and every value is finite."""
    from spp_export.evaluation.parity import Check

    name = "keys, shapes, dtypes and finite values"
    layers = compiled.written_shapes(source.shape)
    config = read_config(directory)
    promised = written_config(source, compiled)
    different = sorted(
        k for k in config.keys() | promised.keys() if config.get(k) != promised.get(k)
    )
    if different:
        return Check(name, False, detail=f"config.json differs from the plan in {different[0]}")
    shape = written_shape(source, compiled)
    expected = {spec.name: spec for spec in source.family.tensors(shape, layers)}
    stored = written_tensors(directory, source.family)
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


_OF_HEADS = (Role.QUERY, Role.KEY, Role.VALUE, Role.OUTPUT)


def _compensated(directory: Path, source: Checkpoint, compiled: Plan) -> Projections:
    """The projections that no slicing gives, as written, for the oracle to put in place: the
    compensated ones, and all of a model that was trained further."""
    from spp_export.slicing.projections import ProjectionsOnDisk

    stored = written_tensors(directory, source.family)
    trained = (directory / RECOVERY_NAME).is_file()
    roles = tuple(source.family.projections.values()) if trained else CONSUMERS
    return ProjectionsOnDisk(
        {
            (index, role): partial(
                _projection,
                stored,
                source.family,
                source.family.layer_name(index, source.family.projection(role)),
                real_columns(compiled, index, role, source.shape),
                role in CONSUMERS,
                source.shape.hidden_size,
            )
            for index, layer in enumerate(compiled.layers)
            for role in roles
            if (source.shape.has_heads if role in _OF_HEADS else source.shape.has_channels)[index]
            if trained or (compiled.compensation != "none" and loses(layer, role, source.shape))
        }
    )


def _projection(
    stored: Mapping[str, StoredTensor],
    family: Family,
    module: str,
    columns: Indices | slice,
    with_bias: bool,
    hidden: int,
) -> Projection:
    import torch

    from spp_export.slicing.projections import Projection

    # Of o_proj and down_proj only: the biases of the others are cut, and never changed.
    bias = stored.get(f"{module}.bias") if with_bias else None
    weight = stored.get(f"{module}.weight")
    if weight is None:  # of attention without heads, or an MLP without channels
        kept = torch.zeros((hidden, 0) if with_bias else (0, hidden))
    else:
        kept = torch.from_numpy(outputs_first(family, read_float(weight))[:, columns])
    return Projection(kept, None if bias is None else torch.from_numpy(read_float(bias)))

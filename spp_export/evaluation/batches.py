"""The batches that parity is checked on, and the logits of the oracle on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_export.common.memory import free_memory
from spp_export.models.checkpoint.checkpoint import Checkpoint
from spp_export.models.families import Family, Role
from spp_export.models.session import Session
from spp_export.models.shape import resident_parameters
from spp_export.planning import Plan

if TYPE_CHECKING:
    import torch

    from spp_export.calibration.activations import TokenBatch
    from spp_export.calibration.reading import Text
    from spp_export.evaluation.parity import ReferenceLogits
    from spp_export.slicing.projections import Projections


_TEXTS = 8


_TOKENS_PER_TEXT = 96


_RANDOM_ROWS = 4


_RANDOM_TOKENS = 48


def check_batches(
    source: Checkpoint, prompts: Sequence[Text], tokenizer: Any, seed: int
) -> list[TokenBatch]:
    """The tokens that parity is checked on: how the first texts begin, or random tokens without
    any, as many as the model's context holds."""
    import torch

    from spp_export.calibration.activations import TokenBatch, token_batches
    from spp_export.calibration.reading import token_texts

    context = source.family.settings(source.config).get("max_position_embeddings")
    room = context if isinstance(context, int) and context > 0 else _TOKENS_PER_TEXT
    if prompts:
        most, some = min(_TOKENS_PER_TEXT, room), token_texts(tokenizer, prompts[:_TEXTS])
        return token_batches(tokenizer, [text.beginning(most) for text in some])
    generator = torch.Generator().manual_seed(seed)
    size = (_RANDOM_ROWS, min(_RANDOM_TOKENS, room))
    ids = torch.randint(source.shape.vocab_size, size, generator=generator)
    return [TokenBatch(ids, torch.ones_like(ids), tuple(range(_RANDOM_ROWS)))]


def session_batches(session: Session, prompts: Sequence[Text], seed: int) -> list[TokenBatch]:
    """`check_batches` for a session's model, whose tokenizer is read only for prompts."""
    tokenizer = session.tokenizer if prompts else None
    return check_batches(session.source, prompts, tokenizer, seed)


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
        resident = resident_parameters(session.source.shape)
        return wide_dtype(session.torch_dtype, session.source.family, resident, session.device)
    shape = session.source.shape
    query, kv = (heads * shape.head_dim for heads in (shape.query_heads, shape.kv_heads))
    widths = {
        **dict.fromkeys((Role.QUERY, Role.OUTPUT), query),
        **dict.fromkeys((Role.KEY, Role.VALUE), kv),
        **dict.fromkeys((Role.GATE, Role.UP, Role.DOWN), shape.channels),
    }
    beside = sum(shape.hidden_size * widths[role] for _, role in compensated)
    parameters = shape.parameters(shape.layers) + beside
    return wide_dtype(session.torch_dtype, session.source.family, parameters, session.device)


def wide_dtype(own: torch.dtype, family: Family, parameters: int, device: str) -> torch.dtype:
    """float64 on the CPU, and elsewhere for a model in float32; float32 for one in half precision,
    and of a family whose stock models compute no wider; `own` where so many parameters do not fit
    in memory that wide."""
    import torch
    import transformers

    halves = (torch.bfloat16, torch.float16)
    single = family.single_in_4 and transformers.__version__.startswith("4.")
    wide = torch.float32 if single or (device != "cpu" and own in halves) else torch.float64
    if not _casts(device, wide) or wide.itemsize < own.itemsize:
        return own
    return wide if wide.itemsize * parameters < 0.8 * free_memory(device) else own


def _casts(device: str, dtype: torch.dtype) -> bool:
    """Whether a model on `device` can be cast to `dtype`: not one that is spread over devices, and
    Apple's have no float64."""
    import torch

    return device != "auto" and not (device.startswith("mps") and dtype == torch.float64)


def slim_reference(
    checkpoint: Path,
    batches: Sequence[TokenBatch],
    exact: torch.dtype,
    same: torch.dtype,
    *,
    layerwise: bool = False,
) -> ReferenceLogits:
    """Logits of the PyTorch model of a checkpoint, in `exact` and in what a graph computes in."""
    from spp_export.evaluation.parity import ReferenceLogits, real_logits
    from spp_export.models.layerwise import open_layerwise
    from spp_export.models.loader import load_slim

    def logits(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        load = open_layerwise if layerwise else load_slim
        model = load(checkpoint, dtype)
        return tuple(real_logits(model, batches))

    return ReferenceLogits(tuple(batches), logits(exact), logits(same))

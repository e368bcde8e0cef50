"""Whether an ONNX directory is what was promised: its graph, and its logits against the oracle's.

The oracle is that of every export, the masked dense model; ONNX Runtime computes in another order,
so where rounding decides, the room is a multiple of what rounding does to the oracle itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spp_export.calibration.activations import TokenBatch
from spp_export.common.errors import UsageError, reason_of
from spp_export.evaluation.parity import Check, Errors, ReferenceLogits
from spp_export.formats.onnx.options import OnnxOptions, Precision, require
from spp_export.formats.onnx.read import GraphWeights
from spp_export.formats.onnx.runtime.model import OrtModel
from spp_export.formats.onnx.untrusted import read_graph
from spp_export.formats.onnx.weights import rounded
from spp_export.formats.onnx.write import GRAPH_NAME
from spp_export.models.families import TensorSpec

# Other kernels, other orders of summation: what rounding takes from the oracle they may take
# several times, and a little beside.
_ROUNDINGS = 4.0
_ROOM = {"fp32": 64.0, "fp16": 4.0, "bf16": 4.0}
# KL to the model of a graph's own weights that rounding of activations may take, as a share of the
# uniform distribution's: in blocks, and by tensor. Of the default model in int4 it is 0.003.
_SHARE_OF_UNIFORM = {"int4": 0.03, "int8": 0.03, "int8-dynamic": 0.1}
# What quantising takes from a weight, as a share of its norm, in the worst form: uniform over a
# step that is the block's range over 2^bits - 1, with room for blocks of uneven values.
_LOST_QUANTISED = {"int4": 0.25, "int8": 0.02, "int8-dynamic": 0.05}

Logits = NDArray[np.float32]


def check_graph(directory: Path) -> Check:
    """The graph is valid ONNX, and types and shapes follow from its inputs.

    Raises CheckpointError for a file that is no graph, or that reaches out of its directory.
    """
    onnx = require("onnx")
    name = "onnx.checker and shape inference"
    if not (directory / GRAPH_NAME).exists():
        return Check(name, False, detail=f"no {GRAPH_NAME} beside its weights")
    model = read_graph(directory)
    try:
        onnx.checker.check_model(directory / GRAPH_NAME)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        return Check(name, False, detail=reason_of(error))
    return Check(name, True, detail=f"{len(model.graph.node)} nodes")


def check_weights(
    name: str,
    weights: GraphWeights,
    kept: Callable[[TensorSpec], NDArray[Any] | None],
    options: OnnxOptions,
) -> Check:
    """A graph's weights are those that `kept` gives, rounded to its precision or quantised.

    `kept` gives a tensor [out, in] as floats, or None for one that nothing is known of: it has to
    be finite then.
    """
    specs = weights.specs
    compared, largest = 0, 0.0
    for spec in specs:
        actual = weights.read(spec.name)
        if actual.shape != spec.shape or not np.isfinite(actual).all():
            return Check(name, False, detail=f"{spec.name}: {list(actual.shape)}, or not finite")
        expected = kept(spec)
        if expected is None:
            continue
        limit = 0.0
        if options.quant and weights.in_few_bits(spec):
            limit = _LOST_QUANTISED[options.quant]
        else:
            expected = rounded(expected, options.precision).astype(np.float32)
        norm = float(np.linalg.norm(expected))
        lost = float(np.linalg.norm(actual - expected)) / max(norm, 1e-30)
        if not lost <= limit:
            return Check(name, False, lost, limit, f"{spec.name} is not what it was made from")
        compared, largest = compared + 1, max(largest, lost)
    detail = f"{compared} of {len(specs)} tensors, largest relative difference {largest:.2g}"
    return Check(name, True, detail=detail)


def check_logits(
    model: OrtModel, reference: ReferenceLogits, options: OnnxOptions
) -> tuple[Check, ...]:
    """Prefill, decoding with the cache, and rows of unequal length on the sides the graph takes."""
    compare = _Comparison(reference, options.precision)
    checks = [
        compare("ONNX prefill against the oracle", _single_rows(model, reference)),
        compare("ONNX decoding with the cache", _decoded(model, reference)),
        compare("ONNX rows of unequal length", _batches(model, reference, "right")),
    ]
    if model.attention == "gqa":
        checks.append(_check_left_padding_refused(model, reference.batches))
    else:
        checks.append(compare("ONNX rows padded on the left", _batches(model, reference, "left")))
    return tuple(checks)


def check_quantised(
    model: OrtModel, reference: ReferenceLogits, options: OnnxOptions
) -> tuple[Check, ...]:
    """A graph whose weights are in few bits against the model of the same weights in floats.

    Its products also round what they multiply the weights by. A graph that can be told not to has
    to keep the tolerances of a graph in floats; as it is, it has to stay much nearer to the model
    than the uniform distribution is. How far quantising took the weights themselves is no check: it
    is measured on text.
    """
    exact = model.with_exact_products()
    checks = () if exact is None else check_logits(exact, reference, options)
    name = f"{options.quant} graph against the model of its own weights"
    share = _SHARE_OF_UNIFORM[str(options.quant)]
    return (*checks, _check_agreement(name, model, reference, share))


def _check_agreement(name: str, model: OrtModel, reference: ReferenceLogits, share: float) -> Check:
    """Mean KL in nats, at most a share of what the uniform distribution has."""
    kl = uniform = 0.0
    tokens = 0
    pairs = zip(_exact_rows(reference), row_logits(model, reference.batches), strict=True)
    for exact, logits in pairs:
        log_p = exact.double().cpu().log_softmax(-1)
        log_q = torch.from_numpy(logits).double().log_softmax(-1)
        p = log_p.exp()
        kl += float((p * (log_p - log_q)).sum())
        uniform += float((p * (log_p + np.log(exact.shape[-1]))).sum())
        tokens += len(exact)
    mean, limit = kl / tokens, share * uniform / tokens
    return Check(name, mean <= limit, mean, limit, f"mean KL in nats, {tokens} tokens")


def row_logits(model: OrtModel, batches: Sequence[TokenBatch]) -> Iterator[Logits]:
    """Logits [T,V] of the real tokens of each row, one row at a time."""
    for ids in _rows(batches):
        yield model.logits(ids[None])[0]


class _Comparison:
    """Logits by the graph against the exact oracle's, row by row."""

    def __init__(self, reference: ReferenceLogits, precision: Precision) -> None:
        self._exact = list(_exact_rows(reference))
        largest = max(float(row.abs().max()) for row in self._exact)
        epsilon = torch.finfo(getattr(torch, OnnxOptions(precision=precision).torch_dtype)).eps
        self._rounding = reference.rounding
        self._room = _ROOM[precision] * epsilon * max(largest, 1.0)
        self._largest = largest

    def __call__(self, name: str, results: Iterator[tuple[int, slice, Logits]]) -> Check:
        """`results` are rows by number, the slice of their tokens that was computed, and its logits
        [T,V].
        """
        errors = [
            (self._exact[row][part].double().cpu() - torch.from_numpy(logits)).abs().amax(-1)
            for row, part, logits in results
        ]
        of_tokens = torch.cat(errors) if errors else torch.zeros(0)
        detail = f"{len(of_tokens)} tokens, largest |logit| {self._largest:.1f}"
        found = Errors.of_tokens(of_tokens)
        return found.check(name, self._rounding, _ROUNDINGS, self._room, detail)


def _rows(batches: Sequence[TokenBatch]) -> Iterator[NDArray[np.int64]]:
    for batch in batches:
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            yield ids[mask.bool()].numpy()


def _exact_rows(reference: ReferenceLogits) -> Iterator[Tensor]:
    for batch, exact in zip(reference.batches, reference.exact, strict=True):
        yield from exact.split(batch.attention_mask.sum(1).tolist())


def _single_rows(
    model: OrtModel, reference: ReferenceLogits
) -> Iterator[tuple[int, slice, Logits]]:
    for row, logits in enumerate(row_logits(model, reference.batches)):
        yield row, slice(None), logits


def _decoded(model: OrtModel, reference: ReferenceLogits) -> Iterator[tuple[int, slice, Logits]]:
    """Half of the longest row at once, the rest token by token."""
    rows = list(_rows(reference.batches))
    row = max(range(len(rows)), key=lambda index: len(rows[index]))
    ids = rows[row]
    half = max(len(ids) // 2, 1)
    decoding = model.start(1, len(ids))
    yield row, slice(0, half), decoding.feed(ids[None, :half])[0]
    for step in range(half, len(ids)):
        part = slice(step, step + 1)
        yield row, part, decoding.feed(ids[None, part])[0]


def _batches(
    model: OrtModel, reference: ReferenceLogits, side: str
) -> Iterator[tuple[int, slice, Logits]]:
    """All but the last token of each row in one padded pass, then the last tokens together.

    Each row of a batch is cut by one token more than the one before it: texts may be equally long.
    """
    first = 0
    for batch in reference.batches:
        rows = [
            ids[: max(len(ids) - index, min(len(ids), 2))]
            for index, ids in enumerate(_rows([batch]))
        ]
        longest = max(len(ids) for ids in rows)
        ids = np.zeros((len(rows), longest - 1), np.int64)
        mask = np.zeros_like(ids)
        spans = []
        for index, row in enumerate(rows):
            start = 0 if side == "right" else longest - len(row)
            spans.append(slice(start, start + len(row) - 1))
            ids[index, spans[-1]], mask[index, spans[-1]] = row[:-1], 1
        decoding = model.start(len(rows), longest)
        if longest > 1 and all(len(row) > 1 for row in rows):
            logits = decoding.feed(ids, mask)
            for index, span in enumerate(spans):
                yield first + index, slice(0, len(rows[index]) - 1), logits[index, span]
            last = decoding.feed(np.array([row[-1:] for row in rows]))
            for index, row in enumerate(rows):
                yield first + index, slice(len(row) - 1, len(row)), last[index]
        first += len(rows)


def _check_left_padding_refused(model: OrtModel, batches: Sequence[TokenBatch]) -> Check:
    """GroupQueryAttention takes a left-padded row for another text: it must not get one."""
    ids = next(_rows(batches))[:1].repeat(2)[None]
    mask = np.array([[0, 1]])
    name = "ONNX rows padded on the left are refused"
    answers: dict[str, Callable[[], Any]] = {"our runner": lambda: model.logits(ids, mask)}
    if model.device == "cpu":  # CUDA's kernels take any index
        answers["the graph"] = lambda: _raw(model, ids, mask)
    silent = [who for who, answer in answers.items() if not _refuses(answer)]
    return Check(
        name, not silent, detail=f"answered all the same: {', '.join(silent)}" if silent else ""
    )


def _refuses(answer: Callable[[], Any]) -> bool:
    try:
        answer()
    except (UsageError, RuntimeError, ValueError) as error:
        return isinstance(error, UsageError) or "left_padding" in str(error)
    except Exception as error:  # ONNX Runtime's own kinds, which have no common public base
        return "left_padding" in str(error)
    return False


def _raw(model: OrtModel, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> None:
    """One run of the session itself, as another program would do it."""
    feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    for value in model.session.get_inputs():
        if value.name.startswith("past_key_values"):
            heads, dim = value.shape[1], value.shape[3]
            feeds[value.name] = np.zeros((1, heads, 0, dim), kinds[value.type])
    model.session.run(["logits"], feeds)

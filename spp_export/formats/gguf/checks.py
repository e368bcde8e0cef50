"""Whether a GGUF file is what was promised: header, weights, and llama.cpp's output.

Header and weights need no llama.cpp. Where there is one, it continues a few texts, and at every
step its likeliest tokens must be as much likelier than one another as the oracle's.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spp_export.calibration.activations import TokenBatch
from spp_export.evaluation.parity import Check, Errors, ReferenceLogits
from spp_export.formats.gguf.contents import Contents
from spp_export.formats.gguf.encode import allowed_error, plain_values
from spp_export.formats.gguf.header import GgufFile
from spp_export.formats.gguf.llama_cpp import LlamaCpp, Step, engine_name, is_installed
from spp_export.formats.gguf.options import GGUF_NAME, QUANTS
from spp_export.formats.gguf.tokens import check_ends, check_tokens
from spp_export.formats.gguf.weights import GgufWeights
from spp_export.formats.gguf.write import stored_bytes
from spp_export.models.checkpoint.checkpoint import read_config
from spp_export.models.checkpoint.companions import GENERATION_CONFIG, companion_object
from spp_export.models.stop_tokens import stop_tokens

# Other kernels, other orders of summation, as for ONNX.
_ROUNDINGS, _ROOM = 4.0, 64.0
# KL that rounding of activations may take, as a share of the uniform distribution's.
_SHARE_OF_UNIFORM = 0.05
_TEXTS, _READ, _GENERATED, _LIKELIEST = 4, 48, 8, 64

Reference = Callable[[Sequence[TokenBatch]], ReferenceLogits]


@dataclass(frozen=True)
class EngineResult:
    """What llama.cpp said, and what it calls itself; None where it is not installed."""

    checks: tuple[Check, ...]
    engine: str | None


def check_header(file: GgufFile, contents: Contents) -> Check:
    """Metadata, tokenizer and the list of tensors are those that spp writes for the plan."""
    name = "metadata, tokenizer and tensors as the plan makes them"
    for key in [*contents.metadata, *file.metadata]:
        if file.metadata.get(key) != contents.metadata.get(key):
            return Check(name, False, detail=f"{key!r:.80} differs from the plan")
    expected = {t.name: (t.kind, tuple(t.shape), stored_bytes(t)) for t in contents.tensors}
    actual = {n: (p.kind, p.shape, p.nbytes) for n, p in file.tensors.items()}
    for tensor in [*expected, *actual]:
        if expected.get(tensor) != actual.get(tensor):
            return Check(name, False, detail=f"tensor {tensor!r:.80} differs from the plan")
    counted = f"{len(expected)} tensors, architecture {contents.architecture.name}"
    unlike = len(contents.fallbacks)
    more = f", {unlike} in f16 for their rows are no multiple of 32" if unlike else ""
    return Check(name, True, detail=counted + more)


def check_weights(
    name: str,
    weights: GgufWeights,
    contents: Contents,
    kept: Callable[[str], NDArray[Any] | None],
) -> Check:
    """A file's weights are those that `kept` gives by name, rounded or quantised.

    `kept` gives None for a tensor that nothing is known of: it has to be finite then.
    """
    compared, worst = 0, 0.0
    for tensor in contents.tensors:
        if tensor.values is not None and not np.array_equal(weights.plain(tensor), tensor.values):
            return Check(name, False, detail=f"{tensor.name} is not what the plan makes it")
    for source in weights.names:
        actual = weights.stored(source)
        if not np.isfinite(actual).all():
            return Check(name, False, detail=f"{source}: holds a value that is not finite")
        expected = kept(source)
        if expected is None:
            continue
        expected = weights.changed(source, np.asarray(expected, np.float32))
        kind = weights.kind(source)
        if actual.shape != expected.shape:
            return Check(name, False, detail=f"{source}: has shape {list(actual.shape)}")
        if kind in QUANTS:
            share = float((np.abs(actual - expected) / allowed_error(expected, kind)).max())
        else:
            share = 0.0 if np.array_equal(actual, plain_values(expected, kind)) else math.inf
        if not share <= 1:
            detail = f"{source} is not what it was made from"
            return Check(name, False, share if math.isfinite(share) else None, 1.0, detail)
        compared, worst = compared + 1, max(worst, share)
    detail = f"{compared} of {len(weights.names)} tensors"
    if any(weights.kind(source) in QUANTS for source in weights.names):
        detail += f", at most {worst:.0%} of what {contents.options.quant} may lose"
    return Check(name, True, detail=detail)


def check_engine(
    directory: Path,
    contents: Contents,
    batches: Sequence[TokenBatch],
    reference: Reference,
    tokenizer: Any,
) -> EngineResult:
    """What llama.cpp reads, against the tokenizer that transformers makes; where it stops, against
    `spp chat`; and what it continues texts with, against the logits at every step of the PyTorch
    model of the file's own weights.

    A file in fewer bits has llama.cpp round activations, too. It has to stay much nearer to the
    model than the uniform distribution is. Where there is no llama.cpp, nothing is checked. Raises
    ModelError where it does not load the file.
    """
    if not is_installed():
        return EngineResult((), None)
    texts = list(_rows(batches))
    path = directory / GGUF_NAME
    with contextlib.closing(
        LlamaCpp(path, _READ + _GENERATED + 1, torch.get_num_threads())
    ) as model:
        generation = companion_object(directory, GENERATION_CONFIG)
        stop = stop_tokens(generation, read_config(directory), tokenizer)
        stop = tuple(id_ for id_ in stop if id_ < contents.vocab_size)
        read = (check_tokens(model, tokenizer), check_ends(model, tokenizer, stop))
        if not all(check.passed for check in read):
            return EngineResult(read, engine_name())
        steps = [model.generate(ids, _GENERATED, _LIKELIEST) for ids in texts]
    oracle = reference([_batch(texts, steps)])
    compare = _Comparison()
    whole = oracle.exact[0].split([len(ids) + _GENERATED - 1 for ids in texts])
    for logits, generated in zip(whole, steps, strict=True):
        compare(generated, logits[-_GENERATED:].double().numpy())
    detail = f"{compare.tokens} tokens, {compare.agreed} of them the oracle's choice"
    name = "llama.cpp against the oracle"
    # llama.cpp looks a GELU up in a table of half precision.
    looked_up = contents.architecture.activation.startswith("gelu")
    if contents.options.kind == "f32" and not looked_up:
        epsilon = float(np.finfo(np.float32).eps)
        # Twice: differences of two logits are compared.
        check = compare.errors.check(
            name,
            oracle.rounding,
            2 * _ROUNDINGS,
            2 * _ROOM * epsilon * max(compare.largest, 1.0),
            f"{detail}, differences of two logits",
        )
        return EngineResult((*read, check), engine_name())
    mean = compare.kl / compare.tokens
    limit = _SHARE_OF_UNIFORM * compare.uniform / compare.tokens
    check = Check(name, mean <= limit, mean, limit, f"{detail}, mean KL in nats")
    return EngineResult((*read, check), engine_name())


class _Comparison:
    """Log-probabilities of likeliest tokens, step by step.

    The normaliser drops out: a sum over all tokens in single precision is far less exact than any
    one logit.
    """

    def __init__(self) -> None:
        self.largest = self.kl = self.uniform = 0.0
        self.tokens = self.agreed = 0
        self._errors: list[float] = []

    @property
    def errors(self) -> Errors:
        """How far the differences of logits are off."""
        return Errors.of_tokens(torch.tensor(self._errors))

    def __call__(self, steps: Sequence[Step], oracle: NDArray[np.float64]) -> None:
        for step, logits in zip(steps, oracle, strict=True):
            which = [token for token, _ in step.likeliest]
            values = np.array([value for _, value in step.likeliest])
            there = logits[which]
            self._errors.append(float(np.abs((values - values[0]) - (there - there[0])).max()))
            self.largest = max(self.largest, float(np.abs(logits).max()))
            p, q = _normalised(there), _normalised(values)
            self.kl += float((np.exp(p) * (p - q)).sum())
            self.uniform += float((np.exp(p) * (p + math.log(len(p)))).sum())
            self.tokens += 1
            self.agreed += int(logits.argmax() == step.token)


def _normalised(logits: NDArray[Any]) -> NDArray[Any]:
    shifted = logits - logits.max()
    normalised: NDArray[Any] = shifted - math.log(float(np.exp(shifted).sum()))
    return normalised


def _rows(batches: Sequence[TokenBatch]) -> Iterator[list[int]]:
    """The beginnings of the first texts."""
    rows = (
        ids[mask.bool()].tolist()[:_READ]
        for batch in batches
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    )
    yield from islice(rows, _TEXTS)


def _batch(texts: Sequence[Sequence[int]], steps: Sequence[Sequence[Step]]) -> TokenBatch:
    """Texts with their continuations but for the last token, whose logits are not compared."""
    whole = [
        torch.tensor([*ids, *(step.token for step in generated[:-1])])
        for ids, generated in zip(texts, steps, strict=True)
    ]
    mask = [torch.ones_like(ids) for ids in whole]
    padded = [torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in (whole, mask)]
    return TokenBatch(padded[0], padded[1], tuple(range(len(whole))))

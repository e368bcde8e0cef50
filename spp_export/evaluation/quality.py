"""How much worse a slim or quantised model predicts text than the model it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spp_export.calibration.activations import (
    TokenBatch,
    input_device,
    model_inputs,
    token_batches,
)
from spp_export.calibration.reading import Text, TokenText
from spp_export.common.progress import progress
from spp_export.evaluation.bootstrap import (
    DocumentScores,
    agreement,
    mean_kl,
    perplexity_ratio,
)
from spp_export.evaluation.parity import rounded
from spp_export.evaluation.remarks import FEW_TOKENS
from spp_export.models.layerwise import logits_of_calls
from spp_export.models.products import products

HELD_OUT = "held-out text of the scenario"
ANSWERS = "answers to held-out prompts of the scenario"
# Logits of a large vocabulary are the memory here: [rows, vocab] in fp32, for two models.
_BATCH_TOKENS = 512


@dataclass(frozen=True)
class Quality:
    """Of one text, over `tokens` predicted tokens.

    perplexity  exp of the mean negative log-likelihood
    mean_kl     mean over tokens of KL(dense || slim), in nats
    top1        share of tokens where both models rank the same token first
    intervals   of 95 % for `ratio`, `mean_kl` and `top1`, by a bootstrap over texts that pairs both
                models; none of a single text
    source      what the text is
    """

    texts: int
    tokens: int
    dense_perplexity: float
    slim_perplexity: float
    mean_kl: float
    top1: float
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    source: str = HELD_OUT

    @property
    def ratio(self) -> float:
        """Perplexity of the slim model over that of the dense one."""
        return self.slim_perplexity / self.dense_perplexity

    @property
    def uncertain(self) -> bool:
        """Whether there was too little text for the figures to say much of other text."""
        return self.tokens < FEW_TOKENS

    def to_dict(self) -> dict[str, Any]:
        """For verify.json and `--json`, figures rounded."""
        intervals = {name: list(ends) for name, ends in self.intervals.items()}
        more = {"ratio": self.ratio, "uncertain": self.uncertain}
        return rounded({**asdict(self), "intervals": intervals, **more})


def measure_quality(
    dense: nn.Module,
    slim: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    source: str = HELD_OUT,
) -> Quality | None:
    """Quality of `slim` against `dense` on `texts`; None where no token can be predicted."""
    batches = token_batches(tokenizer, texts, batch_tokens=_BATCH_TOKENS)
    sums = torch.zeros((5, len(texts)), dtype=torch.float64)
    done = 0
    with (
        progress("measuring quality", sum(b.real_tokens for b in batches)) as advance_to,
        products(input_device(dense).type),
    ):
        logits = (
            logits_of_calls(model, [model_inputs(model, batch) for batch in batches])
            for model in (dense, slim)
        )
        for batch, of_dense, of_slim in zip(batches, *logits, strict=True):
            log_dense, targets = _log_probabilities(of_dense, batch)
            log_slim, _ = _log_probabilities(of_slim, batch)
            add_scores(sums, log_dense, log_slim, targets, documents_of(batch))
            done += batch.real_tokens
            advance_to(done)
    scores = DocumentScores(*(row.numpy() for row in sums))
    tokens = int(scores.tokens.sum())
    if tokens == 0:
        return None
    # torch's exp gives infinity where math's raises: a model may be broken beyond e^709.
    dense_perplexity, slim_perplexity = (sums[1:3].sum(1) / tokens).exp().tolist()
    kl, top1 = mean_kl(scores), agreement(scores)
    measured = {"ratio": perplexity_ratio(scores), "mean_kl": kl, "top1": top1}
    intervals = {
        name: (interval.low, interval.high) for name, interval in measured.items() if interval.known
    }
    return Quality(
        len(texts),
        tokens,
        dense_perplexity,
        slim_perplexity,
        max(kl.value, 0.0),
        top1.value,
        intervals,
        source,
    )


def held_out_source(texts: Sequence[Text]) -> str:
    """What held-out text is."""
    told = any(isinstance(text, TokenText) and text.answers for text in texts)
    return ANSWERS if told else HELD_OUT


def documents_of(batch: TokenBatch) -> Tensor:
    """Index [T] of the text that each predicted token of a batch is of."""
    counts = batch.predicted.sum(1)
    return torch.tensor(batch.texts).repeat_interleave(counts)


def add_scores(
    sums: Tensor, log_dense: Tensor, log_slim: Tensor, targets: Tensor, documents: Tensor
) -> None:
    """Add T predicted tokens of log-probabilities [T,V] to sums [5,N] over N documents, whose rows
    are in the order of `DocumentScores`; targets [T], documents [T]."""
    target = targets[:, None]
    values = torch.stack(
        [
            torch.ones(len(targets), dtype=torch.float64, device=log_dense.device),
            -log_dense.gather(1, target)[:, 0].double(),
            -log_slim.gather(1, target)[:, 0].double(),
            (log_dense.exp() * (log_dense - log_slim)).sum(1).double(),
            (log_dense.argmax(1) == log_slim.argmax(1)).double(),
        ]
    )
    sums.index_add_(1, documents, values.cpu())


def next_token_log_probabilities(model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Log-probabilities [T,V] (fp32) of the T next tokens of a batch, and those tokens [T]."""
    with products(input_device(model).type):
        logits = next(logits_of_calls(model, [model_inputs(model, batch)]))
    return _log_probabilities(logits, batch)


def _log_probabilities(logits: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    ids = batch.input_ids.to(logits.device)
    predicted = batch.predicted.to(logits.device)
    return logits[:, :-1][predicted].float().log_softmax(-1), ids[:, 1:][predicted]

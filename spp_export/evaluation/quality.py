"""How much worse a slim model predicts held-out text than the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spp_export.calibration.activations import TokenBatch, model_inputs, token_batches
from spp_export.common.progress import progress
from spp_export.models.layerwise import logits_of_calls

# Logits of a large vocabulary are the memory here: [rows, vocab] in fp32, for two models.
_BATCH_TOKENS = 512


@dataclass(frozen=True)
class Quality:
    """Of one text, over `tokens` predicted tokens.

    perplexity  exp of the mean negative log-likelihood
    mean_kl     mean over tokens of KL(dense || slim), in nats
    top1        share of tokens where both models rank the same token first
    """

    texts: int
    tokens: int
    dense_perplexity: float
    slim_perplexity: float
    mean_kl: float
    top1: float

    @property
    def ratio(self) -> float:
        """Perplexity of the slim model over that of the dense one."""
        return self.slim_perplexity / self.dense_perplexity

    def to_dict(self) -> dict[str, Any]:
        """For verify.json and `--json`."""
        return {**asdict(self), "ratio": self.ratio}


def measure_quality(
    dense: nn.Module,
    slim: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
) -> Quality | None:
    """Quality of `slim` against `dense` on `texts`; None where no token can be predicted."""
    batches = token_batches(tokenizer, texts, batch_tokens=_BATCH_TOKENS)
    nll = torch.zeros(2, dtype=torch.float64)
    kl = agreed = 0.0
    tokens = done = 0
    with progress("measuring quality", sum(b.real_tokens for b in batches)) as advance_to:
        logits = (
            logits_of_calls(model, [model_inputs(model, batch) for batch in batches])
            for model in (dense, slim)
        )
        for batch, of_dense, of_slim in zip(batches, *logits, strict=True):
            log_dense, targets = _log_probabilities(of_dense, batch)
            log_slim, _ = _log_probabilities(of_slim, batch)
            for index, log_p in enumerate((log_dense, log_slim)):
                nll[index] -= log_p.gather(1, targets[:, None]).double().sum().cpu()
            kl += float((log_dense.exp() * (log_dense - log_slim)).sum(1).double().sum())
            agreed += float((log_dense.argmax(1) == log_slim.argmax(1)).sum())
            tokens += len(targets)
            done += batch.real_tokens
            advance_to(done)
    if tokens == 0:
        return None
    # torch's exp gives infinity where math's raises: a model may be broken beyond e^709.
    dense_ppl, slim_ppl = (nll / tokens).exp().tolist()
    return Quality(len(texts), tokens, dense_ppl, slim_ppl, max(kl / tokens, 0.0), agreed / tokens)


def next_token_log_probabilities(model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Log-probabilities [T,V] (fp32) of the T next tokens of a batch, and those tokens [T]."""
    return _log_probabilities(next(logits_of_calls(model, [model_inputs(model, batch)])), batch)


def _log_probabilities(logits: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    ids = batch.input_ids.to(logits.device)
    predicted = batch.attention_mask[:, 1:].bool().to(logits.device)
    return logits[:, :-1][predicted].float().log_softmax(-1), ids[:, 1:][predicted]

"""Training of a slim model: a few steps, of adapters that are merged into it or of its own weights.

Low-rank adapters are from Hu et al., "LoRA" (2021); recovering a pruned model with them is what
LLM-Pruner and LoRAPrune do, and distilling it from the dense one on what that one says is what
Minitron does (Muralidharan et al., arXiv 2407.14679). The adapters and their merging are PEFT's,
the loop is ours: a few lines that give the same numbers again when they are interrupted and taken
up.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, FunctionCtx
from torch.nn.functional import cross_entropy

from spp_export.calibration.activations import TokenBatch, input_device, model_inputs, pad_rows
from spp_export.calibration.reading import Text, TokenText, token_texts
from spp_export.commands.requests import RecoverSettings
from spp_export.common.errors import ModelError, UsageError
from spp_export.common.installation import install_command, require_package
from spp_export.models.families import Family, Feature
from spp_export.models.products import Matmul, products

# Adam's: the usual ones.
_BETAS, _EPSILON = (0.9, 0.999), 1e-8
_MOST_NORM = 1.0
_ADAPTERS = "base_model.model."
_BASE = ".base_layer.weight"
# Rows of logits whose probabilities are in memory at a time; each is as wide as the vocabulary.
_ROWS = 64


class Training:
    """A slim model in training, and how far that is.

    model   with adapters beside its weights, which stay as they are until `finished`, or as it is
    family  names of its projections
    layers  those whose weights are trained where there are no adapters: the ones that were cut
    dense   the model to learn from; None learns from the text itself
    matmul  precision of products, of both models; weights and their sums stay in float32
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        settings: RecoverSettings,
        layers: Sequence[int],
        dense: nn.Module | None = None,
        matmul: Matmul = "float32",
    ) -> None:
        family.refuse((Feature.VISION,), "recovery", "Keep the export as it is.")
        roles = tuple(family.projections)
        model.requires_grad_(False)
        if settings.adapted:
            model = _with_adapters(model, family, settings)
        else:
            parameters = dict(model.named_parameters())
            for layer in layers:
                for role in roles:
                    name = f"{family.layer_name(layer, role)}.weight"
                    if name in parameters:
                        parameters[name].requires_grad_(True)
        self.model: Any = model
        self.settings = settings
        self.losses: list[float] = []
        self._dense, self._matmul = dense, matmul
        self._trained = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self._optimiser = torch.optim.AdamW(
            self._trained.values(), lr=0.0, betas=_BETAS, eps=_EPSILON, weight_decay=0.0
        )

    @property
    def done(self) -> int:
        """Steps taken."""
        return len(self.losses)

    @property
    def changed(self) -> list[str]:
        """Names in the checkpoint of the weights that training changes."""
        if not self.settings.adapted:
            return sorted(self._trained)
        return sorted(
            f"{name.removeprefix(_ADAPTERS).removesuffix(_BASE)}.weight"
            for name, _ in self.model.named_parameters()
            if name.endswith(_BASE)
        )

    def step(self, batch: TokenBatch) -> float:
        """Train on one batch; its loss in nats per token. Raises ModelError where it diverges."""
        for group in self._optimiser.param_groups:
            group["lr"] = self.settings.rate(self.done)
        self.model.train()
        # Once more for every step: within it, weights are rounded once.
        with products(input_device(self.model).type, self._matmul):
            loss = self._loss(batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ModelError(
                f"step {self.done}: the loss is not a number. Use a smaller --learning-rate."
            )
        with products(input_device(self.model).type):
            loss.backward()
        nn.utils.clip_grad_norm_(self._trained.values(), _MOST_NORM)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self.model.eval()
        self.losses.append(value)
        return value

    def _loss(self, batch: TokenBatch) -> Tensor:
        """Mean of -log q over predicted tokens, or of `divergence` over all: what the dense model
        would say next is known at every token, not only where it spoke."""
        if self._dense is None:
            logits, predicted = _predictions(self.model, batch)
            targets = batch.input_ids[:, 1:].to(logits.device)[predicted]
            return cross_entropy(logits.float(), targets)
        every = replace(batch, answers=None)
        logits, _ = _predictions(self.model, every)
        with torch.no_grad():
            dense, _ = _predictions(self._dense, every)
        return divergence(logits, dense.to(logits.device), self.settings.temperature)

    def values(self) -> dict[str, Tensor]:
        """What is trained, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self._trained.items()}

    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Go back to `values` of before."""
        for name, parameter in self._trained.items():
            parameter.data.copy_(values[name])

    def state(self) -> dict[str, Tensor]:
        """All that `resume` needs, on the CPU."""
        tensors = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        tensors |= {f"value/{name}": value for name, value in self.values().items()}
        for name, parameter in self._trained.items():
            for key, moment in self._optimiser.state[parameter].items():
                tensors[f"{key}/{name}"] = moment.detach().cpu().clone()
        return tensors

    def resume(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state` of the same model and settings."""
        self.losses = [float(loss) for loss in state["losses"]]
        self.restore({name: state[f"value/{name}"] for name in self._trained})
        for name, parameter in self._trained.items():
            self._optimiser.state[parameter] = {
                key: state[f"{key}/{name}"].to(parameter.device if key != "step" else "cpu")
                for key in ("step", "exp_avg", "exp_avg_sq")
            }

    def finished(self) -> nn.Module:
        """The model with what was trained in its own weights; this object cannot be used
        afterwards."""
        if self.settings.adapted:
            self.model = self.model.merge_and_unload()
        self.model.requires_grad_(False)
        trained: nn.Module = self.model.eval()
        return trained


def divergence(logits: Tensor, dense: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over T tokens of T'^2 KL(p || q), p being the softmax of the dense model's logits [T,V]
    and q that of `logits` [T,V], both at a temperature T' (Hinton et al., arXiv 1503.02531)."""
    apply: Any = _Divergence.apply
    found: Tensor = apply(logits, dense, temperature)
    return found


class _Divergence(Function):
    """Its gradient, T' (q - p) / T, is made with the value, some rows at a time."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, dense: Tensor, temperature: float) -> Tensor:
        """As of `divergence`."""
        gradient, total = torch.empty_like(logits), logits.new_zeros((), dtype=torch.float64)
        for start in range(0, len(logits), _ROWS):
            rows = slice(start, start + _ROWS)
            log_q = (logits[rows].float() / temperature).log_softmax(-1)
            log_p = (dense[rows].float() / temperature).log_softmax(-1)
            p = log_p.exp()
            total += (log_p.sub_(log_q).mul_(p)).sum(dtype=torch.float64)
            gradient[rows] = log_q.exp_().sub_(p).mul_(temperature / len(logits))
        ctx.save_for_backward(gradient)
        return (temperature**2 * total / len(logits)).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Of the logits alone."""
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None


def _with_adapters(model: nn.Module, family: Family, settings: RecoverSettings) -> nn.Module:
    peft = require_peft()
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=[module.rpartition(".")[2] for module in family.projections],
        fan_in_fan_out=family.transposed,
        bias="none",
        task_type="CAUSAL_LM",
    )
    # PEFT draws from torch's own generator, which is the caller's.
    with torch.random.fork_rng(), warnings.catch_warnings():
        # It still asks transformers by names that the next version of that will not have.
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(settings.seed)
        adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def _predictions(model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Logits [T,V] of the T predicted tokens, and which of the batch's [B,S-1] they are."""
    logits: Tensor = model(**model_inputs(model, batch)).logits
    predicted = batch.predicted.to(logits.device)
    return logits[:, :-1][predicted], predicted


def training_batches(
    tokenizer: Any, texts: Sequence[Text], settings: RecoverSettings
) -> list[TokenBatch]:
    """One batch per step: every text once per round, each round in a new order by the seed. What is
    longer than the settings' `max_tokens` is cut into several texts.

    Raises UsageError where no text has a token to predict.
    """
    rows = [
        (index, piece)
        for index, text in enumerate(token_texts(tokenizer, texts))
        for piece in text.pieces(settings.max_tokens)
        if _teaches(piece)
    ]
    if not rows:
        raise UsageError("--data has no text of two tokens or more for this model.")
    generator = torch.Generator().manual_seed(settings.seed)
    count = settings.steps * settings.batch_size
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(len(rows), generator=generator).tolist()
    size = settings.batch_size
    return [
        pad_rows([rows[i] for i in order[start : start + size]]) for start in range(0, count, size)
    ]


def _teaches(piece: TokenText) -> bool:
    """Whether a text of one run has a token to predict."""
    return piece.tokens > 1 and (piece.answers is None or any(piece.answers[0][1:]))


def require_peft() -> Any:
    """The library of adapters; UsageError with what to install where it is missing."""
    return require_package("peft", "recovering", lambda: install_command("recover"))

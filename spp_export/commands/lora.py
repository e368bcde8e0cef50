"""LoRA on a slim model: a few steps on text, merged into its weights.

Low-rank adapters are from Hu et al., "LoRA" (2021); recovering a pruned model with them is what
LLM-Pruner and LoRAPrune do. The adapters and their merging are PEFT's, the loop is ours: a few
lines that give the same numbers again when they are interrupted and taken up.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spp_export.calibration.activations import TokenBatch, model_inputs, pad_rows
from spp_export.calibration.reading import Text, token_texts
from spp_export.commands.requests import RecoverSettings
from spp_export.common.errors import ModelError, UsageError
from spp_export.common.installation import install_command, require_package
from spp_export.models.families import Family

# Adam's: the usual ones.
_BETAS, _EPSILON = (0.9, 0.999), 1e-8
_MOST_NORM = 1.0


class Recovery:
    """A model with adapters, and how far its training is.

    The model's own weights stay as they are until `merge`.
    """

    def __init__(self, model: nn.Module, family: Family, settings: RecoverSettings) -> None:
        peft = _peft()
        roles = (
            *(family.query, family.key, family.value, family.output),
            *(family.gate, family.up, family.down),
        )
        config = peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=0.0,
            target_modules=[role.rpartition(".")[2] for role in roles],
            bias="none",
            task_type="CAUSAL_LM",
        )
        # PEFT draws from torch's own generator, which is the caller's.
        with torch.random.fork_rng(), warnings.catch_warnings():
            # It still asks transformers by names that the next version of that will not have.
            warnings.simplefilter("ignore", FutureWarning)
            torch.manual_seed(settings.seed)
            self.model: Any = peft.get_peft_model(model, config)
        self.settings = settings
        self.losses: list[float] = []
        self._trained = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        self._optimiser = torch.optim.AdamW(
            self._trained.values(), lr=0.0, betas=_BETAS, eps=_EPSILON, weight_decay=0.0
        )

    @property
    def done(self) -> int:
        """Steps taken."""
        return len(self.losses)

    def step(self, batch: TokenBatch) -> float:
        """Train on one batch; its loss in nats per token. Raises ModelError where it diverges."""
        for group in self._optimiser.param_groups:
            group["lr"] = self.settings.rate(self.done)
        self.model.train()
        inputs = model_inputs(self.model, batch)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        loss = self.model(**inputs, labels=labels).loss
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ModelError(
                f"step {self.done}: the loss is not a number. Use a smaller --learning-rate."
            )
        loss.backward()
        nn.utils.clip_grad_norm_(self._trained.values(), _MOST_NORM)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self.model.eval()
        self.losses.append(value)
        return value

    def state(self) -> dict[str, Tensor]:
        """All that `resume` needs, on the CPU."""
        tensors = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        for name, parameter in self._trained.items():
            tensors[f"value/{name}"] = parameter.detach().cpu().clone()
            for key, moment in self._optimiser.state[parameter].items():
                tensors[f"{key}/{name}"] = moment.detach().cpu().clone()
        return tensors

    def resume(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state` of the same model and settings."""
        self.losses = [float(loss) for loss in state["losses"]]
        for name, parameter in self._trained.items():
            parameter.data.copy_(state[f"value/{name}"])
            self._optimiser.state[parameter] = {
                key: state[f"{key}/{name}"].to(parameter.device if key != "step" else "cpu")
                for key in ("step", "exp_avg", "exp_avg_sq")
            }

    def merge(self) -> nn.Module:
        """The model with the adapters merged into its weights; this object cannot be used
        afterwards.
        """
        merged: nn.Module = self.model.merge_and_unload()
        return merged.eval()


def training_batches(
    tokenizer: Any, texts: Sequence[Text], settings: RecoverSettings
) -> list[TokenBatch]:
    """One batch per step: every text once per round, each round in a new order by the seed. What is
    longer than the settings' `max_tokens` is cut into several texts.

    Raises UsageError where no text has two tokens.
    """
    rows = [
        (index, piece)
        for index, text in enumerate(token_texts(tokenizer, texts))
        for piece in text.pieces(settings.max_tokens)
        if piece.tokens > 1
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


def _peft() -> Any:
    return require_package("peft", "recovering", lambda: install_command("recover"))

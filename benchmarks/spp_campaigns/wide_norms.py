"""What norms over all heads cost: `python -m spp_campaigns.wide_norms`.

Trains a tiny OLMo 2, which norms the queries of all its heads together and the keys, on the pools,
and slices it at several sizes. A slim model norms the heads that are kept; beside it stand the same
heads normed with those that are gone, as masking alone would, which no slice can be, and heads that
were chosen at random. Losses are of the pools' validation texts, in nats per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerFast

import spp_export
from spp_campaigns.command import finish, machine, parser, scratch, table
from spp_export.calibration.activations import TokenBatch, token_batches
from spp_export.common.progress import quiet_transformers
from spp_export.data.artifacts import open_artifacts
from spp_export.data.pools import Pools, read_pools
from spp_export.data.scenario import read_scenario
from spp_export.evaluation.oracle import masked_dense
from spp_export.evaluation.quality import next_token_log_probabilities
from spp_export.models.session import Session, open_session
from spp_export.planning import Plan
from spp_export.planning.budget import Budget
from spp_export.planning.planner import Planning
from spp_export.planning.request import PlanRequest
from spp_export.slicing.compensation import plan_compensation

_SIZES = (0.9, 0.8, 0.7, 0.5)
_WORDS, _WINDOW, _BATCH = 320, 128, 8
_END = "<|end|>"
_SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "vocab_size": _WORDS,
    "pad_token_id": 0,
    "eos_token_id": 0,
}
_COLUMNS = {
    "kept": "{keep:.0%}",
    "dense": "{dense:.3f}",
    "slim": "{slim:.3f}",
    "normed with what is gone": "{whole_norm:.3f}",
    "random heads": "{random:.3f}",
}


def train(pools: Pools, steps: int, target: Path) -> float:
    """Write a tokenizer and a model that are trained on the pools; the loss of the last steps."""
    texts = [text for part in pools.train for text in part]
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_WORDS, special_tokens=[_END], initial_alphabet=letters, show_progress=False
    )
    words.train_from_iterator(texts, trainer)
    ids = torch.tensor([i for text in texts for i in (*words.encode(text).ids, 0)])
    torch.manual_seed(0)
    model = Olmo2ForCausalLM(Olmo2Config(**_SHAPE))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    losses: list[float] = []
    for _ in range(steps):
        starts = torch.randint(len(ids) - _WINDOW, (_BATCH,))
        batch = torch.stack([ids[start : start + _WINDOW] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    with quiet_transformers():
        model.save_pretrained(target)
        PreTrainedTokenizerFast(
            tokenizer_object=words, eos_token=_END, pad_token=_END
        ).save_pretrained(target)
    return sum(losses[-20:]) / len(losses[-20:])


@torch.no_grad()
def loss_of(model: torch.nn.Module, batches: Sequence[TokenBatch]) -> float:
    """Nats per token."""
    total, tokens = 0.0, 0
    for batch in batches:
        log_probabilities, targets = next_token_log_probabilities(model, batch)
        total -= float(log_probabilities.gather(1, targets[:, None]).sum())
        tokens += len(targets)
    return total / tokens


def rows(
    session: Session, artifacts: Path, scenario: str, sizes: Sequence[float], pools: Pools
) -> Iterator[dict[str, Any]]:
    """Losses at every size, of the dense model and of slim ones."""
    source, model = session.source, session.model
    texts = [text for part in pools.val for text in part]
    batches = token_batches(session.tokenizer, texts, window=_WINDOW)
    dense = loss_of(model, batches)
    masked_alone = replace(source.family, wide_norms={})
    read = open_artifacts(artifacts, str(source.path), source)
    chosen = {}
    for criterion in (None, "random"):
        request = PlanRequest(criterion=criterion, answer_tokens=0)
        chosen[criterion] = Planning.begin(session, read, read_scenario(scenario), request)

    def loss(plan: Plan, planning: Planning, family: Any) -> float:
        made = plan_compensation(session, read, plan, planning.scenario, planning.request)
        with masked_dense(model, family, source.shape, plan, made.projections()) as masked:
            return round(loss_of(masked, batches), 4)

    for keep in sizes:
        plans = {name: of.within(Budget(keep=keep)).plan for name, of in chosen.items()}
        yield {
            "keep": keep,
            "dense": round(dense, 4),
            "slim": loss(plans[None], chosen[None], source.family),
            "whole_norm": loss(plans[None], chosen[None], masked_alone),
            "random": loss(plans["random"], chosen["random"], source.family),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, probe, and print a row for every size."""
    made = parser(__doc__, writes=True)
    made.add_argument("--pools", required=True, help="directory of pools")
    made.add_argument("--scenario", required=True, help="scenario file")
    made.add_argument("--steps", type=int, default=400, help="steps of training")
    made.add_argument("--size", type=float, action="append", help="share kept; repeatable")
    options = made.parse_args(arguments)
    pools = read_pools(options.pools)
    with scratch(options) as place:
        trained = train(pools, options.steps, place / "olmo2")
        artifacts = place / "artifacts"
        spp_export.probe(options.pools, artifacts, model=str(place / "olmo2"), answer_tokens=0)
        session = open_session(str(place / "olmo2"))
        sizes = options.size or _SIZES
        found = list(rows(session, artifacts, options.scenario, sizes, pools))
    document = {"machine": machine(), "shape": _SHAPE, "steps": options.steps, "rows": found}
    document["training_loss"] = round(trained, 4)
    finish(options, document, f"training loss {trained:.3f}", table(_COLUMNS, found))


if __name__ == "__main__":
    main()

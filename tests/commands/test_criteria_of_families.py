"""Every criterion on every kind of family: what it plans verifies, or it is refused by what the
family computes."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from exporting import Workshop, stored, texts, write_texts
from factories import VOCAB, write_tokenizer
from family_models import settings_of

import spp_export
from spp_export.common.errors import ModelError
from spp_export.data.artifacts import Artifacts
from spp_export.evaluation.contract import write_random
from spp_export.importance import CRITERIA
from spp_export.importance.base import Convention
from spp_export.importance.probe_pruning.blocks import KNOWN
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.families import Feature
from spp_export.planning.scoring import SEQUENTIAL

pytestmark = pytest.mark.thinned(most=6)

# One for every way in which a family differs from Llama: fused projections, no gate, parallel
# blocks, sandwiched and shifted norms, capped logits, multipliers, weights with inputs first,
# positions, post-norm, ALiBi, heads side by side, a cache of queries, norms over all heads,
# experts, other mixers, latents.
KINDS = (
    *("llama", "phi3", "arcee", "cohere", "gemma2", "granite", "gpt2", "opt", "opt-350m"),
    *(
        "gpt_neox-sequential",
        "gptj",
        "bloom",
        "mpt",
        "falcon-40b",
        "gpt_neo",
        "gpt_bigcode",
        "persimmon",
    ),
    *("exaone4", "olmo2", "mixtral", "qwen3_next", "lfm2", "falcon_h1", "deepseek_v3"),
)


def dense(workshop: Workshop, name: str) -> Path:
    """A tiny model of a kind, with a tokenizer."""

    def make() -> Path:
        settings = settings_of(name)
        settings.vocab_size = VOCAB
        if getattr(settings, "sliding_window", None):
            # In float64 stock eager attention has no number for padding that sees padding alone.
            settings.sliding_window = 512
        path = write_random(settings, workshop.root / "kinds" / name)
        write_tokenizer(path)
        return path

    return workshop.once(f"{name} kind", make)


def artifacts(workshop: Workshop, name: str) -> Path:
    """What `probe` finds in the pools."""

    def make() -> Path:
        path = workshop.root / "kinds" / f"{name}-artifacts"
        model = str(dense(workshop, name))
        units = "both" if open_source(dense(workshop, name)).family.down else "heads"
        spp_export.probe(workshop.pools, path, model=model, answer_tokens=0, units=units)
        return path

    return workshop.once(f"{name} artifacts of a kind", make)


def unknown_to(criterion: str, features: frozenset[Feature]) -> Collection[Feature]:
    """What a criterion does not know of a family: where it reads rows of keys, latents."""
    if criterion in SEQUENTIAL:
        return features - KNOWN
    sums = CRITERIA[criterion].convention is Convention.GROUP_SUM
    return features & {Feature.LATENT} if sums else ()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("criterion", [*CRITERIA, *SEQUENTIAL])
def test_a_criterion_plans_what_verifies_or_is_refused(
    workshop: Workshop, tmp_path: Path, name: str, criterion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some read it alone, whatever the pools found best.
    monkeypatch.setattr(Artifacts, "scenario_weight", 0.5)
    options = {
        "model": str(dense(workshop, name)),
        "artifacts": artifacts(workshop, name),
        "answer_tokens": 0,
        "keep": 0.6,
        "width_multiple": 8,
        "criterion": criterion,
    }
    kind = open_source(dense(workshop, name)).family
    # Not every criterion says something of experts, which would go with channels.
    options["units"] = "both" if kind.down and not kind.experts else "heads"
    unknown = unknown_to(criterion, kind.features)
    if unknown:
        words = rf" does not know ({'|'.join(map(re.escape, unknown))}), which"
        with pytest.raises(ModelError, match=words):
            spp_export.export(workshop.scenario, tmp_path / "slim", **options)
        assert not (tmp_path / "slim").exists()
        return
    result = spp_export.export(workshop.scenario, tmp_path / "slim", **options)
    assert result.report["passed"]
    assert result.plan.compensation == "lstsq"


@pytest.mark.parametrize("compensate", ["lstsq", "bias"])
def test_weights_with_inputs_first_are_refitted(
    workshop: Workshop, tmp_path: Path, compensate: str
) -> None:
    """GPT-2's: what is written is another weight than the slice, or adds to the bias."""
    place, out = dense(workshop, "gpt2"), tmp_path / "slim"
    result = spp_export.export(
        workshop.scenario,
        out,
        model=str(place),
        artifacts=artifacts(workshop, "gpt2"),
        answer_tokens=0,
        keep=0.6,
        units="both",
        width_multiple=8,
        compensate=compensate,
    )
    assert spp_export.verify(out, model=str(place)).passed
    before, after, changed = stored(place), stored(out), 0
    for index, layer in enumerate(result.plan.layers):
        rows = [head * 8 + i for head in layer.query_heads for i in range(8)]
        for module, kept, whole in (
            ("attn.c_proj", rows, 32),
            ("mlp.c_proj", list(layer.channels or range(24)), 24),
        ):
            name = f"transformer.h.{index}.{module}"
            cut = before[f"{name}.weight"][kept]
            losing = len(kept) < whole
            refitted = not torch.equal(after[f"{name}.weight"], cut)
            added = not torch.equal(after[f"{name}.bias"], before[f"{name}.bias"])
            assert refitted == (losing and compensate == "lstsq")
            assert added == (losing and compensate == "bias")
            changed += losing
    assert changed


@pytest.mark.parametrize("train", ["adapters", "weights"])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox-sequential", "phi3", "opt"])
def test_recovered_models_of_other_families_verify(
    workshop: Workshop, tmp_path: Path, name: str, train: str
) -> None:
    place, out = dense(workshop, name), tmp_path / "slim"
    options = {"model": str(place), "artifacts": artifacts(workshop, name), "answer_tokens": 0}
    spp_export.export(workshop.scenario, out, **options, keep=0.6, units="heads")
    data = write_texts(tmp_path / "more.txt", texts("figures", 16, 40))
    settings = {"learn": "text", "watch_every": 3, "steps": 6, "rank": 2, "batch_size": 2}
    rate = {"learning_rate": 1e-2 if train == "adapters" else 1e-3, "train": train}
    result = spp_export.recover(
        out, data, tmp_path / "recovered", model=str(place), **settings, **rate
    )
    assert result.after.slim_perplexity < result.before.slim_perplexity
    assert spp_export.verify(tmp_path / "recovered", model=str(place)).passed

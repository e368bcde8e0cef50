"""The offline stage, once per model: pools of domain text to artifacts, the model frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from spp_export.calibration.activations import (
    Observer,
    TextMeans,
    input_device,
    observe,
    token_batches,
)
from spp_export.calibration.answers import answer
from spp_export.calibration.gradients import BATCH_TOKENS, gradient_lengths, has_weights
from spp_export.calibration.moments import Collection, gather_all
from spp_export.calibration.reading import (
    Text,
    dialogue_text,
    question_ids,
    read_pools_within,
    spread,
    token_texts,
)
from spp_export.common.arrays import FloatArray, IntArray
from spp_export.common.errors import UsageError
from spp_export.common.options import DEFAULT_CALIBRATION_TOKENS, WINDOW
from spp_export.common.progress import progress
from spp_export.common.versions import library_versions
from spp_export.data.artifacts import Artifacts, Dialogue
from spp_export.data.conversation import Conversation, Message
from spp_export.data.pools import Pools
from spp_export.domains.axes import choose_space
from spp_export.domains.diagnosis import CROSS_DOMAIN, IN_DOMAIN, OUT_OF_DOMAIN
from spp_export.domains.familiar import BEGINNING, Beginnings, fit_familiar
from spp_export.domains.probes import fit_probes
from spp_export.domains.regimes import PROMPTS, RegimeText, calibrate, join_texts
from spp_export.domains.scores import (
    DEFAULT_CRITERIA,
    UNITS,
    AxisShares,
    criteria_named,
    kinds_needed,
    score_units,
)
from spp_export.domains.selection import COVERAGE_WEIGHT, check_count, select_domains
from spp_export.domains.shrinkage import (
    GroupSeconds,
    LayerCase,
    choose_shrinkage,
    sampled_layers,
    strongest,
)
from spp_export.domains.whitelist import choose_whitelist
from spp_export.importance import SCORING
from spp_export.importance.base import Criterion, check_convention
from spp_export.models.checkpoint.checkpoint import Checkpoint
from spp_export.models.products import Matmul
from spp_export.models.shape import Units

# Prompts of a domain that are answered: a scenario mixes several domains.
DIALOGUES = 32


@dataclass(frozen=True)
class ProbeSettings:
    """The options of the offline stage.

    select: how many of the candidate domains to take, greedily; None takes all. criteria: names
    of importance; units: "heads", or "both" heads and MLP channels. seed: of all that is drawn.
    calibration_tokens: most that are read of a pool's training text, and of its validation text.
    answer_tokens: of an answer of the model's to a prompt of a pool; 0 for none.
    """

    select: int | None = None
    criteria: Sequence[str] = DEFAULT_CRITERIA
    units: Units = "both"
    seed: int = 0
    calibration_tokens: int = DEFAULT_CALIBRATION_TOKENS
    answer_tokens: int = 0

    def check(self, candidates: int) -> tuple[Criterion, ...]:
        """The criteria; UsageError for what cannot be."""
        if self.select is not None:
            check_count(self.select, candidates)
        if self.units not in UNITS:
            raise UsageError(f"--units {self.units}: expected one of {', '.join(UNITS)}.")
        return criteria_named(self.criteria)


@dataclass(frozen=True)
class _Text:
    """Pooled text of the candidate domains, and of the domains left out."""

    train: Labelled
    held_out: Labelled
    unknown: Labelled


def probe_model(
    model: nn.Module,
    tokenizer: Any,
    source: Checkpoint,
    candidates: Pools,
    *,
    left_out: Pools | None = None,
    request: ProbeSettings | None = None,
    matmul: Matmul = "float32",
) -> Artifacts:
    """Artifacts of a model from pools; the statistics of their training text go to the cache.

    `matmul` is the precision of products while these are gathered.

    `candidates` are the domains to take, or to select from. Of `left_out`, and of candidates not
    selected, only validation text counts, as text of unknown domains. Passes over: all that text
    and the candidates' training text, joined texts, the validation text for second moments,
    the beginnings of validation texts, and the training text again, domain by domain, for
    statistics.
    """
    request = request or ProbeSettings()
    left_out = left_out or Pools((), (), (), {})
    source.family.check_units(request.units, source.shape)
    criteria = request.check(len(candidates.domains))
    for criterion in criteria:
        check_convention(source.family, criterion)
    dense = Dense(model, tokenizer, source, matmul)
    read = [
        read_pools_within(tokenizer, part, request.calibration_tokens)
        for part in (candidates, left_out)
    ]
    candidates, left_out = (part.pools for part in read)
    text = _Text(*labelled(dense, [candidates.train, candidates.val, left_out.val]))
    axes_Cd, taken, axes_record = _axes(text, candidates, request)
    pools = candidates.take([candidates.domains[k] for k in taken])
    train, held_out = text.train.of(taken), text.held_out.of(taken)
    with progress("fitting probes", None):
        weight, bias = fit_probes(train.pooled, train.labels, len(taken))
    known = train.pooled, train.labels, held_out.pooled, held_out.labels
    beginnings = _beginnings(dense, pools)
    familiar, familiarity = fit_familiar(*known, beginnings, len(taken), request.seed)
    regimes = {
        IN_DOMAIN: (held_out, np.eye(len(taken))[held_out.labels]),
        CROSS_DOMAIN: _joined(dense, pools, request.seed),
        OUT_OF_DOMAIN: _unknown(text, taken),
    }
    held_out_text = {
        name: RegimeText(
            np.einsum("nld,lkd->nlk", part.pooled, weight) + bias, targets, part.labels
        )
        for name, (part, targets) in regimes.items()
    }
    calibration = calibrate(held_out_text, request.seed)
    in_domain = held_out_text[IN_DOMAIN].logits
    accuracy = (in_domain.argmax(axis=2) == held_out.labels[:, None]).mean(axis=0)
    domain_N = [k for k, texts in enumerate(pools.train) for _ in texts]
    writes = AxisShares(source, input_device(model), weight, domain_N)
    collections = _gather(dense, pools, kinds_needed(criteria, request.units, source.shape), writes)
    with progress("scoring units", None):
        scores, energy_KLH = _scores(source, collections, criteria, request, writes)
        whitelist = choose_whitelist(energy_KLH, request.seed, layers=dense.attending)
    manifest = {
        "model": source.name,
        "seed": request.seed,
        "tokens": {
            "read": sum(part.tokens for part in read),
            "of": sum(part.available for part in read),
        },
        **_pools_record(candidates, left_out, pools, writes.tokens),
        "validation_accuracy": [round(float(a), 6) for a in accuracy],
        "axes": axes_record,
        **calibration.manifest,
        "familiarity": familiarity,
        "whitelist": whitelist.to_dict(),
        **_shrinkage(dense, pools, collections, energy_KLH),
        "versions": library_versions(),
    }
    return Artifacts(
        fingerprint=source.fingerprint,
        domains=pools.domains,
        regimes=calibration.regimes,
        weight=weight,
        bias=bias,
        temperature=calibration.temperature,
        axes=axes_Cd[list(taken)],
        importance=scores,
        whitelist=whitelist.heads,
        calibration=tuple(
            (name, sample)
            for name, texts in zip(pools.domains, pools.train, strict=True)
            for sample in texts
        ),
        manifest=manifest,
        sha256="",
        familiar=familiar.arrays(),
        dialogues=_dialogues(dense, pools, request),
    )


def _dialogues(dense: Dense, pools: Pools, request: ProbeSettings) -> tuple[Dialogue, ...]:
    """Prompts of every domain, spread evenly over its training text, with the model's answers."""
    if not request.answer_tokens:
        return ()
    asked: list[tuple[str, tuple[int, ...]]] = []
    for domain, texts in zip(pools.domains, pools.train, strict=True):
        prompts = [Conversation((Message("user", text),), chat=True) for text in texts]
        questions = [
            ids
            for ids in question_ids(dense.tokenizer, prompts)
            if len(ids) + request.answer_tokens <= WINDOW
        ]
        places = spread([1] * len(questions), DIALOGUES)
        asked += [(domain, questions[place]) for place in places]
    if not asked:
        return ()
    answers = answer(dense, [ids for _, ids in asked], request.answer_tokens, request.seed)
    return with_gradients(
        dense,
        [
            Dialogue(domain, text.runs[0], len(text.runs[0]) - len(ids))
            for (domain, ids), text in zip(asked, answers, strict=True)
        ],
    )


def with_gradients(dense: Dense, dialogues: Sequence[Dialogue]) -> tuple[Dialogue, ...]:
    """The dialogues with the gradients of their tokens, from one backward pass; as they are where
    some weights are not in memory."""
    if not has_weights(dense.reader):
        return tuple(dialogues)
    texts = [dialogue_text(one.tokens, one.answer) for one in dialogues]
    batches = token_batches(dense.tokenizer, texts, batch_tokens=BATCH_TOKENS)
    source = dense.source
    lengths = gradient_lengths(
        dense.reader,
        source.family,
        source.shape,
        batches,
        description="reading gradients of dialogues",
    ).astype(np.float16)
    # Batches have the texts in another order.
    order = [place for batch in batches for place in batch.texts]
    ends = np.cumsum([len(dialogues[place].tokens) for place in order])
    parts = dict(zip(order, np.split(lengths, ends[:-1]), strict=True))
    return tuple(replace(one, gradients=parts[place]) for place, one in enumerate(dialogues))


def _axes(
    text: _Text, candidates: Pools, request: ProbeSettings
) -> tuple[FloatArray, tuple[int, ...], dict[str, Any]]:
    """Axes of the candidates [C,d], those taken in the order of candidates, and the record."""
    names = candidates.domains
    train, held_out = text.train, text.held_out
    space, tried = choose_space(
        train.pooled, train.labels, held_out.pooled, held_out.labels, len(names)
    )
    record = space.to_dict(names)
    record["layers_tried"] = [
        {"layer": layer, "accuracy": round(share, 6)} for layer, share in tried.items()
    ]
    if request.select is None:
        taken = tuple(range(len(names)))
        record["selected"] = list(names)
    else:
        steps = select_domains(space, request.select)
        taken = tuple(sorted(step.candidate for step in steps))
        record["selected"] = [names[k] for k in taken]
        record["coverage_weight"] = COVERAGE_WEIGHT
        record["steps"] = [step.to_dict(names[step.candidate]) for step in steps]
    return space.residual_axes(), taken, record


def _joined(dense: Dense, pools: Pools, seed: int) -> tuple[Labelled, FloatArray]:
    """Joined texts, labelled by the run of texts of the same domains."""
    joined = join_texts(pools.val, seed)
    pooled = dense.pooled(joined.texts, "pooling joined texts")
    return Labelled(pooled, np.arange(len(pooled)) // PROMPTS), joined.targets


def _beginnings(dense: Dense, pools: Pools) -> Beginnings:
    """The first tokens of the validation texts of every domain."""
    labels = [k for k, texts in enumerate(pools.val) for _ in texts]
    whole = token_texts(dense.tokenizer, [text for texts in pools.val for text in texts])
    cut = [text.beginning(BEGINNING) for text in whole]
    return Beginnings(
        dense.pooled(cut, "pooling beginnings of texts"),
        np.asarray(labels, dtype=np.int64),
        *(np.array([text.tokens for text in part], dtype=np.int64) for part in (cut, whole)),
    )


def _unknown(text: _Text, taken: Sequence[int]) -> tuple[Labelled, FloatArray]:
    """Held-out text of candidates not taken and of domains left out, which is of no domain."""
    apart = np.flatnonzero(~np.isin(text.held_out.labels, taken))
    pooled = np.concatenate([text.held_out.pooled[apart], text.unknown.pooled])
    after = text.held_out.labels.max() + 1
    labels = np.concatenate([text.held_out.labels[apart], text.unknown.labels + after])
    return Labelled(pooled, labels), np.zeros((len(pooled), len(taken)))


def _gather(
    dense: Dense, pools: Pools, kinds: Sequence[str], writes: AxisShares
) -> Sequence[Collection]:
    """Statistics of each domain's training text, kept in the cache for the exports to come."""
    return gather_all(
        dense.source,
        pools.train,
        kinds,
        lambda: (dense.reader, dense.tokenizer),
        dtype=dense.dtype,
        matmul=dense.matmul,
        also=[writes],
    )


def _scores(
    source: Checkpoint,
    collections: Sequence[Collection],
    criteria: Sequence[Criterion],
    request: ProbeSettings,
    writes: AxisShares,
) -> tuple[Mapping[str, Any], FloatArray]:
    """Importance by every criterion, and energy of the heads, which is needed in any case."""

    def scored(criteria: Sequence[Criterion], units: str) -> Mapping[str, Any]:
        axes = (writes.directions, writes.shares())
        return score_units(source, collections, criteria, units, *axes, request.seed)

    scores = scored(criteria, request.units)
    if "head/energy" in scores:
        return scores, scores["head/energy"]
    return scores, scored([SCORING["energy"]], "heads")["head/energy"]


def _shrinkage(
    dense: Dense, pools: Pools, collections: Sequence[Collection], energy_KLH: FloatArray
) -> dict[str, Any]:
    """What the manifest says of shrinkage and the scenario's weight.

    Nothing, and so the defaults, where there is one domain or too little text to choose by.
    """
    domains = len(pools.domains)
    if domains < 2 or min(len(texts) for texts in pools.val) < 2:
        return {}
    shape, family = dense.source.shape, dense.source.family
    width = shape.query_heads * shape.head_dim
    layers = sampled_layers(dense.attending, width)
    halves = [
        (2 * k + (2 * n >= len(t)), t[n]) for k, t in enumerate(pools.val) for n in range(len(t))
    ]
    seconds = GroupSeconds(layers, width, [group for group, _ in halves])
    dense.watch([text for _, text in halves], seconds, "moments of validation text")

    def case(layer: int) -> LayerCase:
        weight = dense.source.weight(family.output, layer)
        held_out = seconds.second(layer)
        return LayerCase(
            weight=weight,
            train=np.stack(
                [collection.blocks("attention", layer)[0] for collection in collections]
            ),
            own=held_out[0::2],
            judged=held_out[1::2],
            kept=strongest(energy_KLH, layer, shape.head_dim),
        )

    with progress("choosing the shrinkage", 2 * len(layers)) as advance_to:
        return choose_shrinkage(case, layers, advance_to)


def _pools_record(
    candidates: Pools, left_out: Pools, pools: Pools, tokens: Sequence[int]
) -> dict[str, Any]:
    """Hashes of the files that took part, and how many texts each domain has."""
    unused = {f"{name}/train.txt" for name in left_out.domains}
    counts = zip(pools.domains, pools.train, pools.val, tokens, strict=True)
    texts = {
        name: len(val)
        for part in (candidates, left_out)
        for name, val in zip(part.domains, part.val, strict=True)
    }
    hashes = {**candidates.sha256, **left_out.sha256}
    return {
        "pools": {file: digest for file, digest in sorted(hashes.items()) if file not in unused},
        "counts": {
            name: {"train": len(train), "val": len(val), "tokens": count}
            for name, train, val, count in counts
        },
        "left_out": {name: {"val": n} for name, n in texts.items() if name not in pools.domains},
    }


@dataclass(frozen=True)
class Dense:
    """The frozen dense model, its tokenizer and its files, and the precision of products while
    statistics are gathered."""

    reader: nn.Module
    tokenizer: Any
    source: Checkpoint
    matmul: Matmul = "float32"

    @property
    def attending(self) -> list[int]:
        """The layers that have heads."""
        return [index for index, has in enumerate(self.source.shape.has_heads) if has]

    @property
    def dtype(self) -> str:
        """What it computes in."""
        return str(next(self.reader.parameters()).dtype).removeprefix("torch.")

    @property
    def device(self) -> str:
        """Where it is; of a model on several devices, where it begins."""
        return str(next(self.reader.parameters()).device)

    def watch(self, texts: Sequence[Text], observer: Observer, description: str) -> None:
        """One forward pass over texts."""
        observe(
            self.reader,
            self.source.family,
            token_batches(self.tokenizer, texts),
            [observer],
            description=description,
        )

    def pooled(self, texts: Sequence[Text], description: str) -> FloatArray:
        """The residual stream after attention, averaged over each text's tokens [N,L,d]."""
        shape = self.source.shape
        means = TextMeans("residual", len(texts), shape.num_layers, shape.hidden_size)
        if texts:
            self.watch(texts, means, description)
        return means.values


@dataclass(frozen=True)
class Labelled:
    """Pooled texts [N,L,d] and the domain that each is of [N]."""

    pooled: FloatArray
    labels: IntArray

    def of(self, domains: Sequence[int]) -> Labelled:
        """Texts of these domains, numbered in this order."""
        number = {k: i for i, k in enumerate(domains)}
        kept = [n for n, k in enumerate(self.labels) if int(k) in number]
        labels = [number[int(self.labels[n])] for n in kept]
        return Labelled(self.pooled[kept], np.asarray(labels, dtype=np.int64))


def labelled(dense: Dense, parts: Sequence[Sequence[Sequence[str]]]) -> list[Labelled]:
    """Each part, which is a list of texts per domain, pooled; one pass for all."""
    texts = [text for part in parts for group in part for text in group]
    pooled = dense.pooled(texts, "pooling the stream")
    result, start = [], 0
    for part in parts:
        labels = [k for k, group in enumerate(part) for _ in group]
        stop = start + len(labels)
        result.append(Labelled(pooled[start:stop], np.asarray(labels, dtype=np.int64)))
        start = stop
    return result

"""`recover`: an export is trained further, into a checkpoint of the same layout."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spp_export.calibration.answers import Answering, read_traffic
from spp_export.calibration.mixture import Mixing, calibration_parts
from spp_export.calibration.reading import TokenText, read_texts, token_texts
from spp_export.commands.requests import RecoverRequest
from spp_export.common.errors import (
    CheckFailed,
    CheckpointError,
    ParityError,
    QualityError,
    UsageError,
)
from spp_export.common.json_files import dump_json
from spp_export.common.manifest import (
    MANIFEST_NAME,
    check_manifest,
    hash_file,
    require_export,
    write_manifest,
)
from spp_export.common.options import command
from spp_export.common.progress import progress
from spp_export.common.publish import check_target, publish
from spp_export.data.answer_file import with_answers
from spp_export.data.artifacts import Artifacts, open_artifacts
from spp_export.data.conversation import Conversation
from spp_export.data.duplicates import shared_texts
from spp_export.data.scenario import MIN_PROMPTS_TO_HOLD_OUT, Scenario, read_scenario
from spp_export.formats.card import model_card, recovery_section
from spp_export.formats.registry import detect_format
from spp_export.formats.safetensors.verify import RECOVERY_NAME, check_directory
from spp_export.models.checkpoint.header import StoredTensor
from spp_export.models.checkpoint.reader import INDEX_NAME, blocks, stored_tensors
from spp_export.models.checkpoint.writer import ShardWriter, TensorEntry, plan_shards
from spp_export.models.engines import engines_for
from spp_export.models.hub import DEMO, cache_directory, model_license
from spp_export.models.session import Session, open_session
from spp_export.models.tokenizer import load_tokenizer
from spp_export.planning import Plan, read_plan, validate_plan
from spp_export.planning.bound import predicted
from spp_export.planning.planner import answers_record, artifacts_record
from spp_export.planning.written import written_shape
from spp_export.slicing.compensation import plan_mixing
from spp_export.slicing.weights import encoded

if TYPE_CHECKING:
    import torch

    from spp_export.calibration.activations import TokenBatch
    from spp_export.commands.layer_training import LayerLearnt, LayerText
    from spp_export.commands.training import Training
    from spp_export.evaluation.parity import ReferenceLogits
    from spp_export.evaluation.quality import Quality

SCHEMA_VERSION = 1
# Steps between two states that an interrupted run can go on from.
_KEPT_EVERY = 20
# Of the texts, every so manieth says when to stop; with fewer none does.
_WATCHED = 8
# Measures in a row that find nothing better, after which training ends.
_PATIENCE = 4
_ALL = sys.maxsize
_JUDGED = {
    "answers": "answers to prompts that were not trained on",
    "text": "text that was not trained on",
}
# Rounds of training with other answers to the same prompts; later ones repeat these.
_ROUNDS = 4
# What is said of a weight that leaves the range of its dtype.
_UNFIT = {"origin": "a trained value", "advice": "Use a smaller --learning-rate."}
# Files of an export that are written anew.
_OWN = ("README.md", "verify.json", MANIFEST_NAME, INDEX_NAME, RECOVERY_NAME)


@dataclass(frozen=True)
class RecoverResult:
    """What was trained, and its quality on text that was not trained on.

    before, after  quality against the dense model; None where no token can be predicted
    between        the same once layers have learnt, where the whole model then learns too
    losses         of every step, in nats per token
    layers         that learnt by themselves before
    resumed        steps that an earlier run had taken
    measured       tokens that quality was measured on: `read`, and `of` how many
    """

    path: Path
    before: Quality | None
    between: Quality | None
    after: Quality | None
    losses: tuple[float, ...]
    layers: tuple[LayerLearnt, ...]
    resumed: int
    report: Mapping[str, Any]
    measured: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "path": str(self.path),
            "before": None if self.before is None else self.before.to_dict(),
            "between": None if self.between is None else self.between.to_dict(),
            "after": None if self.after is None else self.after.to_dict(),
            "losses": [round(loss, 4) for loss in self.losses],
            "layers": layers_record(self.layers) if self.layers else None,
            "resumed": self.resumed,
            "measured": dict(self.measured),
            "verify": dict(self.report),
        }


@command(RecoverRequest)
def recover(request: RecoverRequest) -> RecoverResult:
    """Train an export on what the dense model answers, or on text, and write the trained model; the
    export stays as it is. Layers that were cut learn by themselves first, then the whole.

    An interrupted run goes on where it was. Raises ParityError where the written model is not the
    one that was trained, QualityError where it is no better than before: then nothing is published
    unless `keep_failed`.

        spp_export.recover("out/chemistry", "chemistry.jsonl", "out/recovered", steps=200)
    """
    source_dir = Path(request.out)
    plan = _plan(source_dir)
    beside = source_dir.with_name(f"{source_dir.name}-recovered")
    target = beside if request.output is None else Path(request.output)
    check_target(target, request.force)
    text = with_answers(read_scenario(request.data), request.answers)
    trained, measured = _split(request, text)
    session = open_session(
        request.model,
        device=request.device,
        dtype="float32",
        matmul=request.matmul,
        dequantize=request.dequantize,
    )
    validate_plan(plan, session.source.shape, session.source.fingerprint)
    artifacts = None
    if request.artifacts is not None or request.model == DEMO:
        artifacts = open_artifacts(request.artifacts, request.model, session.source)
    if request.rounds_of_layers and session.from_disk and request.learn == "text":
        raise UsageError(
            "--layer-rounds: the dense model's layers show what is to be written, and this one "
            "runs from disk. Use a machine with more memory, or --layer-rounds 0."
        )
    if request.learn == "answers" and session.from_disk:
        raise UsageError(
            "--learn answers: every step asks the dense model, and this one runs from disk. Use a "
            "machine with more memory, or --learn text."
        )
    job = _Job(source_dir, plan, session, request, artifacts, trained, measured)
    training, resumed, before = job.train()
    losses = tuple(training.losses)
    with publish(target, request.force) as work:
        reference, merged = job.merged(training)
        _copy(source_dir, work)
        written = job.write(merged, work)
        record = job.record(text, losses, before)
        (work / RECOVERY_NAME).write_text(dump_json(record), encoding="utf-8")
        report, after, failure = job.verify(work, reference, before)
        (work / "verify.json").write_text(dump_json(report), encoding="utf-8")
        if failure and not request.keep_failed:
            job.forget()
            raise failure
        (work / "README.md").write_text(job.card(target.name, report, record), encoding="utf-8")
        write_manifest(work, written)
    job.forget()
    if failure:
        raise type(failure)(f"{failure} Published all the same, by --keep-failed: {target}")
    found = (before, job.between, after)
    return RecoverResult(target, *found, losses, tuple(job.layers), resumed, report, job.measured)


@dataclass(frozen=True)
class _Best:
    """The best model so far on what is watched, after so many steps: the trained values, none
    before the first step."""

    distance: float
    step: int
    values: Mapping[str, torch.Tensor]


class _Job:
    """One recovery."""

    def __init__(
        self,
        directory: Path,
        plan: Plan,
        session: Session,
        settings: RecoverRequest,
        artifacts: Artifacts | None,
        trained: Sequence[Conversation],
        measured: Sequence[Conversation],
    ) -> None:
        self._directory, self._plan, self._session = directory, plan, session
        self._settings, self._artifacts, self._prompts = settings, artifacts, trained
        self.layers: Sequence[LayerLearnt] = ()
        self.between: Quality | None = None
        self._tokenizer = load_tokenizer(directory)
        if settings.learn == "answers":
            answering = Answering(settings.answer_tokens, settings.seed)
            read = read_traffic(session, measured, settings.calibration_tokens, answering)
        else:
            read = read_texts(self._tokenizer, measured, settings.calibration_tokens)
        self._measured, self.measured = read.texts, read.to_dict()
        content = [
            [*((m.role, m.text) for m in conversation.messages), *conversation.given]
            for conversation in trained
        ]
        export = hash_file(directory / MANIFEST_NAME).sha256
        known = artifacts and artifacts_record(artifacts)
        decided = [export, settings.to_dict(), session.matmul, content, known]
        key = hashlib.sha256(json.dumps(decided).encode()).hexdigest()[:32]
        self._state = cache_directory() / "recoveries" / f"{key}.safetensors"

    def train(self) -> tuple[Training, int, Quality | None]:
        """The model after the step that was best, the steps that were there already, and the
        quality before the first one."""
        from spp_export.commands.training import Training, require_peft, training_batches
        from spp_export.models.loader import load_slim

        session, settings, shape = self._session, self._settings, self._session.source.shape
        if settings.adapted:
            require_peft()  # before the dense model is asked for answers
        texts, watched = self._texts()
        batches = training_batches(self._tokenizer, texts, settings)
        slim = load_slim(self._directory, dtype=session.torch_dtype, device=session.device)
        before = self._quality(slim)
        cut = [
            index
            for index, (kept, whole) in enumerate(
                zip(self._plan.written_shapes(shape), shape.layers, strict=True)
            )
            if kept != whole
        ]
        if settings.rounds_of_layers:
            self.layers = self._learn_layers(slim, cut)
            self.between = self._quality(slim) if settings.steps else None
        dense = session.model if settings.learn == "answers" else None
        training = Training(slim, session.source.family, settings, cut, dense, session.matmul)
        best = self._resume(training) or self._first(training, watched)
        resumed = training.done
        with progress("recovering", float(settings.steps)) as advance_to:
            for batch in batches[resumed:]:
                if watched and training.done - best.step >= _PATIENCE * settings.watch_every:
                    break
                training.step(batch)
                advance_to(training.done)
                last = training.done == len(batches)
                if watched and (training.done % settings.watch_every == 0 or last):
                    found = self._distance(training, watched)
                    if found < best.distance:
                        best = _Best(found, training.done, training.values())
                if training.done % _KEPT_EVERY == 0:
                    self._keep(training, best)
        if best.values:
            training.restore(best.values)
        self.best_step = best.step if watched else training.done
        return training, resumed, before

    def _learn_layers(self, slim: Any, cut: Sequence[int]) -> Sequence[LayerLearnt]:
        """The layers that were cut, each by itself; those of an interrupted run are there."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from spp_export.calibration.cache import write
        from spp_export.commands.layer_training import learn_layers

        def known(layer: int) -> Mapping[str, torch.Tensor] | None:
            try:
                return load_file(self._state_of(layer))
            except (FileNotFoundError, SafetensorError):
                return None

        def keep(layer: int, values: Mapping[str, torch.Tensor]) -> None:
            write(self._state_of(layer), {name: of.numpy() for name, of in values.items()})

        session, settings = self._session, self._settings
        return learn_layers(
            session.model,
            slim,
            session.source.family,
            cut,
            self._layer_text(),
            settings.rounds_of_layers,
            seed=settings.seed,
            matmul=session.matmul,
            known=known,
            keep=keep,
        )

    def _layer_text(self) -> LayerText:
        """The prompts with an answer each, or the text, and with it the pools of the artifacts,
        whose domains count as in the plan: every token about alike."""
        from spp_export.commands.layer_training import LayerText

        answered = self._settings.learn == "answers"
        own, seed = self._apart()[0], self._settings.seed + 1
        texts = self._answered(own, seed) if answered else token_texts(self._tokenizer, own)
        artifacts, mixture = self._artifacts, self._plan.diagnosis.get("mixture")
        if artifacts is None:
            return LayerText(texts, [1.0] * len(texts))
        shrinkage = (plan_mixing(self._plan) or Mixing(artifacts.shrinkage, 0.0)).shrinkage
        pools = calibration_parts(artifacts, mixture, (), Mixing(shrinkage, 0.0), answered=answered)
        parts = [(token_texts(self._tokenizer, pool.texts), pool.weight) for pool in pools]
        tokens = [sum(text.tokens for text in part) for part, _ in parts]
        pairs = [(text, 1.0) for text in texts]
        for (part, weight), count in zip(parts, tokens, strict=True):
            pairs += [(text, weight * sum(tokens) / count) for text in part]
        return LayerText(*zip(*pairs, strict=True))

    def _apart(self) -> tuple[Sequence[Conversation], Sequence[Conversation]]:
        """Prompts to train on, and those that say when to stop."""
        settings, prompts = self._settings, self._prompts
        apart = range(_WATCHED - 1, len(prompts), _WATCHED) if settings.watch_every else range(0)
        rest = [prompt for index, prompt in enumerate(prompts) if index not in apart]
        return rest, [prompts[index] for index in apart]

    def _texts(self) -> tuple[Sequence[TokenText], Sequence[TokenText]]:
        """What is trained on, and what says when to stop."""
        settings, (rest, watched) = self._settings, self._apart()
        if settings.learn == "text":
            return token_texts(self._tokenizer, rest), token_texts(self._tokenizer, watched)
        rounds = min(max(1, -(-settings.steps * settings.batch_size // len(rest))), _ROUNDS)
        seeds = range(settings.seed + 1, settings.seed + 1 + rounds)
        read = [text for seed in seeds for text in self._answered(rest, seed)]
        return read, self._answered(watched, settings.seed) if settings.steps else ()

    def _answered(self, prompts: Sequence[Conversation], seed: int) -> Sequence[TokenText]:
        """All of the prompts, with answers."""
        answering = Answering(self._settings.answer_tokens, seed, most=len(prompts))
        return read_traffic(self._session, prompts, _ALL, answering).texts

    def merged(self, training: Training) -> tuple[ReferenceLogits, dict[str, torch.Tensor]]:
        """Logits that the written model must give, and the weights that training has changed.

        The oracle is the model as it was trained, with its adapters beside it; rounding is what
        merging them and storing the sums does to it.
        """
        import torch

        from spp_export.evaluation.batches import session_batches, wide_dtype
        from spp_export.evaluation.parity import ReferenceLogits, real_logits

        session = self._session
        batches: list[TokenBatch] = session_batches(session, self._measured, self._settings.seed)
        shape = session.source.shape
        layers = self._plan.written_shapes(shape)
        family, parameters = session.source.family, 2 * shape.parameters(layers)
        exact = wide_dtype(torch.float32, family, parameters, session.device)
        wide = tuple(real_logits(training.model.to(exact), batches))
        training.model.to(torch.float32)
        names = training.changed
        model = training.finished()
        stored = stored_tensors(self._directory)
        changed: dict[str, torch.Tensor] = {}
        for name in names:
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.to(_torch_dtype(stored[name])).to(parameter.dtype)
            changed[name] = parameter.data
        same = tuple(real_logits(model, batches))
        return ReferenceLogits(tuple(batches), wide, same), changed

    def write(self, changed: Mapping[str, torch.Tensor], work: Path) -> Mapping[str, Any]:
        """The weights, in the names, shapes and dtypes of the export; records of the files."""
        stored = stored_tensors(self._directory)
        entries = [TensorEntry(name, tensor.dtype, tensor.shape) for name, tensor in stored.items()]
        with ShardWriter(work, plan_shards(entries)) as writer:
            for entry in writer.order:
                if entry.name in changed:
                    values = changed[entry.name].float().cpu().numpy()
                    writer.write(entry.name, encoded(values, entry, **_UNFIT))
                else:
                    writer.write(entry.name, blocks(stored[entry.name]))
        return writer.records

    def verify(
        self, work: Path, reference: ReferenceLogits, before: Quality | None
    ) -> tuple[dict[str, Any], Quality | None, CheckFailed | None]:
        """verify.json, the quality after, and what failed first."""
        from spp_export.evaluation.parity import VerifyReport, check_parity, rounded

        checked = check_directory(
            work, self._session, self._plan, self._measured, self._settings.seed
        )
        checks, after = checked.report.checks, None
        if checked.slim is not None:
            merged = check_parity(checked.slim, reference)
            checks += (replace(merged, name="written model against the trained one"),)
            after = self._quality(checked.slim)
        report = VerifyReport(checks, checked.report.context)
        content = report.to_dict()
        if after is not None:
            content["quality"] = rounded(after.to_dict())
        if not report.passed:
            first = report.failures[0]
            return content, after, ParityError(f"{first.name}: {first.describe()}")
        if before and after and not self._figure(after) < self._figure(before):
            figure = "mean KL" if self._settings.learn == "answers" else "perplexity"
            worse = QualityError(
                f"{figure} on {after.source} is {self._figure(after):.4g}, and was "
                f"{self._figure(before):.4g}. Give more text, or fewer --steps."
            )
            return content, after, worse
        return content, after, None

    def _figure(self, quality: Quality) -> float:
        """What training is to make smaller."""
        return quality.mean_kl if self._settings.learn == "answers" else quality.slim_perplexity

    def record(
        self, text: Scenario, losses: Sequence[float], before: Quality | None
    ) -> dict[str, Any]:
        """recovery.json."""
        from spp_export.common.versions import library_versions
        from spp_export.evaluation.parity import rounded

        return {
            "schema_version": SCHEMA_VERSION,
            "export": {
                "name": self._directory.resolve().name,
                "manifest_sha256": hash_file(self._directory / MANIFEST_NAME).sha256,
            },
            "data": {
                "name": text.name,
                "sha256": text.sha256,
                "texts": len(self._prompts),
                **answers_record(text),
            },
            "settings": self._settings.to_dict(),
            "matmul": self._session.matmul,
            **({"layers": rounded(self._layers_record())} if self.layers else {}),
            "steps": {"taken": len(losses), "best": self.best_step},
            **({"loss": rounded(_first_and_last(losses))} if losses else {}),
            "before": None if before is None else rounded(before.to_dict()),
            **({"between": rounded(self.between.to_dict())} if self.between else {}),
            "versions": library_versions(),
        }

    def _layers_record(self) -> dict[str, Any]:
        return {**layers_record(self.layers), "pools": self._artifacts is not None}

    def card(self, name: str, report: Mapping[str, Any], record: Mapping[str, Any]) -> str:
        """README.md."""
        source, plan = self._session.source, self._plan
        layers = plan.written_shapes(source.shape)
        card = model_card(
            name,
            plan,
            source.shape,
            predicted(source.shape, layers, written_shape(source, plan)),
            report,
            engines_for(
                source.family.model_type,
                plan.written_layout,
                layers,
            ),
            model_license(source.path),
        )
        return f"{card}\n{recovery_section(report, record)}"

    def forget(self) -> None:
        """Delete the state that an interrupted run would continue from."""
        self._state.unlink(missing_ok=True)
        for layer in range(self._session.source.shape.num_layers):
            self._state_of(layer).unlink(missing_ok=True)

    def _state_of(self, layer: int) -> Path:
        """Where a layer that has learnt is kept."""
        return self._state.with_name(f"{self._state.stem}-layer-{layer}.safetensors")

    def _quality(self, slim: Any) -> Quality | None:
        from spp_export.evaluation.quality import measure_quality

        source = _JUDGED[self._settings.learn]
        return measure_quality(self._session.model, slim, self._tokenizer, self._measured, source)

    def _distance(self, training: Training, watched: Sequence[TokenText]) -> float:
        """What training is to make smaller, on the texts that say when to stop."""
        from spp_export.evaluation.quality import measure_quality

        dense = self._session.model
        found = (
            measure_quality(dense, training.model, self._tokenizer, watched) if watched else None
        )
        return math.inf if found is None else self._figure(found)

    def _first(self, training: Training, watched: Sequence[TokenText]) -> _Best:
        values = training.values() if watched else {}
        return _Best(self._distance(training, watched), 0, values)

    def _keep(self, training: Training, best: _Best) -> None:
        from spp_export.calibration.cache import write

        tensors = {name: value.numpy() for name, value in training.state().items()}
        tensors["best"] = np.array([best.distance, best.step])
        tensors |= {f"best/{name}": value.numpy() for name, value in best.values.items()}
        write(self._state, tensors)

    def _resume(self, training: Training) -> _Best | None:
        """What an earlier run had found best, where there was one."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = load_file(self._state)
            training.resume(state)
            distance, step = state["best"].tolist()
        except (FileNotFoundError, SafetensorError, KeyError):
            return None
        start = "best/"
        values = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
        return _Best(distance, int(step), values)


def layers_record(layers: Sequence[LayerLearnt]) -> dict[str, Any]:
    """How many layers learnt, and how far their streams are from the dense model's on average."""
    count = len(layers)
    return {
        "count": count,
        "before": sum(layer.before for layer in layers) / count,
        "after": sum(layer.after for layer in layers) / count,
    }


def _first_and_last(losses: Sequence[float]) -> dict[str, float]:
    """Means of the first and of the last tenth."""
    tenth = max(1, len(losses) // 10)
    return {"first": sum(losses[:tenth]) / tenth, "last": sum(losses[-tenth:]) / tenth}


def _plan(directory: Path) -> Plan:
    """The plan of an export that can be recovered. Raises UsageError."""
    require_export(directory)
    if (written := detect_format(directory)) and written.converted:
        raise UsageError(
            f"{directory}: only exports with safetensors can be trained. Recover that one, and "
            "convert the result with 'spp convert'."
        )
    if problems := check_manifest(directory):
        raise CheckpointError(f"{directory}: {problems[0]}. Write the export again.")
    plan = read_plan(directory / "plan.json")
    if plan.padded:
        raise UsageError(
            f"{directory}: its layers are padded with zeros, which training would fill. Recover "
            "the export without --pad."
        )
    return plan


def _split(
    request: RecoverRequest, text: Scenario
) -> tuple[Sequence[Conversation], Sequence[Conversation]]:
    """What is trained on, and what is measured on; UsageError where they share text."""
    if request.validation is None:
        trained, measured = text.split()
        if not measured:
            raise UsageError(
                f"--data {text.name}: holds {text.distinct} texts that are not alike, and it takes "
                f"at least {MIN_PROMPTS_TO_HOLD_OUT} to keep some for measuring. Give it more, or "
                "give --validation FILE."
            )
        return trained, measured
    apart = with_answers(read_scenario(request.validation), request.answers, required=False)
    contents = (
        [conversation.content for conversation in part.conversations] for part in (apart, text)
    )
    if shared := shared_texts(*contents):
        raise UsageError(
            f"--validation {apart.name}: {len(shared)} of its {len(apart.conversations)} texts are "
            f"in --data {text.name}, or nearly, so they cannot judge what is trained on it. Take "
            "them out of one of the files, or leave --validation out."
        )
    return text.conversations, apart.conversations


def _copy(source: Path, work: Path) -> None:
    """Everything of an export but its weights and what is written anew."""
    for path in sorted(source.iterdir()):
        if path.name not in _OWN and path.suffix != ".safetensors":
            shutil.copyfile(path, work / path.name)


def _torch_dtype(stored: StoredTensor) -> torch.dtype:
    import torch

    from spp_export.models.checkpoint.dtypes import FLOAT_DTYPES

    kind: torch.dtype = getattr(torch, FLOAT_DTYPES[stored.dtype])
    return kind

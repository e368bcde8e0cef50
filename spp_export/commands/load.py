"""`load` and `load_many`: slim models straight from the dense checkpoint and plans.

A plan is an adapter of a few kilobytes. What it leaves untouched is read once, and every model
made of the same checkpoint holds the same tensors; what it cuts or re-fits is its own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spp_export.common.disk import scratch_folder
from spp_export.common.errors import PlanError, UsageError
from spp_export.common.json_files import dump_json
from spp_export.data.answer_file import with_answers
from spp_export.data.artifacts import Artifacts, open_artifacts
from spp_export.data.scenario import Scenario, read_scenario
from spp_export.domains.diagnosis import diagnose_prompts
from spp_export.models.checkpoint.companions import GENERATION_CONFIG, companion_object
from spp_export.models.families import Feature
from spp_export.models.hub import DEMO
from spp_export.models.session import Session, open_session
from spp_export.models.stop_tokens import generation_config
from spp_export.models.tokenizer import has_tokenizer
from spp_export.models.weights_on_disk import empty_model, stored_as_tensor, torch_bits
from spp_export.planning import Plan, dense_plan, read_plan, validate_plan
from spp_export.slicing.compensation import (
    Compensator,
    plan_compensation,
    warn_of_other_answers,
    written_config,
)
from spp_export.slicing.weights import SlimTensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PlanLike = str | os.PathLike[str] | Plan


def load(
    model: str,
    plan: PlanLike,
    *,
    artifacts: str | os.PathLike[str] | None = None,
    scenario: str | os.PathLike[str] | None = None,
    answers: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    dequantize: bool = False,
) -> PreTrainedModel:
    """The slim model that `export(plan=...)` would write, in evaluation mode, without writing it.

    plan       a plan, its file, or the directory of an export
    artifacts  what a re-fitting plan is re-fitted on; the demo model's come with spp
    scenario   the text that the plan was made for, if its re-fit shall see it, too
    answers    a log with answers to the scenario's prompts, as of `export`
    dtype      the stored one by default
    dequantize what a quantised model's weights stand for, as in `export`

    Raises PlanError for a plan of another model, UsageError where a re-fit has no text.
    """
    models = load_many(
        model,
        {"slim": plan},
        artifacts=artifacts,
        scenarios={} if scenario is None else {"slim": scenario},
        answers={} if answers is None else {"slim": answers},
        device=device,
        dtype=dtype,
        dequantize=dequantize,
    )
    return models["slim"]


def load_many(
    model: str,
    plans: Mapping[str, PlanLike] | Sequence[PlanLike],
    *,
    artifacts: str | os.PathLike[str] | None = None,
    scenarios: Mapping[str, str | os.PathLike[str]] | None = None,
    answers: Mapping[str, str | os.PathLike[str]] | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    dequantize: bool = False,
) -> ScenarioModels:
    """Slim models of one checkpoint, by name, that share every tensor their plans leave untouched.

    Without names a plan is called what its scenario is, and else after its file. Arguments and
    errors are those of `load`.
    """
    if device == "auto":
        raise UsageError(
            "--device auto: models that share tensors are on one device. Give cpu, or cuda."
        )
    read = _named(plans)
    session = open_session(model, device=device, dtype=dtype, dequantize=dequantize)
    own = session.source.dtype_name if dtype is None else dtype
    weights = SharedWeights(session, getattr(torch, own))
    refitting = any(plan.compensation != "none" for plan in read.values())
    opened = None
    if artifacts is not None or (refitting and model == DEMO):
        opened = open_artifacts(artifacts, model, session.source)
    models = {}
    for name, plan in read.items():
        validate_plan(plan, session.source.shape, session.source.fingerprint)
        text = (scenarios or {}).get(name)
        scenario = None
        if text is not None:
            scenario = with_answers(read_scenario(text), (answers or {}).get(name))
        models[name] = weights.slim(plan, _compensation(session, opened, plan, scenario))
    # Where statistics had to be gathered it was loaded, and is not needed any more.
    session.__dict__.pop("model", None)
    return ScenarioModels(session, weights, read, models, opened)


class ScenarioModels(Mapping[str, "PreTrainedModel"]):
    """Slim models by name, in the order they were given, over one set of shared tensors."""

    def __init__(
        self,
        session: Session,
        weights: SharedWeights,
        plans: Mapping[str, Plan],
        models: Mapping[str, PreTrainedModel],
        artifacts: Artifacts | None,
    ) -> None:
        self.plans = plans
        self.session = session
        self._weights, self._models, self._artifacts = weights, models, artifacts

    def __getitem__(self, name: str) -> PreTrainedModel:
        return self._models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters, each that is shared counted once."""
        held = {
            id(parameter): parameter.nbytes
            for model in self._models.values()
            for parameter in model.parameters()
        }
        return sum(held.values())

    @property
    def dense(self) -> PreTrainedModel:
        """The dense model over the same tensors; those that every plan cuts are read for it."""
        return self._weights.dense()

    def pick(self, text: str) -> str:
        """The model whose plan was made for text like this: the name of whose scenario the probes
        say what is closest to what they say of `text`, by the Bhattacharyya coefficient of the two.
        Text that the artifacts call unfamiliar is judged by them as well.

        Raises UsageError without artifacts, PlanError for a plan without a diagnosis.
        """
        if self._artifacts is None:
            raise UsageError("picking a model needs artifacts to diagnose by. Add --artifacts DIR.")
        scenarios = {name: _shares(name, plan) for name, plan in self.plans.items()}
        # The shared tensors, rather than a second dense model beside them.
        self.session.__dict__["model"] = self.dense
        said = diagnose_prompts(self.session, self._artifacts, [text])
        likely = dict(zip(said.domains, said.q.tolist(), strict=True))
        return max(scenarios, key=lambda name: _likeness(scenarios[name], likely))


class SharedWeights:
    """The tensors of a dense checkpoint in memory, each read when it is first asked for."""

    def __init__(self, session: Session, dtype: torch.dtype) -> None:
        unknown = (Feature.EXPERTS, Feature.VISION)
        advice = "Write an export with spp export --plan, and load that."
        session.source.family.refuse(unknown, "loading by a plan alone", advice)
        self._session, self._dtype = session, dtype
        self._device = torch.device(session.device)
        self._held: dict[str, nn.Parameter] = {}
        self._dense: PreTrainedModel | None = None

    def dense(self) -> PreTrainedModel:
        """The dense model, made once."""
        if self._dense is None:
            source = self._session.source
            plan = dense_plan(source.shape, source.fingerprint, source.name)
            self._dense = self.slim(plan, Compensator(source, plan, None))
        return self._dense

    def slim(self, plan: Plan, compensation: Compensator) -> PreTrainedModel:
        """The model of a plan, sharing what the plan leaves untouched."""
        source = self._session.source
        made = SlimTensors(source, plan, compensation.refit, compensation.biases())
        with scratch_folder(prefix="spp-config-") as place:
            config = written_config(source, plan)
            (place / "config.json").write_text(dump_json(config), encoding="utf-8")
            model: Any = empty_model(place, self._dtype)
        model.config._name_or_path = source.name
        for entry in made.entries():
            value = self._own(made, entry) if made.changes(entry) else self._shared(entry.name)
            owner, _, leaf = entry.name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, value)
        if source.shape.tied_embeddings:
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
        assert not any(parameter.is_meta for parameter in model.parameters())
        model.generation_config = _generation_config(self._session) or model.generation_config
        model.to(self._device)  # its buffers; the parameters are there
        slim: PreTrainedModel = model.eval()
        return slim

    def _shared(self, name: str) -> nn.Parameter:
        if name not in self._held:
            stored = self._session.source.tensors[name]
            value = stored_as_tensor(stored, self._dtype, self._dtype, self._device)
            self._held[name] = nn.Parameter(value, requires_grad=False)
        return self._held[name]

    def _own(self, made: SlimTensors, entry: Any) -> nn.Parameter:
        value = torch.empty(entry.shape, dtype=self._dtype, device=self._device)
        flat, done = value.view(-1), 0
        for _, bits in made.blocks([entry]):
            part: Tensor = torch_bits(bits, entry.dtype).reshape(-1)
            flat[done : done + len(part)] = part
            done += len(part)
        return nn.Parameter(value, requires_grad=False)


def _compensation(
    session: Session, artifacts: Artifacts | None, plan: Plan, scenario: Scenario | None
) -> Compensator:
    from spp_export.planning.request import PlanRequest

    warn_of_other_answers(plan, scenario)
    return plan_compensation(session, artifacts, plan, scenario, PlanRequest())


def _named(plans: Mapping[str, PlanLike] | Sequence[PlanLike]) -> dict[str, Plan]:
    """Plans by the names given, or by their scenarios' names or their files'."""
    if isinstance(plans, Mapping):
        return {name: _read(plan) for name, plan in plans.items()}
    named: dict[str, Plan] = {}
    for source in plans:
        plan = _read(source)
        name = _name(source, plan)
        if name in named:
            raise UsageError(
                f"two plans are called {name!r:.60}. Give plans by name: {{name: plan}}."
            )
        named[name] = plan
    return named


def _read(plan: PlanLike) -> Plan:
    if isinstance(plan, Plan):
        return plan
    path = Path(plan)
    return read_plan(path / "plan.json" if path.is_dir() else path)


def _name(source: PlanLike, plan: Plan) -> str:
    named = plan.scenario.get("name")
    if isinstance(named, str) and named:
        return Path(named).stem
    if isinstance(source, Plan):
        raise UsageError("a plan without a scenario has no name. Give plans by name: {name: plan}.")
    return Path(source).stem


def _shares(name: str, plan: Plan) -> Mapping[str, float]:
    """What the probes said of the plan's scenario, its sum one. Not its mixture, in which all
    domains count alike where the scenario is unfamiliar."""
    said: Any = plan.diagnosis.get("probability")
    numbers = isinstance(said, dict) and all(
        type(value) in (int, float) and value >= 0 for value in said.values()
    )
    total = sum(said.values()) if numbers else 0
    if not total:
        raise PlanError(
            f"plan {name!r:.60} has no diagnosis to pick it by. Make it with 'spp plan --scenario'."
        )
    return {domain: value / total for domain, value in said.items()}


def _likeness(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    """Bhattacharyya coefficient of two distributions, of which the second need not sum to one."""
    return sum(math.sqrt(first.get(name, 0.0) * share) for name, share in second.items())


def _generation_config(session: Session) -> Any:
    """Of the model, with every token that ends an answer; None where it needs none."""
    from transformers import GenerationConfig

    path, config = session.source.path, session.source.config
    tokenizer = session.tokenizer if has_tokenizer(path) else None
    settings = generation_config(path, config, tokenizer, config)
    settings = settings or companion_object(path, GENERATION_CONFIG)
    # With it transformers 4 asks for a hash, which only reading a file gives.
    settings = {name: x for name, x in settings.items() if name != "_from_model_config"}
    return GenerationConfig.from_dict(settings) if settings else None

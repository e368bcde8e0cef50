"""The options of each command, for Python and the command line alike.

Imports nothing heavy: help pages are made from these fields.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from spp_export.common.errors import UsageError
from spp_export.common.options import (
    BUDGET,
    CHECKS,
    CONVERTED,
    DANGEROUS,
    PUBLISHING,
    RUNNING,
    SHARE,
    AnswerTokens,
    Artifacts,
    CalibrationTokens,
    Dequantize,
    Device,
    Dtype,
    Force,
    KeepFailed,
    Layerwise,
    Matmul,
    Model,
    Numbers,
    Parallel,
    PathLike,
    Request,
    Seed,
    argument,
    check_word,
    comma_list,
    compared_text,
    non_default,
    option,
    output_option,
    parse_duration,
    scenario_option,
)
from spp_export.evaluation.remarks import Wanted
from spp_export.formats.format import Format, FormatOptions
from spp_export.formats.registry import FORMATS, options_of
from spp_export.models.shape import ModelShape, Units
from spp_export.planning.plan import Compensation, Plan
from spp_export.planning.request import FRONTIER_SHARES, Comparable, PlanRequest, Regime

ANSWERS, MEASURED, ROWS, TEXTS = "Answers", "Measured before", "Rows", "Texts to judge on"
TRAINING = "Training"
DEFAULT_NEW_TOKENS = 256
DEFAULT_KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)


def private_option() -> Any:
    """Whether a repository that is made is private."""
    words = "Make a private repository, where there is none yet."
    return option(False, panel=PUBLISHING, help=words)


def named_paths(values: Any) -> Mapping[str, PathLike]:
    """NAME=PATH words as a mapping. ValueError for a word that is none, or a name given twice."""
    paths: dict[str, PathLike] = {}
    for value in values:
        name, sign, path = value.partition("=")
        if not (name and sign and path) or name in paths:
            raise ValueError(f"{value!r}: expected NAME=PATH, each name once")
        paths[name] = path
    return paths


@dataclass(frozen=True, kw_only=True)
class GivenAnswers(AnswerTokens):
    """Answers to a scenario's prompts that are known."""

    answers: PathLike | None = scenario_option(
        None,
        panel=RUNNING,
        help="Chat log with answers to the prompts, a file as of a scenario; the dense model "
        "answers those that it has none to.",
    )

    def check(self) -> None:
        """UsageError where the answers would not be read."""
        super().check()
        if self.answers is not None and not self.answer_tokens:
            raise UsageError("--answer-tokens 0 reads prompts alone. Drop it, or --answers.")


@dataclass(frozen=True)
class PlanFileRequest(
    PlanRequest, GivenAnswers, Force, Layerwise, Parallel, Dtype, Artifacts, Model
):
    """A plan, and the file it goes to."""

    scenario: PathLike = scenario_option()
    output: PathLike | None = output_option(
        None, help="Where to write the plan; without it, only show it."
    )


@dataclass(frozen=True)
class FrontierRequest(PlanRequest, GivenAnswers, Force, Dtype, Artifacts, Model):
    """The sizes to try for a scenario."""

    scenario: PathLike = scenario_option()
    output: PathLike = output_option("", help="Directory to write.")
    _: KW_ONLY
    share: tuple[float, ...] = option(
        FRONTIER_SHARES,
        panel=BUDGET,
        metavar="SHARE",
        numbers=SHARE,
        help="Share of what --cost counts that stays; repeatable, 0.95 to 0.5 by default.",
    )
    measure: bool = option(
        False,
        panel=CHECKS,
        help="Also write the model of every plan for a while, and time it and the dense one in "
        "turn, as 'spp bench' does.",
    )

    def check(self) -> None:
        """UsageError for a budget, of which this tries many."""
        super().check()
        if self.measure and self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise UsageError(f"--measure times on cpu or cuda, and not on {self.device}.")
        if self.limits != (None,) * 5:
            raise UsageError("frontier tries many budgets. Drop the budget, or give --share.")
        if self.policy == "published":
            raise UsageError("frontier: --policy published has a budget of its own. Drop it.")


@dataclass(frozen=True)
class DiagnoseRequest(CalibrationTokens, Layerwise, Parallel, Dtype, Artifacts, Model):
    """A scenario's domains."""

    scenario: PathLike = scenario_option()
    _: KW_ONLY
    regime: str | None = option(
        None, type=Regime, help="Probe temperatures to use; chosen from the text by default."
    )


@dataclass(frozen=True)
class ProbeRequest(
    AnswerTokens, CalibrationTokens, Force, Seed, Parallel, Matmul, Dtype, Artifacts, Model
):
    """A model's artifacts."""

    pools: PathLike | None = option(
        None, metavar="DIR", help="Text per domain: <domain>/train.txt and <domain>/val.txt."
    )
    output: PathLike = output_option("", help="Artifacts directory to write.")
    _: KW_ONLY
    add_domain: Mapping[str, PathLike] | None = option(
        None,
        metavar="NAME=FILE",
        type=list[str],
        parse=named_paths,
        help="In place of --pools: the domains of --artifacts and one more, with texts of it in a "
        "file of the format of a scenario; repeatable.",
    )
    domains: tuple[str, ...] | None = option(
        None,
        metavar="A,B,C",
        type=str,
        parse=comma_list,
        help="Domains to use, in this order; every sub-directory by default. Text of the "
        "others stands for unknown domains.",
    )
    select: int | None = option(
        None,
        least=1,
        metavar="K",
        help="Take only K of the domains: those that lie apart and cover the rest best.",
    )
    criteria: tuple[str, ...] | None = option(
        None,
        metavar="A,B,C",
        type=str,
        parse=comma_list,
        help="Criteria of importance to score units by; energy and axis by default.",
    )
    units: Literal["heads", "both"] = option(
        "both", help="What is scored: heads, or both heads and MLP channels."
    )

    def check(self) -> None:
        """UsageError for what cannot be asked together."""
        super().check()
        if not os.fspath(self.output):
            raise UsageError("-o is missing: say where the artifacts go.")
        if (self.pools is None) == (self.add_domain is None):
            raise UsageError(
                "probe needs --pools DIR, or --add-domain NAME=FILE to add to the domains of "
                "artifacts."
            )
        base = {"--domains": self.domains, "--select": self.select}
        wrong = [flag for flag, value in base.items() if value is not None]
        if self.add_domain is not None and wrong:
            raise UsageError(f"{wrong[0]} chooses among --pools. Drop it, or --add-domain.")
        if self.pools is not None and self.artifacts is not None:
            raise UsageError("--artifacts are what --add-domain adds to. Drop it, or --pools.")


@dataclass(frozen=True, kw_only=True)
class CacheRequest(Request):
    """What is kept on this machine."""

    model: str | None = option(
        None, metavar="NAME", help="Only what is kept of this model, as the list calls it."
    )
    older_than: float | None = option(
        None,
        metavar="AGE",
        type=str,
        parse=parse_duration,
        least=0,
        help="Only what was not used for so long: 30d, 12h, 90m; in Python, seconds.",
    )
    clear: bool = option(False, panel=DANGEROUS, help="Remove it, unless it is in use.")


@dataclass(frozen=True)
class ImportRequest(Force):
    """Artifacts of the published format."""

    directory: PathLike = argument(metavar="DIR", help="Artifacts in the published format.")
    output: PathLike = output_option(help="Artifacts directory to write.")
    _: KW_ONLY
    domains: tuple[str, ...] | None = option(
        None,
        metavar="A,B,C",
        type=str,
        parse=comma_list,
        help="Names of the domains, in the order of the files; they do not hold them.",
    )


@dataclass(frozen=True, kw_only=True)
class _Form(Device):
    """A format and its options."""

    @property
    def form(self) -> FormatOptions:
        """The options of the format. Raises UsageError for one that it does not have."""
        return self._options()

    def fitted(self, shape: ModelShape) -> Self:
        """The same with what is left open decided for a model of this shape. Raises UsageError for
        what it cannot be."""
        made = self._options(shape)
        decided = {
            _FLAGS[flag]: getattr(made, name)
            for name, flag in made.flags().items()
            if flag in _FLAGS
        }
        return replace(self, **decided)

    def _options(self, shape: ModelShape | None = None) -> FormatOptions:
        values = {flag: getattr(self, name) for flag, name in _FLAGS.items()}
        return options_of(self._format, self.device, values, shape)

    @property
    def _format(self) -> str:
        name: str = getattr(self, "format")  # noqa: B009  of the command
        return name

    def check(self) -> None:
        """UsageError for an option of another format."""
        super().check()
        check_word("--format", self._format, tuple(FORMATS))
        _ = self.form


def format_option(default: str, names: Sequence[str], words: str) -> Any:
    """--format, one of these names."""
    return option(default, type=Literal[tuple(names)], help=words)


def form_fields(formats: Iterable[Format[Any]]) -> dict[str, tuple[str, Any]]:
    """By flag, the name in a request and the field of each option of these formats."""
    choices: dict[str, dict[str, None]] = {}
    helps: dict[str, list[str]] = {}
    for made in formats:
        known = made.options.choices()
        for item in fields(made.options):
            flag = made.options.flags()[item.name]
            choices.setdefault(flag, {}).update(dict.fromkeys(known.get(item.name, ())))
            helps.setdefault(flag, []).append(item.metadata["help"])
    return {
        flag: (
            flag.removeprefix("--").replace("-", "_"),
            option(
                None,
                panel=CONVERTED,
                type=Literal[tuple(choices[flag])] if choices[flag] else str,
                help=" ".join(words),
            ),
        )
        for flag, words in helps.items()
    }


_FIELDS = form_fields(FORMATS.values())
_FLAGS = {flag: name for flag, (name, _) in _FIELDS.items()}
if TYPE_CHECKING:

    @dataclass(frozen=True, kw_only=True)
    class FormRequest(_Form):
        """For type checkers, which cannot read the registry; the class of this name below has the
        same fields.
        """

        onnx_attention: str | None = None
        precision: str | None = None
        quant: str | None = None

else:
    FormRequest = make_dataclass(
        "FormRequest",
        [(name, str | None, item) for name, item in _FIELDS.values()],
        bases=(_Form,),
        frozen=True,
        kw_only=True,
        namespace={"__module__": __name__},
    )


@dataclass(frozen=True, kw_only=True)
class Distance(Request):
    """How far answers may be from the dense model's."""

    max_kl: float | None = option(
        None,
        panel=CHECKS,
        least=0,
        metavar="NATS",
        help="Publish only if the mean KL to the model it is made from is at most this; 0.1 is "
        "where answers begin to differ noticeably.",
    )
    same_token: float | None = option(
        None,
        panel=CHECKS,
        metavar="SHARE",
        numbers=SHARE,
        help="Publish only if it finds the same token likeliest as the model it is made from, at "
        "least this often.",
    )

    @property
    def wanted(self) -> Wanted:
        """Both together."""
        return Wanted(self.max_kl, self.same_token)


@dataclass(frozen=True)
class ExportRequest(
    PlanRequest,
    GivenAnswers,
    KeepFailed,
    Force,
    Layerwise,
    Parallel,
    Dtype,
    Distance,
    FormRequest,
    Artifacts,
    Model,
):
    """An export, and the plan for it or what to make one by."""

    scenario: PathLike | None = scenario_option(
        None,
        help="Text that the deployed model will be asked: .txt, .jsonl or .json; - is standard "
        "input. With --plan it only serves the checks and the compensation.",
    )
    output: PathLike | None = output_option(
        None, help="Directory to write; out/<scenario> by default."
    )
    _: KW_ONLY
    plan: PathLike | Plan | None = option(
        None,
        metavar="FILE",
        type=Path,
        help="A plan from 'spp plan', instead of deciding anew.",
    )
    format: str = format_option(
        "safetensors",
        tuple(FORMATS),
        ", ".join(f"{made.name} for {made.engine}" for made in FORMATS.values()) + ".",
    )
    pad: bool = option(
        False,
        help="Fill the groups of ragged layers with heads of zeros, and write layers for other "
        "engines; a budget does not count them.",
    )
    max_perplexity: float | None = option(
        None,
        panel=CHECKS,
        metavar="R",
        numbers=Numbers("a ratio above 0, such as 1.05", above=True),
        help="Publish only if held-out perplexity is at most R times the dense model's.",
    )
    dry_run: bool = option(
        False,
        panel=CHECKS,
        help="Decide, list the tensors that would change, and write nothing.",
    )
    push_to_hub: str | None = option(
        None,
        panel=PUBLISHING,
        metavar="ID",
        help="Upload the checked export to this repository of the Hugging Face Hub.",
    )
    private: bool = private_option()
    verify: bool = option(
        True,
        panel=DANGEROUS,
        flags=("--no-verify",),
        help="Skip the checks against the masked dense model.",
    )

    @property
    def seeks_smallest(self) -> bool:
        """Whether the budget is a quality, to be met by the smallest model that does."""
        return bool(self.wanted.given) and self.plan is None and self.limits == (None,) * 5

    def check(self) -> None:
        """UsageError for options that exclude each other."""
        super().check()
        if self.scenario is None and self.plan is None:
            raise UsageError("export needs --scenario FILE or --plan FILE.")
        if self.scenario is None and self.answers is not None:
            raise UsageError("--answers: answers to the prompts of a scenario. Add --scenario.")
        decided = [name for name in non_default(self, PlanRequest) if name != "seed"]
        if self.plan is not None and decided:
            flag = "--" + decided[0].replace("_", "-")
            raise UsageError(f"{flag}: the plan already decides that. Drop {flag}, or --plan.")
        unchecked = self.dry_run or not self.verify
        given = " and ".join(self.wanted.given)
        if given and unchecked and not (self.seeks_smallest and self.verify):
            raise UsageError(f"{given}: nothing is measured then. Drop --no-verify, --dry-run.")
        if self.seeks_smallest and self.policy == "published":
            raise UsageError(f"{given}: --policy published takes its own budget. Give --strength.")
        if self.max_perplexity is not None and unchecked:
            raise UsageError(
                "--max-perplexity: nothing is measured then. Drop --no-verify, --dry-run."
            )
        if self.push_to_hub is not None and unchecked:
            raise UsageError(
                "--push-to-hub takes what was written and checked. Drop --dry-run and "
                "--no-verify, or push what was not checked with 'spp push --unverified'."
            )
        if self.private and self.push_to_hub is None:
            raise UsageError(
                "--private: nothing is uploaded. Add --push-to-hub ID, or drop --private."
            )
        if self.plan is None:
            self.check_layout(self.layout, self.pad)

    def check_layout(self, layout: str, pad: bool) -> None:
        """UsageError for padding without a ragged layout, or a format that needs equal groups."""
        if pad and layout != "ragged":
            raise UsageError(f"--pad fills the groups of ragged layers; this layout is {layout}.")
        if not FORMATS[self.format].ragged and layout == "ragged" and not pad:
            raise UsageError(
                f"--format {self.format} needs groups of the same size in a layer. Add --pad to "
                "fill those of a ragged layout with zeros."
            )


@dataclass(frozen=True)
class ConvertRequest(KeepFailed, Force, Seed, Distance, FormRequest, Dequantize):
    """A conversion."""

    checkpoint: str = argument(
        metavar="DIR",
        help="An export with safetensors, or a dense model: directory, hub id or demo.",
    )
    output: PathLike = output_option(help="Directory to write.")
    _: KW_ONLY
    format: str = format_option(
        "onnx", [made.name for made in FORMATS.values() if made.converted], "What to write."
    )
    scenario: PathLike | None = compared_text()
    verify: bool = option(
        True,
        panel=DANGEROUS,
        flags=("--no-verify",),
        help="Skip the comparison with the PyTorch model.",
    )

    def check(self) -> None:
        """UsageError for what cannot be asked together."""
        super().check()
        if self.max_kl is not None and not self.verify:
            raise UsageError("--max-kl: nothing is measured then. Drop --no-verify.")


@dataclass(frozen=True)
class VerifyRequest(Seed, Layerwise, Dtype, Distance, Model):
    """The check of a directory."""

    out: PathLike = argument(metavar="OUT", help="A directory written by 'spp export'.")
    _: KW_ONLY
    scenario: PathLike | None = compared_text()


@dataclass(frozen=True)
class PushRequest(Request):
    """An upload."""

    out: PathLike = argument(
        metavar="OUT", help="A directory written by 'spp export' or 'spp convert'."
    )
    repo_id: str = argument(metavar="ID", help="Repository, as org/name; made if there is none.")
    _: KW_ONLY
    private: bool = private_option()
    revision: str | None = option(
        None,
        panel=PUBLISHING,
        metavar="BRANCH",
        help="Branch to write to, made if there is none; main by default.",
    )
    token: str | None = option(
        None, shell=False, help="HF_TOKEN, or that of 'hf auth login', by default."
    )
    unverified: bool = option(
        False,
        panel=DANGEROUS,
        help="Push even what was not checked, or did not pass; its card says so.",
    )


@dataclass(frozen=True)
class ReportRequest(Force):
    """A page on an export or a plan."""

    out: PathLike = argument(metavar="OUT", help="A directory written by 'spp export', or a plan.")
    output: PathLike | None = output_option(
        None, help="The page; beside OUT, with its name, by default."
    )
    _: KW_ONLY
    bench: PathLike | None = option(
        None, panel=MEASURED, metavar="FILE", help="Results of 'spp bench -o', to draw."
    )
    eval: PathLike | None = option(
        None,
        panel=MEASURED,
        metavar="PATH",
        help="Results of 'spp eval -o', a directory or its file, to draw.",
    )
    artifacts: PathLike | None = option(
        None,
        panel=MEASURED,
        metavar="DIR",
        help="Artifacts for the scores of heads; the demo model's come with spp.",
    )


@dataclass(frozen=True)
class ShowRequest(Dequantize):
    """A path to describe."""

    path: PathLike = argument(
        metavar="PATH",
        help="A plan, artifacts, an export, a dense model (its directory, or its name if it is in "
        "the cache), or results of 'spp eval'.",
    )
    _: KW_ONLY
    guess: bool = option(
        False,
        help="Of a model whose architecture has no record: propose one from transformers' classes "
        "and prove it on tiny models. No weights are needed.",
    )


@dataclass(frozen=True, kw_only=True)
class AnswerRequest(Seed):
    """How tokens of an answer are chosen."""

    system: str | None = option(
        None, panel=ANSWERS, metavar="TEXT", help="What the model is told to be, first."
    )
    raw: bool = option(
        False,
        panel=ANSWERS,
        help="Go on with the text as it is, without the model's chat template.",
    )
    max_new_tokens: int = option(
        DEFAULT_NEW_TOKENS, panel=ANSWERS, least=1, metavar="N", help="Longest answer."
    )
    temperature: float = option(
        0.0,
        panel=ANSWERS,
        numbers=Numbers("a number of 0 or more, such as 0.7"),
        metavar="T",
        help="0 always takes the likeliest token; more draws among the likely ones.",
    )
    top_p: float | None = option(
        None,
        panel=ANSWERS,
        metavar="SHARE",
        numbers=SHARE,
        help="With --temperature, draw from the likeliest tokens that have this probability "
        "together, above 0 to 1.",
    )
    top_k: int | None = option(
        None,
        panel=ANSWERS,
        least=1,
        metavar="N",
        help="With --temperature, draw from the N likeliest tokens.",
    )

    def check(self) -> None:
        """UsageError for an option that would be ignored."""
        super().check()
        for name, value in (("--top-p", self.top_p), ("--top-k", self.top_k)):
            if value is not None and not self.temperature:
                raise UsageError(
                    f"{name}: without --temperature the likeliest token is always taken. "
                    f"Add --temperature 0.7, or drop {name}."
                )


@dataclass(frozen=True)
class ChatRequest(AnswerRequest, Dtype, Artifacts, Model):
    """A conversation."""

    out: tuple[PathLike, ...] = argument(
        metavar="OUT...",
        help="A directory written by 'spp export', a dense model's directory, or demo. A "
        "plan.json runs over --model; of several plans or exports the first turn picks one.",
    )
    _: KW_ONLY
    threads: int | None = option(
        None, panel=RUNNING, least=1, metavar="N", help="Threads of the CPU to use."
    )


# At which few steps do most and none diverge.
_LEARNING_RATES = {"adapters": 5e-4, "weights": 5e-5}
_LAYER_ROUNDS = {"answers": 5, "text": 0}


@dataclass(frozen=True, kw_only=True)
class RecoverSettings(AnswerTokens, Seed):
    """How an export is trained: an option each, and part of recovery.json."""

    learn: Literal["answers", "text"] = option(
        "answers",
        panel=TRAINING,
        help="answers: what the dense model says to the prompts of --data, and how likely each "
        "token was to it, the prompts' too. text: the text of --data itself.",
    )
    train: Literal["adapters", "weights"] = option(
        "adapters",
        panel=TRAINING,
        help="adapters: LoRA on every projection. weights: the projections of the layers that were "
        "cut.",
    )
    temperature: float = option(
        1.0,
        panel=TRAINING,
        metavar="T",
        numbers=Numbers("a number above 0, such as 2", above=True),
        help="At which the dense model's distribution is learnt.",
    )
    layer_rounds: int | None = option(
        None,
        panel=TRAINING,
        least=0,
        metavar="N",
        help="Rounds over the text in which each layer that was cut first learns by itself to "
        "write what the dense model's does; 5 with --learn answers and 0 with text by default.",
    )
    steps: int = option(
        200,
        panel=TRAINING,
        least=0,
        metavar="N",
        help="Optimiser steps of the whole model after that; 0 for none.",
    )
    rank: int = option(8, panel=TRAINING, least=1, metavar="N", help="Of the adapters.")
    alpha: int = option(
        16,
        panel=TRAINING,
        least=1,
        metavar="N",
        help="Adapters count alpha / rank times.",
    )
    learning_rate: float | None = option(
        None,
        panel=TRAINING,
        metavar="RATE",
        numbers=Numbers("a number between 0 and 1, such as 0.0005", most=1, above=True),
        help="At its highest; 0.0005 for adapters and 0.00005 for weights by default.",
    )
    batch_size: int = option(4, panel=TRAINING, least=1, metavar="N", help="Texts per step.")
    max_tokens: int = option(
        256,
        panel=TRAINING,
        least=2,
        metavar="N",
        help="Longest text to train on; a longer one is cut into several.",
    )
    watch_every: int = option(
        25,
        panel=TRAINING,
        metavar="N",
        help="Steps between two measures of an eighth of the texts, which is not trained on: the "
        "best model of all counts, and training ends where it gets no better. 0 never measures.",
    )

    @property
    def rounds_of_layers(self) -> int:
        """Rounds in which layers learn by themselves."""
        usual = _LAYER_ROUNDS[self.learn]
        return usual if self.layer_rounds is None else self.layer_rounds

    @property
    def adapted(self) -> bool:
        """Whether adapters are trained."""
        return self.train == "adapters" and self.steps > 0

    @property
    def highest_rate(self) -> float:
        """The learning rate at its highest."""
        return self.learning_rate or _LEARNING_RATES[self.train]

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0: it rises for a tenth of the steps, then falls to
        zero as half a cosine does (Loshchilov and Hutter, arXiv 1608.03983)."""
        warm = max(1, math.ceil(0.1 * self.steps))
        if step < warm:
            return self.highest_rate * (step + 1) / warm
        passed = (step - warm) / max(1, self.steps - warm)
        return self.highest_rate * 0.5 * (1 + math.cos(math.pi * passed))

    def to_dict(self) -> dict[str, Any]:
        """For recovery.json."""
        names = [item.name for item in fields(RecoverSettings)]
        chosen = {"learning_rate": self.highest_rate, "layer_rounds": self.rounds_of_layers}
        return {**{name: getattr(self, name) for name in names}, **chosen}


@dataclass(frozen=True)
class RecoverRequest(
    CalibrationTokens, KeepFailed, Force, RecoverSettings, GivenAnswers, Matmul, Artifacts, Model
):
    """An export to train further."""

    out: PathLike = argument(metavar="OUT", help="A safetensors directory by 'spp export'.")
    data: PathLike = scenario_option(
        help="Text to train on: .txt, .jsonl or .json as a scenario, or - for standard input."
    )
    output: PathLike | None = output_option(
        None, help="Directory to write; OUT-recovered by default."
    )
    _: KW_ONLY
    validation: PathLike | None = scenario_option(
        None,
        panel=CHECKS,
        help="Text to measure on; by default every fourth text of --data, which is then not "
        "trained on.",
    )

    def check(self) -> None:
        """UsageError for what cannot be asked together."""
        super().check()
        if self.answers is not None and self.learn == "text":
            raise UsageError("--answers: --learn text asks no prompts. Drop one of the two.")
        if not self.steps and not self.rounds_of_layers:
            raise UsageError("--steps 0 without --layer-rounds trains nothing. Give one of them.")


@dataclass(frozen=True, kw_only=True)
class EvalRequest(Seed):
    """Which rows an evaluation measures, and how. The controls are always among them.

    The first criterion is the one that controls and ablations vary.
    """

    keep: tuple[float, ...] = option(
        DEFAULT_KEEPS,
        panel=ROWS,
        metavar="SHARE",
        numbers=SHARE,
        help="Share of the units' parameters that stays; repeatable, 0.9 to 0.5 by default.",
    )
    criterion: tuple[str, ...] = option(
        (),
        panel=ROWS,
        metavar="NAME",
        help="A criterion of 'spp plan', probe-pruning, full-batch-probing, or all; "
        "repeatable. Controls and ablations vary the first.",
    )
    units: tuple[Units, ...] = option(
        ("heads",),
        panel=ROWS,
        metavar="[heads|channels|both]",
        help="What may be removed; repeatable, heads by default.",
    )
    compensate: tuple[Compensation, ...] = option(
        ("lstsq",),
        panel=ROWS,
        metavar="[none|bias|lstsq]",
        help="How what stays makes up for what goes; repeatable, lstsq by default.",
    )
    comparable: str | None = option(
        None,
        type=Comparable,
        help="How scores of different layers are made comparable; the criterion's own way by "
        "default.",
    )
    ablations: bool = option(
        False,
        panel=ROWS,
        help="Also the first criterion without the whitelist, and with one domain.",
    )
    domain: tuple[str, ...] = option(
        (), panel=TEXTS, metavar="NAME", help="A domain of --pools; repeatable, all by default."
    )
    generate: bool = option(
        False, panel=TEXTS, help="Also let every row answer the evaluation sets."
    )
    max_new_tokens: int = option(48, panel=TEXTS, least=1, metavar="N", help="Longest answer.")
    curves: bool = option(True, help="Draw curves.png.")

    def check(self) -> None:
        """UsageError for an unknown word or an invalid budget."""
        from spp_export.evaluation.harness.rows import BASELINES, DYNAMIC
        from spp_export.planning.scoring import CRITERION_NAMES

        super().check()
        for name in self.criterion:
            if name in DYNAMIC and name not in BASELINES:
                raise UsageError(
                    f"--criterion {name}: a baseline of the repository's benchmarks, which are not "
                    "importable here. Run it in a clone, with benchmarks on PYTHONPATH."
                )
            check_word("--criterion", name, (*CRITERION_NAMES, *BASELINES, "all"))
        check_word("--comparable", self.comparable or "raw", get_args(Comparable))
        if not (self.units and self.compensate):
            raise UsageError("an evaluation needs at least one of --units and of --compensate.")

    def criterion_names(self, default: str) -> tuple[str, ...]:
        """The criteria, each once; the default first where all are meant."""
        from spp_export.evaluation.harness.rows import BASELINES
        from spp_export.planning.scoring import CRITERION_NAMES

        names = self.criterion or (default,)
        if "all" in names:
            first = (name for name in names if name != "all")
            names = (*first, default, *CRITERION_NAMES, *BASELINES)
        return tuple(dict.fromkeys(names))


@dataclass(frozen=True, kw_only=True)
class EvalTexts(
    EvalRequest, GivenAnswers, CalibrationTokens, Force, Parallel, Matmul, Dtype, Artifacts, Model
):
    """What an evaluation reads, beside its scenario."""

    wrong: PathLike | None = option(
        None,
        panel=ROWS,
        metavar="FILE",
        help="Another scenario, for the control that chooses by the wrong text; of several "
        "--scenario the next one by default.",
    )
    other_artifacts: Mapping[str, PathLike] | None = option(
        None,
        panel=ROWS,
        metavar="NAME=DIR",
        type=list[str],
        parse=named_paths,
        help="With --ablations, also the first criterion with these artifacts; repeatable.",
    )
    plan: tuple[PathLike, ...] = option(
        (), panel=ROWS, metavar="FILE", help="A plan to measure; repeatable."
    )
    pools: PathLike | None = option(
        None, panel=TEXTS, metavar="DIR", help="Validation pools: <domain>/val.txt."
    )
    eval_set: tuple[PathLike, ...] = option(
        (),
        panel=TEXTS,
        metavar="FILE",
        help="Questions with answers, in the format of a scenario; repeatable.",
    )


EVAL_OUTPUT = "Directory for the results; one begun before is continued."


@dataclass(frozen=True)
class EvaluateRequest(EvalTexts):
    """The evaluation of one scenario."""

    scenario: PathLike = scenario_option()
    output: PathLike = output_option(help=EVAL_OUTPUT)


@dataclass(frozen=True)
class EvaluateScenariosRequest(EvalTexts):
    """The evaluation of several scenarios."""

    scenario: tuple[PathLike, ...] = scenario_option(
        type=list[str],
        help="Text that the deployed model will be asked; repeatable, each into a directory of "
        "its name.",
    )
    output: PathLike = output_option(help=EVAL_OUTPUT)

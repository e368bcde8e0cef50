"""Options, each written once: fields of a request that Python and the command line both take.

@dataclass(frozen=True)
class VerifyRequest(Model):
    out: PathLike = argument(metavar="OUT", help="A directory written by 'spp export'.")
    _: KW_ONLY
    seed: int = option(0, least=0, metavar="N", help="Seed of everything drawn at random.")

@command(VerifyRequest)
def verify(request: VerifyRequest) -> VerifyReport: ...

verify("out/chemistry", seed=1)  # and, from the same fields, spp verify out/chemistry --seed 1
"""

from __future__ import annotations

import difflib
import inspect
import math
import os
import re
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from decimal import Decimal
from functools import cache, wraps
from numbers import Integral, Real
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from spp_export.common.errors import UsageError

PathLike = str | os.PathLike[str]
DtypeName = Literal["float32", "bfloat16", "float16", "float64"]
MatmulName = Literal["auto", "float32", "bfloat16"]
ParallelName = Literal["data", "tensor", "map"]

# Panels of the help page.
MAKE, BUDGET, CHECKS = "What to make", "Budget", "Checks"
CONVERTED = "ONNX graph, GGUF file"
PUBLISHING, RUNNING, DANGEROUS = "Publishing", "Running", "Dangerous"

# Tokens that a model is shown together; longer texts are cut.
WINDOW = 512
# 64 windows. Second moments of the default model's widest block, 1536 channels, then rest on 21
# times as many tokens, and reading them takes about as long as reading three of its pools.
DEFAULT_CALIBRATION_TOKENS = 64 * WINDOW

# Of an answer of the dense model's that slim models are made for and judged on.
DEFAULT_ANSWER_TOKENS = 96

P = ParamSpec("P")
RequestT = TypeVar("RequestT", bound="Request")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Numbers:
    """Which numbers an option takes.

    words         in a message, after "expected"
    least, most   the lowest and the highest; `above` leaves the lowest out
    """

    words: str
    least: float = 0.0
    most: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        low = self.least < value if self.above else self.least <= value
        return low and value <= self.most and math.isfinite(value)


SHARE = Numbers("a share between 0 and 1, such as 0.8", most=1, above=True)
SHARE_OR_NONE = Numbers("a number from 0 to 1, such as 0.5", most=1)


@dataclass(frozen=True)
class Option:
    """What a field of a request is on the command line.

    flags     other than its name in kebab case; "--no-verify" turns `verify` off
    type      of the word on the command line, where it is not that of the field
    parse     the word on the command line to the value; ValueError for one that makes no sense
    numbers   those that a number is one of
    least     the same of a whole number, by the lowest alone
    argument  a word without a flag
    shell     whether the command line has it at all
    """

    help: str
    panel: str = MAKE
    metavar: str | None = None
    flags: tuple[str, ...] = ()
    type: Any = None
    parse: Callable[[Any], Any] | None = None
    numbers: Numbers | None = None
    least: int | None = None
    argument: bool = False
    shell: bool = True


def option(default: Any = MISSING, **facts: Any) -> Any:
    """A field with a flag; `facts` are those of `Option`."""
    return field(default=default, metadata={"option": Option(**facts)})


def argument(default: Any = MISSING, **facts: Any) -> Any:
    """A field that is a word of its own on the command line."""
    return field(default=default, metadata={"option": Option(**facts, argument=True)})


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of a command: fields by `option` and `argument`, and the checks on them."""

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():
            value = getattr(self, name)
            if get_origin(hint) is tuple and value is not None:
                alone = isinstance(value, (str, int, float, os.PathLike))
                object.__setattr__(self, name, (value,) if alone else tuple(value))

    def check(self) -> None:
        """UsageError for a value that is invalid by itself."""
        for item in fields(self):
            hint, values = field_types(type(self))[item.name], getattr(self, item.name)
            many = get_origin(hint) is tuple
            for value in (values or ()) if many else (values,):
                if value is not None:
                    _check(flag(item), value, get_args(hint)[0] if many else hint, fact(item))


def _check(name: str, value: Any, hint: Any, option: Option) -> None:
    if get_origin(hint) is Literal:
        check_word(name, value, get_args(hint))
    if hint in (int, float):
        known = numbers_of(option)
        is_number = isinstance(value, Integral if hint is int else Real)
        if isinstance(value, bool) or not is_number or value not in known:
            raise wrong_number(name, value, known)


def numbers_of(option: Option) -> Numbers:
    """The numbers that an option takes: whole ones, where it does not say."""
    least = option.least or 0
    return option.numbers or Numbers(f"a whole number of {least} or more", least)


def wrong_number(name: str, value: object, known: Numbers) -> UsageError:
    """The error for what is not one of the numbers that an option takes."""
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    return UsageError(f"{name} {shown:.40}: expected {known.words}.")


def check_word(name: str, value: str, known: Sequence[str]) -> None:
    """UsageError for a word that is not among those known."""
    if value not in known:
        raise UsageError(f"{name} {value!s:.40}: expected one of {', '.join(known)}.")


def fact(item: Field[Any]) -> Option:
    """The option of a field."""
    known: Option = item.metadata["option"]
    return known


def flag(item: Field[Any]) -> str:
    """How messages call a field: by its flag."""
    known = fact(item)
    if known.argument:
        return known.metavar or item.name
    return known.flags[0] if known.flags else "--" + item.name.replace("_", "-")


def field_types(request: Any) -> Mapping[str, Any]:
    """The type of every field, None aside."""
    return _field_types(request)


@cache
def _field_types(request: Any) -> Mapping[str, Any]:
    hints = get_type_hints(request)
    return {item.name: _without_none(hints[item.name]) for item in fields(request)}


def _without_none(hint: Any) -> Any:
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    parts = [part for part in get_args(hint) if part is not types.NoneType]
    return parts[0] if len(parts) == 1 else Union[tuple(parts)]  # noqa: UP007


def non_default(request: Request, of: type[Request] | None = None) -> dict[str, Any]:
    """The fields that differ from their defaults, of the request or of one of its base classes."""
    return {
        item.name: getattr(request, item.name)
        for item in fields(of or request)
        if getattr(request, item.name) != item.default
    }


def command(
    request: Callable[P, RequestT],
) -> Callable[[Callable[[RequestT], Result]], Callable[P, Result]]:
    """Let a function of a checked request take the fields of the request as its arguments."""

    def decorate(function: Callable[[RequestT], Result]) -> Callable[P, Result]:
        result = inspect.signature(function).return_annotation
        signature = inspect.signature(request).replace(return_annotation=result)

        @wraps(function)
        def call(*positional: P.args, **keywords: P.kwargs) -> Result:
            _check_names(function.__name__, signature, keywords)
            made = request(*positional, **keywords)
            made.check()
            return function(made)

        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__annotations__ = {
            **{name: parameter.annotation for name, parameter in signature.parameters.items()},
            "return": result,
        }
        call.__doc__ = f"{inspect.getdoc(function)}\n\nArguments:\n\n{_described(request)}\n"
        return call

    return decorate


def _check_names(function: str, signature: inspect.Signature, keywords: Mapping[str, Any]) -> None:
    for name in keywords:
        if name not in signature.parameters:
            close = difflib.get_close_matches(name, signature.parameters, 1)
            advice = f" Did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{function}() has no option {name!r}.{advice}")


def _described(request: Any) -> str:
    lines = [
        textwrap.fill(f"{item.name}: {fact(item).help}", 96, subsequent_indent=" " * 4)
        for item in fields(request)
    ]
    return "\n".join(lines)


_DEVICE = re.compile(r"cpu|auto|mps|(cuda|xpu)(:\d{1,3})?")
_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_count(text: str) -> int:
    """A whole number such as 1500, 12k, 1.5M or 2Gi. Raises ValueError."""
    match = _COUNT.fullmatch(text.strip())
    if not match or (match[3] and not match[2]):
        raise ValueError(f"{text!r} is not a count such as 1500, 12k, 1.5M or 2Gi")
    base = 1024 if match[3] else 1000
    value = Decimal(match[1]) * base ** _POWERS[match[2].lower()]
    if value != int(value):
        raise ValueError(f"{text!r} is not a whole number")
    return int(value)


_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_duration(text: str) -> float:
    """Seconds of a duration such as 30d, 12h or 90m. Raises ValueError."""
    match = _DURATION.fullmatch(text.strip().lower())
    if not match:
        raise ValueError(f"{text!r} is not a duration such as 30d, 12h or 90m")
    return float(match[1]) * _SECONDS[match[2]]


def comma_list(text: str) -> tuple[str, ...]:
    """The words of a list a,b,c."""
    return tuple(word.strip() for word in text.split(","))


@dataclass(frozen=True, kw_only=True)
class Device(Request):
    """Where models run."""

    device: str = option("cpu", panel=RUNNING, metavar="NAME", help="cpu, cuda, cuda:1, auto.")

    def check(self) -> None:
        """UsageError for what is the name of no device; whether there is one is another matter."""
        super().check()
        check_device_name(self.device)


def check_device_name(device: str) -> None:
    """UsageError for what is the name of no device that a model could run on."""
    if not _DEVICE.fullmatch(device):
        raise UsageError(f"--device {device:.40}: expected cpu, cuda, cuda:1, mps, xpu or auto.")


@dataclass(frozen=True, kw_only=True)
class Dequantize(Request):
    """What is done with a quantised model."""

    dequantize: bool = option(
        False,
        help="Of a quantised model, take what its weights stand for: FP8, MXFP4, "
        "compressed-tensors, bitsandbytes, GPTQ, AWQ. Dequantised once, and kept in spp's cache.",
    )


@dataclass(frozen=True, kw_only=True)
class Model(Dequantize, Device):
    """The dense model, and where it runs."""

    model: str = option("demo", metavar="DIR|HUB_ID|demo", help="The dense model to start from.")


@dataclass(frozen=True, kw_only=True)
class Dtype(Request):
    """The precision that models run in."""

    dtype: str | None = option(
        None,
        panel=RUNNING,
        type=DtypeName,
        help="Precision to compute in: float32 on the CPU, else the stored one.",
    )


@dataclass(frozen=True, kw_only=True)
class Matmul(Request):
    """The precision of the products that take most of the time."""

    matmul: MatmulName = option(
        "auto",
        panel=RUNNING,
        help="Precision of matrix products while statistics are gathered or a model is trained: "
        "auto is bfloat16 where the processor has it, which is faster, and float32 elsewhere.",
    )


@dataclass(frozen=True, kw_only=True)
class Layerwise(Request):
    """How models that do not fit in memory run."""

    layerwise: bool | None = option(
        None,
        panel=RUNNING,
        help="Run models layer by layer, their weights staying on disk; by default where they do "
        "not fit in memory.",
    )


@dataclass(frozen=True, kw_only=True)
class Parallel(Request):
    """How the processes that torchrun started share a model and its text."""

    parallel: ParallelName = option(
        "data",
        panel=RUNNING,
        help="How processes of torchrun read text: data, each the whole model and its share of the "
        "text; tensor, each a part of the model, by transformers' plan; map, each a model that "
        "accelerate spreads over its share of the machine's cards.",
    )


@dataclass(frozen=True, kw_only=True)
class Artifacts(Request):
    """The probes and importance of a model's units."""

    artifacts: PathLike | None = option(
        None,
        metavar="DIR",
        help="The model's artifacts, made by 'spp probe'; the demo model's come with spp.",
    )


@dataclass(frozen=True, kw_only=True)
class Seed(Request):
    """The seed of everything drawn at random."""

    seed: int = option(
        0, panel=RUNNING, least=0, metavar="N", help="Seed of everything drawn at random."
    )


@dataclass(frozen=True, kw_only=True)
class CalibrationTokens(Request):
    """How much of a text is read."""

    calibration_tokens: int = option(
        DEFAULT_CALIBRATION_TOKENS,
        panel=RUNNING,
        least=WINDOW,
        metavar="N",
        parse=parse_count,
        help="Most tokens to read of a text: of what is calibrated on, and of what is held out. "
        "Of a longer text, pieces spread evenly over it are read.",
    )


@dataclass(frozen=True, kw_only=True)
class AnswerTokens(Request):
    """How long answers are that the dense model gives."""

    answer_tokens: int = option(
        DEFAULT_ANSWER_TOKENS,
        panel=RUNNING,
        least=0,
        metavar="N",
        parse=parse_count,
        help="Most tokens of the dense model's answer to a prompt that comes without one; 0 reads "
        "the text of prompts alone.",
    )


@dataclass(frozen=True, kw_only=True)
class Force(Request):
    """Whether an output may be replaced."""

    force: bool = option(False, panel=DANGEROUS, help="Replace an output that spp wrote before.")


@dataclass(frozen=True, kw_only=True)
class KeepFailed(Request):
    """Whether an export that fails a check is published."""

    keep_failed: bool = option(
        False,
        panel=DANGEROUS,
        help="Publish even when a check fails; the exit status is 1 all the same.",
    )


def scenario_option(default: Any = MISSING, **facts: Any) -> Any:
    """A file with the text of a scenario."""
    words = (
        "Text that the deployed model will be asked: .txt, .jsonl or .json; - is standard input."
    )
    return option(default, **{"metavar": "FILE", "type": str, "help": words, **facts})


def compared_text() -> Any:
    """A file with text to compare logits on."""
    words = (
        "Text to compare logits on: how its first eight texts begin; random tokens without it. "
        "Quality, where it is measured, is that on answers to its held-out prompts. - is standard "
        "input."
    )
    return scenario_option(None, panel=CHECKS, help=words)


def output_option(default: Any = MISSING, *, help: str) -> Any:  # noqa: A002
    """-o/--output, whose meaning each command states."""
    return option(default, flags=("--output", "-o"), metavar="PATH", help=help)

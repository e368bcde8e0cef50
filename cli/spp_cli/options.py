"""Commands made from requests: every field is an option, which typer parses, explains and
completes."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from spp_cli.output import Output
from spp_export.common.options import (
    BUDGET,
    CHECKS,
    CONVERTED,
    DANGEROUS,
    MAKE,
    PUBLISHING,
    RUNNING,
    Numbers,
    PathLike,
    Request,
    fact,
    field_types,
    flag,
    numbers_of,
    option,
    wrong_number,
)

RequestT = TypeVar("RequestT", bound=Request)
# On a help page in this order; those of a single command come where the gap is.
_FIRST = (MAKE, CONVERTED, BUDGET)
_PANELS = (*_FIRST, "", CHECKS, PUBLISHING, RUNNING, DANGEROUS)


def _plain(parameters: list[Any]) -> list[Any]:
    """A flag takes no word, so none is shown beside it; nor beside typer's own."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


class Command(TyperCommand):
    """A command whose flags show no word."""

    def get_params(self, ctx: Any) -> list[Any]:
        """As of the class above."""
        return _plain(super().get_params(ctx))


class Group(TyperGroup):
    """A group of such commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """As of the class above."""
        return _plain(super().get_params(ctx))


@dataclass(frozen=True, kw_only=True)
class OutputOptions(Request):
    """How a command shows its result."""

    json: bool = option(False, panel=RUNNING, help="One JSON object on stdout.")
    quiet: bool = option(
        False, panel=RUNNING, flags=("--quiet", "-q"), help="No progress, tables or hints."
    )


def command(
    request: type[RequestT],
) -> Callable[[Callable[[RequestT, Output], None]], Callable[..., None]]:
    """Let typer make a command of a function of a checked request."""

    def decorate(run: Callable[[RequestT, Output], None]) -> Callable[..., None]:
        own = sorted((item for item in fields(request) if fact(item).shell), key=_place)
        # json and quiet come before --force and what is more dangerous.
        end = sum(fact(item).panel != DANGEROUS for item in own)
        names = [*own[:end], *fields(OutputOptions), *own[end:]]

        @wraps(run)
        def call(*, json: bool, quiet: bool, **words: Any) -> None:
            values = {item.name: _value(item, words[item.name]) for item in own}
            # What is left out has the request's own default.
            made = request(**{k: v for k, v in values.items() if v is not None and v != []})
            out = Output(json=json, quiet=quiet)
            made.check()
            run(made, out)

        types = {**field_types(request), **field_types(OutputOptions)}
        parameters = [_parameter(item, types[item.name]) for item in names]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {item.name: item.annotation for item in parameters}
        return call

    return decorate


def _place(item: Field[Any]) -> tuple[bool, bool, bool, int]:
    """Arguments, options that must be there, those that Python takes by place, and the others
    panel by panel."""
    panel = fact(item).panel
    rank = _PANELS.index(panel) if panel in _PANELS else len(_FIRST)
    optional = item.default is not MISSING
    return not fact(item).argument, optional, bool(item.kw_only), rank


def _value(item: Field[Any], value: Any) -> Any:
    """What a word stands for: a list of them may make one value, and --no-x turns x off."""
    if _turns_off(item):
        return not value
    parse = fact(item).parse
    return _parser(parse)(value) if parse and isinstance(value, list) and value else value


def _parameter(item: Field[Any], hint: Any) -> inspect.Parameter:
    """A parameter as typer reads it."""
    known, required = fact(item), item.default is MISSING
    typed = known.type or _typed(hint)
    repeatable = get_origin(typed) is list
    facts: dict[str, Any] = {"help": known.help, "metavar": known.metavar}
    kind = get_args(typed)[0] if repeatable else typed
    if known.parse and not repeatable:
        facts["parser"] = _parser(known.parse)
    elif kind in (int, float):
        facts["parser"] = _number(flag(item), kind, numbers_of(known))
    about = (
        typer.Argument(**facts)
        if known.argument
        else typer.Option(*_flags(item, hint), rich_help_panel=known.panel, **facts)
    )
    default = False if _turns_off(item) else None if repeatable else item.default
    optional = not required and default is None
    return inspect.Parameter(
        item.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else default,
        annotation=Annotated[typed | None if optional else typed, about],
    )


def _typed(hint: Any) -> Any:
    """The type of a word on the command line; of a repeatable one typer takes no choices."""
    if hint == PathLike:
        return Path
    if get_origin(hint) is not tuple:
        return hint
    inner: Any = _typed(get_args(hint)[0])
    return list[str] if get_origin(inner) is Literal else list[inner]


def _turns_off(item: Field[Any]) -> bool:
    return item.default is True and bool(fact(item).flags)


def _flags(item: Field[Any], hint: Any) -> tuple[str, ...]:
    """What typer takes for the flags."""
    word = item.name.replace("_", "-")
    either = hint is bool and item.default is not False
    return fact(item).flags or ((f"--{word}/--no-{word}",) if either else (f"--{word}",))


def _number(name: str, kind: type, known: Numbers) -> Callable[[Any], Any]:
    def parsed(text: Any) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise wrong_number(name, text, known) from None

    return parsed


def _parser(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def parsed(text: Any) -> Any:
        if isinstance(text, int):  # the default, which typer hands over as well
            return text
        try:
            return parse(text)
        except ValueError as error:
            raise typer.BadParameter(f"{error}.") from None

    return parsed


def command_line(*words: object, **flags: Any) -> str:
    """`spp` with these words and those flags that have a value, ready for a shell."""
    parts = ["spp", *(str(word) for word in words)]
    for name, value in flags.items():
        word = name.replace("_", "-")
        if isinstance(value, bool):
            parts.append(f"--{word}" if value else f"--no-{word}")
        elif value is not None:
            parts += [f"--{word}", str(value)]
    return shlex.join(parts)


def help_without_command(context: typer.Context) -> None:
    """A group by itself asks for nothing: show what there is, and exit with 2."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)

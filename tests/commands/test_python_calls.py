"""Every command as a function: the command line's names as keyword arguments, shown and checked."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields

import pytest
from typer.main import get_command

import spp_export
from spp_cli.main import app
from spp_export.common.errors import UsageError
from spp_export.common.options import Request, fact

# Options of the command line that say how something is shown, or what is asked of a dialogue.
ONLY_IN_A_SHELL = {"json", "quiet", "help", "layers", "prompt"}
# Functions take these over from the command's words.
FUNCTIONS = {"artifacts import": "import_artifacts"}


def commands(command, name=""):
    """Parameters by flag of every command that runs something."""
    children = getattr(command, "commands", None)
    if children is None:
        yield name, {parameter.name for parameter in command.params}
        return
    for child, inner in children.items():
        yield from commands(inner, f"{name} {child}".strip())


COMMANDS = dict(commands(get_command(app)))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_a_function_with_its_options(name):
    function = getattr(spp_export, FUNCTIONS.get(name, name))
    asked = set(inspect.signature(function).parameters)
    assert asked - {"token"} == COMMANDS[name] - ONLY_IN_A_SHELL
    text = inspect.getdoc(function)
    for option in asked:
        assert re.search(rf"^{option}: ", text, re.MULTILINE), option


@pytest.mark.parametrize("name", COMMANDS)
def test_a_function_shows_an_example(name):
    text = inspect.getdoc(getattr(spp_export, FUNCTIONS.get(name, name)))
    examples = re.findall(r"^    (?:\w+ = |print\(|assert )?spp_export\.(\w+)\(.*$", text, re.M)
    assert len(examples) == 1
    assert getattr(spp_export, examples[0]) is getattr(spp_export, FUNCTIONS.get(name, name))


def test_dir_shows_the_functions():
    assert set(dir(spp_export)) == set(spp_export.__all__)
    assert {FUNCTIONS.get(name, name) for name in COMMANDS} < set(dir(spp_export))
    for name in dir(spp_export):
        assert getattr(spp_export, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'exprot'"):
        spp_export.exprot  # noqa: B018


def test_an_option_that_there_is_not_names_the_nearest():
    with pytest.raises(TypeError, match=r"export\(\) has no option 'kep'\. Did you mean 'keep'\?"):
        spp_export.export("s.txt", kep=0.8)
    with pytest.raises(TypeError, match=r"show\(\) has no option 'zzz'\.$"):
        spp_export.show("out", zzz=1)
    with pytest.raises(TypeError, match="scenario"):
        spp_export.plan()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spp_export.export("s", layout="square"), "--layout square: expected one of"),
        (lambda: spp_export.export("s", tp=0), "--tp 0: expected a whole number of 1 or more"),
        (lambda: spp_export.export("s", format="tflite"), "--format tflite: expected one of"),
        (lambda: spp_export.export("s", precision="fp16"), "--precision: is for ONNX and GGUF"),
        (
            lambda: spp_export.probe("p", "a", select=0),
            "--select 0: expected a whole number of 1 or more",
        ),
        (lambda: spp_export.eval("s", "o", units=["rows"]), "--units rows: expected one of"),
        (lambda: spp_export.chat("demo", top_k=4), "--top-k: without --temperature"),
        (
            lambda: spp_export.bench("out", batch=[0]),
            "--batch 0: expected a whole number of 1 or more",
        ),
        (lambda: spp_export.bench(), "Give either directories"),
        (
            lambda: spp_export.recover("out", "d", rank=0),
            "--rank 0: expected a whole number of 1 or more",
        ),
    ],
)
def test_python_is_refused_what_the_command_line_is(call, message):
    with pytest.raises(UsageError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_one_value_stands_for_a_list_of_one():
    request = spp_export.EvalRequest(keep=0.8, criterion="flap", units=["heads", "both"])
    assert (request.keep, request.criterion) == ((0.8,), ("flap",))
    assert request.units == ("heads", "both")


def subclasses(of):
    for each in of.__subclasses__():
        yield each
        yield from subclasses(each)


def test_every_field_of_a_request_says_what_it_is():
    spp_export.bench.__doc__  # noqa: B018  imports its module
    for request in subclasses(Request):
        for item in fields(request):
            assert fact(item).help.endswith((".", "...")), (request, item.name)

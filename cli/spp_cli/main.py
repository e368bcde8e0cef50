"""The `spp` command: its sub-commands, and the one place where errors become exit codes.

0 done and every check held; 1 it ran and the answer is no; 2 bad usage or input; 130 interrupted;
128 and the signal's number for SIGTERM (143) and SIGHUP (129).
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, Any

import typer

from spp_cli import options
from spp_cli.commands.artifacts import artifacts_app
from spp_cli.commands.bench import bench
from spp_cli.commands.cache import cache
from spp_cli.commands.chat import chat
from spp_cli.commands.convert import convert
from spp_cli.commands.diagnose import diagnose
from spp_cli.commands.doctor import doctor
from spp_cli.commands.eval import evaluate
from spp_cli.commands.export import export
from spp_cli.commands.frontier import frontier
from spp_cli.commands.plan import plan
from spp_cli.commands.probe import probe
from spp_cli.commands.push import push
from spp_cli.commands.recover import recover
from spp_cli.commands.report import report
from spp_cli.commands.show import show
from spp_cli.commands.verify import verify
from spp_cli.output import PipeClosedError, write_error, write_json, write_warning
from spp_export.common import processes
from spp_export.common.errors import SppError

_MOMENT_S = 0.01
_INTERRUPTED = 130
# They end the command like Ctrl-C: what it has begun is taken away first.
_ENDING = (signal.SIGTERM, signal.SIGHUP)
_COMPLETING = "_SPP_COMPLETE"  # set by the shell's completion script
_PIPE_CLOSED = 141  # what the shell reports of a process that SIGPIPE ended
# Read when transformers and its friends are imported, which is later than this module.
_QUIET_LIBRARIES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

app = typer.Typer(
    name="spp",
    cls=options.Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for command in (
    export,
    convert,
    plan,
    frontier,
    diagnose,
    probe,
    verify,
    recover,
    bench,
    report,
    push,
    show,
    chat,
    doctor,
    cache,
):
    app.command(cls=options.Command)(command)
app.command(name="eval", cls=options.Command)(evaluate)
app.add_typer(artifacts_app, name="artifacts")


def _version(show: bool) -> None:
    if show:
        from spp_export.common.versions import spp_version

        print(f"spp {spp_version()}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """One big language model in, many small scenario-specific ones out.

    Example: spp export --scenario chemistry.txt
    """
    options.help_without_command(context)


class _TerminatedError(BaseException):
    """One of `_ENDING` came. No Exception, which libraries catch and go on after."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.exit_code = 128 + number


def main() -> None:
    """Run the process's arguments and end the process."""
    sys.unraisablehook = _deliver_again
    try:
        for number in _ENDING:
            if signal.getsignal(number) is signal.SIG_DFL:  # and not ignored, as by nohup
                signal.signal(number, _terminate)
        status = _place(sys.argv[1:])
    except KeyboardInterrupt:  # before it began, or once more while the first was reported
        processes.say_terminated()
        status = _INTERRUPTED
        if not processes.rank():
            write_error("interrupted.")
    except _TerminatedError as error:
        status = _ended(error)
    # All is done, but for the interpreter, which takes a moment to end.
    for number in (signal.SIGINT, *_ENDING):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(status)


def _place(arguments: Sequence[str]) -> int:
    """The exit status of this process, which runs the command or, one of several, helps with it."""
    _quieten()
    try:
        helps = processes.begin()
    except SppError as error:
        write_error(str(error))
        return error.exit_code
    if not helps:
        status = run(arguments)
        processes.finish(status)
        return status
    try:
        return processes.work(explain)
    except SppError as error:
        write_error(str(error))
        return error.exit_code


def _ended(error: _TerminatedError, arguments: Sequence[str] = ()) -> int:
    """The exit status after a signal, which torchrun sends where another process failed."""
    processes.say_terminated()
    if failure := processes.failure():
        return _report(failure, arguments)
    if not processes.rank():
        write_error("terminated.")
    return error.exit_code


def _report(error: Exception, arguments: Sequence[str]) -> int:
    """Say what went wrong; the exit status."""
    message, code = explain(error)
    write_error(message)
    if "--json" in arguments:
        write_json({"error": message, "exit_code": code})
    return code


def _terminate(number: int, _: FrameType | None) -> None:
    raise _TerminatedError(number)


def _deliver_again(lost: Any) -> None:
    """A signal can come while something is collected, where Python ignores all that is raised; it
    is sent once more a moment later."""
    error = lost.exc_value
    if isinstance(error, _TerminatedError):
        number = error.number
    elif isinstance(error, KeyboardInterrupt):
        number = signal.SIGINT
    else:
        sys.__unraisablehook__(lost)
        return
    again = threading.Timer(_MOMENT_S, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def run(arguments: Sequence[str]) -> int:
    """The exit status of these arguments; whatever goes wrong is one line on stderr."""
    _quieten()
    if _COMPLETING in os.environ:
        os.environ["COLUMNS"] = "10000"  # a shell takes the second line of a help for a choice
    _survive_any_text()
    _show_warnings()
    try:
        status = app(args=list(arguments), prog_name="spp", standalone_mode=False) or 0
        if status == _INTERRUPTED:  # Typer turns KeyboardInterrupt into this
            write_error("interrupted.")
        return int(status)
    except PipeClosedError:
        # The interpreter flushes stdout once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except _TerminatedError as error:
        return _ended(error, arguments)
    except Exception as error:
        if os.environ.get("SPP_DEBUG") == "1":
            traceback.print_exc()
        return _report(error, arguments)


def _quieten() -> None:
    """Only what is ours is said."""
    for name, value in _QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # Python's, which are meant for developers


def explain(error: Exception) -> tuple[str, int]:
    """What the user reads of an error, and the exit status."""
    if isinstance(error, SppError):
        return str(error), error.exit_code
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "spp"
        message = error.format_message().replace("Value error, ", "").rstrip(".")
        end = "" if message.endswith(("?", "!")) else "."
        return f"{message}{end} See '{path} --help'.", 2
    # By name: torch has its own kind, and may not be loaded.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            "out of memory. Use a machine with more, --dtype bfloat16, or another --device.",
            2,
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}no space left on the disk. Make room, or choose another disk.", 2
    if isinstance(error, OSError) and error.filename and error.strerror:
        from spp_export.models.hub import cache_directory

        advice = ""
        if str(error.filename).startswith(str(cache_directory())):
            advice = " Set SPP_CACHE to a directory that can be written."
        return f"{error.filename}: {error.strerror}.{advice}", 2
    what = f"internal error: {type(error).__name__}: {error}"
    return f"{what}; run again with SPP_DEBUG=1 to see where.", 2


def _survive_any_text() -> None:
    """Names of files can hold what the terminal's encoding cannot."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _show_warnings() -> None:
    logger = logging.getLogger("spp_export")
    if not any(isinstance(handler, _Warnings) for handler in logger.handlers):
        logger.addHandler(_Warnings(logging.WARNING))
        logger.propagate = False


class _Warnings(logging.Handler):
    """The library's warnings as lines like ours."""

    def emit(self, record: logging.LogRecord) -> None:
        write_warning(record.getMessage())


if __name__ == "__main__":
    main()

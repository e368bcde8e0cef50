"""`spp chat`: what reaches the library, and what a shell, a pipe and a terminal get to see."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import spp_export.commands.chat.chat as module
from spp_cli.conversation import show_piece
from spp_cli.main import app, run
from spp_export import Chat

ROOT = Path(__file__).parents[2]
STOP = 0
CLOSING = re.compile(
    r"(\d+) tokens?( \([a-z-]+\))?(, [\d.]+ tokens/s)?, first token after \d+ ms, "
    r"peak memory [\d.]+ [MG]B\n"
)


class Bytes:
    """A tokenizer of bytes."""

    chat_template = None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": list(text.encode())}

    def decode(self, ids, **_):
        return bytes(ids).decode(errors="replace")


class Echo:
    """Says after every prompt the same words."""

    runtime = "echo"
    context_length = 64

    def __init__(self, words="né.", hangs_after=None, asks=False):
        """After `hangs_after` tokens it goes on only when interrupted; with `asks` it reads a byte
        of standard input before every token."""
        self.words = [*words.encode(), STOP]
        self.hangs_after = hangs_after
        self.asks = asks

    def start(self, capacity):
        following = enumerate(self.words)

        def feed(ids):
            number, word = next(following)
            while number == self.hangs_after:
                time.sleep(0.01)
            if self.asks:
                os.read(0, 1)
            logits = np.zeros(256, np.float32)
            logits[word] = 1
            return logits

        return feed


class Templated(Bytes):
    chat_template = "yes"

    def apply_chat_template(self, messages, **_):
        return "|".join(message["content"] for message in messages) + ">"


def talker(tokenizer=None, **options):
    return Chat(Echo(**options), tokenizer or Bytes(), frozenset({STOP}))


@pytest.fixture
def library(monkeypatch):
    calls = {}

    def open_chat(*positional, **keywords):
        calls["open"] = (positional, keywords)
        opened = talker(Templated())
        ask = opened.ask

        def watched(prompt, **options):
            answer = ask(prompt, **options)
            given = {"choose": opened.choose, "max_new_tokens": opened.max_new_tokens, **options}
            calls.setdefault("asked", []).append((bytes(answer.prompt_ids).decode(), given))
            return answer

        monkeypatch.setattr(opened, "ask", watched)
        return opened

    monkeypatch.setattr(module, "open_chat", open_chat)
    return calls


def invoke(*arguments, typed=None):
    found = CliRunner().invoke(app, ["chat", *map(str, arguments)], input=typed)
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


def test_defaults(library):
    invoke("out", "--prompt", "Hello")
    positional, keywords = library["open"]
    assert positional == (Path("out"),)
    assert keywords == {
        "device": "cpu",
        "dtype": None,
        "threads": None,
        "system": None,
        "raw": False,
    }
    ((prompt, options),) = library["asked"]
    assert prompt == "Hello>"
    assert options["max_new_tokens"] == 256
    assert options["choose"].temperature == 0


def test_every_flag_is_passed(library):
    invoke(
        *("out", "--prompt", "Hello", "--system", "Be kind.", "--raw", "--max-new-tokens", "2"),
        *("--temperature", "0.7", "--top-p", "0.9", "--top-k", "40", "--seed", "3"),
        *("--threads", "2", "--device", "cuda:1", "--dtype", "bfloat16"),
    )
    _, keywords = library["open"]
    expected = {"system": "Be kind.", "raw": True, "threads": 2, "device": "cuda:1"}
    assert {name: keywords[name] for name in expected} == expected
    assert keywords["dtype"] == "bfloat16"
    ((_, options),) = library["asked"]
    choose = options["choose"]
    assert (options["max_new_tokens"], choose.temperature) == (2, 0.7)
    assert (choose.top_p, choose.top_k) == (0.9, 40)


def test_the_seed_decides_what_is_drawn(library):
    def drawn(seed):
        asked = ("out", "--prompt", "Hello", "--max-new-tokens", "1", "--temperature", "2")
        invoke(*asked, "--seed", seed)
        _, options = library["asked"][-1]
        return [int(options["choose"](np.zeros((1, 256)))[0]) for _ in range(9)]

    assert drawn(3) == drawn(3) != drawn(4)


def test_one_answer(library):
    found = invoke("out", "--prompt", "Hello")
    assert (found.exit_code, found.stdout) == (0, "né.\n")
    assert CLOSING.fullmatch(found.stderr)[1] == "5"


def test_an_answer_that_is_cut_says_by_what(library):
    found = invoke("out", "--prompt", "Hello", "--max-new-tokens", "1")
    assert CLOSING.fullmatch(found.stderr)[2] == " (--max-new-tokens)"
    found = invoke("out", "--prompt", "x" * 61)
    assert found.stdout == "n\N{REPLACEMENT CHARACTER}\n"
    assert found.stderr.endswith(
        "warning: the answer ends here because the model's context is full.\n"
    )


def test_quiet_is_the_answer_alone(library):
    found = invoke("out", "--prompt", "Hello", "--quiet")
    assert (found.stdout, found.stderr) == ("né.\n", "")


def test_json_is_one_object(library):
    found = invoke("out", "--prompt", "Hello", "--json")
    said = json.loads(found.stdout)
    timings = said.pop("timings")
    assert said.pop("peak_memory_bytes") > 1e6
    assert said == {
        "prompt": "Hello",
        "answer": "né.",
        "prompt_token_ids": list(b"Hello>"),
        "token_ids": [*"né.".encode(), STOP],
        "ending": "end",
        "runtime": "echo",
    }
    assert set(timings) == {"first_token_seconds", "seconds", "tokens_per_second"}
    assert found.stderr == ""


def test_lines_of_a_pipe_are_a_conversation(library):
    typed = "Hello\n\nAgain \r\n/reset\nAnew\n/quit\nnever\n"
    found = invoke("out", "--quiet", typed=typed)
    asked = [prompt for prompt, _ in library["asked"]]
    assert asked == ["Hello>", "Hello|né.|Again >", "Anew>"]
    assert found.stdout == "né.\n" * 3


def test_a_conversation_says_how_it_is_ruled(library):
    found = invoke("out", typed="/reset\n")
    assert found.stderr.splitlines() == [
        "echo; /reset forgets what was said, /quit or Ctrl-D ends.",
        "what was said is forgotten.",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json"], "--json is about one answer. Add --prompt TEXT."),
        (
            ["--top-k", "3"],
            "--top-k: without --temperature the likeliest token is always taken. "
            "Add --temperature 0.7, or drop --top-k.",
        ),
        (
            ["--temperature", "1", "--top-p", "0"],
            "--top-p 0: expected a share between 0 and 1, such as 0.8.",
        ),
        (
            ["--temperature", "inf"],
            "--temperature inf: expected a number of 0 or more, such as 0.7.",
        ),
        (
            ["--max-new-tokens", "0"],
            "--max-new-tokens 0: expected a whole number of 1 or more.",
        ),
        (
            [],
            "out: no such directory. Give a directory that 'spp export' wrote, a dense model's, "
            "or 'demo'.",
        ),
    ],
)
def test_bad_usage_is_one_line(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(["chat", "out", *arguments]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_terminal_is_not_steered_by_what_a_model_writes(monkeypatch, capsys):
    text = "a\x1b]0;title\x07\tb\r\n\x9bc"
    show_piece(text)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show_piece(text)
    assert capsys.readouterr().out == text + "a\\x1b]0;title\\x07\tb\\x0d\n\\x9bc"


SESSION = """
import os, sys
sys.path.insert(0, {tests!r})
if sys.stdin.isatty():
    os.open(os.ttyname(0), os.O_RDWR)  # the first that a session opens sends its signals
import spp_export
from test_chat_command import Templated, talker
from spp_cli.main import run
opened = talker(Templated(), **{options!r})
vars(spp_export)["chat"] = lambda **_: opened
sys.exit(run(["chat", "out", *sys.argv[1:]]))
"""


def start(*arguments, options=None, **streams):
    script = SESSION.format(tests=str(Path(__file__).parent), options=options or {})
    kept = {k: v for k, v in os.environ.items() if k not in ("SPP_DEBUG", "FORCE_COLOR")}
    path = os.pathsep.join([str(ROOT / name) for name in ("", "cli", "benchmarks")])
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        env=kept | {"PYTHONPATH": path, "TERM": "dumb", "PYTHONIOENCODING": "utf-8"},
        start_new_session=True,
        **streams,
    )


class Terminal:
    """The other side of a process's terminal."""

    def __init__(self, *arguments, **options):
        self._ours, theirs = os.openpty()
        self.process = start(
            *arguments, options=options, stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        self._seen = ""

    def expect(self, words):
        """What comes up to these words."""
        while words not in self._seen:
            try:
                self._seen += os.read(self._ours, 1024).decode()
            except OSError:  # the process has ended
                pytest.fail(f"no {words!r} in {self._seen!r}")
        before, _, self._seen = self._seen.partition(words)
        return before

    def type(self, text):
        os.write(self._ours, text.encode())

    def type_until(self, key, words):
        """The same key until these words come: before readline waits for keys, the terminal echoes
        them itself, and a signal of then is seen with the next key only."""
        while words not in self._seen:
            self.type(key)
            while select.select([self._ours], [], [], 1)[0]:
                self._seen += os.read(self._ours, 1024).decode()
                if words in self._seen:
                    break
        self.expect(words)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def terminal():
    made = []

    def make(*arguments, **options):
        made.append(Terminal(*arguments, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_dialogue_on_a_terminal(terminal):
    shell = terminal()
    shell.expect("ends.")
    shell.expect("> ")
    shell.type("Hello\n")
    shell.expect("né.")
    shell.expect("peak memory")
    shell.expect("> ")
    shell.type("a line that is dropped")
    shell.expect("dropped")
    shell.type_until("\x03", "> ")
    shell.type("x" * 80 + "\n")
    assert "Shorten the prompt" in shell.expect("/reset.")
    shell.expect("> ")
    shell.type("\x04")
    assert shell.process.wait() == 0


def test_ctrl_c_stops_the_answer_and_not_the_dialogue(terminal):
    shell = terminal(words="abcdefghijklmnopqrstuvwxyz", hangs_after=5)
    shell.expect("> ")
    shell.type("Hello\n")
    shell.expect("ab")
    shell.type("\x03")
    assert "z" not in shell.expect("(interrupted)")
    shell.expect("> ")
    shell.type("/quit\n")
    assert shell.process.wait() == 0


def test_ctrl_c_ends_a_single_answer(terminal):
    shell = terminal("--prompt", "Hello", words="abcdefghijklmnopqrstuvwxyz", hangs_after=5)
    shell.expect("ab")
    shell.type("\x03")
    shell.expect("error: interrupted.")
    assert shell.process.wait() == 130


def test_the_answer_streams():
    """No token is computed before the words up to the one before it have been read."""
    process = start(
        *("--prompt", "Hello", "--quiet"),
        options={"words": "one two three", "asks": True},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    seen = b""
    with process:
        process.stdin.write(b"..")
        process.stdin.flush()
        while piece := os.read(process.stdout.fileno(), 1024):
            seen += piece
            assert len(piece) <= 2
            process.stdin.write(b"." * len(piece))
            process.stdin.flush()
    assert seen == b"one two three\n"


def test_a_reader_that_goes_away_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    process = start("--prompt", "Hello", stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    _, error = process.communicate()
    assert (process.returncode, error) == (141, b"")


def test_input_that_is_not_text():
    process = start(
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, options={}
    )
    out, error = process.communicate(b"caf\xe9 au lait\n")
    assert (process.returncode, out) == (2, b"")
    assert error.endswith(b"error: standard input is not UTF-8 text.\n")


def test_plans_are_for_the_first_turn_to_choose_from(monkeypatch):
    calls = {}

    def opened(*positional, **keywords):
        calls["open"] = (positional, keywords)
        chat = talker(Templated())
        chat.chosen = None
        ask = chat.ask

        def chosen(prompt, **options):
            chat.chosen = "history"
            return ask(prompt, **options)

        chat.ask = chosen
        return chat

    monkeypatch.setattr(module, "open_scenario_chat", opened)
    found = invoke("a.json", "b.json", "--model", "m", "--artifacts", "x", "--prompt", "Hello")
    positional, keywords = calls["open"]
    assert positional == ((Path("a.json"), Path("b.json")),)
    assert (keywords["model"], keywords["artifacts"]) == ("m", Path("x"))
    assert "answered by history" in found.stderr
    invoke("a.json", "--prompt", "Hello")
    assert calls["open"][0] == ((Path("a.json"),),)

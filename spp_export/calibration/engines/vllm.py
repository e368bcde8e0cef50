"""vLLM, on a CUDA card: it answers all prompts at once, and ends a row where its answer ends.

It runs in a process of its own, which gives all of its memory on the card back when it is done.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from spp_export.calibration.engines.base import Dense, EngineFailed, Prompts
from spp_export.calibration.engines.batches import steps
from spp_export.common.processes import lone_environment
from spp_export.common.progress import progress
from spp_export.common.signals import Cleanup, held

_CHILD = Path(__file__).with_name("vllm_child.py")
# vLLM takes about as long to start as transformers to take so many steps on a card, each for a
# batch of prompts: a minute, at 30 ms a step. An estimate: no card with vLLM was at hand.
_LEAST_STEPS = 2000
# Of what is free on the card; our own model is there already, and needs some to compute in.
_MEMORY_SHARE = 0.8
_VISIBLE = "CUDA_VISIBLE_DEVICES"


class Vllm:
    """`vllm.LLM`, for many prompts and models that are to run on one CUDA card."""

    version = "answers: sampled by vLLM, v1"

    def suits(self, dense: Dense, prompts: Prompts) -> bool:
        """Whether vLLM is installed, the model is to be on a card that is there, and the prompts
        are many enough to start it for. It knows no double precision."""
        if steps(len(prompts.questions), prompts.tokens) < _LEAST_STEPS:
            return False
        if not dense.device.startswith("cuda") or dense.dtype == "float64":
            return False
        if importlib.util.find_spec("vllm") is None:
            return False
        import torch

        return torch.cuda.is_available()

    def answers(self, dense: Dense, prompts: Prompts) -> list[list[int]]:
        """The answer to each question."""
        import torch

        free, total = torch.cuda.mem_get_info(dense.device)
        seeds = np.random.SeedSequence(prompts.seed).generate_state(len(prompts.questions))
        request = {
            "engine": {
                "model": str(dense.source.path),
                "skip_tokenizer_init": True,
                "dtype": dense.dtype,
                "seed": prompts.seed,
                "max_model_len": max(map(len, prompts.questions)) + prompts.tokens,
                "gpu_memory_utilization": round(_MEMORY_SHARE * free / total, 3),
                # Capturing graphs takes longer than a hundred short answers.
                "enforce_eager": True,
                # Settings of the model's generation config are in `sampling`, and no others count.
                "generation_config": "vllm",
            },
            "questions": [list(question) for question in prompts.questions],
            "seeds": seeds.tolist(),
            "sampling": {
                **prompts.sampling,
                "max_tokens": prompts.tokens,
                "stop_token_ids": list(prompts.stop),
                "ignore_eos": True,
                "detokenize": False,
            },
        }
        environment = lone_environment() | {_VISIBLE: _card(dense.device)}
        said = _asked(request, environment, len(prompts.questions))
        return [prompts.ended(answer) for answer in said]


def _card(device: str) -> str:
    """What makes this card the only one that a process sees."""
    number = int(device.partition(":")[2] or 0)
    known = [name for name in os.environ.get(_VISIBLE, "").split(",") if name]
    return known[number] if known else str(number)


def _asked(request: dict[str, Any], environment: dict[str, str], questions: int) -> list[list[int]]:
    """What the process answers."""
    with tempfile.TemporaryFile() as log:
        with held():
            process = subprocess.Popen(
                [sys.executable, "-P", str(_CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C ends it with us, and not by its own traceback
            )
            ending = Cleanup(lambda: _end(process))
        try:
            with progress("answering prompts with vLLM", questions) as advance_to:
                return _answer(process, request, log, advance_to)
        finally:
            ending.run()


def _answer(
    process: subprocess.Popen[str], request: dict[str, Any], log: IO[bytes], advance_to: Any
) -> list[list[int]]:
    assert process.stdin
    assert process.stdout
    with contextlib.suppress(BrokenPipeError):  # then there is no answer
        json.dump(request, process.stdin)
        process.stdin.close()
    for line in process.stdout:
        reply = json.loads(line)
        if "answers" in reply:
            answers: list[list[int]] = reply["answers"]
            return answers
        advance_to(reply["done"])
    status = process.wait()
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
    last = next((line for line in reversed(lines) if "Error" in line), "no reason given")
    raise EngineFailed(f"vLLM ended with status {status}: {last:.200}")


def _end(process: subprocess.Popen[str]) -> None:
    """End it and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with process:  # closes its pipes, and waits for it
        pass

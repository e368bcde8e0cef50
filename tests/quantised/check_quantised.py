"""Run prebuilt quantised checkpoints in vLLM, on the CPU, and compare with transformers.

    python tests/quantised/build_quantised.py OUT    # where llm-compressor is
    python tests/quantised/check_quantised.py OUT    # where vLLM's CPU build and this project are
    python tests/quantised/check_quantised.py OUT llama-int7

Every checkpoint runs on vLLM's own layers by the plugin, and on its Transformers backend. The
reference is transformers with the same files in float32, by the code that travels with them, and
with activations that are not rounded. Rounded, they move the prompts' log-probabilities, and so
does bfloat16, which is all that vLLM's kernel for 4 bits takes: vLLM is to be no further from the
reference than twice transformers itself. A line says which kernels this processor cannot run. Exit
status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "vllm"))

import check_vllm  # first: sets what vLLM reads from the environment
import torch
import transformers
import vllm
from answers import random_prompts
from checking import attempt, require
from compressed_tensors.quantization import disable_quantization
from transformers import AutoModelForCausalLM

WAYS: dict[str, dict[str, Any]] = {
    "plugin": {},
    "backend": {"model_impl": "transformers", "trust_remote_code": True},
}
# What vLLM's kernels need on a CPU, one of each set. Without VNNI sums of 8-bit products overflow
# 16 bits, and it computes something else without a word; with 7 bits they do not.
NEEDS = {
    "int4": {"avx512f"},
    "int7": {"avx2"},
    "int8": {"avx512_vnni", "avx_vnni"},
}
DTYPES = {"int4": torch.bfloat16}
# vLLM's distance from the reference over transformers', at most.
ROUNDING = 2.0


def main() -> int:
    """Check every checkpoint below the directory, one line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("names", nargs="*", help="of checkpoints; default: all")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    vllm.model_executor.models.registry._run_in_subprocess = lambda look: look()
    directory = arguments.directory.resolve()
    names = arguments.names or sorted(path.name for path in directory.iterdir())
    flags = set(Path("/proc/cpuinfo").read_text().split())
    able = [name for name in names if NEEDS[recipe_of(name)] & flags]
    for name in names:
        if name not in able:
            lacking = " or ".join(sorted(NEEDS[recipe_of(name)]))
            print(f"not run {name}: this processor has no {lacking}", flush=True)
    # Before vLLM runs: its Transformers backend changes classes of transformers for good.
    references = {name: references_of(directory / name) for name in able}
    failed = [
        name for name in able if not attempt(name, check, directory / name, *references[name])
    ]
    print(f"vLLM {vllm.__version__}, transformers {transformers.__version__}: ", end="")
    print(f"{len(able)} checks, {len(failed)} failed, {len(names) - len(able)} not run")
    return int(bool(failed) or not able)


def recipe_of(name: str) -> str:
    """By which a checkpoint was quantised."""
    return name.rpartition("-")[2]


def dtype_of(name: str) -> torch.dtype:
    """What vLLM runs a checkpoint in."""
    return DTYPES.get(recipe_of(name), torch.float32)


def prompts() -> list[list[int]]:
    """Token ids."""
    return random_prompts(97)


@torch.no_grad()
def references_of(path: Path) -> tuple[torch.Tensor, float]:
    """Log-probabilities of the prompts' tokens, and how far transformers' own are from them."""
    rounded = with_transformers(path, dtype_of(path.name), exact=False)
    exact = with_transformers(path, torch.float32, exact=True)
    return exact, distance(rounded, exact)


def with_transformers(path: Path, dtype: torch.dtype, *, exact: bool) -> torch.Tensor:
    """Log-probabilities of the prompts' tokens; `exact`: without rounding activations."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=True)
    home = type(model).__module__.partition(".")[0]
    require(home == "transformers_modules", f"transformers runs classes of {home}")
    model(torch.tensor([[3]]))  # unpacks the weights
    if exact:
        model.apply(disable_quantization)
    found = []
    for ids in prompts():
        log_p = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
        found.append(log_p.gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    return torch.cat(found)


def check(path: Path, exact: torch.Tensor, rounding: float) -> str:
    """Every way of running a checkpoint, and how far it is from the reference in nats."""
    said = f"transformers {rounding:.3f}"
    for way, options in WAYS.items():
        name, found = with_vllm(path, options)
        away = distance(found, exact)
        said += f"; {way} {name} {away:.3f}"
        require(away <= ROUNDING * rounding, said)
    return said


def with_vllm(path: Path, options: dict[str, Any]) -> tuple[str, torch.Tensor]:
    """The class that ran, and log-probabilities of the prompts' tokens."""
    dtype = dtype_of(path.name)
    sampling = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    asked = [{"prompt_token_ids": ids} for ids in prompts()]
    with check_vllm.engine(path, dtype=dtype, **options) as llm:
        outputs = llm.generate(asked, sampling, use_tqdm=False)
        core: Any = llm.llm_engine.engine_core
        model = core.engine_core.model_executor.driver_worker.worker.get_model()
    found = []
    for ids, output in zip(prompts(), outputs, strict=True):
        steps = zip(output.prompt_logprobs[1:], ids[1:], strict=True)
        found.append(torch.tensor([step[token].logprob for step, token in steps]))
    return type(model).__name__, torch.cat(found)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Mean over tokens."""
    return float((found - expected).abs().mean())


if __name__ == "__main__":
    sys.exit(main())

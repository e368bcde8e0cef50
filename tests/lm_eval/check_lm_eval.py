"""Run lm-evaluation-harness on prebuilt slim checkpoints and compare its scores with plain ones.

    python tests/loading/build_loading.py OUT      # once, with the project's own environment
    python tests/lm_eval/check_lm_eval.py OUT      # where lm_eval, torch and transformers are

A script, not a test module: `make test-all` runs it in an environment without spp_export. One
per-layer checkpoint of every family answers `spp_domains`, offline and started from a directory
that is not the project's. Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

TASKS = Path(__file__).resolve().parents[2] / "benchmarks" / "lm_eval"
TASK = "spp_domains"
# Sums of up to fifty float32 log-probabilities, padded in one computation and not in the other.
TOLERANCE = 1e-4


class WrongResultError(Exception):
    """The harness did not run, or scored something else."""


def main() -> int:
    """Check one checkpoint of every family below the directory, one line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    models = per_layer_models(parser.parse_args().directory.resolve())
    failures = 0
    for family, model in models.items():
        try:
            print(f"ok     {family}: {check(model)}")
        except Exception as error:
            failures += 1
            print(f"FAILED {family}: {type(error).__name__}: {error}")
    version = importlib.metadata.version("lm_eval")
    print(f"lm_eval {version}: {len(models)} models, {failures} failed")
    return int(failures > 0 or not models)


def per_layer_models(directory: Path) -> dict[str, Path]:
    """The first checkpoint of every model type that runs by its own code."""
    found: dict[str, Path] = {}
    for path in sorted(directory.glob("*/model/config.json")):
        config = json.loads(path.read_text())
        if "auto_map" in config:
            found.setdefault(config["model_type"], path.parent)
    return found


def check(model: Path) -> str:
    """Accuracy and largest difference; WrongResultError where the harness finds anything else."""
    with tempfile.TemporaryDirectory() as scratch:
        results, samples = run_harness(model, Path(scratch))
    questions = [sample["doc"] for sample in samples]
    require(len(questions) >= 60, f"only {len(questions)} questions")
    found = [[float(option[0][0]) for option in sample["resps"]] for sample in samples]
    expected = plain_scores(model, questions)
    worst = (torch.tensor(found) - torch.tensor(expected)).abs().max().item()
    require(worst <= TOLERANCE, f"log-likelihoods differ by {worst:.1e}")
    right = [
        max(range(len(scores)), key=scores.__getitem__) == question["right"]
        for scores, question in zip(found, questions, strict=True)
    ]
    accuracy = results["acc,none"]
    require(abs(accuracy - sum(right) / len(right)) < 1e-9, f"accuracy is {accuracy}")
    return f"accuracy {accuracy:.3f} of {len(right)}, log-likelihoods within {worst:.1e}"


def run_harness(model: Path, scratch: Path) -> tuple[dict[str, float], list[dict[str, object]]]:
    """What `lm_eval` reports for the task, and its samples in the order of the sets."""
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", TASK]
    command += ["--model_args", f"pretrained={model},trust_remote_code=True,dtype=float32"]
    command += ["--include_path", str(TASKS), "--device", "cpu", "--batch_size", "16"]
    command += ["--output_path", str(scratch / "out"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(scratch / "home")}
    done = subprocess.run(
        command, cwd=scratch, env={**os.environ, **offline}, capture_output=True, text=True
    )
    require(done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-400:]}")
    (report,) = (scratch / "out").rglob("results_*.json")
    (log,) = (scratch / "out").rglob(f"samples_{TASK}_*.jsonl")
    samples = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    samples.sort(key=lambda sample: sample["doc_id"])
    return json.loads(report.read_text())["results"][TASK], samples


def plain_scores(path: Path, questions: list[dict[str, object]]) -> list[list[float]]:
    """Log-likelihood of every option after its question, one forward pass for each, no padding."""
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=True)
    return [
        [
            continuation(model, tokenizer, f"Question: {question['question']}\nAnswer:", option)
            for option in question["options"]
        ]
        for question in questions
    ]


def continuation(
    model: torch.nn.Module, tokenizer: transformers.PreTrainedTokenizerBase, text: str, option: str
) -> float:
    start = len(tokenizer(text).input_ids)
    ids = tokenizer(f"{text} {option}", return_tensors="pt").input_ids
    with torch.no_grad():
        scores = model(ids).logits[0].float().log_softmax(-1)
    return sum(scores[place - 1, ids[0, place]].item() for place in range(start, ids.shape[1]))


def require(condition: bool, complaint: str) -> None:
    """WrongResultError with the complaint unless the condition holds."""
    if not condition:
        raise WrongResultError(complaint)


if __name__ == "__main__":
    sys.exit(main())

"""Generate in transformers.js from ONNX directories, and compare with PyTorch.

    cp tests/transformers_js/*.json tests/transformers_js/generate.mjs WORK
    (cd WORK && npm ci --ignore-scripts)
    python tests/transformers_js/check_transformers_js.py WORK [--model SLIM ...]

Below WORK, ONNX directories of every family are written, per-layer and uniform, and of every
`--model`, a slim or dense checkpoint. Node generates from each of them greedily and offline; token
ids must be those of the PyTorch model, which decodes without a cache, and the two tokenizers must
agree. Batches are padded on the left, so only the forms of attention that take it get one.
Installation scripts are not needed: all they do is fetch libraries for GPUs. Exit status 1 if
anything differs.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import string
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from factories import CASES, Case, random_layers, shape_of, uniform_layers, write_slim
from family_models import slim_experts
from greedy import clear_prompt

from spp_export import load_slim
from spp_export.common.progress import quiet_transformers
from spp_export.formats.card import onnx_card
from spp_export.formats.onnx import Attention, OnnxOptions
from spp_export.formats.onnx.write import write_onnx
from spp_export.formats.registry import FORMATS
from spp_export.models.families import FAMILIES
from spp_export.models.families.served import TRANSFORMERS_JS

# Those with experts that it knows; the last has sinks.
EXPERTS = ("qwen2_moe", "qwen3_moe", "gpt_oss")
NEW_TOKENS = 12
# Of different lengths, and longer than the sliding windows of the factories.
LENGTHS = (9, 14)


@dataclass(frozen=True)
class Job:
    """One directory and what must come out of it, per text."""

    name: str
    directory: Path
    texts: list[str]
    prompts: list[list[int]]
    expected: list[list[int]]

    def asked(self) -> dict[str, object]:
        """For generate.mjs."""
        return {
            "directory": str(self.directory),
            "texts": self.texts,
            "newTokens": len(self.expected[0]),
        }

    def wrong(self, prompts: list[list[int]], generated: list[list[int]]) -> str | None:
        """What differs, if anything does."""
        if prompts != self.prompts:
            return f"tokens of the prompts are {prompts}, expected {self.prompts}"
        if generated != self.expected:
            return f"generated {generated}, expected {self.expected}"
        return None


def main() -> int:
    """One line per directory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", type=Path, action="append", default=[])
    options = parser.parse_args()
    work = options.work.resolve()
    models = work / "models"
    shutil.rmtree(models, ignore_errors=True)
    jobs = [*tiny_jobs(models), *given_jobs(options.model, models)]
    failures = 0
    for job, result in zip(jobs, run_node(work, jobs), strict=True):
        wrong = job.wrong(result["prompts"], result["generated"])
        failures += wrong is not None
        print(f"FAILED {job.name}: {wrong}" if wrong else f"ok     {job.name}")
    failures += not card_runs(work, jobs[0].directory)
    failures += not families_are_as_said(work)
    print(f"transformers.js: {len(jobs)} directories, {failures} failed")
    return int(failures > 0)


def run_node(work: Path, jobs: list[Job]) -> list[dict[str, list[list[int]]]]:
    """Answers of generate.mjs in `work`, one per job."""
    path = work / "jobs.json"
    path.write_text(json.dumps([job.asked() for job in jobs]))
    command = ["node", "generate.mjs", path.name]
    done = subprocess.run(command, cwd=work, check=True, stdout=subprocess.PIPE, text=True)
    answers: list[dict[str, list[list[int]]]] = json.loads(done.stdout)
    return answers


def card_runs(work: Path, directory: Path) -> bool:
    """Whether what the card of a directory says of transformers.js can be typed in as it is."""
    card = onnx_card(directory.name, "tiny", "gqa", None, (), None)
    script = work / "card.mjs"
    script.write_text(card.split("```js\n")[1].split("```")[0])
    command = ["node", str(script)]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    runs = done.returncode == 0 and "generated_text: 'The experiment shows" in done.stdout
    print("ok     the card" if runs else f"FAILED the card: {done.stdout}{done.stderr}")
    return runs


def families_are_as_said(work: Path) -> bool:
    """Whether it has classes of those families, among all that become ONNX, that the package
    says."""
    source = work / "node_modules/@huggingface/transformers/dist/transformers.node.mjs"
    listed = source.read_text().partition("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = ")[2]
    known = set(re.findall(r'\[\s*"([a-z0-9_]+)"', listed.partition("]);")[0]))
    onnx = FORMATS["onnx"]
    ours = {name for name, family in FAMILIES.items() if not onnx.refusal(family, "per-layer")}
    odd = sorted((known & ours) ^ TRANSFORMERS_JS)
    print(f"FAILED its families: {', '.join(odd)}" if odd else "ok     its families")
    return not odd


def tiny_jobs(models: Path) -> Iterator[Job]:
    """Every case per layer; of every family one uniform; two texts where padding is taken."""
    for seed, case in enumerate(CASES):
        dense = case.make(models / case.name)
        layers = random_layers(shape_of(dense), seed)
        slim = write_slim(models / case.name / "slim", dense, layers)
        yield job(case.name, slim, "gqa", random_texts(1))
        yield job(case.name, slim, "gqa-bias", random_texts(2))
        yield job(case.name, slim, "standard", random_texts(2))
    for family in sorted({case.family for case in CASES}):
        target = models / f"{family}-uniform"
        dense = Case(family, family, {"kv_heads": 4, "query_heads": 8}).make(target)
        layers = uniform_layers(shape_of(dense), 0, kv_heads=2, group_size=2, channels=40)
        slim = write_slim(target / "slim", dense, layers, "uniform")
        yield job(target.name, slim, "gqa", random_texts(1))
    for family in EXPERTS:
        slim = slim_experts(family, models / family)
        yield job(family, slim, "gqa", random_texts(1))
        yield job(family, slim, "gqa-bias", random_texts(2))
        yield job(family, slim, "standard", random_texts(2))


def given_jobs(checkpoints: list[Path], models: Path) -> Iterator[Job]:
    """A checkpoint with a trained tokenizer, told something to complete."""
    texts = ["Sulfuric acid is", "The treaty of 1648 ended a war that", "Two and two make"]
    for index, checkpoint in enumerate(checkpoints):
        yield job(checkpoint.name, checkpoint, "gqa", [texts], models / f"given-{index}")


def random_texts(count: int) -> list[list[str]]:
    """ASCII texts to choose from, for each row of a batch."""
    alphabet = string.ascii_letters + string.digits + " "
    rows = []
    for length in LENGTHS[:count]:
        rng = random.Random(length)
        rows.append(["".join(rng.choices(alphabet, k=length)) for _ in range(100)])
    return rows


def job(
    name: str,
    checkpoint: Path,
    attention: Attention,
    rows: list[list[str]],
    target: Path | None = None,
) -> Job:
    """Write the ONNX directory, and let PyTorch alone decide which text of each row to try."""
    out = target or checkpoint.parent / f"onnx-{attention}"
    out.mkdir(parents=True)
    write_onnx(checkpoint, out, OnnxOptions(attention=attention))
    with quiet_transformers():
        model, tokenizer = load_slim(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    texts, prompts, expected = [], [], []
    for row in rows:
        encoded = tokenizer(row).input_ids
        prompt, following = clear_prompt(model, encoded, NEW_TOKENS)
        texts.append(row[encoded.index(prompt)])
        prompts.append(prompt)
        expected.append(following)
    return Job(f"{name} {attention}", out, texts, prompts, expected)


if __name__ == "__main__":
    sys.exit(main())

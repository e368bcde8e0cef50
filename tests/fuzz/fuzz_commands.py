"""Whole commands on damaged files, in this process: what is said, and what is left behind."""

from __future__ import annotations

import io
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from random import Random

import fuzz_seeds
from factories import format_options, make_checkpoint, random_layers, shape_of
from fuzz_campaign import Finding, HangError, Tally, alarm
from fuzz_targets import check_line, mutation_of

import spp_export
from spp_cli.main import run
from spp_export.common.manifest import write_manifest
from spp_export.data.artifacts import write_artifacts
from spp_export.formats.onnx.options import OnnxOptions
from spp_export.models.checkpoint.checkpoint import open_source

SECONDS_PER_COMMAND = 30.0
OUT = "out"


@dataclass(frozen=True)
class Attack:
    """A command, and the files of the workplace that are damaged for it.

    Arguments in braces are places of the workplace. `seals` names the directory whose manifest is
    written anew, as someone who wants to be believed would do.
    """

    name: str
    victims: tuple[str, ...]
    arguments: tuple[str, ...]
    statuses: tuple[int, ...] = (0, 2)
    seals: str = ""


_MODEL = ("--model", "dense", "--quiet")
_PLANNED = ("export", "--plan", "plan.json", "-o", OUT, *_MODEL)
_DIAGNOSED = ("export", "--scenario", "s.jsonl", "--artifacts", "artifacts", "-o", OUT, *_MODEL)
_DENSE = (
    "dense/config.json",
    "dense/model.safetensors.index.json",
    "dense/model-00001-of-00003.safetensors",
)
_TOKENIZER = ("dense/tokenizer.json", "dense/tokenizer_config.json", "s.jsonl")
_ARTIFACTS = tuple(
    f"artifacts/{name}"
    for name in (
        "artifacts.json",
        "importance.safetensors",
        "probes.safetensors",
        "whitelist.json",
    )
)
_SLIM = tuple(f"slim/{name}" for name in ("plan.json", "config.json", "model.safetensors"))
_ONNX = tuple(
    f"graph/{name}" for name in ("plan.json", "config.json", "genai_config.json", "model.onnx")
)
ATTACKS: tuple[Attack, ...] = (
    Attack("dry run", ("plan.json", *_DENSE), (*_PLANNED, "--dry-run")),
    Attack("export", ("plan.json", *_DENSE), (*_PLANNED, "--no-verify")),
    Attack("checked export", ("plan.json", *_DENSE), _PLANNED, (0, 1, 2)),
    Attack("onnx export", ("plan.json", *_DENSE), (*_PLANNED, "--format", "onnx", "--no-verify")),
    Attack("diagnosed dry run", (*_ARTIFACTS, *_TOKENIZER, _DENSE[0]), (*_DIAGNOSED, "--dry-run")),
    Attack("talking export", ("plan.json",), (*_PLANNED[:-1], "--no-verify")),
    Attack("show plan", ("plan.json",), ("show", "plan.json")),
    Attack("show dense", _DENSE, ("show", "dense", "--json")),
    Attack("show artifacts", _ARTIFACTS, ("show", "artifacts")),
    Attack("show slim", (*_SLIM, "slim/verify.json"), ("show", "slim"), (0, 1, 2), "slim"),
    Attack("verify slim", _SLIM, ("verify", "slim", *_MODEL), (0, 1, 2), "slim"),
    Attack("verify graph", _ONNX, ("verify", "graph", *_MODEL), (0, 1, 2), "graph"),
    Attack("verify", (*_SLIM, "slim/manifest.json"), ("verify", "slim", *_MODEL), (0, 1, 2)),
)


def make_workplace(root: Path) -> None:
    """A dense model in two files, artifacts, a scenario, a plan, and exports of it in two forms."""
    dense = make_checkpoint(
        root,
        "llama",
        kv_heads=2,
        query_heads=4,
        layers=2,
        hidden=16,
        head_dim=16,
        channels=24,
        shards=2,
    )
    source = open_source(dense, "org/model")
    layers = random_layers(shape_of(dense), 0)
    plan = fuzz_seeds.plan(source.fingerprint, layers=layers)
    (root / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    (root / "s.jsonl").write_text('{"prompt": "What is an acid?"}\n{"text": "And a base?"}\n')
    (root / "artifacts").mkdir()
    write_artifacts(fuzz_seeds.artifacts(source.shape, source.fingerprint), root / "artifacts")
    for name, onnx in (("slim", None), ("graph", OnnxOptions())):
        request = {**format_options(onnx)}
        spp_export.export(output=root / name, model=str(dense), plan=root / "plan.json", **request)


class Workplace:
    """A copy of the files that commands may read, in which one file is damaged at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = self._files()

    def attack(self, attack: Attack, number: int, tally: Tally) -> None:
        """Damage a file, run the command in the workplace, judge it, and put all in order."""
        rng = Random(f"{attack.name}/{number}")
        victim = rng.choice(attack.victims)
        place = self.root / victim
        seed, data = place.read_bytes(), place.read_bytes()
        for _ in range(rng.choice((1, 1, 1, 2))):
            data = mutation_of(place.name)(rng, data, [seed])
        manifest = self.root / attack.seals / "manifest.json"
        promised = manifest.read_bytes() if attack.seals else b""
        place.write_bytes(data)
        if attack.seals:
            manifest.unlink()
            write_manifest(manifest.parent)
        start = time.perf_counter()
        status, problem = self._run(attack)
        tally.slowest = max(tally.slowest, time.perf_counter() - start)
        place.write_bytes(seed)
        if attack.seals:
            manifest.write_bytes(promised)
        if (self.root / OUT).exists() and not problem:
            if status or "--dry-run" in attack.arguments:
                problem = f"status {status} left an output"
            shutil.rmtree(self.root / OUT)
        if left := self._files() ^ self.files:
            problem = problem or f"status {status} left {sorted(left)[:3]}"
        tally.outcomes["FOUND" if problem else f"exit {status}"] += 1
        if problem:
            entry, _, name = victim.rpartition("/")
            tally.findings.append(Finding(attack.name, number, entry, name, data, problem))

    def _run(self, attack: Attack) -> tuple[int, str]:
        """The exit status, and what is wrong with what was said."""
        stdout, stderr = io.StringIO(), io.StringIO()
        here = Path.cwd()
        os.chdir(self.root)
        try:
            with redirect_stdout(stdout), redirect_stderr(stderr), alarm(SECONDS_PER_COMMAND):
                status = run(attack.arguments)
        except (Exception, HangError, SystemExit) as error:
            return -1, f"{type(error).__name__}: {error}"
        finally:
            os.chdir(here)
        said = stderr.getvalue().splitlines()
        errors = [line for line in said if line.startswith("error: ")]
        if status not in attack.statuses or len(errors) != bool(status):
            return status, f"status {status}, said {said}"
        if status and (said[-1:] != errors or "internal error" in errors[0]):
            return status, f"status {status}, said {said}"
        try:
            for line in said:
                check_line(line)
        except AssertionError as problem:
            return status, str(problem)
        return status, ""

    def _files(self) -> set[str]:
        return {os.path.join(at, name) for at, _, names in os.walk(self.root) for name in names}


def attacks(root: Path, rounds: int, names: Sequence[str] = ()) -> list[Tally]:
    """Every attack `rounds` times, in the workplace at `root`."""
    place = Workplace(root)
    tallies = []
    for attack in ATTACKS:
        if names and attack.name not in names:
            continue
        tally = Tally(attack.name, Counter())
        for number in range(rounds):
            place.attack(attack, number, tally)
        tallies.append(tally)
    return tallies

"""What learning from the dense model is worth: `python -m spp_campaigns.distillation --model demo`.

Exports a scenario at several sizes and trains each export with several seeds, always for the same
number of steps: on the dense model's answers to the prompts of a pool, and on the text of these
prompts. Distances are measured on answers to the pool's validation prompts, on which nothing was
chosen or trained.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import spp_export
from spp_campaigns.command import finish, machine, parser, scratch, table
from spp_export.calibration.answers import Answering, read_traffic
from spp_export.common.errors import QualityError
from spp_export.common.options import DEFAULT_CALIBRATION_TOKENS
from spp_export.data.scenario import read_scenario
from spp_export.evaluation.quality import Quality, measure_quality
from spp_export.formats.safetensors.verify import RECOVERY_NAME
from spp_export.models.loader import load_slim
from spp_export.models.session import open_session

_COLUMNS = {
    "keep": "{keep:.0%}",
    "learns": "{learn}",
    "trains": "{train}",
    "seed": "{seed}",
    "KL before": "{before[mean_kl]:.3f}",
    "KL after": "{after[mean_kl]:.3f}",
    "same token before": "{before[top1]:.1%}",
    "same token after": "{after[top1]:.1%}",
    "s": "{seconds:.0f}",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if learning from answers does not bring a model nearer to the dense
    one."""
    made = parser(__doc__, writes=True)
    made.add_argument("--model", default="demo", help="directory or demo")
    made.add_argument("--artifacts", help="artifacts of the model; not needed for demo")
    made.add_argument("--scenario", required=True, help="scenario file")
    made.add_argument("--data", required=True, help="prompts to train on")
    made.add_argument("--validation", required=True, help="prompts to measure on")
    made.add_argument("--keep", type=float, action="append", help="share of parameters; repeatable")
    made.add_argument("--units", default="both", help="heads, channels or both")
    made.add_argument("--learn", action="append", help="answers, text; repeatable")
    made.add_argument("--train", default="adapters", help="adapters or weights")
    made.add_argument("--seeds", type=int, default=1, help="number of seeds")
    made.add_argument("--steps", type=int, default=200, help="steps of the optimiser")
    options = made.parse_args(arguments)
    with scratch(options) as place:
        rows = [
            row for keep in options.keep or (0.8,) for row in _of_size(keep, options, Path(place))
        ]
    document = {
        "machine": machine(),
        "model": options.model,
        "scenario": Path(options.scenario).stem,
        "units": options.units,
        "prompts": len(read_scenario(options.data).conversations),
        "steps": options.steps,
        "rows": rows,
    }
    title = f"{options.model}, {options.units}, {document['scenario']}, {options.steps} steps"
    finish(options, document, title, table(_COLUMNS, rows))
    learnt = [row for row in rows if row["learn"] == "answers"]
    return int(any(row["after"]["mean_kl"] >= row["before"]["mean_kl"] for row in learnt))


def _of_size(keep: float, options: argparse.Namespace, place: Path) -> list[dict[str, Any]]:
    slim = place / f"slim-{keep}"
    spp_export.export(
        options.scenario,
        slim,
        model=options.model,
        artifacts=options.artifacts,
        keep=keep,
        units=options.units,
        verify=False,
    )
    before = _judged(slim, options)
    return [
        {"keep": keep, **_row(slim, learn, seed, before, options)}
        for learn in options.learn or ("answers",)
        for seed in range(options.seeds)
    ]


def _row(
    slim: Path, learn: Any, seed: int, before: Quality, options: argparse.Namespace
) -> dict[str, Any]:
    """One training run. A result that is worse by its own measure is kept as well, and judged like
    the others."""
    target = slim.with_name(f"{slim.name}-{learn}-{seed}")
    began = time.perf_counter()
    with contextlib.suppress(QualityError):
        spp_export.recover(
            slim,
            options.data,
            target,
            model=options.model,
            validation=options.validation,
            learn=learn,
            train=options.train,
            steps=options.steps,
            seed=seed,
            keep_failed=True,
        )
    seconds = time.perf_counter() - began
    after = _judged(target, options)
    return {
        "learn": learn,
        "train": options.train,
        "seed": seed,
        "steps": json.loads((target / RECOVERY_NAME).read_text())["steps"],
        "before": before.to_dict(),
        "after": after.to_dict(),
        "seconds": round(seconds, 1),
    }


def _judged(directory: Path, options: argparse.Namespace) -> Quality:
    """Distances on answers to the validation prompts, which come from the cache after the first
    time."""
    session = open_session(options.model)
    prompts = read_scenario(options.validation).conversations
    answers = read_traffic(session, prompts, DEFAULT_CALIBRATION_TOKENS, Answering()).texts
    found = measure_quality(session.model, load_slim(directory), session.tokenizer, answers)
    assert found is not None
    return found


if __name__ == "__main__":
    raise SystemExit(main())

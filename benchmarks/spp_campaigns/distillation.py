"""What learning from the dense model is worth: `python -m spp_campaigns.distillation --model demo`.

Exports a scenario at several sizes and trains each export: its layers, once, each by itself; and
with several seeds the whole model for some number of steps, on the dense model's answers to the
prompts of a pool, or on the text of these prompts. Distances are measured on answers to the pool's
validation prompts, on which nothing was chosen or trained, and to prompts of another pool.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
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

# By the name of a row: what `spp recover` is asked for.
_WAYS: Mapping[str, Mapping[str, Any]] = {
    "layers": {"learn": "answers", "steps": 0},
    "layers, answers": {"learn": "answers", "layer_rounds": 0},
    "answers": {"learn": "answers", "layer_rounds": 0},
    "text": {"learn": "text"},
}
# Goes on where another way ended.
_AFTER = {"layers, answers": "layers"}
_COLUMNS = {
    "keep": "{keep:.0%}",
    "learns": "{learn}",
    "seed": "{seed}",
    "KL before": "{before[mean_kl]:.3f}",
    "KL after": "{after[mean_kl]:.3f}",
    "same token before": "{before[top1]:.1%}",
    "same token after": "{after[top1]:.1%}",
    "KL outside before": "{outside_before[mean_kl]:.3f}",
    "KL outside after": "{outside[mean_kl]:.3f}",
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
    made.add_argument("--outside", required=True, help="prompts of another pool to measure on")
    made.add_argument("--keep", type=float, action="append", help="share of parameters; repeatable")
    made.add_argument("--units", default="both", help="heads, channels or both")
    made.add_argument("--learn", action="append", choices=_WAYS, help="a way; repeatable")
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
    learnt = [row for row in rows if row["learn"] != "text"]
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
    before, outside = (_judged(slim, prompts, options) for prompts in _measured(options))
    known = {"before": before.to_dict(), "outside_before": outside.to_dict()}
    return [{"keep": keep, **known, **row} for row in _trained(slim, options)]


def _trained(slim: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each way and seed; what a way goes on from is made once, with the first seed."""
    asked = set(options.learn or _WAYS)
    made = asked | {_AFTER[learn] for learn in asked & _AFTER.keys()}
    ended: dict[str, tuple[Path, float]] = {}
    for learn in filter(made.__contains__, _WAYS):
        for seed in range(1 if learn in _AFTER.values() else options.seeds):
            begin, spent = ended.get(_AFTER.get(learn, ""), (slim, 0.0))
            row, target = _row(begin, learn, seed, spent, options)
            ended[learn] = target, row["seconds"]
            if learn in asked:
                yield row


def _measured(options: argparse.Namespace) -> tuple[str, str]:
    return options.validation, options.outside


def _row(
    slim: Path, learn: str, seed: int, spent: float, options: argparse.Namespace
) -> tuple[dict[str, Any], Path]:
    """One training run, after others that took so many seconds, and what it wrote. A result that is
    worse by its own measure is kept as well, and judged like the others."""
    target = slim.with_name(f"{slim.name}-{learn.replace(', ', '-')}-{seed}")
    asked = {"train": "weights", "steps": options.steps, **_WAYS[learn]}
    began = time.perf_counter()
    with contextlib.suppress(QualityError):
        spp_export.recover(
            slim,
            options.data,
            target,
            model=options.model,
            artifacts=options.artifacts,
            validation=options.validation,
            seed=seed,
            keep_failed=True,
            **asked,
        )
    seconds = spent + time.perf_counter() - began
    after, outside = (_judged(target, prompts, options) for prompts in _measured(options))
    record = json.loads((target / RECOVERY_NAME).read_text())
    row = {
        "learn": learn,
        "seed": seed,
        "steps": record["steps"],
        **({"layers": record["layers"]} if "layers" in record else {}),
        "after": after.to_dict(),
        "outside": outside.to_dict(),
        "seconds": round(seconds, 1),
    }
    return row, target


def _judged(directory: Path, prompts: str, options: argparse.Namespace) -> Quality:
    """Distances on answers to prompts, which come from the cache after the first time."""
    session = open_session(options.model)
    conversations = read_scenario(prompts).conversations
    answers = read_traffic(session, conversations, DEFAULT_CALIBRATION_TOKENS, Answering()).texts
    found = measure_quality(session.model, load_slim(directory), session.tokenizer, answers)
    assert found is not None
    return found


if __name__ == "__main__":
    raise SystemExit(main())

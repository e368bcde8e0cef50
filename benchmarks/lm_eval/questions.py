"""The multiple-choice turns of the evaluation sets, as lm-evaluation-harness wants them.

The harness calls `load` through the task's `custom_dataset`. A `data_files` path would be resolved
against the working directory; this one is found from where this file is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset

EVAL = Path(__file__).resolve().parents[1] / "data" / "eval"
_OPTION = re.compile(r"\n([A-D])\) (.+)")


def load(only: str | None = None, **_: object) -> dict[str, Dataset]:
    """The split `test`: question, options, index of the right one, domain and set of each turn.

    `only` keeps one file or one folder of the sets, by name, such as "chemistry"; ValueError if
    there is none. Other keywords, which the harness passes to every task, are not used.
    """
    paths = [path for path in sorted(EVAL.glob("*/*.json")) if only in (None, *_names(path))]
    if not paths:
        raise ValueError(f"no evaluation set named {only!r} in {EVAL.name}.")
    return {"test": Dataset.from_list([entry for path in paths for entry in _questions(path)])}


def _names(path: Path) -> tuple[str, str]:
    return path.stem, path.parent.name


def _questions(path: Path) -> Iterator[dict[str, object]]:
    domain, category = _names(path)
    for scenario in json.loads(path.read_text(encoding="utf-8")):
        for turn in scenario["turns"]:
            if turn["task_type"] == "multiple_choice":
                options = dict(_OPTION.findall(turn["prompt"]))
                yield {
                    "question": turn["prompt"].partition("\nA) ")[0],
                    "options": list(options.values()),
                    "right": list(options).index(turn["answer"][0]),
                    "domain": domain,
                    "category": category,
                }

"""Tiny checkpoints whose tokenizers merge something, which llama.cpp insists on."""

from __future__ import annotations

import json
from pathlib import Path

from factories import CASES

CASE = {case.name: case for case in CASES}
# The ids that the tiny tokenizer leaves free.
MERGES = {260: ("e", "r"), 261: ("t", "h"), 262: ("th", "er")}
# What has no sliding window and no biases beside norms of q and k.
FAMILIES = (
    "llama-mha-tied",
    "llama-gqa-bias",
    "llama-mqa",
    "mistral-gqa",
    "qwen2-gqa-tied",
    "qwen3-gqa-tied",
)


def add_merges(directory: Path) -> Path:
    """Three merges for a directory's tokenizer.json."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    for index, (left, right) in MERGES.items():
        content["model"]["vocab"][left + right] = index
        content["model"]["merges"].append([left, right])
    path.write_text(json.dumps(content))
    return directory


def make(name: str, tmp_path: Path, **options: object) -> Path:
    """A case's dense checkpoint."""
    return add_merges(CASE[name].make(tmp_path, **options))

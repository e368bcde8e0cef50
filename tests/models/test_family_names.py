"""Names of families are in their records: other code asks the record, and names none."""

from __future__ import annotations

import ast
from pathlib import Path

import spp_export
from spp_export.models.families import known_types

ROOT = Path(spp_export.__file__).parent
# Where the same words are another's names: architectures and tokenizers of llama.cpp, engines of
# GGUF by these, methods of quantisation, and the config.json of the default model.
OTHERS = {
    "formats/gguf/architecture.py",
    "formats/gguf/engines.py",
    "formats/gguf/tensors.py",
    "formats/gguf/tokenizer.py",
    "models/quantised.py",
    "models/hub.py",
}


def named(file: Path) -> set[str]:
    """The families that are string constants of a module."""
    constants = (
        node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)
    )
    return {node.value for node in constants if node.value in known_types()}


def test_no_other_code_names_a_family() -> None:
    found = {
        str(file.relative_to(ROOT)): names
        for file in sorted(ROOT.rglob("*.py"))
        if "families" not in file.parts and (names := named(file))
    }
    assert found.keys() == OTHERS, found

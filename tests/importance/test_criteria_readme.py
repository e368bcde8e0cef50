"""The README of the criteria: its example runs as it stands, its table says what the code does."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

import spp_export.importance as importance
from spp_export.calibration.statistics import LayerStatistics, LayerWeights
from spp_export.importance import CRITERIA
from spp_export.importance.base import Need

README = (Path(importance.__file__).parent / "README.md").read_text(encoding="utf-8")


def test_the_example_is_a_criterion_after_one_file_and_one_line(tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in block.splitlines() if line]) <= 10
    (file,) = re.findall(r"for instance `(\w+)\.py`", README)
    (line,) = re.findall(r'among `FILES`: `"(\w+)",`', README)
    assert line == file
    (tmp_path / f"{file}.py").write_text(block)
    monkeypatch.setattr(importance, "__path__", [*importance.__path__, str(tmp_path)])
    try:
        found = importance.registry((*importance.FILES, line))
    finally:
        sys.modules.pop(f"spp_export.importance.{file}", None)
        vars(importance).pop(file, None)
    assert list(found) == [*CRITERIA, file]
    # three heads of two columns each, four channels
    shapes = [(6, 2), (6, 2), (6, 2), (2, 6), (4, 2), (4, 2), (2, 4)]
    weights = LayerWeights(*(np.arange(a * b).reshape(a, b) - 3.0 for a, b in shapes))
    layer = LayerStatistics(layer=0, heads=3, groups=3, weights=weights)
    np.testing.assert_array_equal(found[file].heads(layer), [12, 12, 18])
    np.testing.assert_array_equal(found[file].channels(layer), [4, 4, 4, 4])


def test_the_table_lists_every_criterion_as_it_is():
    rows = re.findall(r"^\| `(.+?)` \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", README, re.MULTILINE)
    assert [row[0] for row in rows] == list(CRITERIA)
    for name, source, convention, needs, across in rows:
        criterion = CRITERIA[name]
        assert source == criterion.source
        assert convention == criterion.convention
        assert across == criterion.comparable
        wanted = set() if needs == "nothing" else {Need(need) for need in needs.split(", ")}
        assert wanted == criterion.needs


@pytest.mark.parametrize("name", CRITERIA)
def test_names_are_the_file_names(name):
    assert name.replace("-", "_") in importance.FILES

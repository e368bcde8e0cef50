"""`probe --add-domain`: artifacts with one domain more, from those that there are."""

from __future__ import annotations

import numpy as np
import pytest
from exporting import ALPHABETS, refused, texts, write_texts

import spp_export
from spp_export.common.errors import ScenarioError, UsageError
from spp_export.data.artifacts import read_artifacts

NAME = "llama-gqa-bias"
DOMAINS = tuple(ALPHABETS)


def own(count, seed=0):
    """Texts of letters that no other domain has."""
    generator = np.random.default_rng(seed)
    letters = list("§¶+*#~")
    return ["".join(generator.choice(letters, 40)) for _ in range(count)]


def add(workshop, tmp_path, file, name="signs", **request):
    return spp_export.probe(
        add_domain={name: file},
        artifacts=workshop.artifacts(NAME),
        output=tmp_path / "more",
        model=str(workshop.dense(NAME)),
        **request,
    )


def test_a_domain_is_added_and_recognised(workshop, tmp_path):
    base = read_artifacts(workshop.artifacts(NAME))
    file = write_texts(tmp_path / "signs.txt", own(24))
    made = add(workshop, tmp_path, file)
    assert made.domains == (*base.domains, "signs")
    assert set(made.importance) == set(base.importance)
    kept = dict.fromkeys(made.domains, 0)
    for domain, _ in made.calibration:
        kept[domain] += 1
    assert kept["signs"] == 18
    before = sum(domain == DOMAINS[0] for domain, _ in base.calibration)
    assert kept[DOMAINS[0]] == before - before // 4
    assert not {text for _, text in made.calibration} - {
        *own(24),
        *(text for _, text in base.calibration),
    }
    unseen = write_texts(tmp_path / "unseen.txt", own(6, seed=5))
    options = {"model": str(workshop.dense(NAME)), "artifacts": tmp_path / "more"}
    found = spp_export.diagnose(unseen, **options)
    assert max(found.shares, key=found.shares.get) == "signs"
    known = write_texts(tmp_path / "known.txt", texts(DOMAINS[1], 6, 77))
    found = spp_export.diagnose(known, **options)
    assert max(found.shares, key=found.shares.get) == DOMAINS[1]


@pytest.mark.parametrize(
    ("name", "count", "match"),
    [
        (DOMAINS[0], 24, f"--add-domain {DOMAINS[0]}: the artifacts know it; they know"),
        ("signs", 7, "domain signs: has 7 texts, expected at least 8"),
    ],
)
def test_what_cannot_be_added_is_refused(workshop, tmp_path, name, count, match):
    file = write_texts(tmp_path / "signs.txt", own(count))
    with refused(ScenarioError, match):
        add(workshop, tmp_path, file, name)
    assert not (tmp_path / "more").exists()


def test_a_text_of_another_domain_is_refused(workshop, tmp_path):
    base = read_artifacts(workshop.artifacts(NAME))
    file = write_texts(tmp_path / "signs.txt", [*own(10), base.calibration[0][1]])
    with refused(ScenarioError, "repeats"):
        add(workshop, tmp_path, file)


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        ({}, "probe needs --pools DIR, or --add-domain NAME=FILE"),
        ({"pools": "p", "add_domain": {"a": "b"}}, "probe needs --pools DIR, or --add-domain"),
        ({"add_domain": {"a": "b"}, "domains": ("a",)}, "--domains chooses among --pools"),
        ({"add_domain": {"a": "b"}, "select": 2}, "--select chooses among --pools"),
        ({"pools": "p", "artifacts": "a"}, "--artifacts are what --add-domain adds to"),
    ],
)
def test_what_does_not_go_together(request_, match):
    with refused(UsageError, match):
        spp_export.probe(output="x", **request_)
    with refused(UsageError, "-o is missing"):
        spp_export.probe("pools")

"""What plan, card and report tell of a family, in sentences that are English."""

from __future__ import annotations

import re

import pytest

from spp_export.models.families import FAMILIES, Family

WITH_MIXERS = [family for family in FAMILIES.values() if family.mixers]


@pytest.mark.parametrize("family", WITH_MIXERS, ids=lambda family: family.model_type)
def test_what_stays_is_a_plural_as_its_verb_is(family: Family) -> None:
    """'layers of lightning attention stay', not 'lightning attention stay'."""
    assert family.mixers is not None
    (told,) = (remark for remark in family.remarks if remark.endswith(" stay as they are"))
    subject = told.removesuffix(" stay as they are")
    assert subject == family.mixers.name
    noun = re.split(r" of | beside | \(|, ", subject)[0]
    assert noun.endswith("s"), f"{noun!r} is no plural"

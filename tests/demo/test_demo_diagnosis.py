"""What the default model's probes say of scenarios of a few short prompts, as users begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from spp_export.data.artifacts import bundled_artifacts, read_artifacts
from spp_export.data.scenario import Scenario, read_scenario
from spp_export.domains.diagnosis import Diagnosis, diagnose_prompts, diagnose_scenario
from spp_export.models.hub import DEMO
from spp_export.models.session import open_session

pytestmark = pytest.mark.demo
ROOT = Path(__file__).parents[2]

SHORT = {
    "chemistry": ["Why does salt dissolve in water?", "What is an acid?", "Balance H2 + O2."],
    "history": [
        "Who was Julius Caesar?",
        "Why did Rome fall?",
        "When did the Thirty Years' War end?",
    ],
    "math": ["What is the derivative of x squared?", "Is 91 a prime?", "Solve 3x + 4 = 19."],
}
OTHER = {
    "German": [
        "Wie komme ich am schnellsten vom Bahnhof zum Flughafen?",
        "Schreib mir bitte eine kurze Einladung zum Geburtstag.",
        "Was soll ich heute Abend kochen, wenn ich nur Nudeln habe?",
    ],
    "code": [
        "for (int i = 0; i < n; ++i) { sum += a[i]; }",
        "def f(x): return [y for y in x if y is not None]",
        "SELECT id, name FROM users WHERE age > 30 ORDER BY name;",
    ],
    "logs": [
        "2026-03-01T10:00:01Z ERROR worker[17]: connection reset by peer",
        "2026-03-01T10:00:07Z WARN http: GET /health 503 0.002s",
        "2026-03-01T10:01:12Z INFO queue: 412 jobs pending, 0 failed",
    ],
}


@pytest.fixture(scope="module")
def diagnose():
    session, artifacts = open_session(DEMO), read_artifacts(bundled_artifacts())

    def diagnose(text: Scenario | list[str]) -> Diagnosis:
        if isinstance(text, Scenario):
            return diagnose_scenario(session, artifacts, text)
        return diagnose_prompts(session, artifacts, text)

    return diagnose


@pytest.mark.parametrize("domain", ["chemistry", "history"])
def test_the_examples_are_known_text_of_their_domain(diagnose, domain):
    found = diagnose(read_scenario(ROOT / "examples" / f"{domain}.txt"))
    assert not found.unfamiliar
    assert max(found.shares, key=found.shares.get) == domain
    assert found.shares[domain] > 0.5


@pytest.mark.parametrize("domain", SHORT)
def test_short_questions_are_known_text_of_their_domain(diagnose, domain):
    found = diagnose(SHORT[domain])
    assert not found.unfamiliar
    assert max(found.shares, key=found.shares.get) == domain


@pytest.mark.parametrize("kind", OTHER)
def test_short_text_of_another_kind_is_not(diagnose, kind):
    assert diagnose(OTHER[kind]).unfamiliar

"""Names from outside are text: to the terminal, to Markdown, to YAML."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import pytest
import yaml
from rich.console import Console

from spp_cli.main import run
from spp_cli.render.look import UNICODE
from spp_cli.render.reports import diagnosis_report, shown_report
from spp_export.commands.show import show
from spp_export.formats.card import model_card, onnx_card
from spp_export.models.hub import model_license
from spp_export.models.shape import ModelShape
from spp_export.planning import LayerPlan, Plan
from spp_export.planning.bound import predicted

NAMES = {
    "front matter": "x\n---\nlicense: evil\n---\n# Owned",
    "html": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "entity": "&lt;script&gt; &#x41;",
    "link": "[click](javascript:alert(1)) ![pixel](http://evil.example/x.png)",
    "autolink": "http://evil.example www.evil.example <https://evil.example>",
    "table": "a | b |\n|---|---|\n| c",
    "emphasis": "**bold** __bold__ ~~gone~~ $$x^2$$ `code`",
    "fence": "x\n```\nrm -rf\n```",
    "heading": "# heading\n## another\n=====",
    "quotes": "\"double\" 'single' \\ back",
    "yaml": "!!python/object/apply:os.system [id] & *anchor {a: b} # note %tag",
    "terminal": "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b2J \r over \x08\x08 \x7f",
    "bidi": "\u202efdp.exe\u2066 \u200b zero",
    "separators": "a\u2028b\u2029c\u0085d\ve\ff",
    "astral": "\U0001f600 \U00020000 é 酸",
    "surrogate": "half \ud800 pair",
    "rich": "[red]x[/red] [link=http://evil.example]y[/link] :skull:",
    "list": "- item\n1. item",
    "mention": "@someone #1 owner/repo#2",
}
SHAPE = ModelShape(
    model_type="llama",
    num_layers=1,
    hidden_size=8,
    query_heads=4,
    kv_heads=2,
    head_dim=2,
    channels=6,
    vocab_size=10,
    tied_embeddings=True,
    element_bytes=4,
)
ACTIVE = re.compile(r"(?<!\\)(?:\\\\)*[`*_\[\]<>|&~$@!]|(?<!\\)://")


def plan(name: str, model: str | None = None) -> Plan:
    return Plan(
        model_fingerprint="f" * 64,
        model_source=model or name,
        layout="uniform",
        compensation="none",
        layers=(LayerPlan((0,), (0, 1)),),
        scenario={"name": name, "sha256": "a" * 64},
        diagnosis={"mixture": {name: 1.0}, "breadth": 0.0, "regime": name},
    )


def cards(name: str) -> dict[str, str]:
    compiled = plan(name)
    sizes = predicted(SHAPE, compiled.written_shapes(SHAPE), SHAPE)
    report = {"checks": [{"name": "files", "passed": False, "detail": name}]}
    slim = (compiled, SHAPE, sizes)
    return {
        "slim": model_card(name, *slim, report, (), name),
        "graph": onnx_card(name, name, "gqa", report, (), name, slim),
        "converted": onnx_card(name, name, "gqa", report, (), name),
    }


def flat(name: str) -> str:
    """What a card may say of a name: one line of characters that show."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(name.split()))


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_the_front_matter_holds_the_name_and_nothing_of_it(name):
    for card in cards(name).values():
        card.encode()
        assert card.startswith("---\n")
        front, _, body = card.removeprefix("---\n").partition("\n---\n")
        values = yaml.safe_load(front)
        # No hub takes any of these names for the id of a model.
        assert list(values) == ["library_name", "license", "pipeline_tag", "tags"]
        assert values["license"] == flat(name)
        assert body.startswith("\n# ")


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_the_text_has_no_markup_of_the_names(name):
    """The same lines as for a harmless name, each without anything that Markdown reads."""
    for kind, card in cards(name).items():
        plain = cards("harmless")[kind]
        assert card.count("\n") == plain.count("\n")
        for line, harmless in zip(card.split("\n"), plain.split("\n"), strict=True):
            if line == harmless or line.startswith("license: "):
                continue
            if line.startswith("const generate"):  # within a block of code
                assert json.dumps(name) in line
                continue
            before, after = harmless.split("harmless", 1)[0], harmless.rsplit("harmless", 1)[1]
            assert line.startswith(before)
            assert line.endswith(after)
            assert not ACTIVE.search(line[len(before) : len(line) - len(after)]), line


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ('---\ntags: [x]\nlicense: "apache-2.0"\n---\nText', "apache-2.0"),
        ("# Title\n---\nlicense: evil\n---\n", None),
        ("---\nlicense: mit\n", None),
        ("---\ntags: x\n---\nlicense: evil\n---\n", None),
        ("---\nx:\n  license: nested\n---\n", None),
        ("---\nlicense:\n---\n", None),
        ("", None),
        ("---", None),
        (f"---\nlicense: {'x' * 3000}\n---\n", "x" * 100),
    ],
)
def test_the_license_is_the_metadatas(tmp_path, text, found):
    (tmp_path / "README.md").write_text(text)
    assert model_license(tmp_path) == found


def visible(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_errors_and_tables_show_what_steers_a_terminal(tmp_path, name, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    harmless = name.replace("\ud800", "?")
    path = tmp_path / "plan.json"
    path.write_text(plan(harmless, "org/model").to_json(), encoding="utf-8")
    assert run(["show", str(path)]) == 0
    shown = capsys.readouterr()
    without_colours = re.sub(r"\x1b\[[0-9;]*m", "", shown.out)
    assert visible(without_colours), without_colours
    assert "[red]" in without_colours or "[red]" not in name
    assert ":skull:" in without_colours or ":skull:" not in name
    assert run(["show", f"{tmp_path}/{name}"]) == 2
    path.write_text(plan(harmless).to_json(), encoding="utf-8")
    assert run(["show", str(path)]) in (0, 2)  # a model's name is one line of text, or refused
    said = capsys.readouterr().err
    assert said.count("\n") in (1, 2)
    assert visible(said)


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_reports_print_names_as_text(tmp_path, name):
    harmless = name.replace("\ud800", "?")
    layer = {"layer": 0, "probability": {harmless: 0.5}}
    found = {"mixture": {harmless: 1.0}, "breadth": 0.5, "regime": harmless, "layers": [layer]}
    path = tmp_path / "plan.json"
    path.write_text(plan(harmless, "org/model").to_json(), encoding="utf-8")
    shown = replace(show(path), problems=(f"{harmless}: missing",))
    for report in (diagnosis_report(found, UNICODE), shown_report(shown, UNICODE)):
        stream = io.StringIO()
        Console(file=stream, markup=False, emoji=False, highlight=False).print(report)
        assert visible(stream.getvalue())

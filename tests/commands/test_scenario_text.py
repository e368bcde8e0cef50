"""How much of a text commands read, what they say of it, and that no text judges itself."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from exporting import CASES, refused, texts, write_texts
from typer.testing import CliRunner

import spp_export
from spp_cli.main import app
from spp_export.common.errors import ScenarioError, UsageError

NAME = CASES[0].name
TEMPLATE = (
    "{% for m in messages %}({{ m['role'][0] }}){{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}(a){% endif %}"
)


def options(workshop):
    return {"model": str(workshop.dense(NAME)), "artifacts": workshop.artifacts(NAME)}


def plan(workshop, path, **more):
    return spp_export.plan(path, keep=0.7, answer_tokens=0, **options(workshop), **more)


@pytest.fixture
def long_text(workshop, tmp_path):
    """Four prompts, the first of which goes on in another domain for twenty windows."""
    other = " ".join(texts("capitals", 330, 5))
    prompts = texts("figures", 4, 9)
    return write_texts(tmp_path / "long.txt", [f"{prompts[0]} {other}", *prompts[1:]])


def test_what_comes_after_the_first_window_counts(workshop, long_text, tmp_path):
    short = write_texts(tmp_path / "short.txt", [long_text.read_text()[:500]])
    alike = write_texts(tmp_path / "alike.txt", [long_text.read_text().split("\n\n")[0]])
    of_short, of_long = (spp_export.diagnose(path, **options(workshop)) for path in (short, alike))
    domains = of_long.domains
    assert of_long.tokens["read"] == of_long.tokens["of"] == len(alike.read_bytes()) - 1
    assert domains[int(np.argmax(of_long.mixture))] == "capitals"
    assert of_long.q[domains.index("figures")] < of_short.q[domains.index("figures")]


def test_no_more_is_read_than_calibration_tokens(workshop, long_text, tmp_path):
    whole = plan(workshop, long_text).plan
    tokens = whole.scenario["tokens"]
    assert tokens["calibration"]["read"] == tokens["calibration"]["of"] > 10_000
    assert tokens["held_out"]["read"] == tokens["held_out"]["of"] > 0
    part = plan(workshop, long_text, calibration_tokens=1024, output=tmp_path / "plan.json").plan
    read = part.scenario["tokens"]["calibration"]
    assert read["of"] == tokens["calibration"]["of"]
    assert 512 <= read["read"] <= 1024
    assert part.calibration["calibration_tokens"] == 1024
    found = json.loads((tmp_path / "plan.json").read_text())["scenario"]["tokens"]
    assert found == part.scenario["tokens"]
    # What a plan was made from is what it is re-fitted on.
    again = spp_export.export(
        long_text, tmp_path / "out", plan=tmp_path / "plan.json", **options(workshop)
    )
    assert again.plan.scenario["tokens"]["calibration"] == read
    with refused(UsageError, "--calibration-tokens 100: expected a whole number of 512 or more"):
        plan(workshop, long_text, calibration_tokens=100)


@pytest.mark.parametrize("command", ["diagnose", "export"])
def test_the_summary_says_how_much_was_read(workshop, long_text, command):
    more = [] if command == "diagnose" else ["--dry-run"]
    model = ["--model", str(workshop.dense(NAME)), "--artifacts", str(workshop.artifacts(NAME))]
    arguments = [command, "--scenario", str(long_text), "--calibration-tokens", "1k", *model]
    found = CliRunner().invoke(app, [*arguments, *more])
    assert found.exit_code == 0, found.output
    (line,) = [line for line in found.stdout.splitlines() if "tokens" in line and "read" in line]
    assert " of " in line
    assert line.endswith("; --calibration-tokens reads more")
    assert command == "diagnose" or " held out" in line
    found = CliRunner().invoke(app, [*arguments, *more, "--json"])
    shown = json.loads(found.stdout)
    tokens = shown["tokens"] if command == "diagnose" else shown["scenario"]["tokens"]
    assert "read" in json.dumps(tokens)


@pytest.fixture(scope="module")
def chatting(workshop, tmp_path_factory):
    """The dense model with a chat template."""
    target = tmp_path_factory.mktemp("chatting") / "dense"
    shutil.copytree(workshop.dense(NAME), target)
    (target / "chat_template.jinja").write_text(TEMPLATE)
    return target


def log(path, count=8, seed=4):
    said = zip(texts("figures", count, seed), texts("figures", count, seed + 1), strict=True)
    path.write_text(
        "".join(
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": question},
                        {"role": "assistant", "content": answer},
                    ]
                }
            )
            + "\n"
            for question, answer in said
        )
    )
    return path


def test_a_chat_log_is_exported_through_the_chat_template(workshop, chatting, tmp_path):
    path = log(tmp_path / "log.jsonl")
    result = spp_export.export(
        path,
        tmp_path / "out",
        keep=0.7,
        model=str(chatting),
        artifacts=workshop.artifacts(NAME),
    )
    written = result.plan.scenario
    assert (written["prompts"], written["held_out"]) == (8, 2)
    lengths = [
        len("(u)(a)" + "".join(message["content"] for message in json.loads(line)["messages"]))
        for line in path.read_text().splitlines()
    ]
    held_out = lengths[3] + lengths[7]
    assert written["tokens"]["held_out"] == {"read": held_out, "of": held_out}
    assert written["tokens"]["calibration"]["of"] == sum(lengths) - held_out
    assert result.report["passed"]
    quality = result.report["quality"]
    answers = [json.loads(line)["messages"][1]["content"] for line in path.read_text().splitlines()]
    assert quality["tokens"] == len(answers[3]) + len(answers[7])
    assert quality["source"] == "answers to held-out prompts of the scenario"
    assert spp_export.verify(tmp_path / "out", model=str(chatting), scenario=path).passed


def test_text_that_does_not_fit_the_template_is_one_line(workshop, chatting, tmp_path):
    (chatting / "chat_template.jinja").write_text("{{ raise_exception('not like this') }}")
    try:
        with refused(ScenarioError, "does not fit the model's chat template .not like this"):
            spp_export.diagnose(
                log(tmp_path / "log.jsonl"),
                model=str(chatting),
                artifacts=workshop.artifacts(NAME),
            )
    finally:
        (chatting / "chat_template.jinja").write_text(TEMPLATE)


def recover(workshop, tmp_path, data, **more):
    exported = workshop.exported(NAME, "per-layer", "none")
    return spp_export.recover(
        exported.path, data, tmp_path / "r", model=str(exported.dense), steps=2, **more
    )


def test_recovery_is_not_measured_on_what_it_trains_on(workshop, tmp_path):
    prompts = texts("figures", 12, 31)
    data = write_texts(tmp_path / "data.txt", prompts)
    again = write_texts(
        tmp_path / "again.txt",
        [f"  {prompts[1]}\n{prompts[2]}", prompts[5].replace(" ", "\t"), *texts("small", 5, 1)],
    )
    with refused(UsageError, r"--validation again\.txt: 2 of its 7 texts are in --data data\.txt"):
        recover(workshop, tmp_path, data, validation=again)
    with refused(UsageError, "12 of its 12 texts"):
        recover(workshop, tmp_path, data, validation=data)


def test_recovery_needs_four_texts_that_are_not_alike(workshop, tmp_path):
    prompts = texts("figures", 3, 32)
    data = write_texts(tmp_path / "data.txt", [*prompts * 5, prompts[0].replace(" ", "  ")])
    with refused(UsageError, "holds 3 texts that are not alike, and it takes at least 4"):
        recover(workshop, tmp_path, data)
    assert not (tmp_path / "r").exists()


def test_all_of_a_text_is_trained_on_and_measured(workshop, tmp_path):
    long = [" ".join(texts("figures", 30, seed)) for seed in range(8)]
    result = recover(workshop, tmp_path, write_texts(tmp_path / "data.txt", long), keep_failed=True)
    there = len(long[3]) + len(long[7])
    assert result.measured == {"read": there, "of": there}
    assert result.to_dict()["measured"] == result.measured
    pieces = -(-len(long[3]) // 512) + -(-len(long[7]) // 512)
    assert result.before.tokens == there - pieces


def test_a_wrong_scenario_that_holds_what_is_judged_on_is_refused(workshop, tmp_path):
    own = texts("figures", 8, 55)
    scenario = write_texts(tmp_path / "own.txt", own)
    wrong = write_texts(tmp_path / "wrong.txt", [own[3], own[7], *texts("small", 6, 8)])
    with refused(UsageError, "2 of its 2 documents are among the prompts of --wrong wrong"):
        spp_export.evaluate(
            scenario, tmp_path / "out", wrong=wrong, keep=[0.7], **options(workshop)
        )

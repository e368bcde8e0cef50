"""Summaries against what a person would write by hand from the same result."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_results import DOMAINS, REPORT, diagnosis, export_result, model_shape, plan_result
from rich.console import Console

from spp_cli.output import Output
from spp_cli.render.look import ASCII, UNICODE
from spp_cli.render.reports import diagnosis_report, shown_report
from spp_cli.render.summary import export_summary, plan_summary, tensor_changes
from spp_export.calibration.stored import Kept
from spp_export.commands.show import Shown
from spp_export.planning.bound import predicted
from spp_export.planning.latency import LatencyTable, PredictedLatency


def text_of(renderable, width=100):
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    console.print(renderable)
    return "".join(line.rstrip() + "\n" for line in console.file.getvalue().splitlines())


@pytest.fixture
def summary():
    return text_of(export_summary(export_result(), UNICODE, 1_234_000_000))


def test_one_screen(summary):
    lines = summary.splitlines()
    assert len(lines) <= 48
    assert max(map(len, lines)) <= 100


def test_title_says_from_what_to_what(summary):
    assert summary.splitlines()[0] == (
        "SmolLM2-135M-Instruct → out/chemistry   per-layer layout, compensation lstsq, keep 0.8"
    )


@pytest.mark.parametrize(
    ("matmul", "said"), [("bfloat16", True), ("float32", False), (None, False)]
)
def test_the_title_says_what_was_calibrated_in_fewer_digits(matmul, said):
    result = export_result()
    plan = replace(result.plan, calibration={"matmul": matmul})
    title = text_of(export_summary(replace(result, plan=plan), UNICODE, 1), width=160)
    assert (", calibrated in bfloat16, keep 0.8" in title.splitlines()[0]) == said


def test_sizes_are_those_of_the_shape(summary):
    result = export_result()
    layers = result.plan.layer_shapes(result.shape)
    before, after = result.shape.parameters(result.shape.layers), result.shape.parameters(layers)
    kept = result.shape.head_parameters(layers)
    rows = {line[:19].strip(): line[19:].split() for line in summary.splitlines()}
    assert rows["parameters"] == [f"{before:,}", f"{after:,}", f"{1 - after / before:.1%}"]
    assert rows["of q, k, v, o"] == ["26,542,080", f"{kept:,}", f"{1 - kept / 26_542_080:.1%}"]
    assert rows["weights on disk"][:2] == ["538.1", "MB"]
    assert rows["KV cache per token"][:2] == ["46,080", "B"]


def test_mixture_is_sorted_with_breadth_and_regime(summary):
    found = diagnosis()
    ordered = sorted(zip(DOMAINS, found.mixture, strict=True), key=lambda item: -item[1])
    lines = summary.splitlines()[3:9]
    assert [line.split()[0] for line in lines] == [name for name, _ in ordered]
    assert f"{ordered[0][1]:.1%}" in lines[0]
    assert f"breadth {found.breadth:.2f}" in summary
    assert "in-domain" in summary


def test_checks_quality_engines_and_stages(summary):
    lines = summary.splitlines()
    assert "ok  logits parity with the masked dense model  found 1.9e-05, at most 0.00022" in lines
    assert "ok  keys, shapes, dtypes and finite values     272 tensors" in lines
    first = lines.index("quality: KL 0.043 [0.031, 0.056], same token 91.2% [88.0%, 94.0%]")
    assert lines[first + 1 : first + 4] == [
        "  perplexity 1.030 [1.010, 1.051] times, 18.20 dense, 18.75 slim",
        "  1,234 tokens: held-out text of the scenario; 95 % intervals in brackets",
        "  uncertain: measured on fewer than 2,000 tokens",
    ]
    assert any(line.startswith("transformers  yes  ") for line in lines)
    assert any(line.startswith("llama.cpp     no   ") for line in lines)
    assert lines[-1] == (
        "plan 3.2 s, compensate 41 s, slice 0.8 s, verify 2 min 5 s, peak memory 1.2 GB"
    )


def test_a_distance_that_users_notice_is_a_warning():
    far = REPORT["quality"] | {"tokens": 5000, "mean_kl": 0.6, "intervals": {}}
    text = text_of(export_summary(export_result(report=REPORT | {"quality": far}), UNICODE, 0))
    assert "quality: KL 0.600, same token 91.2%\n" in text
    assert "  answers will differ noticeably: the mean KL is 0.1 or more\n" in text
    assert "uncertain" not in text
    broken = far | {"mean_kl": None, "ratio": None, "slim_perplexity": None}
    text = text_of(export_summary(export_result(report=REPORT | {"quality": broken}), UNICODE, 0))
    assert "quality: KL not finite, same token 91.2%\n" in text
    assert "perplexity not finite times\n" in text
    assert "answers will differ noticeably" in text


def test_what_was_kept_is_said():
    assert "kept for later runs" not in text_of(export_summary(export_result(), UNICODE, 0))
    kept = Kept({Path("a"): 40_000_000, Path("b"): 283_000_000})
    text = text_of(export_summary(replace(export_result(), kept=kept), UNICODE, 0))
    assert "kept for later runs: 2 files of statistics, 323.0 MB (spp cache)\n" in text


def test_a_failed_check_shows_its_detail():
    failed = {"name": "prefix causality", "passed": False, "found": 3.0, "limit": 1e-5}
    report = REPORT | {"checks": [failed | {"detail": "prefix of 9 tokens"}]}
    text = text_of(export_summary(export_result(report=report), UNICODE, 0))
    assert "FAILED  prefix causality  found 3, at most 1e-05; prefix of 9 tokens\n" in text


@pytest.mark.parametrize(
    ("report", "line"),
    [
        (None, "not checked: --no-verify"),
        (
            REPORT | {"quality": None},
            "quality not measured: it takes held-out text, a scenario of at least four prompts",
        ),
    ],
)
def test_what_was_not_measured_is_said(report, line):
    text = text_of(export_summary(export_result(report=report), UNICODE, 0))
    assert line in text.splitlines()


def test_no_gain_is_said():
    shape = model_shape(vocab_size=10_000_000)
    text = text_of(plan_summary(plan_result(shape), "plan", UNICODE))
    assert "decode, batch 1 x 128 tokens   at best 1.00x  no gain possible here\n" in text


def test_a_uniform_plan_says_which_counts_there_were():
    result = plan_result()
    counts = {"realised": {"accepted_query_heads": [1, 2, 3, 4, 6, 9]}}
    uniform = replace(result, plan=replace(result.plan, layout="uniform", budget=counts))
    line = "query heads that the stock config accepts: 1, 2, 3, 4, 6, 9\n"
    assert line in text_of(plan_summary(uniform, "plan", UNICODE))
    assert line not in text_of(plan_summary(result, "plan", UNICODE))


def test_what_a_table_predicts_is_said():
    result = plan_result()
    table = LatencyTable("ab" * 32, {}, "decode", 1, 128, "cpu", "float32", {}, {}, 1.0)
    sizes = replace(result.predicted, latency=PredictedLatency(table, 12_500_000, 10_000_000))
    lines = text_of(plan_summary(replace(result, predicted=sizes), "plan", UNICODE)).splitlines()
    said = "decode, batch 1 x 128 tokens   12.500 ms dense, 10.000 ms slim (1.25x)"
    assert lines[lines.index(said) + 1] == "by the profile abababababab, cpu, float32"


def test_a_plan_has_no_verdict():
    text = text_of(plan_summary(plan_result(), "plan.json", UNICODE))
    assert "→ plan.json" in text
    assert "perplexity" not in text
    assert "parity" not in text


def test_a_hand_written_plan_needs_no_diagnosis():
    result = plan_result()
    bare = type(result.plan)("f" * 64, "model", "per-layer", "none", result.plan.layers)
    sizes = predicted(result.shape, bare.layer_shapes(result.shape))
    text = text_of(plan_summary(type(result)(bare, result.shape, None, sizes), "plan", UNICODE))
    assert "domains" not in text
    assert "query heads kept, by layer" in text


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_a_narrow_terminal_loses_nothing(width):
    look = replace(UNICODE, width=width)
    text = text_of(export_summary(export_result(), look, 0), width)
    assert max(map(len, text.splitlines())) <= width
    for head in range(9):
        assert f"  {head} " in text


def test_wide_models_show_counts_per_group():
    shape = model_shape(num_layers=48, query_heads=40, kv_heads=8, hidden_size=5120, head_dim=128)
    text = text_of(plan_summary(plan_result(shape), "plan", UNICODE))
    assert "query heads kept per KV group, by layer" in text
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) <= 48


def test_ascii_is_ascii():
    text = text_of(export_summary(export_result(), ASCII, 0))
    assert text.isascii()
    assert "SmolLM2-135M-Instruct -> out/chemistry" in text


def test_control_characters_never_reach_the_terminal():
    found = diagnosis(("chem\x1b[2Jistry", "math"))
    text = text_of(plan_summary(plan_result(found=found), "out\x1b]0;x", UNICODE))
    assert "\x1b" not in text


def test_tensor_changes_collapse_layers():
    tensors = [
        {"name": f"model.layers.{i}.self_attn.q_proj.weight", "dense": (8, 4), "slim": (n, 4)}
        for i, n in enumerate([4, 4, 2, 4, 6])
    ]
    assert text_of(tensor_changes(tensors, ASCII)).splitlines() == [
        "model.layers.{0-1,3}.self_attn.q_proj.weight   8 x 4 -> 4 x 4",
        "model.layers.2.self_attn.q_proj.weight         8 x 4 -> 2 x 4",
        "model.layers.4.self_attn.q_proj.weight         8 x 4 -> 6 x 4",
    ]


def test_layers_of_a_diagnosis():
    report = diagnosis(("history", "math")).to_dict(layers=True)
    text = text_of(diagnosis_report(report, UNICODE))
    assert report["layers"][-1]["layer"] == 29
    row = report["layers"][-1]["probability"]
    assert text.splitlines()[-1].split() == ["29", f"{row['history']:.3f}", f"{row['math']:.3f}"]


def axes_of(names):
    random = np.random.default_rng(0)
    angles = random.integers(10, 170, (len(names), len(names)))
    return {
        "layer": 22,
        "dimensions": 32,
        "variance": 0.734,
        "candidates": names,
        "selected": names[:2],
        "separation": dict.fromkeys(names, 2.5) | {names[-1]: None},
        "angles": ((angles + angles.T) / 2).tolist(),
    }


def test_axes_are_a_matrix_of_angles():
    names = ["chemistry", "math", "law\x1b[2J"]
    axes = axes_of(names)
    shown = Shown("artifacts", {"layers": 30, "axes": axes}, ())
    text = text_of(shown_report(shown, UNICODE))
    assert "axes of 32 dimensions at layer 22, 73% of the variance; 2 of 3 taken" in text
    lines = [line.split() for line in text.splitlines()]
    angle = f"{axes['angles'][1][0]:.0f}"
    assert ["2", "math", "2.5", angle, f"{axes['angles'][1][2]:.0f}"] in lines
    assert not any("\x1b" in word for line in lines for word in line)
    assert any(line[-3:-2] == ["-"] for line in lines)


def test_axes_of_many_domains_name_the_nearest():
    names = [f"domain{i}" for i in range(30)]
    axes = axes_of(names)
    text = text_of(shown_report(Shown("artifacts", {"axes": axes}), UNICODE))
    angles = axes["angles"][3]
    nearest = min((j for j in range(30) if j != 3), key=lambda j: angles[j])
    row = next(line for line in text.splitlines() if "domain3 " in line.split("2.5")[0])
    assert row.split() == ["4", "domain3", "2.5", names[nearest], f"{angles[nearest]:.0f}"]


def test_shown_facts_and_problems():
    shown = Shown(
        "plan", {"layers": 3, "query_heads": [9, 6], "asked": {"keep": 0.8}}, ("a: gone",)
    )
    assert text_of(shown_report(shown, UNICODE)).splitlines() == [
        "plan",
        "layers       3",
        "query heads  9 6",
        "asked        keep 0.8",
        "",
        "a: gone",
    ]


def test_numbers_that_json_cannot_hold_become_null(capsys):
    Output(json=True).result(lambda: {"found": [float("inf"), 1.5]}, lambda look: "")
    assert json.loads(capsys.readouterr().out) == {"found": [None, 1.5]}


def test_quiet_prints_the_essential_line_only(capsys):
    out = Output(quiet=True)
    out.result(dict, lambda look: "long", brief="out/chemistry")
    out.hint("spp verify")
    assert capsys.readouterr() == ("out/chemistry\n", "")


def test_json_hints_nothing(capsys):
    out = Output(json=True)
    out.result(lambda: {"a": 1}, lambda look: "long", brief="x")
    out.hint("spp verify")
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"a": 1}
    assert captured.err == ""

"""`spp report`: what is on the page, that nothing in a file can act on it, and its refusals."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from pages import FINGERPRINT, LAYERS, bench, plan, read, verdict, write_export

import spp_export
from spp_bench.schema import check
from spp_cli.main import run
from spp_export.common.errors import ArtifactsError, OutputError, PlanError, UsageError
from spp_export.data.artifacts import Artifacts, write_artifacts

pytestmark = pytest.mark.thinned(most=3)

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
DEMO_FINGERPRINT = json.loads(
    (RESULTS / "eval-chemistry" / "results.jsonl").read_text().partition("\n")[0]
)["model"]["fingerprint"]
NASTY = "</script><script>alert(1)</script><img src=x onerror=\"alert('2')\">&amp;'"
HOSTILE = f"{NASTY}\u202e"


@pytest.fixture
def out(tmp_path):
    return write_export(tmp_path / "out")


def page_of(path: Path, **options):
    return read(
        spp_export.report(path, output=path.parent / "page.html", force=True, **options).path
    )


def written(path: Path, document) -> Path:
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def plan_hash(directory: Path) -> str:
    return hashlib.sha256((directory / "plan.json").read_bytes()).hexdigest()


def sections(page) -> list[str]:
    return [section.attributes["id"] for section in page.all("section")]


def test_an_export_has_all_sections(out):
    result = spp_export.report(out)
    assert result.path == out.with_name("out.html")
    data = result.path.read_bytes()
    assert (result.bytes, result.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    page = read(result.path)
    expected = ["mixture", "savings", "heads", "channels", "checks", "quality", "benchmark"]
    expected += ["engines", "provenance"]
    assert sections(page) == list(result.sections) == expected
    assert set(result.missing) == {"quality", "benchmark"}
    assert page.one("h1").text == "out"
    assert page.one("p", class_="lead").text == (
        "org/model, cut for sums.txt: 9 of 16 query heads and 20 of 32 MLP channels stay, which "
        "takes 25\u00a0% off its parameters and 25\u00a0% off its KV cache; perplexity on held-out "
        "text is 1.05\u00d7 the dense model's, and every check passed."
    )


def test_ids_are_unique_and_name_what_exists(out, tmp_path):
    results = written(tmp_path / "bench.json", bench(plan_hash(out), (64, 128)))
    page = page_of(out, bench=results)
    ids = [one.attributes["id"] for one in page.elements if "id" in one.attributes]
    assert len(ids) == len(set(ids))
    for element in page.elements:
        assert element.attributes.get("aria-labelledby", ids[0]) in ids


def test_it_asks_the_network_for_nothing(out, tmp_path):
    results = written(tmp_path / "bench.json", bench(plan_hash(out), (64, 128)))
    page = page_of(out, bench=results)
    for element in page.elements:
        names = element.attributes.keys()
        assert not [name for name in names if name in ("src", "style") or name.startswith("on")]
    assert page.one("link").attributes["href"] == "data:,"
    text = (tmp_path / "page.html").read_text()
    assert "http://" not in text
    assert "https://" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_the_policy_allows_this_style_and_this_script_alone(out):
    page = page_of(out)
    policy = page.one("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"]
    assert "default-src 'none'" in policy
    for kind, name in (("style", "style"), ("script", "script")):
        digest = hashlib.sha256(page.one(name).text.encode()).digest()
        assert f"{kind}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert "unsafe" not in policy


def test_every_head_is_told(out):
    cells = page_of(out).all("rect", role="gridcell")
    heads = [cell for cell in cells if "query head" in cell.text]
    assert len(heads) == 16
    # A row per head, a column per layer.
    expected = [
        "kept"
        if head in layer["query_heads"]
        else ("removed" if head // 2 in layer["kv_heads"] else "gone")
        for head in range(4)
        for layer in LAYERS
    ]
    assert [cell.attributes["class"] for cell in heads] == expected
    assert heads[2].text == "Layer 2, query head 0\nKV group 0, removed with its whole KV group"
    assert [cell.attributes["tabindex"] for cell in heads] == ["0"] + ["-1"] * 15
    legend = read_legend(page_of(out))
    assert legend == ["kept 9", "removed 3", "removed with its KV group 4", "KV groups kept 6 of 8"]


def read_legend(page) -> list[str]:
    return [one.text for one in page.all("li") if re.match(r"(kept|removed|KV groups)", one.text)]


def test_channels_layer_by_layer(out):
    cells = page_of(out).all("rect", role="gridcell")
    channels = [cell.text for cell in cells if "channels" in cell.text]
    assert channels[1] == "Layer 1\n3 of 8 channels, 38\u00a0%"
    heights = [float(c.attributes["height"]) for c in cells if "channels" in c.text]
    assert np.allclose(np.array(heights) / heights[0], [1, 3 / 8, 1, 1 / 8], atol=1e-3)


def test_without_channels_removed_there_is_no_section_of_them(tmp_path):
    layers = [{**layer, "channels": None} for layer in LAYERS]
    assert "channels" not in sections(
        page_of(write_export(tmp_path / "o", plan=plan(layers=layers)))
    )


def test_savings_and_bounds(out):
    rows = {row.text for row in page_of(out).all("tr")}
    assert "Parameters1,000750\u221225.0\u00a0%" in rows
    assert "Bytes of weights4.0\u00a0kB3.0\u00a0kB\u221225.0\u00a0%" in rows
    assert "KV heads86\u221225.0\u00a0%" in rows
    assert "Decode at most, batch 1, context 1281.300\u00d7" in rows


def test_a_check_that_failed_is_said_so(tmp_path):
    checks = [{"name": "logits parity", "passed": False, "found": 0.1, "limit": 0.001}]
    page = page_of(write_export(tmp_path / "out", verify=verdict(passed=False, checks=checks)))
    assert "a check FAILED" in page.one("p", class_="lead").text
    assert "FAILEDlogits parity0.1000.00100" in {row.text for row in page.all("tr")}
    assert page.one("li", class_="bad").text == "Checks passed0 of 1against dense"


def test_a_report_that_says_passed_over_failed_checks_is_not_believed(tmp_path):
    checks = [{"name": "logits parity", "passed": False}]
    page = page_of(write_export(tmp_path / "out", verify=verdict(checks=checks)))
    assert "a check FAILED" in page.one("p", class_="lead").text


@pytest.mark.parametrize("content", [None, [1], {"passed": "yes"}])
def test_without_a_report_the_page_says_what_makes_one(tmp_path, content):
    out = write_export(tmp_path / "out", verify=content)
    assert spp_export.report(out).missing["checks"] == "spp verify out --model org/model"
    assert "passed" not in read(tmp_path / "out.html").one("p", class_="lead").text


def test_nothing_in_a_file_becomes_markup(tmp_path):
    document = plan(
        model={"fingerprint": NASTY, "source": NASTY},
        scenario={"name": HOSTILE, "sha256": HOSTILE},
        diagnosis={"mixture": {HOSTILE: 1.0}, "regime": HOSTILE},
        criterion={"name": HOSTILE, HOSTILE: HOSTILE},
        budget={"asked": {HOSTILE: HOSTILE}, "realised": {"kind": HOSTILE}},
        versions={HOSTILE: HOSTILE},
    )
    checks = [{"name": HOSTILE, "passed": True, "detail": HOSTILE}]
    files = {"files": {HOSTILE: {"bytes": 3, "sha256": HOSTILE}}}
    report = verdict(checks=checks, reference=HOSTILE, computed_in=HOSTILE)
    name = HOSTILE.replace("/", "")
    out = write_export(tmp_path / name, plan=document, verify=report, manifest=files)
    results = bench(plan_hash(out), (64, 128), name=HOSTILE)
    results["machine"]["cpu"] = HOSTILE
    results["problems"] = [HOSTILE]
    page = page_of(out, bench=written(tmp_path / "bench.json", results))
    assert len(page.all("script")) == 1
    assert not page.all("img")
    assert not [name for one in page.elements for name in one.attributes if name.startswith("on")]
    # The name is there to be read, but for the mark that would turn the line around.
    assert HOSTILE.replace("\u202e", "\ufffd") in page.one("p", class_="lead").text
    assert "\u202e" not in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("value", [None, True, [], "x", {"a": [1]}, 1e300, -1, {"dense": 0}])
def test_provenance_of_any_kind_is_survived(tmp_path, value):
    objects = ("scenario", "diagnosis", "calibration", "criterion", "budget", "predicted")
    inner = ("mixture", "breadth", "asked", "realised", "parameters", "kv_bytes_per_token", "name")
    document = plan(**{name: dict.fromkeys(inner, value) for name in objects})
    for name in ("checks", "quality", "quantisation", "reference"):
        out = write_export(tmp_path / name, plan=document, verify=verdict(**{name: value}))
        assert "provenance" in sections(page_of(out))


def test_long_names_are_cut(tmp_path):
    out = write_export(tmp_path / "out", plan=plan(scenario={"name": "x" * 100_000}))
    page_of(out)
    assert (tmp_path / "page.html").stat().st_size < 100_000


def test_a_plan_alone_has_the_sections_that_it_can(tmp_path):
    result = spp_export.report(written(tmp_path / "plan.json", plan()))
    assert result.path == tmp_path / "plan.html"
    assert result.missing == {}
    expected = ["mixture", "savings", "heads", "channels", "engines", "provenance"]
    assert sections(read(result.path)) == expected


def test_what_a_plan_alone_does_not_record_is_said(tmp_path):
    names = ("schema_version", "model", "layout", "compensation", "layers")
    bare = {name: plan()[name] for name in names}
    page = page_of(written(tmp_path / "plan.json", bare))
    heads = page.one("section", id="heads").text
    assert "How many heads the dense model has is not recorded" in heads
    assert read_legend(page) == ["kept 9", "removed", "KV groups kept 6"]
    assert "Query heads kept9of how many is not recorded" in {li.text for li in page.all("li")}
    rows = {row.text for row in page.all("tr")}
    assert not [row for row in rows if row.startswith(("Query heads", "KV heads", "MLP"))]
    assert "13not recorded" in rows  # channels of layer 1
    assert "is not recorded" in page.one("section", id="channels").text
    assert page.one("p", class_="lead").text == "org/model: 9 query heads stay."
    assert "names no diagnosis" in page.one("section", id="mixture").text


def test_the_slim_counts_of_a_uniform_export_are_not_taken_for_the_dense_models(tmp_path):
    layers = [{"kv_heads": [1], "query_heads": [2], "channels": [0, 7]}] * 4
    config = {"num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 2}
    document = plan(layers=layers, layout="uniform")
    page = page_of(write_export(tmp_path / "out", plan=document, config=config))
    assert read_legend(page) == ["kept 4", "removed", "KV groups kept 4"]
    assert page.one("p", class_="lead").text.startswith(
        "org/model, cut for sums.txt: 4 query heads and 8 MLP channels stay, which"
    )


def test_artifacts_record_query_heads_and_no_groups(tmp_path):
    artifacts = write_scores(tmp_path / "artifacts", np.ones((2, 4, 4)))
    page = page_of(written(tmp_path / "plan.json", plan()), artifacts=artifacts)
    assert read_legend(page) == ["kept 9", "removed 7", "KV groups kept 6"]
    heads = page.one("section", id="heads").text
    assert "How many KV heads the dense model has is not recorded" in heads


@pytest.mark.parametrize(
    "layer",
    [
        {"kv_heads": [0, 1], "query_heads": [0, 1]},
        {"kv_heads": [0], "query_heads": [0, 2]},
        {"kv_heads": [0], "query_heads": [0, 7]},
        {"kv_heads": [0, 5], "query_heads": [0, 1]},
    ],
)
def test_heads_that_are_in_no_group_are_refused(tmp_path, layer):
    out = write_export(
        tmp_path / "out", plan=plan(layers=[*LAYERS[:3], {**layer, "channels": None}])
    )
    with pytest.raises(PlanError, match=r"layer 3 .* not those of its KV groups"):
        page_of(out)


def test_channels_that_the_model_does_not_have_are_refused(tmp_path):
    layers = [*LAYERS[:3], {**LAYERS[3], "channels": [8]}]
    with pytest.raises(PlanError, match="keeps channel 8 of 8 channels"):
        page_of(write_export(tmp_path / "out", plan=plan(layers=layers)))


def test_more_heads_than_any_model_has_are_refused(tmp_path):
    layers = [{"kv_heads": [10**12], "query_heads": [10**12]}]
    with pytest.raises(PlanError, match="more than a page shows"):
        page_of(written(tmp_path / "plan.json", plan(layers=layers, predicted={})))


def write_scores(directory: Path, scores: np.ndarray, fingerprint: str = FINGERPRINT) -> Path:
    """Artifacts of two domains, four layers and four heads."""
    directory.mkdir()
    zeros = np.zeros((4, 2), dtype=np.float32)
    made = Artifacts(
        fingerprint=fingerprint,
        domains=("math", "law"),
        regimes=("in-domain",),
        weight=np.zeros((4, 2, 3), dtype=np.float32),
        bias=zeros,
        temperature=np.ones((1, 4), dtype=np.float32),
        axes=np.zeros((2, 3), dtype=np.float32),
        importance={"head/energy": scores.astype(np.float32)},
        whitelist=(),
        calibration=(),
        manifest={},
    )
    write_artifacts(made, directory)
    return directory


def test_scores_are_mixed_as_the_diagnosis_says(out, tmp_path):
    scores = np.random.default_rng(0).random((2, 4, 4))
    page = page_of(out, artifacts=write_scores(tmp_path / "artifacts", scores))
    # Half of the mixture of 3 to 1 is shrunk towards both domains alike.
    mixed = 0.625 * scores[0] + 0.375 * scores[1]
    (cell,) = [one for one in page.all("rect") if one.text.startswith("Layer 3, query head 1")]
    rank = 1 + int((mixed[3] > mixed[3, 1]).sum())
    nth = {1: "1st", 2: "2nd", 3: "3rd", 4: "4th"}[rank]
    assert cell.text.endswith(f"energy {mixed[3, 1]:.3f}, {nth} of 4 in its layer")
    words = page.one("section", id="heads").text
    assert "It did not decide: the plan chose by obs" in words
    assert "not the very artifacts" in words


def test_without_artifacts_of_the_model_no_score_is_shown(out):
    page = page_of(out)
    assert "No score per head is shown" in page.one("section", id="heads").text
    assert not [cell for cell in page.all("rect") if "in its layer" in cell.text]


def test_artifacts_of_another_model_are_refused(out, tmp_path):
    other = write_scores(tmp_path / "artifacts", np.ones((2, 4, 4)), "0" * 64)
    with pytest.raises(ArtifactsError, match="made for the model 0000000000000000"):
        page_of(out, artifacts=other)


def test_measurements_at_one_context(out, tmp_path):
    document = bench(plan_hash(out))
    check(document)
    page = page_of(out, bench=written(tmp_path / "bench.json", document))
    section = page.one("section", id="benchmark").text
    assert "out torch\n1.210\u00d7, from 1.170\u00d7 to 1.520\u00d7\nbound 1.550\u00d7" in section
    assert "out torchdecode112836.3 ms30.0 ms1.21\u00d71.55\u00d738\u00a0%" in section
    assert "Measured on Some CPU, cpu, float32, 2 threads, torch 2.13.0" in section
    tiles = [tile.text for tile in page.all("li")]
    assert "Decode speed1.21\u00d7of 1.55\u00d7 possible" in tiles


def test_measurements_over_context_are_curves_with_their_bound(out, tmp_path):
    document = bench(plan_hash(out), (128, 1024))
    check(document)
    page = page_of(out, bench=written(tmp_path / "bench.json", document))
    titles = [one.text for one in page.all("title")]
    assert "out torch\n1024 tokens: 1.310\u00d7\nfrom 1.170 to 1.520" in titles
    assert "out torch: bound\n128 tokens: 1.550\u00d7" in titles
    # Weights and cache: 3 MB and 192 bytes for each of 1024 tokens.
    assert "dense torch\n1024 tokens: 3.197 MB" in titles
    lines = lines_of(page, "hue0")
    dashed = [line for line in lines if "stroke-dasharray" in line.attributes]
    assert len(lines) == 4  # of speed, of memory
    assert len(dashed) == 2
    legends = [one.text for one in page.all("li")]
    assert {"bound: the best possible", "the dense model in the same engine"} <= set(legends)


@pytest.mark.parametrize("value", [0, -1, 1.5, "64", None, True, 10**400])
@pytest.mark.parametrize("name", ["context", "batch"])
def test_sizes_that_are_no_counts_are_refused(out, tmp_path, name, value):
    document = bench(plan_hash(out), (64, 128))
    document["cells"][0][name] = value
    with pytest.raises(UsageError, match="expected what 'spp bench -o FILE' writes"):
        page_of(out, bench=written(tmp_path / "bench.json", document))


def lines_of(page, ink: str) -> list:
    """The lines of a colour in all charts."""
    drawn = [path for path in page.all("path") if path.attributes.get("fill") == "none"]
    return [path for path in drawn if path.attributes.get("stroke") == f"var(--{ink})"]


def test_problems_of_a_measurement_are_shown(out, tmp_path):
    document = bench(plan_hash(out)) | {"problems": ["out torch is above the bound"]}
    page = page_of(out, bench=written(tmp_path / "bench.json", document))
    assert page.one("p", class_="bad").text == "out torch is above the bound"


def test_measurements_of_another_plan_are_refused(out, tmp_path):
    with pytest.raises(UsageError, match="hold no measurement of this plan"):
        page_of(out, bench=written(tmp_path / "bench.json", bench("0" * 64)))


@pytest.mark.parametrize(
    "content", [{}, [], {"candidates": 3}, {"candidates": [{"name": "a", "plan_hash": 1}]}]
)
def test_what_is_no_measurement_is_refused(out, tmp_path, content):
    with pytest.raises(UsageError, match="'spp bench"):
        page_of(out, bench=written(tmp_path / "bench.json", content))


@pytest.mark.parametrize("value", ["1.2", None, True, -3])
def test_speed_ups_that_are_no_numbers_are_refused(out, tmp_path, value):
    document = bench(plan_hash(out))
    document["cells"][0]["rows"][1]["decode"]["speedup"]["median"] = value
    with pytest.raises(UsageError, match="expected what 'spp bench -o FILE' writes"):
        page_of(out, bench=written(tmp_path / "bench.json", document))


def test_curves_of_an_evaluation(tmp_path):
    document = plan(model={"fingerprint": DEMO_FINGERPRINT, "source": "demo"})
    out = write_export(tmp_path / "out", plan=document)
    page = page_of(out, eval=RESULTS / "eval-chemistry")
    section = page.one("section", id="quality").text
    # The plan removes channels too: its own panel comes first, and the others can be unfolded.
    assert page.all("h3")[0].text == "Heads and channels, compensation lstsq"
    assert "Other units and compensations" in section
    assert "for another scenario, chemistry.txt" in section
    assert "quantised to 4 bits before they came here" in section
    assert "this export" in section
    assert lines_of(page, "hue0")
    titles = [one.text for one in page.all("title")]
    assert any(
        re.match(r"obs\n20 % removed: 1\.\d{3}\u00d7 dense\nfrom ", title) for title in titles
    )


def test_an_evaluation_of_another_model_is_refused(out):
    with pytest.raises(UsageError, match="evaluates the model"):
        page_of(out, eval=RESULTS / "eval-chemistry" / "results.jsonl")


def test_a_malformed_evaluation_is_refused(out, tmp_path):
    header = {"schema_version": 1, "context": {}, "model": {"fingerprint": FINGERPRINT}}
    lines = written(tmp_path / "results.jsonl", header)
    lines.write_text(lines.read_text() + "\n")
    with pytest.raises(OutputError, match="line 1, the header: the document has no texts"):
        page_of(out, eval=lines)


def test_equal_files_give_equal_pages_without_a_path_of_this_machine(out, tmp_path):
    first = spp_export.report(out, output=tmp_path / "a" / "page.html")
    second = spp_export.report(out, output=tmp_path / "b" / "page.html")
    assert first.sha256 == second.sha256
    assert str(tmp_path) not in first.path.read_text()


def test_an_existing_page_is_replaced_only_by_force(out, tmp_path):
    target = tmp_path / "out.html"
    spp_export.report(out)
    with pytest.raises(OutputError, match="already exists"):
        spp_export.report(out)
    spp_export.report(out, force=True)
    target.write_text("<p>mine</p>")
    with pytest.raises(OutputError, match="no page of 'spp report'"):
        spp_export.report(out, force=True)
    assert target.read_text() == "<p>mine</p>"


def test_a_page_inside_the_export_would_belie_its_manifest(out):
    with pytest.raises(UsageError, match="lies in the export"):
        spp_export.report(out, output=out / "report.html")


def test_what_is_no_export_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        spp_export.report(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"has no plan\.json"):
        spp_export.report(tmp_path)


def test_an_onnx_export_names_its_own_engines_and_reference(tmp_path):
    form = {"attention": "gqa", "precision": "fp32", "quant": "int4"}
    out = write_export(tmp_path / "out", config={"spp_onnx": form})
    (out / "model.onnx").write_bytes(b"x")
    (out / "model.onnx_data").write_bytes(b"x" * 2000)
    page = page_of(out)
    assert page.one("p", class_="kind").text == "Slim ONNX export of org/model, int4"
    assert "onnxruntime-genai" in page.one("section", id="engines").text
    assert "the PyTorch model of the same weights" in page.one("section", id="checks").text
    assert "2.0\u00a0kB, int4" in page.one("section", id="savings").text


def test_a_gguf_export(tmp_path):
    form = {"architecture": "deci", "precision": None, "quant": "q8_0"}
    out = write_export(tmp_path / "out", config={"spp_gguf": form})
    (out / "model.gguf").write_bytes(b"x" * 2000)
    page = page_of(out)
    assert page.one("p", class_="kind").text == "Slim GGUF export of org/model, q8_0"
    assert "architecture deci" in page.one("section", id="engines").text
    assert "2.0\u00a0kB, q8_0" in page.one("section", id="savings").text


def test_a_large_model_is_a_page_of_reasonable_size(tmp_path):
    layer = {"kv_heads": list(range(8)), "query_heads": list(range(64))}
    config = {"num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 99}
    out = write_export(tmp_path / "out", plan=plan(layers=[layer] * 80), config=config)
    assert spp_export.report(out).bytes < 1_500_000


def test_the_command_says_where_the_page_is(out, tmp_path, capsys):
    assert run(["report", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["path"] == str(tmp_path / "out.html")
    assert result["missing"]["benchmark"].startswith("spp bench out --model org/model")
    assert run(["report", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert run(["report", str(out), "--force"]) == 0
    assert "out.html" in capsys.readouterr().out.replace("\n", "")


def luminance(colour: str) -> float:
    """Relative luminance by WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_contrast(out, scheme):
    style = page_of(out).one("style").text
    light, _, rest = style.partition("prefers-color-scheme: dark")
    block = light if scheme == "light" else rest.partition("* {")[0]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
    for name in ("text", "soft", "good", "bad"):
        for under in ("page", "panel"):
            assert contrast(colours[name], colours[under]) >= 4.5, (name, under)
    assert contrast(colours["tip"], colours["tip-text"]) >= 4.5
    # What is drawn rather than read; lines of one hue are told by their dashes too.
    for name in ("kept", "removed", "gone", *(f"hue{index}" for index in range(6))):
        assert contrast(colours[name], colours["page"]) >= 3, name

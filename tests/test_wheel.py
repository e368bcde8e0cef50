"""What the wheel ships: four packages with unique names, the demo artifacts, nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_wheel_ships_only_our_packages(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "-o",
            str(tmp_path),
            str(ROOT),
        ],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    (info,) = {top for top in tops if top.endswith(".dist-info")}
    assert tops - {info} == {"spp_export", "spp_cli", "spp_kernels", "spp_bench"}
    benchmarks = {name.split("/")[1] for name in names if name.startswith("spp_bench/")}
    # What `spp bench` runs; peers, browsers and campaigns stay in the repository.
    assert {"bench.py", "profile.py", "bounds.py", "memory.py", "engines", "shapes"} <= benchmarks
    campaigns = {path.name for path in (ROOT / "benchmarks" / "spp_campaigns").iterdir()}
    assert benchmarks & campaigns <= {"__init__.py", "__pycache__"}
    left_out = ("spp_campaigns", "peers", "report_picture", "exporters", "probe_pruning/dynamic")
    assert not [name for name in names if any(word in name for word in left_out)]
    assert "spp_export/models/modeling/modeling_spp.py" in names
    assert "spp_export/formats/card.md.j2" in names
    page = ("report.html.j2", "style.css", "script.js")
    assert {f"spp_export/commands/report/page/{name}" for name in page} <= set(names)
    assert "spp_export/data/assets/smollm2-135m-instruct/artifacts.json" in names
    assert not [name for name in names if name.endswith((".pyc", ".pt", ".bin", ".gguf"))]
    entry_points = zipfile.ZipFile(wheel).read(f"{info}/entry_points.txt").decode()
    assert "spp = spp_cli.main:main" in entry_points

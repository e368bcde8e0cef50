"""`--model`: a directory, a hub id, the demo, or one line that says what is wrong."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from spp_export.common.errors import DownloadError, ModelError
from spp_export.models import hub as models
from spp_export.models.hub import DEMO_NAME, ModelLocation, cache_directory, hub_id, locate_model


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: `hub.answer` is a path to give or an error to raise."""

    class Hub:
        answer: Path | Exception = ConnectionError("no test asks the network")
        asked = ()

        def __call__(self, model, *, allow_patterns):
            self.asked = (model, allow_patterns)
            if isinstance(self.answer, Exception):
                raise self.answer
            return str(self.answer)

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


def test_a_directory_goes_by_its_own_name(tmp_path, monkeypatch):
    folder = tmp_path / "my-model"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for spelling in (str(folder), ".", "../my-model", "./"):
        found = locate_model(spelling)
        assert found.path.samefile(folder)
        assert found.name == "my-model"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate_model("~/my-model") == ModelLocation(folder, "my-model")


def test_a_directory_here_wins_over_the_hub(tmp_path, monkeypatch, hub):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate_model("org/name").name == "name"
    assert hub.asked == ()


def test_a_file_is_no_model(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ModelError, match=r"is a file; --model wants a directory"):
        locate_model(str(file))


@pytest.mark.parametrize(
    "model", ["nothing", "/no/such", "./org/name", "~/x", "a/b/c", "../a/b", "~nobody-here/x"]
)
def test_what_is_neither_here_nor_an_id_is_named(model, tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"no such directory\. Give a directory") as caught:
        locate_model(model)
    assert not isinstance(caught.value, DownloadError)
    assert hub.asked == ()


def test_a_hub_id_is_fetched_without_pickles_or_code(tmp_path, hub):
    hub.answer = tmp_path
    assert locate_model("org/name") == ModelLocation(tmp_path, "org/name")
    model, patterns = hub.asked
    assert model == "org/name"
    wanted = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "LICENSE.txt"]
    wanted += [
        "model.safetensors.index.json",
        "chat_template.jinja",
        "README.md",
        "NOTICE",
        "USE_POLICY.md",
        "merges.txt",
        "tokenizer.json",
    ]
    for name in wanted:
        assert any(fnmatch(name, pattern) for pattern in patterns), name
    for name in ("pytorch_model.bin", "modeling_evil.py", "model.pt", "model.gguf", "x.pkl"):
        assert not any(fnmatch(name, pattern) for pattern in patterns), name


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError("cannot connect\nto anything"), "cannot connect"),
        (RepositoryNotFoundError("404: no such repository", response=Mock(headers={})), "404"),
        (TimeoutError(), "TimeoutError"),
    ],
    ids=["network", "missing", "silent"],
)
def test_a_hub_that_does_not_answer_is_one_line(hub, error, reason):
    hub.answer = error
    with pytest.raises(DownloadError, match=rf"org/name: not a directory here.*{reason}") as caught:
        locate_model("org/name")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_the_real_hub_client_offline_is_one_line():
    with pytest.raises(DownloadError, match="Check the id, the network and your token") as caught:
        locate_model("spp-tests/no-such-model")
    assert "\n" not in str(caught.value)


def test_demo_is_the_default_models_own_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    monkeypatch.setattr(models, "demo_model", lambda: tmp_path / "cached")
    assert locate_model("demo") == ModelLocation(tmp_path / "cached", DEMO_NAME)


def test_the_cache_is_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "mine"))
    assert cache_directory() == tmp_path / "mine"
    monkeypatch.delenv("SPP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "platform"))
    assert cache_directory() == tmp_path / "platform" / "spp"


@pytest.mark.parametrize(
    ("name", "known"),
    [
        (DEMO_NAME, "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("org/some-model_1.5", "org/some-model_1.5"),
        ("some-model", None),
        ("a directory", None),
        ("org/some/model", None),
        ("../model", None),
        ("org/model\nlicense: mit", None),
    ],
)
def test_a_base_model_is_an_id_on_the_hub(name, known):
    assert hub_id(name) == known


def test_the_default_model_says_what_was_done_to_it():
    assert DEMO_NAME.endswith("(dequantised from Q4_1)")

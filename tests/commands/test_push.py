"""Pushing to the hub, against a double of its client; the network is never touched."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from exporting import refused
from huggingface_hub.utils import HFValidationError, validate_repo_id

import spp_export
from spp_cli.main import run
from spp_export.commands.push import check_hub
from spp_export.common.errors import CheckpointError, OutputError, ParityError, UsageError
from spp_export.common.manifest import write_manifest

ID = "org/slim"
# The client takes these before its version 1, and the hub never does.
_LATER = ("org/é", "org/x\n")
URL = f"https://huggingface.co/{ID}/commit/abc"


class Hub:
    """Records the calls of the client, by name, and fails where it is told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.failure: tuple[str, Exception] | None = None
        self.token: str | None = None

    def client(self, token: str | None = None) -> Hub:
        self.token = token
        return self

    def __getattr__(self, name: str) -> Any:
        def call(repo_id: str, **keywords: Any) -> Any:
            assert repo_id == ID
            self.calls.append((name, keywords))
            if self.failure and self.failure[0] == name:
                raise self.failure[1]
            # A CommitInfo is made differently in other versions of the client.
            return SimpleNamespace(commit_url=URL, oid="abc")

        return call

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """The double, and a machine without a network."""

    def no_network(*_):
        raise AssertionError("the network was asked")

    double = Hub()
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(huggingface_hub, "HfApi", double.client)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_own")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return double


@pytest.fixture
def out(workshop, tmp_path):
    """An export to change."""
    return Path(shutil.copytree(workshop.exported("llama-mqa").path, tmp_path / "slim"))


def test_it_uploads_what_was_written(out, hub):
    found = spp_export.push_to_hub(out, ID)
    assert hub.names == ["create_repo", "upload_folder"]
    created, uploaded = (keywords for _, keywords in hub.calls)
    assert created == {"private": None, "exist_ok": True}
    assert uploaded["folder_path"] == out
    assert uploaded["revision"] is None
    assert uploaded["commit_message"] == "Upload slim, made by spp"
    assert "*.safetensors" in uploaded["delete_patterns"]
    assert not {"*", "*.md", "README.md"} & set(uploaded["delete_patterns"])
    assert hub.token == "hf_own"
    sizes = [path.stat().st_size for path in out.iterdir()]
    assert found.to_dict() == {
        "repo_id": ID,
        "url": URL,
        "commit": "abc",
        "files": len(sizes),
        "bytes": sum(sizes),
    }


def test_private_branch_and_token_are_passed_on(out, hub):
    spp_export.push_to_hub(out, ID, private=True, revision="v2", token="hf_given")
    assert hub.names == ["create_repo", "create_branch", "upload_folder"]
    assert hub.calls[0][1]["private"] is True
    assert hub.calls[1][1] == {"branch": "v2", "exist_ok": True}
    assert hub.calls[2][1]["revision"] == "v2"
    assert hub.token == "hf_given"


def test_a_changed_file_is_not_uploaded(out, hub):
    (out / "config.json").write_text("{}")
    with refused(CheckpointError, r"config\.json: has 2 bytes.* Write the export again"):
        spp_export.push_to_hub(out, ID, unverified=True)
    assert hub.calls == []


@pytest.mark.parametrize(
    ("report", "complaint"),
    [
        (None, "its checks were left out"),
        ({"passed": False}, "its checks did not pass"),
        ([], "its checks did not pass"),
    ],
)
def test_the_unverified_goes_up_only_where_asked(out, hub, report, complaint):
    (out / "verify.json").unlink()
    if report is not None:
        (out / "verify.json").write_text(json.dumps(report))
    write_manifest(out)
    with refused(UsageError, f"{complaint}.*--unverified"):
        spp_export.push_to_hub(out, ID)
    assert hub.calls == []
    spp_export.push_to_hub(out, ID, unverified=True)
    assert hub.names == ["create_repo", "upload_folder"]


def test_only_exports_are_uploaded(tmp_path, workshop, hub):
    for path in (tmp_path, workshop.dense("llama-mqa"), workshop.artifacts("llama-mqa")):
        with refused(UsageError, "not an export of spp"):
            spp_export.push_to_hub(path, ID, unverified=True)
    with refused(UsageError, "no such directory"):
        spp_export.push_to_hub(tmp_path / "none", ID)
    assert hub.calls == []


@pytest.mark.parametrize(
    "repo_id",
    ["", "a/b/c", "-a", "org/", "/a", "a.", "a..b", "a--b", "a.git", "org/é", "org/x\n", "x" * 97],
)
def test_an_impossible_id_is_refused(out, hub, repo_id):
    if repo_id not in _LATER:
        with pytest.raises(HFValidationError):
            validate_repo_id(repo_id)
    with refused(UsageError, "expected the id of a repository, like org/name"):
        spp_export.push_to_hub(out, repo_id)
    assert hub.calls == []


@pytest.mark.parametrize("repo_id", ["a", "org/Llama-3.2_x", "0/0", "a.b/c_", "x" * 96])
def test_ids_that_the_client_takes_are_taken(repo_id):
    validate_repo_id(repo_id)
    assert check_hub(repo_id, "hf_given") == "hf_given"


def test_no_token_and_offline_are_said_before_anything_is_tried(out, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with refused(UsageError, "no token .* 'hf auth login', or set HF_TOKEN"):
        spp_export.push_to_hub(out, ID)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with refused(UsageError, "HF_HUB_OFFLINE is set"):
        spp_export.push_to_hub(out, ID, token="hf_given")
    assert hub.calls == []


class RefusedError(Exception):
    """As much of the client's HfHubHTTPError as all versions of it have."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status} refused.\nMore lines.")
        self.response = SimpleNamespace(status_code=status)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RefusedError(401), r"status 401: 401 refused\. The token is not valid"),
        (RefusedError(403), r"status 403: .* may not write there"),
        (RefusedError(404), r"status 404: .* check the id"),
        (RefusedError(500), r"status 500: .* Try again later"),
        (ConnectionError("no route\nto host"), r"did not take it: no route\. Check the network"),
        (TimeoutError(), r"did not take it: TimeoutError\. Check the network"),
    ],
    ids=str,
)
@pytest.mark.parametrize("call", ["create_repo", "upload_folder"])
def test_what_the_hub_says_is_one_line(out, hub, call, error, said):
    hub.failure = (call, error)
    with refused(OutputError, said):
        spp_export.push_to_hub(out, ID)


def test_an_export_is_pushed_once_it_is_published(workshop, hub, tmp_path):
    request = {"push_to_hub": ID, "private": True}
    result = workshop.export("llama-mqa", tmp_path / "new", **request)
    assert hub.calls[0][1]["private"] is True
    assert hub.calls[1][1]["folder_path"] == result.path == tmp_path / "new"
    assert result.to_dict()["pushed"]["url"] == URL


def test_an_export_that_cannot_be_pushed_stays(workshop, hub, tmp_path):
    hub.failure = ("create_repo", RefusedError(403))
    request = {"push_to_hub": ID}
    with refused(OutputError, "status 403.*The export is in .*new: push it with 'spp push'"):
        workshop.export("llama-mqa", tmp_path / "new", **request)
    assert (tmp_path / "new" / "manifest.json").exists()


def test_an_export_that_fails_its_checks_is_not_pushed(workshop, hub, tmp_path, monkeypatch):
    def failing(*_, **__):
        raise ParityError("they differ")

    monkeypatch.setattr("spp_export.commands.export.check_export", failing)
    request = {"push_to_hub": ID}
    with refused(ParityError, "they differ"):
        workshop.export("llama-mqa", tmp_path / "new", **request)
    assert hub.calls == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"verify": False}, "--push-to-hub takes what was written and checked"),
        ({"dry_run": True}, "--push-to-hub takes what was written and checked"),
        ({"push_to_hub": "a/b/c"}, "expected the id"),
    ],
)
def test_what_cannot_be_pushed_is_said_before_the_work(hub, tmp_path, changes, said):
    request = {**{"push_to_hub": ID, **changes}}
    with refused(UsageError, said):
        spp_export.export(tmp_path / "no scenario.txt", tmp_path / "new", **request)
    assert hub.calls == []


def test_the_command_says_where_it_is(out, hub, capsys):
    assert run(["push", str(out), ID, "--private", "--revision", "v2"]) == 0
    assert URL in capsys.readouterr().out
    assert hub.names == ["create_repo", "create_branch", "upload_folder"]
    assert run(["push", str(out), ID, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["url"] == URL
    (out / "verify.json").unlink()
    write_manifest(out)
    assert run(["push", str(out), ID]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert run(["push", str(out), ID, "--unverified", "--quiet"]) == 0
    assert capsys.readouterr().out == f"{URL}\n"


def test_private_alone_is_refused(capsys):
    assert run(["export", "--scenario", "s.txt", "--private"]) == 2
    assert "Add --push-to-hub ID" in capsys.readouterr().err

"""`push`: an export to the Hugging Face Hub, only as it was written and checked."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spp_export.commands.requests import PushRequest
from spp_export.common.errors import CheckpointError, OutputError, UsageError
from spp_export.common.json_files import read_json
from spp_export.common.manifest import MANIFEST_NAME, check_manifest, listed_names, wrote
from spp_export.common.options import command
from spp_export.common.progress import progress
from spp_export.formats.registry import FORMATS

# An older export's files of these kinds go in the same commit: transformers would read a leftover
# model.safetensors rather than new shards. Whatever else the repository has stays.
_REPLACED = tuple(pattern for made in FORMATS.values() for pattern in (made.weights, *made.others))
# What the hub takes for an id.
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_ID = re.compile(f"(?:{_PART}/)?{_PART}")
_LONGEST_ID = 96
_ADVICE = {
    401: "The token is not valid: run 'hf auth login', or set HF_TOKEN.",
    403: "The token may not write there: take one with write access, or another repository.",
    404: "There is no such repository or branch for this token: check the id.",
}


@dataclass(frozen=True)
class PushResult:
    """Where an export went: repository, page of the commit, its hash, and what was sent."""

    repo_id: str
    url: str
    commit: str
    files: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


@command(PushRequest)
def push_to_hub(request: PushRequest) -> PushResult:
    """Upload a directory that `export`, `convert` or `recover` wrote, as one commit.

    The repository is made if there is none, and so is the branch. Raises CheckpointError where a
    file is not as it was written; UsageError where the checks did not pass or were left out (unless
    `unverified`), or the id or the token is no good; OutputError where the hub does not take it.

        spp_export.push("out/chemistry", "my-name/chemistry", private=True)
    """
    repo_id = request.repo_id
    directory = Path(request.out)
    _check_written(directory)
    if not request.unverified:
        _check_verified(directory)
    token = check_hub(repo_id, request.token)
    files = [path for path in directory.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)

    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    try:
        with progress("uploading", None):
            # None leaves it to the organisation, whose own repositories may all be private.
            api.create_repo(repo_id, private=request.private or None, exist_ok=True)
            if request.revision is not None:
                api.create_branch(repo_id, branch=request.revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=directory,
                revision=request.revision,
                commit_message=f"Upload {directory.resolve().name}, made by spp",
                delete_patterns=list(_REPLACED),
            )
    except Exception as error:  # the hub client raises a wide family of network errors
        raise OutputError(f"{repo_id}: {_reason(error)}") from error
    return PushResult(repo_id, commit.commit_url, commit.oid, len(files), size)


push = push_to_hub


def check_hub(repo_id: str, token: str | None = None) -> str:
    """The token to push with. Raises UsageError where no push can succeed; makes no request."""
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_OFFLINE

    odd = "--" in repo_id or ".." in repo_id or repo_id.endswith(".git")
    if odd or len(repo_id) > _LONGEST_ID or not _ID.fullmatch(repo_id):
        raise UsageError(
            f"{repo_id!r:.120}: expected the id of a repository, like org/name: letters, digits, "
            "and single '-', '_', '.' between them."
        )
    if HF_HUB_OFFLINE:
        raise UsageError("HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it.")
    token = token or huggingface_hub.get_token()
    if not token:
        raise UsageError("no token of the Hugging Face Hub: run 'hf auth login', or set HF_TOKEN.")
    return token


def _check_written(directory: Path) -> None:
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such directory.")
    if not wrote(directory):
        raise UsageError(f"{directory}: no {MANIFEST_NAME} of spp, so not an export of spp.")
    if "plan.json" not in listed_names(directory):
        raise UsageError(f"{directory}: no plan.json, so not an export of spp.")
    if problems := check_manifest(directory):
        raise CheckpointError(f"{directory}: {problems[0]}. Write the export again.")


def _check_verified(directory: Path) -> None:
    path = directory / "verify.json"
    if not path.exists():
        raise UsageError(
            f"{directory}: its checks were left out (--no-verify). Write it again with them, or "
            "push it with --unverified."
        )
    report = read_json(path, what="report", error=CheckpointError)
    if not isinstance(report, dict) or report.get("passed") is not True:
        raise UsageError(
            f"{directory}: its checks did not pass; verify.json says which. Push it with "
            "--unverified if you want it all the same."
        )


def _reason(error: Exception) -> str:
    """One line: what the hub or the network reported, and what to do."""
    first = str(error).partition("\n")[0].strip().rstrip(".") or type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None:
        return f"the hub did not take it: {first}. Check the network and the id."
    return (
        f"the hub refused it, status {status}: {first}. {_ADVICE.get(status, 'Try again later.')}"
    )

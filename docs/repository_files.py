"""MkDocs hook: files of the repository that pages link to become part of the site.

Pages link to them as they lie in the repository (`../SECURITY.md`), so that the links work in a
checkout, too. Here they are added under `repository/`, with what they link to in turn, and links
are rewritten. A link to a file that does not exist is a warning, which ends a strict build.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

LOG = logging.getLogger("mkdocs.hooks.repository_files")
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)#\s]+)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
PREFIX = "repository/"


def on_files(files: Any, config: Any) -> Any:
    """Add every file that can be reached by links from the pages."""
    root = Path(config.config_file_path).parent
    seen = {file.src_uri for file in files}
    waiting = [file.src_uri for file in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        text = (root / in_repository(page)).read_text(encoding="utf-8")
        for link in LINK.findall(FENCE.sub("", text)):
            target = target_of(page, link)
            uri = in_site(target)
            if uri in seen:
                continue
            if not (root / target).is_file():
                LOG.warning("%s links to %s, which is no file of the repository", page, link)
                continue
            seen.add(uri)
            files.append(File.generated(config, uri, abs_src_path=str(root / target)))
            if uri.endswith(".md"):
                waiting.append(uri)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with its links as they are in the site."""
    here = page.file.src_uri
    folder = posixpath.dirname(here)

    def rewritten(match: re.Match[str]) -> str:
        return posixpath.relpath(in_site(target_of(here, match[1])), folder or ".")

    return LINK.sub(rewritten, markdown)


def in_repository(uri: str) -> str:
    """Where a file of the site lies in the repository."""
    return uri.removeprefix(PREFIX) if uri.startswith(PREFIX) else f"docs/{uri}"


def in_site(path: str) -> str:
    """Where a file of the repository lies in the site."""
    return path.removeprefix("docs/") if path.startswith("docs/") else PREFIX + path


def target_of(page: str, link: str) -> str:
    """The file of the repository that a page's link names."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(in_repository(page)), link))

"""`cache`: what spp keeps on this machine, and its removal."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp_export.calibration.stored import CachedFile, cache_limit, cached_files, remove
from spp_export.commands.requests import CacheRequest
from spp_export.common.options import command
from spp_export.models.hub import cache_directory


@dataclass(frozen=True)
class CacheContents:
    """What the cache holds, least recently used first.

    limit    bytes that statistics and states of training may take; what was used longest ago goes
             first
    removed  what was removed just now
    in_use   what should have been removed, and is being used
    """

    directory: Path
    limit: int
    files: tuple[CachedFile, ...]
    removed: tuple[CachedFile, ...] = ()
    in_use: tuple[CachedFile, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "directory": str(self.directory),
            "limit": self.limit,
            "bytes": sum(file.nbytes for file in self.files),
            "files": [file.to_dict() for file in self.files],
            "removed": [file.to_dict() for file in self.removed],
            "in_use": [file.to_dict() for file in self.in_use],
        }


@command(CacheRequest)
def cache(request: CacheRequest) -> CacheContents:
    """List what spp keeps on this machine to be faster, or remove it; nothing else is lost by that.

    What another process is using stays.

        spp_export.cache(clear=True, model="org/name")
    """
    limit, files = cache_limit(), cached_files()
    chosen = [file for file in files if _chosen(file, request)]
    if not request.clear:
        return CacheContents(cache_directory(), limit, tuple(chosen))
    removed = [file for file in chosen if remove(file)]
    left = tuple(file for file in files if file not in removed)
    in_use = tuple(file for file in chosen if file not in removed)
    return CacheContents(cache_directory(), limit, left, tuple(removed), in_use)


def _chosen(file: CachedFile, request: CacheRequest) -> bool:
    if request.model is not None and file.model != request.model:
        return False
    return request.older_than is None or file.used < time.time() - request.older_than

"""`spp cache`."""

from __future__ import annotations

from spp_cli.options import command
from spp_cli.output import Output
from spp_export.commands.requests import CacheRequest
from spp_export.common.options import non_default


@command(CacheRequest)
def cache(request: CacheRequest, out: Output) -> None:
    """Show what spp keeps on this machine, and remove it.

    Statistics of models make later exports faster. SPP_CACHE_LIMIT says how much they may take, 50G
    by default; what was used longest ago goes first. SPP_CACHE is another place for all of it.

    Example: spp cache --clear --older-than 30d
    """
    import spp_export

    contents = spp_export.cache(**non_default(request))

    from spp_cli.render.cache import cache_list
    from spp_cli.render.look import byte_size

    freed = sum(file.nbytes for file in contents.removed)
    brief = byte_size(freed if request.clear else sum(file.nbytes for file in contents.files))
    out.result(contents.to_dict, lambda look: cache_list(contents, look), brief=brief)

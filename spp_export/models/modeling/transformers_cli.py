"""transformers' own command line, for per-layer models too.

    python -m spp_export.transformers_cli serve out/chemistry

`transformers serve` (5.23) takes a model's class from the package `transformers` by its name, with
`--trust-remote-code` too, and so never finds one that a checkpoint brings along. Here that package
has ours too; no remote code is needed. Uniform models are stock models, and are served by
`transformers serve` itself.
"""

from __future__ import annotations

import sys
from typing import Any

from spp_export.common.errors import ModelError, SppError


def main() -> None:
    """Run the process's arguments as arguments of `transformers`. Raises ModelError without it."""
    # First of all: transformers replaces its package in sys.modules while these are imported.
    import spp_export.models.modeling as ours

    package = sys.modules["transformers"]

    class WithOurs(type(package)):  # type: ignore[misc]
        def __getattr__(self, name: str) -> Any:
            return getattr(ours, name) if name.startswith("Spp") else super().__getattr__(name)

    package.__class__ = WithOurs
    try:
        from transformers.cli.transformers import main as transformers_main
    except ImportError as error:
        raise ModelError(
            f"transformers has no command line here: {error}. "
            "Run: pip install 'transformers[serving]>=5'"
        ) from error
    transformers_main()


if __name__ == "__main__":
    try:
        main()
    except SppError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

"""Let transformers' auto classes load per-layer checkpoints once `spp_export` is imported.

The classes need torch and transformers, `import spp_export` must import neither, and nobody calls
us between `from transformers import AutoModelForCausalLM` and `from_pretrained`. So we listen for
the import of transformers' own registry, and register right after it. Modules of transformers
import one another in circles, and ours subclass several of them, so "right after" means when no
module of transformers is being executed any more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_REGISTRY = "transformers.models.auto.configuration_auto"
_CLASSES = "spp_export.models.modeling"


def install() -> None:
    """Register the per-layer classes now if transformers' registry is loaded, else when it will be.

    Calling it again does nothing. It imports transformers only if the caller already has.
    """
    if _REGISTRY in sys.modules:
        import_module(_CLASSES)
    elif not any(isinstance(finder, _Listener) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Listener())


class _Listener(MetaPathFinder):
    """Finds transformers' modules as usual and notes when each starts and ends executing."""

    def __init__(self) -> None:
        self._executing: list[str] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith("transformers."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            # The loader keeps its type: transformers and `inspect` ask it for more than execution.
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: self._execute(execute, module)  # type: ignore[method-assign]
        return spec

    def _execute(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        self._executing.append(module.__name__)
        try:
            execute(module)
        finally:
            self._executing.pop()
        if not self._executing and _REGISTRY in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            import_module(_CLASSES)

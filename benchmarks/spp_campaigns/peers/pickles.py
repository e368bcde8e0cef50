"""How a pickled model is loaded."""

from __future__ import annotations

PICKLE = "model.pth"

"""Types of numpy arrays, by what they hold. Shapes stand in names and docstrings."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
BoolArray = NDArray[np.bool_]
IndexArray = NDArray[np.intp]
IntArray = NDArray[np.int64]

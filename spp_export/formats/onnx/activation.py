"""Activations of an MLP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spp_export.formats.onnx.recorder import Dimension, Recorder


def activated(
    g: Recorder,
    kind: str,
    x: Any,
    name: str,
    shape: Sequence[Dimension],
    constants: Mapping[str, Any],
) -> Any:
    """`x` after the activation `kind`, as of `Settings`.

    `constants` are the values that an activation has weights for, by the ends of their names.
    """
    if kind == "silu":
        sigmoid = g.op("Sigmoid", [x], f"{name}/sigmoid", shape)
        return g.op("Mul", [x, sigmoid], f"{name}/silu", shape)
    if kind in ("gelu", "gelu_tanh"):
        approximate = "tanh" if kind == "gelu_tanh" else "none"
        return g.op("Gelu", [x], f"{name}/gelu", shape, approximate=approximate)
    if kind == "xielu":
        return _xielu(g, x, name, shape, constants)
    relu = g.op("Relu", [x], f"{name}/relu", shape)
    return g.op("Mul", [relu, relu], f"{name}/relu2", shape) if kind == "relu2" else relu


def _xielu(
    g: Recorder, x: Any, name: str, shape: Sequence[Dimension], constants: Mapping[str, Any]
) -> Any:
    """xIELU: Huang and Schlag, Deriving Activation Functions Using Integration (2024), equation 8.

    Both halves have beta x in common; with p and n for the two slopes it adds p x^2 above zero and
    n (e^x - 1 - x) below.
    """
    by_end = {tensor.rpartition(".")[2]: value for tensor, value in constants.items()}
    beta, eps = by_end["beta"], by_end["eps"]

    def op(kind: str, inputs: Sequence[Any], label: str, size: Any = shape) -> Any:
        return g.op(kind, inputs, f"{name}/{label}", size)

    p = op("Softplus", [by_end["alpha_p"]], "alpha_p", [1])
    n = op("Add", [op("Softplus", [by_end["alpha_n"]], "alpha_n", [1]), beta], "alpha_n_beta", [1])
    zero, one = g.number(0.0, "zero_float"), g.number(1.0, "one_float")
    above = op("Mul", [op("Mul", [x, x], "square"), p], "above")
    below = op("Sub", [op("Exp", [op("Min", [x, eps], "capped")], "exp"), one], "exp_minus_one")
    below = op("Mul", [op("Sub", [below, x], "below_less"), n], "below")
    positive = g.op("Greater", [x, zero], f"{name}/positive", shape, dtype="BOOL")
    chosen = op("Where", [positive, above, below], "chosen")
    return op("Add", [chosen, op("Mul", [x, beta], "linear")], "xielu")

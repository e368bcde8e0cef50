"""What a criterion may read of one layer: its weights and its statistics on one text collection."""

from __future__ import annotations

from dataclasses import dataclass

from spp_export.common.arrays import FloatArray


@dataclass(frozen=True)
class LayerWeights:
    """Projections of one layer as stored, [out, in]; biases take no part in any criterion.

    query [H*dh,d], key and value [G*dh,d], output [d,H*dh], gate and up [I,d], down [d,I]; of an
    MLP without a gate, gate is zeros
    """

    query: FloatArray
    key: FloatArray
    value: FloatArray
    output: FloatArray
    gate: FloatArray
    up: FloatArray
    down: FloatArray


@dataclass(frozen=True)
class AttentionInputs:
    """Averages over real tokens of what q, k and v read (x [d]) and what o_proj reads (a [H*dh]).

    input_square [d] E x^2; mean [H*dh] E a; square [H*dh] E a^2; second [H,dh,dh] E a_h a_h^T
    """

    input_square: FloatArray
    mean: FloatArray
    square: FloatArray
    second: FloatArray


@dataclass(frozen=True)
class MlpInputs:
    """Averages over real tokens of what gate and up read (x [d]) and what down_proj reads (z [I]).

    input_square [d] E x^2; mean [I] E z; square [I] E z^2
    """

    input_square: FloatArray
    mean: FloatArray
    square: FloatArray


@dataclass(frozen=True)
class ExpertOutputs:
    """What each of E experts writes, w = g f(x) with its weight g by the router and 0 where a token
    is not routed to it: square [E] E ||w||^2 and length [E] E ||w|| over all real tokens, routed
    [E] the share of them that it writes something for."""

    square: FloatArray
    length: FloatArray
    routed: FloatArray


@dataclass(frozen=True)
class ExpertInputs:
    """What the down projection of each of E experts reads, its F channels times the expert's weight
    g by the router, and 0 where a token is not routed to it: square [E,F] E (g z)^2 over all real
    tokens."""

    square: FloatArray


@dataclass(frozen=True)
class ExpertColumns:
    """Of the down projections of E experts, by column: squares [E,F] sum_i W[i,c]^2 and sums [E,F]
    sum_i |W[i,c]|."""

    squares: FloatArray
    sums: FloatArray


@dataclass(frozen=True)
class Gradients:
    """Reductions of |W * dLoss/dW|, the loss being the mean over texts of the mean next-token loss.

    Sums over a row: query_rows [H*dh], key_rows and value_rows [G*dh], gate_rows and up_rows [I].
    Sums over a column: output_columns [H*dh], down_columns [I]. Gates: the mean over texts x of
    |sum over tokens of a . dLoss_x/da|, head_gates [H] of each head's part of o_proj's input,
    channel_gates [I] of down_proj's.
    """

    query_rows: FloatArray
    key_rows: FloatArray
    value_rows: FloatArray
    output_columns: FloatArray
    gate_rows: FloatArray
    up_rows: FloatArray
    down_columns: FloatArray
    head_gates: FloatArray
    channel_gates: FloatArray


@dataclass(frozen=True)
class Axis:
    """The probe axis of the collection's domain: direction [d], of unit length, and each head's
    share [H] E (u . w)^2 / (||w||^2 + eps) of its write w along it."""

    direction: FloatArray
    share: FloatArray


@dataclass(frozen=True)
class LayerStatistics:
    """One layer of H query heads in G groups and E experts (`expert_count`), seen by one text
    collection.

    Only what the criteria asked for `needs` is gathered; the rest is None.
    """

    layer: int
    heads: int
    groups: int
    weights: LayerWeights
    attention: AttentionInputs | None = None
    mlp: MlpInputs | None = None
    gradients: Gradients | None = None
    axis: Axis | None = None
    seed: int = 0
    experts: ExpertOutputs | None = None
    expert_count: int = 0
    expert_inputs: ExpertInputs | None = None
    expert_columns: ExpertColumns | None = None

"""What may be chosen about an ONNX graph, and what no provider can run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args

from spp_export.common.errors import ModelError, UsageError
from spp_export.common.installation import install_command, require_package
from spp_export.formats.format import FormatOptions
from spp_export.models.families import Feature

if TYPE_CHECKING:
    from spp_export.formats.settings import Settings
    from spp_export.models.checkpoint.checkpoint import Checkpoint
    from spp_export.models.shape import ModelShape

# gqa       GroupQueryAttention with its rotary inside; right padding; shared KV buffer; fastest
# gqa-bias  the same with positions and mask from outside: padding on either side
# standard  operators of the ONNX standard alone (opset 24), for other runtimes and fp32 on CUDA
Attention = Literal["gqa", "gqa-bias", "standard"]
Precision = Literal["fp32", "fp16", "bf16"]
# int4, int8     weights only, in blocks of 64 or 32 values (MatMulNBits)
# int8-dynamic   weights per channel and activations per tensor (MatMulInteger)
Quant = Literal["int8", "int4", "int8-dynamic"]

# What head_dim is a multiple of, as ONNX Runtime says when it runs them. The rotary inside
# GroupQueryAttention is what needs 16.
INSIDE_MULTIPLE = 16
_HEAD_MULTIPLES: Mapping[Attention, int] = {"gqa": INSIDE_MULTIPLE, "gqa-bias": 8, "standard": 1}

ATTENTIONS: tuple[Attention, ...] = get_args(Attention)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
QUANTS: tuple[Quant, ...] = get_args(Quant)

# Counts up where the same checkpoint and options would give another graph: `verify` compares whole
# graphs, and must be able to say that one was written before.
GRAPH_VERSION = 1

# What a graph can compute beyond a Llama.
KNOWN = frozenset(
    {
        Feature.NO_GATE,
        Feature.ACTIVATION,
        Feature.FUSED,
        Feature.PARALLEL,
        Feature.SANDWICH,
        Feature.MULTIPLIERS,
        Feature.SOFTCAP,
        Feature.LAYER_NORM,
        Feature.SHIFTED_NORM,
        Feature.BARE_NORM,
        Feature.ROTARY,
        Feature.POSITIONS,
        Feature.ALIBI,
        Feature.POST_NORM,
        Feature.SIDE_BY_SIDE,
        Feature.TRANSPOSED,
        Feature.WIDE_NORM,
        Feature.EXPERTS,
        Feature.SINKS,
    }
)

# As safetensors spells them.
STORED: Mapping[Precision, str] = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class OnnxOptions(FormatOptions):
    """The form of a graph."""

    attention: Attention = field(
        default="gqa",
        metadata={
            "flag": "--onnx-attention",
            "help": "gqa is fastest and pads on the right; gqa-bias pads on either side; standard "
            "is for other runtimes, and for fp32 on CUDA. By default the first that takes the "
            "model's head_dim.",
        },
    )
    precision: Precision = field(
        default="fp32", metadata={"help": "Of an ONNX graph: fp32 on the CPU, fp16 on CUDA."}
    )
    quant: Quant | None = field(
        default=None,
        metadata={
            "help": "Of an ONNX graph: int8 or int4, weights rounded in small blocks, or "
            "int8-dynamic, which rounds activations too."
        },
    )

    @classmethod
    def chosen(
        cls, device: str, values: Mapping[str, Any], shape: ModelShape | None = None
    ) -> OnnxOptions:
        """As of the base class; the fastest attention that takes the model's heads."""
        attention = values.get("attention")
        if shape is not None:
            fitting = [form for form in ATTENTIONS if not shape.head_dim % _HEAD_MULTIPLES[form]]
            attention = attention or fitting[0]
            if attention not in fitting:
                raise UsageError(
                    f"--onnx-attention {attention}: takes head_dim in multiples of "
                    f"{_HEAD_MULTIPLES[attention]}, and this model has {shape.head_dim}. Use "
                    f"{' or '.join(fitting)}, or leave it out."
                )
        # The only precision of each device that every form has kernels for.
        usual = "fp16" if device.startswith("cuda") else "fp32"
        defaults = {"attention": attention, "precision": values.get("precision") or usual}
        made: OnnxOptions = super().chosen(device, {**values, **defaults})
        return made

    def reason(self, shape: ModelShape) -> str | None:
        """Why the attention is not what it is by default, where the model's heads are why."""
        usual = ATTENTIONS[0]
        if self.attention == usual or not shape.head_dim % _HEAD_MULTIPLES[usual]:
            return None
        return (
            f"{usual} takes head_dim in multiples of {_HEAD_MULTIPLES[usual]}, and this model has "
            f"{shape.head_dim}"
        )

    def check(self, device: str | None = None) -> None:
        """UsageError for options that exclude each other or that `device` ("cpu", "cuda") cannot
        run.
        """
        super().check(device)
        if self.quant == "int8-dynamic" and self.precision != "fp32":
            raise UsageError(
                "--quant int8-dynamic: starts from fp32 weights. Drop --precision, or use int8."
            )
        if device is None:
            return
        if device != "cpu" and not device.startswith("cuda"):
            raise UsageError(f"--device {device:.40}: ONNX Runtime checks a graph on cpu or cuda.")
        if device == "cpu" and self.precision == "bf16":
            raise UsageError(
                "--precision bf16: ONNX Runtime has no bf16 kernels on the CPU. "
                "Use fp32 or fp16, or --device cuda."
            )
        fp32_attention = self.precision == "fp32" and self.attention != "standard"
        if device.startswith("cuda") and fp32_attention:
            raise UsageError(
                "--precision fp32: GroupQueryAttention has no fp32 kernel on CUDA. "
                "Use --precision fp16 or bf16, or --onnx-attention standard."
            )

    @property
    def torch_dtype(self) -> str:
        """The precision as torch spells it ("float32")."""
        return _DTYPES[self.precision]

    @property
    def element_bytes(self) -> int:
        """Of one value that is not quantised."""
        return 4 if self.precision == "fp32" else 2


def onnx_settings(decoder: Checkpoint, options: OnnxOptions | None = None) -> Settings:
    """Settings of a checkpoint that is to be a graph, of this form where it matters. Raises
    ModelError where it cannot be one."""
    from spp_export.formats.settings import settings_of

    if options and options.quant and any(decoder.shape.sparse):
        raise ModelError(
            f"--quant {options.quant}: no form of it rounds the weights of experts, which are most "
            "of this model's. Drop it; --precision fp16 halves them."
        )
    return settings_of(decoder, KNOWN, "ONNX")


def require(name: str) -> ModuleType:
    """An optional library by its import name; UsageError that says how to install it."""
    return require_package(name, "ONNX", lambda: install_command("onnx"))

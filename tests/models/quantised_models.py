"""Tiny checkpoints whose weights are quantised here, with what they stand for in float64."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from factories import make_checkpoint, read_config
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from spp_export.common.progress import quiet_transformers

GROUP = 32
# Of four bits: sign, two of the exponent, one of the mantissa.
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1 = torch.cat([_E2M1, -_E2M1]).double()
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Quantised:
    """A checkpoint: the tensors in its file, and by name what the weights stand for."""

    path: Path
    stored: dict[str, Tensor]
    meant: dict[str, Tensor]

    def save(self, **settings: Any) -> None:
        """Write the file again, and change its quantization_config."""
        tensors = {name: tensor.contiguous() for name, tensor in self.stored.items()}
        save_file(tensors, self.path / "model.safetensors", metadata={"format": "pt"})
        config = read_config(self.path)
        config["quantization_config"] = config.get("quantization_config", {}) | settings
        (self.path / "config.json").write_text(json.dumps(config))


def dense(
    tmp_path: Path, dtype: str = "bfloat16", **options: Any
) -> tuple[Path, dict[str, Tensor]]:
    path = make_checkpoint(
        tmp_path, "llama", kv_heads=2, query_heads=4, layers=2, dtype=dtype, **options
    )
    return path, load_file(path / "model.safetensors")


def fp8(
    tmp_path: Path, block: tuple[int, int] | None = (32, 32), *, tied: bool = False
) -> Quantised:
    """Blocks of a weight, or all of it, have a scale each, by which the stored values are
    multiplied."""
    path, tensors = dense(tmp_path, tied=tied)
    made = Quantised(path, dict(tensors), {})
    for name, tensor in tensors.items():
        if "proj" not in name:
            continue
        rows, columns = tensor.shape
        height, width = block or (rows, columns)
        blocks = tensor.float().reshape(rows // height, height, columns // width, width)
        scales = blocks.abs().amax((1, 3)) / 448
        values = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        made.stored[name] = values.reshape(rows, columns)
        made.stored[f"{name}_scale_inv"] = scales if block else scales.reshape(())
        product = values.double() * scales.double()[:, None, :, None]
        made.meant[name] = product.reshape(rows, columns)
    skipped = ["lm_head"]
    made.save(quant_method="fp8", weight_block_size=block, modules_to_not_convert=skipped)
    return made


def mxfp8(tmp_path: Path) -> Quantised:
    """FP8 of which 32 in a row have a power of two, whose exponent is stored, plus 127."""
    made = fp8(tmp_path, (1, GROUP))
    for name in made.meant:
        powers = made.stored[f"{name}_scale_inv"].double().log2().round()
        made.stored[f"{name}_scale_inv"] = (powers + 127).to(torch.uint8)
        scales = (2.0**powers).repeat_interleave(GROUP, 1)
        made.meant[name] = made.stored[name].double() * scales
    made.save(quant_method="mxfp8")
    return made


def packed(tmp_path: Path, method: str, *, shuffled: bool = False, bits: int = 4) -> Quantised:
    """GPTQ or AWQ: whole numbers of a few bits, less their group's zero point, times its scale."""
    path, tensors = dense(tmp_path, "float16")
    made = Quantised(path, dict(tensors), {})
    generator = torch.Generator().manual_seed(bits)
    count = 32 // bits
    for name, tensor in tensors.items():
        if "proj" not in name:
            continue
        outputs, inputs = tensor.shape
        groups = inputs // GROUP
        values = torch.randint(0, 1 << bits, (inputs, outputs), generator=generator)
        zeros = torch.randint(1, 1 << bits, (groups, outputs), generator=generator)
        scales = (torch.rand(groups, outputs, generator=generator) * 0.1 + 0.01).half()
        index = torch.arange(inputs) // GROUP
        if shuffled:
            index = index[torch.randperm(inputs, generator=generator)]
        module = name.removesuffix(".weight")
        del made.stored[name]
        if method == "gptq":
            words = values.reshape(inputs // count, count, outputs).transpose(1, 2)
            made.stored[f"{module}.g_idx"] = index.to(torch.int32)
            order, less = range(count), zeros - 1
        else:
            words = values.reshape(inputs, outputs // count, count)
            order, less = AWQ_ORDER, zeros
        made.stored[f"{module}.qweight"] = _words(words, order, bits)
        made.stored[f"{module}.qzeros"] = _words(less.reshape(groups, -1, count), order, bits)
        made.stored[f"{module}.scales"] = scales
        made.meant[name] = ((values - zeros[index]).double() * scales.double()[index]).T
    made.save(quant_method=method, bits=bits, group_size=GROUP)
    return made


def _words(values: Tensor, order: Any, bits: int) -> Tensor:
    """Fields [..., 32 / bits] in words, the first of `order` in the lowest bits."""
    words = sum(values[..., column] << (bits * place) for place, column in enumerate(order))
    assert isinstance(words, Tensor)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def mxfp4(tmp_path: Path) -> Quantised:
    """gpt-oss as it is published: experts of 4-bit floats, 32 of them with a power of two."""
    config = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=263,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        layer_types=["sliding_attention", "full_attention"],
    )
    path = tmp_path / "gpt-oss"
    with quiet_transformers():
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    made = Quantised(path, load_file(path / "model.safetensors"), {})
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in made.stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = made.stored.pop(name).shape
        shape = (experts, outputs, inputs // 32, 16)
        pairs = torch.randint(0, 256, shape, generator=generator)
        powers = torch.randint(118, 125, shape[:-1], generator=generator)
        made.stored[f"{name}_blocks"] = pairs.to(torch.uint8)
        made.stored[f"{name}_scales"] = powers.to(torch.uint8)
        values = torch.stack([E2M1[pairs & 15], E2M1[pairs >> 4]], -1).flatten(-2)
        scaled = values * 2.0 ** (powers.double() - 127)[..., None]
        made.meant[name] = scaled.flatten(-2).transpose(1, 2)
    made.save(quant_method="mxfp4")
    return made

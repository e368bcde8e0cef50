"""Tiny random models that see, and a picture for each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from factories import VOCAB, write_tokenizer
from family_models import DELTA, EXPERTS, SHARING
from old_transformers import in_its_words
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, LlavaProcessor

from spp_export.evaluation.contract import write_random

IMAGE = 90  # stands for a part of a picture in a prompt
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"hidden_size": 32, "intermediate_size": 24, "vocab_size": 97, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
_TOWER = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
_TOWER |= {"num_attention_heads": 2, "patch_size": 14}
_QWEN = {"hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "out_hidden_size": 32}
_QWEN |= {"patch_size": 14}
_MARKS = {"video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}


def text(kind: str, **more: Any) -> dict[str, Any]:
    """The config of a decoder."""
    return {"model_type": kind, **_SIZES, **_HEADS, **_TOKENS, **in_its_words(more)}


CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "text_config": text("qwen2_5_vl_text", rope_parameters=_MROPE),
        "vision_config": {**_QWEN, "depth": 1, "window_size": 28, "fullatt_block_indexes": [0]},
        "image_token_id": IMAGE,
        **_MARKS,
    },
    "qwen3_vl": {
        "text_config": text("qwen3_vl_text", rope_parameters=_MROPE),
        "vision_config": {
            **_QWEN,
            "depth": 2,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        "image_token_id": IMAGE,
        **_MARKS,
    },
    "qwen3_5": {
        "text_config": text("qwen3_5_text", rope_parameters=_MROPE, **DELTA),
        "vision_config": {**_QWEN, "depth": 1, "num_position_embeddings": 16},
        "image_token_id": IMAGE,
        **_MARKS,
    },
    "qwen3_5_moe": {
        "text_config": text(
            "qwen3_5_moe_text", rope_parameters=_MROPE, **DELTA, **EXPERTS["qwen3_5_moe_text"]
        )
        | {"moe_intermediate_size": 24},
        "vision_config": {**_QWEN, "depth": 1, "num_position_embeddings": 16},
        "image_token_id": IMAGE,
        **_MARKS,
    },
    "llava": {
        "text_config": text("llama"),
        "vision_config": {
            **_TOWER,
            "model_type": "clip_vision_model",
            "num_hidden_layers": 2,
            "image_size": 28,
            "projection_dim": 16,
        },
        "image_token_index": IMAGE,
        "image_seq_length": 4,
    },
    "mistral3": {
        "text_config": text("mistral"),
        "vision_config": {**_TOWER, "model_type": "pixtral", "image_size": 56, "head_dim": 8},
        "image_token_index": IMAGE,
    },
    "gemma3": {
        "text_config": text(
            "gemma3_text",
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=5,
        ),
        "vision_config": {**_TOWER, "model_type": "siglip_vision_model", "image_size": 28},
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
        "boi_token_index": 91,
        "eoi_token_index": 92,
    },
    "gemma4": {
        "text_config": text("gemma4_text", **SHARING, sliding_window=5),
        "vision_config": {
            **_TOWER,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "patch_size": 4,
            "position_embedding_size": 8,
        },
        "image_token_id": IMAGE,
        "video_token_id": 91,
        "boi_token_id": 92,
        "eoi_token_id": 93,
        "audio_token_id": 94,
    },
    "smolvlm": {
        "text_config": text("llama"),
        "vision_config": {**_TOWER, "model_type": "smolvlm_vision", "image_size": 28},
        "image_token_id": IMAGE,
        "pad_token_id": 0,
    },
    "internvl": {
        "text_config": text("qwen2"),
        "vision_config": {
            **_TOWER,
            "model_type": "internvl_vision",
            "image_size": [28, 28],
            "patch_size": [14, 14],
        },
        "image_token_id": IMAGE,
        "image_seq_length": 1,
    },
}
# Of those, what this version of transformers has.
SEEING = [name for name in CONFIGS if name in CONFIG_MAPPING]


def make_seeing(name: str, target: Path) -> Path:
    """A random model, made by the stock classes."""
    return write_random(AutoConfig.for_model(name, **CONFIGS[name]), target)


def make_talking(target: Path) -> Path:
    """A LLaVA with the tokenizer of `factories` and a processor, as one is published."""
    words = {"vocab_size": VOCAB, "max_position_embeddings": 1024}
    config = {**CONFIGS["llava"], "text_config": text("llama", **words), "image_token_index": 260}
    write_random(AutoConfig.for_model("llava", **config), target, torch.float32)
    write_tokenizer(target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    crop = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    # Of two classes the one that needs no torchvision, whose name transformers 5 changed.
    pil = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    images = pil(**crop)
    more = {"patch_size": 14, "vision_feature_select_strategy": "default"}
    LlavaProcessor(images, tokenizer, num_additional_image_tokens=1, **more).save_pretrained(target)
    return target


def picture(name: str, model: Any) -> dict[str, torch.Tensor]:
    """A prompt with a random picture in it, as a model's processor would give it."""
    generator = torch.Generator().manual_seed(2)

    def pixels(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    count = 1 if name in ("smolvlm", "internvl") else 4
    ids = torch.tensor([[5, 92, *[IMAGE] * count, 93, 17, 33, 8]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name.startswith("qwen"):
        inputs |= {"pixel_values": pixels(16, 1176), "image_grid_thw": torch.tensor([[1, 4, 4]])}
        if hasattr(model.model, "get_vision_position_ids"):  # of transformers 5
            inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    elif name == "mistral3":
        inputs |= {"pixel_values": pixels(1, 3, 56, 56), "image_sizes": torch.tensor([[56, 56]])}
    elif name == "gemma4":
        places = torch.tensor([[x, y] for y in range(6) for x in range(6)])[None]
        inputs |= {"pixel_values": pixels(1, 36, 48).sigmoid(), "image_position_ids": places}
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    elif name == "smolvlm":
        inputs["pixel_values"] = pixels(1, 1, 3, 28, 28)
    else:
        inputs["pixel_values"] = pixels(1, 3, 28, 28)
    if name == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    return inputs

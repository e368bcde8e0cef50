"""The runner's logits are PyTorch's, however the tokens come in; what it cannot take it refuses."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported_onnx import (
    ALL,
    WINDOWED,
    assert_close,
    few_of,
    onnx_directory,
    pair,
    random_ids,
)
from numpy.typing import NDArray

from spp_export.common.errors import CheckpointError, ModelError, UsageError
from spp_export.formats.onnx.options import ATTENTIONS, Attention
from spp_export.formats.onnx.runtime import Decoding, OrtModel
from spp_export.formats.onnx.runtime.cache import to_float32
from spp_export.models.loader import load_slim

pytestmark = pytest.mark.thinned(most=4)

BOTH_SIDES: tuple[Attention, ...] = ("gqa-bias", "standard")


@pytest.mark.parametrize(("case", "form"), few_of(ALL))
def test_one_pass_gives_the_logits_of_pytorch(case: str, form: Attention) -> None:
    both = pair(case, form)
    ids = random_ids(2, 17)
    found = both.model.logits(ids)
    assert found.dtype == np.float32
    assert_close(found, both.expected(ids))


@pytest.mark.parametrize(("case", "form"), few_of(ALL))
def test_tokens_fed_one_by_one_give_the_same(case: str, form: Attention) -> None:
    both = pair(case, form)
    ids = random_ids(2, 17, seed=1)
    decoding = both.model.start(2, 17)
    found = [decoding.feed(ids[:, :5])]
    found += [decoding.feed(ids[:, column : column + 1]) for column in range(5, 17)]
    assert_close(np.concatenate(found, axis=1), both.expected(ids))


@pytest.mark.parametrize("form", ATTENTIONS)
def test_a_single_row_takes_chunks(form: Attention) -> None:
    both = pair(WINDOWED, form)
    ids = random_ids(1, 20)
    decoding = both.model.start(1, 20)
    found = [decoding.feed(ids[:, a:b]) for a, b in ((0, 4), (4, 11), (11, 12), (12, 20))]
    assert_close(np.concatenate(found, axis=1), both.expected(ids))


@pytest.mark.parametrize(
    ("case", "form", "side"),
    few_of(
        [(*each, "right") for each in ALL]
        + [(*each, "left") for each in ALL if each[1] in BOTH_SIDES]
    ),
)
def test_rows_of_unequal_length_are_each_as_alone(case: str, form: Attention, side: str) -> None:
    both = pair(case, form)
    texts, lengths = random_ids(3, 16), [9, 4, 7]
    decoding = both.model.start(3, 9 + 7)
    ids, mask = _pad(texts, lengths, 9, side)
    found = [list(row[real]) for row, real in zip(decoding.feed(ids, mask), mask, strict=True)]
    for step in range(7):
        new = np.array([[row[n + step]] for row, n in zip(texts, lengths, strict=True)])
        for row, logits in zip(found, decoding.feed(new), strict=True):
            row.append(logits[0])
    for row, logits, length in zip(texts, found, lengths, strict=True):
        assert_close(np.array(logits), both.expected(row[None, : length + 7])[0])


@pytest.mark.parametrize("form", ATTENTIONS)
def test_a_row_may_pause_and_start_late(form: Attention) -> None:
    """Ids that the mask calls padding leave no trace in what comes after."""
    both = pair(WINDOWED, form)
    texts = random_ids(2, 12)
    decoding = both.model.start(2, 30)
    read: list[list[Any]] = [[], []]
    for step in range(18):
        real = np.array([[step % 3 != 1], [step > 5]])
        ids = np.array([[texts[row, len(read[row])] if real[row] else 9] for row in (0, 1)])
        logits = decoding.feed(ids, real)
        for row in (0, 1):
            if real[row]:
                read[row].append(logits[row, 0])
    assert [len(row) for row in read] == [12, 12]
    assert_close(np.array(read), both.expected(texts))


@pytest.mark.parametrize("form", ATTENTIONS)
def test_padding_at_the_end_of_a_chunk_is_forgotten(form: Attention) -> None:
    both = pair(WINDOWED, form)
    ids = random_ids(1, 13)
    decoding = both.model.start(1, 20)
    parts = [decoding.feed(ids[:, :6])]
    padded = np.concatenate([ids[:, 6:9], [[5, 6]]], axis=1)
    parts.append(decoding.feed(padded, [[1, 1, 1, 0, 0]])[:, :3])
    parts.append(decoding.feed(ids[:, 9:]))
    assert_close(np.concatenate(parts, axis=1), both.expected(ids))


@pytest.mark.parametrize("form", BOTH_SIDES)
def test_a_mask_with_holes(form: Attention) -> None:
    both = pair(WINDOWED, form)
    ids, mask = random_ids(1, 15), np.ones((1, 15), np.int64)
    mask[0, [0, 4, 5, 11]] = 0
    real = mask[0] == 1
    found = both.model.logits(ids, mask)[:, real]
    assert_close(found, both.expected(ids[:, real]))


@pytest.mark.parametrize("mask", [[0, 1, 1], [0, 0, 1], [1, 0, 1]])
def test_gqa_refuses_padding_that_is_not_on_the_right_and_goes_on(mask: list[int]) -> None:
    both = pair(WINDOWED, "gqa")
    ids = random_ids(2, 4)
    decoding = both.model.start(2, 4)
    with pytest.raises(UsageError, match=r"on the right only.*--onnx-attention gqa-bias"):
        decoding.feed(ids[:, :3], [[1, 1, 1], mask])
    assert_close(decoding.feed(ids), both.expected(ids))


@pytest.mark.parametrize("form", ATTENTIONS)
def test_several_rows_take_chunks_in_the_standard_form_alone(form: Attention) -> None:
    both = pair(WINDOWED, form)
    ids = random_ids(2, 9)
    decoding = both.model.start(2, 9)
    decoding.feed(ids[:, :5])
    if form == "standard":
        assert_close(decoding.feed(ids[:, 5:]), both.expected(ids)[:, 5:])
        return
    with pytest.raises(UsageError, match=r"one token at a time.*got 4 for 2"):
        decoding.feed(ids[:, 5:])


@pytest.mark.parametrize("form", ATTENTIONS)
def test_capacity_is_kept(form: Attention) -> None:
    model = pair(WINDOWED, form).model
    decoding = model.start(1, 5)
    decoding.feed(random_ids(1, 4))
    with pytest.raises(UsageError, match="2 tokens after 4 exceed the 5"):
        decoding.feed(random_ids(1, 2))
    decoding.feed(random_ids(1, 1))
    with pytest.raises(UsageError, match="1 tokens after 5 exceed"):
        decoding.feed(random_ids(1, 1))


def test_context_length_is_kept() -> None:
    model = pair(WINDOWED, "gqa").model
    assert model.context_length == 1024
    model.start(1, 1024)
    with pytest.raises(UsageError, match="1025 tokens are more than the 1024"):
        model.start(1, 1025)
    with pytest.raises(UsageError, match="at least one"):
        model.start(0, 5)


@pytest.mark.parametrize("form", ATTENTIONS)
def test_the_whole_context_can_be_used(form: Attention) -> None:
    both = pair(WINDOWED, form)
    ids = random_ids(1, 1024)
    decoding = both.model.start(1, 1024)
    found = [decoding.feed(ids[:, :1022]), decoding.feed(ids[:, 1022:1023])]
    found.append(decoding.feed(ids[:, 1023:]))
    assert_close(np.concatenate(found, axis=1), both.expected(ids))


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[1, 263]], None, "vocabulary of 263"),
        ([[-1, 2]], None, "vocabulary of 263"),
        ([[1, 2], [1, 2]], None, "2 rows, expected 1"),
        ([1, 2], None, "shape"),
        ([[]], None, "shape"),
        ([[1, 2]], [[1, 1, 1]], "for the new tokens alone"),
        ([[1, 2]], [[1, 2]], "0 and 1"),
    ],
)
def test_odd_inputs_are_refused(ids: Any, mask: Any, message: str) -> None:
    decoding = pair(WINDOWED, "gqa").model.start(1, 8)
    with pytest.raises(UsageError, match=message) as caught:
        decoding.feed(ids, mask)
    assert "\n" not in str(caught.value)


def test_logits_outlive_what_made_them() -> None:
    both = pair(WINDOWED, "standard")
    decoding = both.model.start(1, 40)
    first = decoding.feed(random_ids(1, 8))
    before = first.copy()
    for _ in range(20):
        decoding.feed(random_ids(1, 1))
    del decoding
    gc.collect()
    np.testing.assert_array_equal(first, before)


@pytest.mark.parametrize("form", ATTENTIONS)
def test_decodings_of_a_model_do_not_meet(form: Attention) -> None:
    both = pair(WINDOWED, form)
    ids = random_ids(2, 10)
    decodings = [both.model.start(1, 10), both.model.start(1, 10)]
    found: list[list[NDArray[np.float32]]] = [[], []]
    for column in range(10):
        for row, decoding in enumerate(decodings):
            found[row].append(decoding.feed(ids[row : row + 1, column : column + 1])[0])
    assert_close(np.array(found)[:, :, 0], both.expected(ids))


@pytest.mark.parametrize("form", ATTENTIONS)
def test_fp16_is_as_near_as_pytorch_in_fp16(form: Attention) -> None:
    both = pair("qwen2-gqa-tied", form, "fp16")
    ids = random_ids(1, 16)
    decoding = both.model.start(1, 16)
    parts = [decoding.feed(ids[:, :8])] + [decoding.feed(ids[:, i : i + 1]) for i in range(8, 16)]
    found, exact = np.concatenate(parts, axis=1), both.expected(ids)
    with torch.no_grad():
        half = load_slim(both.slim, dtype=torch.float16)(torch.from_numpy(ids)).logits.numpy()
    assert found.dtype == np.float32
    assert 0 < abs(found - exact).max() < 2 * abs(half - exact).max() + 1e-3


def test_bfloat16_is_read_exactly() -> None:
    values = torch.tensor([[0.0, -1.5, 3.140625], [1e30, -1e-30, 65280.0]]).bfloat16()
    # The runner's memory for them is of float16, a type of the same size.
    stored = values.view(torch.int16).numpy().view(np.float16)
    found = to_float32(stored, "tensor(bfloat16)")
    np.testing.assert_array_equal(found, values.float().numpy())


@pytest.mark.parametrize(("case", "form"), few_of(ALL))
def test_sizes_are_those_of_the_checkpoint(case: str, form: Attention) -> None:
    both = pair(case, form)
    config = json.loads((both.slim / "config.json").read_text())
    layers = config["per_layer_config"]
    kept = tuple(layers[key]["num_key_value_heads"] for key in sorted(layers, key=int))
    assert both.model.kv_heads == kept
    assert both.model.attention == form
    assert both.model.head_dim == 16
    assert both.model.vocab_size == 263
    assert both.model.config["spp_onnx"]["precision"] == "fp32"


def test_a_directory_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: no such file"):
        OrtModel.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="no spp_onnx"):
        OrtModel.load(tmp_path)
    (tmp_path / "config.json").write_text('{"spp_onnx": {"attention": ["gqa"]}}')
    with pytest.raises(ModelError, match="malformed"):
        OrtModel.load(tmp_path)


@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "max_position_embeddings"])
@pytest.mark.parametrize("value", [None, 0, "3", True])
def test_a_config_without_its_sizes(tmp_path: Path, key: str, value: object) -> None:
    target = _changed(tmp_path, **{key: value})
    with pytest.raises(ModelError, match=key):
        OrtModel.load(target, threads=1)


def test_a_graph_of_another_depth(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not those of 2 layers"):
        OrtModel.load(_changed(tmp_path, num_hidden_layers=2), threads=1)


def test_running_needs_no_torch() -> None:
    directory = onnx_directory(WINDOWED, "gqa")
    code = (
        "import sys\nfrom spp_export.formats.onnx.runtime import OrtModel, generate\n"
        f"model = OrtModel.load({str(directory)!r}, threads=1)\n"
        "assert len(list(generate(model, [[5, 6]], max_new_tokens=3))) == 3\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_start_gives_a_decoding() -> None:
    decoding = pair(WINDOWED, "gqa").model.start(2, 7)
    assert isinstance(decoding, Decoding)
    assert (decoding.batch, decoding.capacity) == (2, 7)


def _changed(tmp_path: Path, **changes: object) -> Path:
    """A copy of a directory with other values in its config."""
    target = tmp_path / "changed"
    shutil.copytree(onnx_directory(WINDOWED, "gqa"), target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def _pad(
    texts: NDArray[np.int64], lengths: list[int], width: int, side: str
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Ids and mask [B, width] of the texts' first tokens; padding is a token that could matter."""
    ids, mask = np.full((len(texts), width), 7), np.zeros((len(texts), width), bool)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, place] = texts[row, :length]
        mask[row, place] = True
    return ids, mask

"""Every family in llama.cpp: log-probabilities of all tokens against transformers'."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import gguf
import pytest
import torch
from factories import random_layers, shape_of, uniform_layers, write_slim
from gguf_cases import FAMILIES, make

from spp_export.common.errors import ModelError
from spp_export.formats.gguf import GgufOptions
from spp_export.formats.gguf.contents import gguf_contents
from spp_export.formats.gguf.header import read_gguf
from spp_export.formats.gguf.llama_cpp import LlamaCpp
from spp_export.formats.gguf.options import QUANTS
from spp_export.formats.gguf.weights import GgufWeights
from spp_export.formats.gguf.write import write_gguf
from spp_export.models.checkpoint.checkpoint import open_checkpoint
from spp_export.models.loader import load_slim

pytestmark = pytest.mark.thinned(most=6)

pytest.importorskip("xllamacpp")
# What llama.cpp loads each as: dense, uniform and per-layer.
ARCHITECTURES = {
    "llama": ("llama", "llama", "deci"),
    "mistral": ("llama", "llama", "deci"),
    "qwen2": ("llama", "qwen2", "deci"),
    "qwen3": ("qwen3", "qwen3", "openelm"),
}
PROMPT = list(range(5, 42))
NEW = 12


def written(checkpoint: Path, options: GgufOptions = GgufOptions()) -> Path:  # noqa: B008  frozen
    decoder = open_checkpoint(checkpoint)
    out = checkpoint / "gguf"
    out.mkdir()
    write_gguf(decoder, gguf_contents(decoder, options, "tiny"), out)
    return out / "model.gguf"


def slim(layout: str, dense: Path, target: Path) -> Path:
    """For qwen2, the uniform one is as wide as the hidden state, which its own loader wants."""
    shape = shape_of(dense)
    if layout == "dense":
        return dense
    if layout == "per-layer":
        return write_slim(target, dense, random_layers(shape, 3))
    kv_heads, group = {"qwen2": (2, 2)}.get(shape.model_type, (max(shape.kv_heads // 2, 1), 1))
    layers = uniform_layers(shape, 1, kv_heads=kv_heads, group_size=group, channels=40)
    return write_slim(target, dense, layers, "uniform")


@pytest.mark.parametrize("layout", ["dense", "uniform", "per-layer"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name: str, layout: str, tmp_path: Path) -> None:
    checkpoint = slim(layout, make(name, tmp_path), tmp_path / "slim")
    path = written(checkpoint)

    with closing(LlamaCpp(path, 64, 1)) as model:
        steps = model.generate(PROMPT, NEW, 263)

    ids = PROMPT + [step.token for step in steps]
    with torch.no_grad():
        logits = load_slim(checkpoint, dtype=torch.float64)(torch.tensor([ids[:-1]])).logits
    wanted = logits[0, -NEW:].log_softmax(-1)
    found = torch.empty(NEW, 263, dtype=torch.float64)
    for row, step in zip(found, steps, strict=True):
        row[[token for token, _ in step.likeliest]] = torch.tensor(
            [value for _, value in step.likeliest], dtype=torch.float64
        )
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)
    assert [step.token for step in steps] == wanted.argmax(-1).tolist()
    position = ["dense", "uniform", "per-layer"].index(layout)
    family = name.partition("-")[0]
    architecture = gguf.GGUFReader(path).fields["general.architecture"].contents()
    assert architecture == ARCHITECTURES[family][position]


def test_linear_scaling(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
    dense = make("qwen3-gqa-tied", tmp_path, rope_parameters=rope)
    with closing(LlamaCpp(written(dense), 64, 1)) as model:
        (step,) = model.generate(PROMPT, 1, 263)
    with torch.no_grad():
        logits = load_slim(dense, dtype=torch.float64)(torch.tensor([PROMPT])).logits
    wanted = logits[0, -1].log_softmax(-1)
    assert all(abs(float(wanted[token]) - value) < 2e-4 for token, value in step.likeliest)


@pytest.mark.parametrize("quant", [*QUANTS, None])
def test_forms_in_fewer_bits(quant, tmp_path: Path) -> None:
    """PyTorch with the file's weights: llama.cpp rounds activations too, which is little."""
    dense = make("llama-mha-tied", tmp_path)
    options = GgufOptions(quant=quant) if quant else GgufOptions("fp16")
    path = written(dense, options)
    with closing(LlamaCpp(path, 64, 1)) as model:
        (step,) = model.generate(PROMPT, 1, 263)
    contents = gguf_contents(open_checkpoint(dense), options, "tiny")
    weights = GgufWeights(read_gguf(path.parent), contents.tensors)
    torch_model = load_slim(dense, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in torch_model.named_parameters():
            parameter.copy_(torch.from_numpy(weights.read(name)))
        wanted = torch_model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    found = torch.tensor([value for _, value in step.likeliest], dtype=torch.float64)
    there = wanted[[token for token, _ in step.likeliest]]
    assert float((there.exp() * (there - found)).sum()) < (0.01 if quant else 1e-5)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("mistral-window-tied", "mistral sees the last 6 tokens only"),
        ("qwen2-mha-window", "qwen2 sees the last 6 tokens only"),
        ("qwen3-mqa-bias", "architecture qwen3 has no biases"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(name: str, match: str, tmp_path: Path) -> None:
    dense = make(name, tmp_path)
    with pytest.raises(ModelError, match=match) as caught:
        written(dense)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("quant", [None, "q8_0"])
def test_untied_qwen3_has_mlps_of_one_width_where_layers_differ(quant, tmp_path: Path) -> None:
    """Narrower ones are filled up with zeros, and read back without."""
    dense = make("qwen3-gqa-tied", tmp_path, tied=False)
    checkpoint = write_slim(tmp_path / "slim", dense, random_layers(shape_of(dense), 3))
    options = GgufOptions(quant=quant) if quant else GgufOptions("fp32")
    decoder = open_checkpoint(checkpoint)
    path, contents = written(checkpoint, options), gguf_contents(decoder, options, "tiny")
    assert contents.architecture.name == "step35"
    weights = GgufWeights(read_gguf(path.parent), contents.tensors)
    for name in weights.names:
        assert weights.read(name).shape == decoder.tensors[name].shape
    with closing(LlamaCpp(path, 64, 1)) as model:
        (step,) = model.generate(PROMPT, 1, 263)
    with torch.no_grad():
        logits = load_slim(checkpoint, dtype=torch.float64)(torch.tensor([PROMPT])).logits
    wanted = logits[0, -1].log_softmax(-1)
    worst = max(abs(float(wanted[token]) - value) for token, value in step.likeliest)
    assert worst < (0.5 if quant else 2e-4)


def test_a_file_that_llama_cpp_refuses_is_an_error_here(tmp_path: Path) -> None:
    """Its abort() ends only the process it runs in."""
    path = written(make("llama-mha-tied", tmp_path))
    data = path.read_bytes().replace(b"attn_output", b"attn_outpux")
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.gguf: llama\.cpp ended with status"):
        LlamaCpp(path, 64, 1)

"""Three ways to the same numbers: float64 truth, the plain expression in a dtype, the fast ones.

A fast implementation may be no further from the truth than the plain one in the same dtype, but for
the rounding of its result and of sums in float32. Triton's kernels run on a card, and without one
in triton's interpreter.
"""

from __future__ import annotations

import itertools
import math
import sys
from importlib.util import find_spec

import pytest
import torch
from pairs import few

from spp_kernels import ragged_attention as package
from spp_kernels.ragged_attention import choice, ragged_attention
from spp_kernels.ragged_attention.problem import visible

pytestmark = pytest.mark.thinned

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = [
    "sdpa",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    ),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# group sizes, (B, S, T, D), options
CASES = {
    "decode": ([3, 1, 2], (1, 1, 197, 64), {}),
    "decode-one-group": ([1], (2, 1, 70, 80), {}),
    "decode-one-position": ([5, 1, 1, 7], (1, 1, 1, 16), {}),
    "decode-left-padding": ([8, 8], (2, 1, 130, 16), {"starts": [129, 37]}),
    "decode-part-filled": ([2, 0, 3], (2, 1, 131, 20), {"starts": [4, 0], "ends": [67, 1]}),
    "decode-window": ([5, 1, 1, 7], (1, 1, 300, 16), {"window": 70}),
    "few-queries": ([3, 1, 2], (1, 3, 133, 128), {}),
    "few-queries-padding": ([1, 4], (2, 5, 90, 16), {"starts": [88, 3], "window": 33}),
    "prefill": ([3, 1, 2], (1, 77, 77, 64), {}),
    "prefill-one-group": ([1], (2, 131, 131, 16), {}),
    "prefill-even": ([8, 8], (1, 33, 33, 80), {}),
    "prefill-left-padding": ([5, 1, 1, 7], (2, 37, 37, 16), {"starts": [0, 29]}),
    "prefill-on-a-past": ([3, 1, 2], (1, 41, 150, 16), {}),
    "prefill-window": ([1, 4], (2, 70, 90, 16), {"starts": [0, 21], "window": 9}),
    "prefill-scaled": ([2, 3], (1, 20, 20, 16), {"scale": 0.7}),
    "not-causal": ([1, 4], (2, 29, 67, 16), {"causal": False, "starts": [60, 0]}),
}


def problem(name, dtype):
    """(query, key, value, group_of_query) and options of a case; query heads are out of order."""
    sizes, (batch, queries, keys, width), options = CASES[name]
    group_of_query = [group for group, size in enumerate(sizes) for _ in range(size)]
    group_of_query = group_of_query[::2] + group_of_query[1::2]
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, len(group_of_query), queries, width)] + [(batch, len(sizes), keys, width)] * 2
    tensors = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
    options = {
        key: torch.tensor(value, device=DEVICE) if isinstance(value, list) else value
        for key, value in options.items()
    }
    return (*tensors, group_of_query), options


def plain(query, key, value, group_of_query, *, starts=None, ends=None, **options):
    """The expression that models are written with, every product in the inputs' dtype."""
    scale = options.get("scale", 1 / math.sqrt(query.shape[3]))
    causal, window = options.get("causal", True), options.get("window")
    lengths = (query.shape[2], key.shape[2])
    seen = visible(*lengths, starts, ends, causal, window, query.device)[:, None]
    scores = query @ key[:, group_of_query].transpose(2, 3) * scale
    weights = scores.masked_fill(~seen, -math.inf).softmax(dim=3, dtype=torch.float32)
    weights = weights.masked_fill(~seen.any(dim=3, keepdim=True), 0).to(query.dtype)
    return weights @ value[:, group_of_query]


def truth(query, key, value, group_of_query, **options):
    exact = (query.double(), key.double(), value.double())
    return ragged_attention(*exact, group_of_query, **options, implementation="naive")


def check_error(found, expected, arguments, options):
    query, _, value, _ = arguments
    allowed = (plain(*arguments, **options).double() - expected).abs().max()
    allowed += torch.finfo(query.dtype).eps * expected.abs().max()
    allowed += torch.finfo(torch.float32).eps * value.abs().max()
    error = (found.double() - expected).abs().max()
    assert error <= allowed, f"error {error:.2e}, {error / allowed:.2f} of what is allowed"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    few(itertools.product(CASES, DTYPES), set),
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_no_further_from_the_truth_than_the_plain_expression(name, dtype, implementation):
    arguments, options = problem(name, dtype)
    expected = truth(*arguments, **options)
    found = ragged_attention(*arguments, **options, implementation=implementation)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    check_error(found, expected, arguments, options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["decode-part-filled", "few-queries-padding", "prefill-window"])
def test_what_lies_outside_has_no_effect(name, implementation):
    """NaN before `starts`, from `ends` on, and around the tensors in storages larger than they."""
    (query, key, value, group_of_query), options = problem(name, torch.float32)
    clean = ragged_attention(
        query, key, value, group_of_query, **options, implementation=implementation
    )
    position = torch.arange(key.shape[2], device=DEVICE)
    hidden = position < options["starts"][:, None]
    if "ends" in options:
        hidden = hidden | (position >= options["ends"][:, None])
    key, value = (
        inside_poison(tensor.masked_fill(hidden[:, None, :, None], math.nan))
        for tensor in (key, value)
    )
    found = ragged_attention(
        inside_poison(query), key, value, group_of_query, **options, implementation=implementation
    )
    torch.testing.assert_close(found, clean, rtol=1e-6, atol=1e-6)


def inside_poison(tensor):
    """The same numbers inside a storage of NaN, one larger on either side of each axis."""
    larger = tensor.new_full([size + 2 for size in tensor.shape], math.nan)
    view = larger[tuple(slice(1, -1) for _ in tensor.shape)]
    return view.copy_(tensor)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["decode", "prefill-on-a-past"])
def test_strides_do_not_matter(name, implementation):
    (query, key, value, group_of_query), options = problem(name, torch.float32)
    clean = ragged_attention(
        query, key, value, group_of_query, **options, implementation=implementation
    )
    by_position = query.transpose(1, 2).contiguous().transpose(1, 2)
    by_width = key.transpose(2, 3).contiguous().transpose(2, 3)
    joined = torch.cat((value, value), dim=3)[..., : value.shape[3]]
    found = ragged_attention(
        by_position, by_width, joined, group_of_query, **options, implementation=implementation
    )
    torch.testing.assert_close(found, clean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("queries", [1, 6])
def test_a_row_does_not_depend_on_its_batch(queries, implementation):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, queries, 16, generator=generator).to(DEVICE)
    key = torch.randn(2, 2, 90, 16, generator=generator).to(DEVICE)
    starts = torch.tensor([21, 0], device=DEVICE)
    groups, way = [0, 0, 0, 1], {"implementation": implementation}
    found = ragged_attention(query, key, key, groups, starts=starts, **way)
    short = key[:1, :, 21:]
    alone = ragged_attention(query[:1], short, short, groups, **way)
    torch.testing.assert_close(found[:1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("queries", [2, 7])
def test_queries_that_see_nothing_give_zeros(queries, implementation):
    query = torch.randn(2, 3, queries, 16, device=DEVICE)
    key = torch.randn(2, 2, 80, 16, device=DEVICE)
    starts, ends = torch.tensor([80, 0]).to(DEVICE), torch.tensor([80, 1]).to(DEVICE)
    found = ragged_attention(
        query, key, key, [0, 1, 1], starts=starts, ends=ends, implementation=implementation
    )
    assert (found[0] == 0).all()
    assert (found[1, :, :-1] == 0).all()
    torch.testing.assert_close(found[1, :, -1], key[1, [0, 1, 1], 0])


def test_triton_is_chosen_inside_a_measured_region_alone(monkeypatch):
    region = choice.Region((9, 0), batch=range(1, 9), queries=range(1, 2), keys=range(100, 200))
    monkeypatch.setattr(choice, "TRITON_WINS", (region,))
    inside = {"capability": (9, 0), "batch": 8, "queries": 1, "keys": 100}
    assert choice.measured_faster(**inside)
    for change in ({"capability": (8, 0)}, {"batch": 9}, {"queries": 2}, {"keys": 200}):
        assert not choice.measured_faster(**{**inside, **change})


def test_the_cpu_and_float64_never_choose_triton():
    for tensor in (torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 8, device=DEVICE).double()):
        assert choice.fastest(tensor, tensor) == "sdpa"


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_triton_refuses_float64():
    tensor = torch.zeros(1, 1, 1, 16, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match=r"float32, float16 or bfloat16, got torch\.float64"):
        ragged_attention(tensor, tensor, tensor, [0], implementation="triton")


def test_gradients_flow_after_a_call_in_inference_mode():
    query = torch.randn(1, 5, 3, 16, device=DEVICE, requires_grad=True)
    key = torch.randn(1, 2, 3, 16, device=DEVICE)
    groups = [1, 0, 1, 1, 1]  # of no other test: tables are kept
    with torch.inference_mode():
        ragged_attention(query, key, key, groups)
    ragged_attention(query, key, key, groups).sum().backward()
    assert query.grad.abs().sum() > 0


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_triton_has_no_gradients_and_says_so():
    tensor = torch.zeros(1, 1, 1, 16, device=DEVICE, requires_grad=True)
    with pytest.raises(ValueError, match="no gradients"):
        ragged_attention(tensor, tensor, tensor, [0], implementation="triton")
    assert choice.fastest(tensor, tensor) == "sdpa"


def test_torch_compiles_the_switch_whole():
    arguments, options = problem("decode-left-padding", torch.float32)
    compiled = torch.compile(ragged_attention, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments, **options), ragged_attention(*arguments, **options))


def test_only_the_kernels_need_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, f"{package.__name__}.triton", raising=False)
    monkeypatch.delattr(package, "triton", raising=False)
    arguments, options = problem("decode", torch.float32)
    assert ragged_attention(*arguments, **options).isfinite().all()
    with pytest.raises(ModuleNotFoundError, match="triton"):
        ragged_attention(*arguments, **options, implementation="triton")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA card")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("batch", "queries", "keys"),
    [(1, 1, 32_771), (16, 1, 2_049), (2, 1_025, 1_025), (1, 65, 8_000)],
)
def test_sizes_of_real_models(batch, queries, keys, dtype, implementation):
    sizes = [4, 4, 1, 4, 2, 0, 3, 4]
    group_of_query = [group for group, size in enumerate(sizes) for _ in range(size)]
    shapes = [(batch, len(group_of_query), queries, 128)] + [(batch, len(sizes), keys, 128)] * 2
    arguments = [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]
    options = {"starts": torch.arange(batch, device=DEVICE) * 100}
    expected = truth(*arguments, group_of_query, **options)
    found = ragged_attention(*arguments, group_of_query, **options, implementation=implementation)
    check_error(found, expected, (*arguments, group_of_query), options)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA card")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_cuda_graph_follows_starts_and_ends(implementation):
    query = torch.randn(2, 6, 1, 64, device=DEVICE, dtype=torch.float16)
    key = torch.randn(2, 3, 512, 64, device=DEVICE, dtype=torch.float16)
    starts, ends = torch.tensor([0, 5]).to(DEVICE), torch.tensor([400, 300]).to(DEVICE)
    options = {"starts": starts, "ends": ends, "implementation": implementation}
    groups = [0, 0, 0, 1, 2, 2]
    ragged_attention(query, key, key, groups, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ragged_attention(query, key, key, groups, **options)
    ends += 1
    graph.replay()
    torch.testing.assert_close(found, ragged_attention(query, key, key, groups, **options))

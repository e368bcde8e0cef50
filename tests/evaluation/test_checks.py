"""The checks pass on every good model and fail on each defect, whatever the precision."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from factories import CASES, make_checkpoint, mask_in_torch, random_layers, shape_of, write_slim
from pairs import few, of_family
from untouched import assert_untouched, compensation, logits, plan_of, state

from spp_export.calibration.activations import TokenBatch
from spp_export.common.json_files import dump_json
from spp_export.evaluation.parity import (
    Check,
    Errors,
    ReferenceLogits,
    VerifyReport,
    check_cache,
    check_causality,
    check_parity,
    real_logits,
    reference_logits,
)
from spp_export.models.families import FAMILIES, Role
from spp_export.models.loader import load_dense, load_slim

pytestmark = pytest.mark.thinned(most=4)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def padded_batch(lengths=(40, 25, 7), seed=1):
    width = max(lengths)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 259, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return TokenBatch(ids * mask, mask, tuple(range(len(lengths))))


BATCHES = [padded_batch(), padded_batch((12, 12), seed=2)]


class Pair:
    """A dense checkpoint and a slim one of a random plan, loaded in a precision."""

    def __init__(self, dense, seed=0, channels=True):
        self.dense, self.shape = dense, shape_of(dense)
        self.family = FAMILIES[self.shape.model_type]
        self.layers = random_layers(self.shape, seed, channels=channels)
        self.slim = write_slim(dense.parent / f"slim{seed}", dense, self.layers)

    def reference(self, dtype, compensated=None):
        model = load_dense(self.dense, dtype)
        return reference_logits(
            model, self.family, self.shape, plan_of(self.layers), BATCHES, compensated
        )

    def checks(self, slim, reference):
        return {
            "parity": check_parity(slim, reference),
            "causality": check_causality(slim, BATCHES[0]),
            "cache": check_cache(slim, BATCHES[0], reference.rounding),
        }


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def any_pair(request, tmp_path_factory):
    return Pair(request.param.make(tmp_path_factory.mktemp("pair")))


@pytest.mark.parametrize(
    ("any_pair", "dtype"),
    few(itertools.product(CASES, DTYPES), of_family),
    indirect=["any_pair"],
    ids=str,
)
def test_a_good_model_passes_everything(any_pair, dtype):
    slim = load_slim(any_pair.slim, dtype)
    for check in any_pair.checks(slim, any_pair.reference(dtype)).values():
        assert check.passed, check.describe()
        assert check.found <= check.limit


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two groups of three heads, few enough removed that every defect has something to break."""
    dense = make_checkpoint(
        tmp_path_factory.mktemp("pair"), "llama", kv_heads=4, query_heads=8, layers=3
    )
    found = Pair(dense, seed=3)
    assert all(len(layer.query_heads) > 1 for layer in found.layers)
    return found


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def reference(pair, request):
    return pair.reference(request.param)


@pytest.fixture
def slim(pair, reference):
    return load_slim(pair.slim, reference.same[0].dtype)


def attends_to_everything(slim):
    """What a layer without an attention implementation does."""
    attention = slim.model.layers[1].self_attn
    attention.is_causal = False
    attention.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "attention_mask": None}), with_kwargs=True
    )


def heads_in_another_order(slim):
    weight = slim.model.layers[0].self_attn.o_proj.weight
    dim = slim.config.head_dim
    with torch.no_grad():
        weight.copy_(
            torch.cat([weight[:, dim : 2 * dim], weight[:, :dim], weight[:, 2 * dim :]], 1)
        )


def a_stale_cache(slim):
    """Every layer hands out the keys and values that it was given one step ago."""
    for layer in slim.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            last = []

            def stale(_module, _args, output, last=last):
                last.append(output)
                return last[-2][:, -1:] if output.shape[1] == 1 else output

            projection.register_forward_hook(stale)


def positions_from_zero(slim):
    """Decoding that forgets how long the prompt was."""

    def forget(_module, args, kwargs):
        if kwargs.get("past_key_values") is not None:
            count = kwargs["input_ids"].shape[1]
            kwargs = {**kwargs, "position_ids": torch.arange(count)[None]}
        return args, kwargs

    slim.model.register_forward_pre_hook(forget, with_kwargs=True)


def not_a_number(slim):
    with torch.no_grad():
        slim.model.layers[2].mlp.up_proj.weight[0, 0] = math.nan


def infinite(slim):
    with torch.no_grad():
        slim.model.layers[0].self_attn.o_proj.bias = torch.nn.Parameter(
            torch.full_like(slim.model.norm.weight, math.inf)
        )


def a_column_too_far(slim):
    """Every column of one o_proj moved by one, as an index that counts from one would."""
    weight = slim.model.layers[1].self_attn.o_proj.weight
    with torch.no_grad():
        weight.copy_(weight.roll(1, dims=1))


@pytest.mark.parametrize(
    ("defect", "caught"),
    [
        (attends_to_everything, {"parity", "causality"}),
        (heads_in_another_order, {"parity"}),
        (a_stale_cache, {"cache"}),
        (positions_from_zero, {"cache"}),
        (not_a_number, {"parity", "causality", "cache"}),
        (infinite, {"parity", "causality", "cache"}),
        (a_column_too_far, {"parity"}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_defect_is_caught_by_its_check(pair, slim, reference, defect, caught):
    defect(slim)
    checks = pair.checks(slim, reference)
    failed = {name for name, check in checks.items() if not check.passed}
    assert caught <= failed
    if defect is not attends_to_everything:  # that one changes what decoding sees, too
        assert failed == caught


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_one_column_of_one_projection_is_seen(pair, dtype):
    """In half precision rounding hides less than a column: float32 is what export computes in."""
    reference, slim = pair.reference(dtype), load_slim(pair.slim, dtype)
    weight = slim.model.layers[1].self_attn.o_proj.weight
    with torch.no_grad():
        weight[:, 3] *= 1.01
    check = check_parity(slim, reference)
    assert not check.passed
    assert check.found > 10 * check.limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_oracle_that_is_not_finite_proves_nothing(pair, dtype):
    """The dense checkpoint itself is broken: no limit can be stated, so nothing passes."""
    broken = load_dense(pair.dense, dtype)
    slim = load_slim(pair.slim, dtype)
    with torch.no_grad():
        broken.model.norm.weight[0] = slim.model.norm.weight[0] = math.nan
    reference = reference_logits(
        broken, pair.family, pair.shape, plan_of(pair.layers), BATCHES, None
    )
    assert reference.rounding == Errors(math.inf, math.inf)
    for check in pair.checks(slim, reference).values():
        assert not check.passed


def test_rounding_is_the_distance_of_the_two_precisions(pair):
    reference = pair.reference(torch.bfloat16)
    pairs = zip(reference.same, reference.exact, strict=True)
    tokens = torch.cat([(same.double() - exact).abs().amax(-1) for same, exact in pairs])
    found = reference.rounding
    assert found.largest == tokens.max() > found.usual > 0
    assert (tokens <= found.usual).double().mean() == pytest.approx(0.9, abs=1 / len(tokens))
    assert pair.reference(torch.float64).rounding == Errors()
    assert ReferenceLogits((), (), ()).rounding == Errors()


def test_a_token_where_rounding_is_amplified_is_no_fault():
    """One of forty is a hundred times as far off as the others, in the oracle a tenth of that; what
    is off at more tokens, or by more than chance, is."""
    oracle = torch.full((40,), 1e-5)
    oracle[7] = 1e-4
    rounding = Errors.of_tokens(oracle)
    found = torch.full((40,), 1.5e-5)
    found[7] = 1e-3

    def passes(errors):
        return Errors.of_tokens(errors).check("it", rounding, 2, 1e-6, "").passed

    assert passes(found)
    for wrong in (0.1, math.nan, math.inf):
        assert not passes(torch.where(torch.arange(40) == 3, wrong, found))
    assert not passes(torch.where(torch.arange(40) < 8, 1e-4, found))


def test_logits_of_the_oracle_are_those_of_the_masked_model_in_both_precisions(pair):
    reference = pair.reference(torch.float32)
    for dtype, found in ((torch.float32, reference.same), (torch.float64, reference.exact)):
        with mask_in_torch(load_dense(pair.dense, dtype), pair.layers) as model:
            for batch, values in zip(BATCHES, found, strict=True):
                assert values.dtype == dtype
                torch.testing.assert_close(values, *real_logits(model, [batch]))
    assert [values.shape[0] for values in reference.exact] == [72, 24]


def test_real_logits_leave_padding_out_and_do_not_depend_on_it(pair):
    model = load_dense(pair.dense, torch.float64)
    batch = padded_batch()
    found = next(real_logits(model, [batch])).split([40, 25, 7])
    for row, length in enumerate((40, 25, 7)):
        with torch.no_grad():
            alone = model(batch.input_ids[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(found[row], alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fails", [False, True])
def test_the_dense_model_comes_back_exactly(tmp_path, dtype, fails, monkeypatch):
    dense = make_checkpoint(
        tmp_path, "llama", kv_heads=2, query_heads=4, layers=2, tied=True, attention_bias=True
    )
    shape = shape_of(dense)
    layers = random_layers(shape, 1)
    model = load_dense(dense, dtype)
    before, plain = state(model), logits(model)

    def run():
        return reference_logits(
            model,
            FAMILIES["llama"],
            shape,
            plan_of(layers),
            BATCHES,
            compensation(shape, layers),
        )

    if fails:

        def refuse(model, batches):
            if next(model.parameters()).dtype == torch.float64:
                raise RuntimeError("out of memory")
            return [plain for _ in batches]

        monkeypatch.setattr("spp_export.evaluation.parity.real_logits", refuse)
        with pytest.raises(RuntimeError, match="out of memory"):
            run()
    else:
        run()
    # buffers are put back as copies
    assert_untouched(model, before, same_objects=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), plain)


def test_the_dense_model_comes_back_when_it_does_not_fit_in_memory(pair, monkeypatch):
    model = load_dense(pair.dense, torch.bfloat16)
    before = state(model)
    last, real = model.lm_head, type(model.lm_head)._apply

    def no_memory(self, fn, recurse=True):
        if self is last and no_memory.armed:
            no_memory.armed = False
            raise torch.OutOfMemoryError("no memory")
        return real(self, fn, recurse)

    no_memory.armed = True
    monkeypatch.setattr(type(last), "_apply", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        reference_logits(model, pair.family, pair.shape, plan_of(pair.layers), BATCHES, None)
    assert_untouched(model, before, same_objects=False)


@pytest.mark.parametrize("biased", [False, True])
def test_compensated_models_are_compared_with_the_compensated_oracle(pair, biased):
    slim = load_slim(pair.slim, torch.float32)
    compensated = compensation(pair.shape, pair.layers)
    for (index, role), projection in compensated.items():
        layer = slim.model.layers[index]
        module = layer.self_attn.o_proj if role is Role.OUTPUT else layer.mlp.down_proj
        module.weight = torch.nn.Parameter(projection.weight)
        module.bias = torch.nn.Parameter(projection.bias)
    assert check_parity(slim, pair.reference(torch.float32, compensated)).passed
    assert not check_parity(slim, pair.reference(torch.float32)).passed
    module.bias = None
    assert not check_parity(slim, pair.reference(torch.float32, compensated)).passed


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_shortest_texts_can_be_checked(pair, length):
    slim, batch = load_slim(pair.slim), padded_batch((length,))
    assert check_causality(slim, batch).passed
    assert check_cache(slim, batch).passed


@pytest.mark.parametrize("ids", [[5, 5, 5, 5, 5, 5], [7, 8, 9, 4, 4, 4], [1, 2, 3, 5, 6, 5]])
def test_a_suffix_that_reads_the_same_backwards_still_changes(pair, ids):
    slim = load_slim(pair.slim)
    attends_to_everything(slim)
    batch = TokenBatch(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long), (0,))
    assert not check_causality(slim, batch).passed


def test_reports_say_what_was_found_and_are_json_even_where_it_is_infinite():
    good = Check("shapes", True, detail="9 tensors")
    bad = Check("parity", False, math.inf, 1.23456e-4, "8 tokens")
    report = VerifyReport((good, bad), {"reference": "float64"})
    assert not report.passed
    assert report.failures == (bad,)
    assert VerifyReport((good,)).passed
    assert bad.describe() == "found inf, at most 0.000123; 8 tokens."
    assert good.describe() == "9 tensors."
    content = json.loads(dump_json(report.to_dict()))
    assert content["passed"] is False
    assert content["reference"] == "float64"
    assert content["checks"][0] == {"name": "shapes", "passed": True, "detail": "9 tensors"}
    assert content["checks"][1]["found"] is None
    assert content["checks"][1]["limit"] == 1.235e-4

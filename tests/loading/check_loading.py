"""Load prebuilt slim checkpoints in whatever transformers is installed and check what they compute.

    python tests/loading/build_loading.py OUT                 # once, with the project's own version
    python tests/loading/check_loading.py OUT                 # with the files beside the weights
    python tests/loading/check_loading.py OUT --registered    # with the classes of spp_export

A script, not a test module: `make test-all` runs it in environments with other versions, where only
torch and transformers need be installed. Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

# Models of float64 weights still normalise and take softmax in float32, so versions may differ by
# the rounding of one float32 operation; a wrong rotary base or mask is off by more than 0.01.
TOLERANCE = 1e-5
OLD = transformers.__version__.startswith("4.")
MIDDLE = transformers.__version__.startswith("5.17.")
# What stock models of transformers 4 do otherwise: an activation in bfloat16, whatever was asked;
# experts with biases, which those of 5 do not have; convolutions that see padding; a mask that is
# not as long as the cache.
OTHER_IN_OLD = {"apertus", "ernie4_5_moe", "falcon_h1", "lfm2"}
# Stock models of transformers 4 that fail in float64.
SINGLE_IN_OLD = {"deepseek_v3", "dots1", "glm4_moe", "mpt"}
SINGLE_TOLERANCE = 1e-4
# A stock model whose recurrence is in float32 in transformers 4, whatever was asked: dense ones are
# up to 3e-4 from those of 5.
COARSE_IN_OLD = {"qwen3_next"}
COARSE_TOLERANCE = 1e-3
# Stock models that fail with a static cache, or continue a text otherwise than with any other.
WITHOUT_STATIC_CACHE = {"gpt_neo"}
WITHOUT_STATIC_CACHE |= {"deepseek_v2", "deepseek_v3", "olmoe"} if OLD else set()
WITHOUT_STATIC_CACHE |= {"llama4_text"} if MIDDLE else set()
# Stock models whose cache does not follow the beams.
WITHOUT_CACHED_BEAMS = {"minimax"}
# Stock models that fail with any cache.
WITHOUT_CACHE: set[str] = {"falcon_h1"} if MIDDLE else set()
# Stock models that continue a row with padding otherwise with a cache than without.
OTHER_WITH_CACHE = {"minimax"}
PROMPTS = ("Sulfuric acid is", "The treaty of 1648 ended a war that")


class WrongResultError(Exception):
    """A checkpoint does not compute what it must."""


def main() -> int:
    """Check every checkpoint below the directory, one line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument(
        "--registered", action="store_true", help="import spp_export, no remote code"
    )
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if arguments.registered:
        import spp_export  # noqa: F401
    cases = sorted(path.parent for path in arguments.directory.glob("*/expected.safetensors"))
    failures = 0
    for case in cases:
        try:
            worst = check(case, trust=not arguments.registered)
            found = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
            print(f"ok     {case.name}: largest difference of logits {found}")
        except Exception as error:
            failures += 1
            print(f"FAILED {case.name}: {type(error).__name__}: {error}")
    how = "registered" if arguments.registered else "remote code"
    families = sorted(arguments.directory.glob("families/*"))
    missing = {path.name for path in families if path.name not in CONFIG_MAPPING}
    if OLD:
        missing |= OTHER_IN_OLD
    known = [path for path in families if path.name not in missing]
    for case in known:
        try:
            worst = check_family(case, trust=not arguments.registered)
            print(f"ok     {case.name}: largest difference of logits {worst:.1e}")
        except Exception as error:
            failures += 1
            print(f"FAILED {case.name}: {type(error).__name__}: {error}")
    absent = [path.name for path in families if path not in known]
    print(f"families that this version cannot compute: {', '.join(absent) or 'none'}")
    count = len(cases) + len(known)
    print(f"transformers {transformers.__version__}, {how}: {count} cases, {failures} failed")
    return int(failures > 0 or not cases)


def check(case: Path, trust: bool) -> dict[str, float]:
    """Largest difference of logits by attention; WrongResultError where the checkpoint is wrong."""
    path, expected = case / "model", load_file(case / "expected.safetensors")
    config = json.loads((path / "config.json").read_text())
    options = {"trust_remote_code": True} if trust and "auto_map" in config else {}
    check_tokenizer(path, expected, options)
    # Eager attention of a padded row in float64 is NaN in stock models too: the mask's lowest
    # float64 becomes -inf in the float32 softmax. The last prompt is the longest, so unpadded.
    unpadded = {name: tensor[-1:] for name, tensor in expected.items()}
    worst = {}
    for attention, prompts in (("eager", unpadded), ("sdpa", expected)):
        model = load(path, attn_implementation=attention, **options)
        check_class(model, config, trust)
        worst[attention] = check_logits(model, prompts)
        check_causality(model, prompts)
        check_generation(model, prompts)
    check_switch(model, unpadded)
    check_base_model(path, model, expected, options)
    check_saved_again(model, expected, options)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        check_dtype(path, dtype, expected, options)
    return worst


def check_family(case: Path, trust: bool) -> float:
    """Largest difference of logits; WrongResultError where the checkpoint is wrong."""
    path, expected = case / "model", load_file(case / "expected.safetensors")
    options: dict[str, Any] = {"trust_remote_code": True} if trust else {}
    # One row is of a model with capped scores, which some versions leave uncapped but for eager.
    if len(expected["input_ids"]) == 1:
        options["attn_implementation"] = "eager"
    if OLD and path.parent.name in SINGLE_IN_OLD:
        options["dtype"] = torch.float32
    model = load(path, **options)
    worst = check_logits(model, expected)
    if path.parent.name in OTHER_WITH_CACHE:
        expected = {name: tensor[-1:] for name, tensor in expected.items()}
    cached = path.parent.name not in WITHOUT_CACHE
    static = path.parent.name not in WITHOUT_STATIC_CACHE | OTHER_WITH_CACHE
    beams = cached and path.parent.name not in WITHOUT_CACHED_BEAMS
    kinds = {"cached": cached, "static": static, "beams": beams}
    check_generation(model, expected, **kinds, eos_token_id=None)
    check_saved_again(model, expected, options)
    return worst


def load(path: Path, dtype: torch.dtype = torch.float64, **options: object) -> torch.nn.Module:
    """The causal language model of a checkpoint, with no tensor missing or left over."""
    model, report = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, output_loading_info=True, **options
    )
    if any(report.values()):
        raise WrongResultError(f"loading report is not empty: {report}")
    return model


def check_tokenizer(
    path: Path, expected: dict[str, torch.Tensor], options: dict[str, bool]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", **options)
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    require(torch.equal(batch.input_ids, expected["input_ids"]), "the tokenizer gives other ids")


def check_class(model: torch.nn.Module, config: dict[str, object], trust: bool) -> None:
    package = type(model).__module__.split(".")[0]
    ours = "transformers_modules" if trust else "spp_export"
    require(package == (ours if "auto_map" in config else "transformers"), f"class of {package}")
    first = model.model.layers[0].self_attn
    require(type(first).__module__.startswith("transformers.models."), "attention is not stock")


def check_logits(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> float:
    """Difference on real tokens; what padding attends to is nobody's business."""
    real = expected["attention_mask"].bool()
    with torch.no_grad():
        logits = model(expected["input_ids"], attention_mask=expected["attention_mask"]).logits
    worst = (logits[real] - expected["logits"][real]).abs().max().item()
    single = next(model.parameters()).dtype == torch.float32
    limit = SINGLE_TOLERANCE if single else TOLERANCE
    if OLD and model.config.model_type in COARSE_IN_OLD:
        limit = COARSE_TOLERANCE
    require(worst <= limit, f"logits differ by {worst:.1e}")
    return worst


def check_causality(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    ids = expected["input_ids"][-1:]
    half = ids.shape[1] // 2
    changed = torch.cat([ids[:, :half], ids[:, half:].flip(1)], dim=1)
    with torch.no_grad():
        first, second = (model(x).logits[:, :half] for x in (ids, changed))
        worst = (first - second).abs().max().item()
    require(worst <= TOLERANCE, f"later tokens change earlier logits by {worst:.1e}")


def check_generation(
    model: torch.nn.Module,
    expected: dict[str, torch.Tensor],
    *,
    cached: bool = True,
    static: bool = True,
    beams: bool = True,
    **options: object,
) -> None:
    """Greedy tokens of a left-padded batch with every cache; beams at least run the same twice."""
    count = expected["tokens"].shape[1] - expected["input_ids"].shape[1]
    inputs = {name: expected[name] for name in ("input_ids", "attention_mask")}
    common = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, **inputs}
    common |= options
    caches: dict[str, dict[str, Any]] = {"no cache": {"use_cache": False}}
    if cached:
        caches["dynamic cache"] = {}
    if cached and static:
        caches["static cache"] = {"cache_implementation": "static", "disable_compile": True}
    for name, cache in caches.items():
        tokens = model.generate(**common, **cache)
        require(torch.equal(tokens, expected["tokens"]), f"greedy tokens differ with {name}")
    found = [model.generate(**common, num_beams=2, use_cache=way) for way in (beams, False)]
    require(torch.equal(*found), "beam search differs with and without cache")


def check_switch(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    """Another attention implementation reaches every layer."""
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        seen = {layer.self_attn.config._attn_implementation for layer in model.model.layers}
        require(seen == {attention}, f"layers attend with {seen} after switching to {attention}")
        check_logits(model, expected)


def check_base_model(
    path: Path, model: torch.nn.Module, expected: dict[str, torch.Tensor], options: dict[str, bool]
) -> None:
    base = AutoModel.from_pretrained(path, dtype=torch.float64, **options)
    inputs = {name: expected[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        hidden = [decoder(**inputs).last_hidden_state for decoder in (base, model.model)]
    require(torch.equal(*hidden), "AutoModel computes other hidden states")


def check_saved_again(
    model: torch.nn.Module, expected: dict[str, torch.Tensor], options: dict[str, bool]
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        check_logits(load(Path(scratch), **options), expected)
        config = AutoConfig.from_pretrained(scratch, **options)
        before, after = (
            value.to_dict().get("per_layer_config") for value in (model.config, config)
        )
        require(before == after, "per_layer_config changes when saved again")


def check_dtype(
    path: Path, dtype: torch.dtype, expected: dict[str, torch.Tensor], options: dict[str, bool]
) -> None:
    """Finite logits that follow the expected ones as closely as the type allows."""
    model = load(path, dtype=dtype, **options)
    real = expected["attention_mask"].bool()
    with torch.no_grad():
        logits = model(expected["input_ids"], attention_mask=expected["attention_mask"]).logits
    require(logits.dtype == dtype, f"logits are {logits.dtype}, expected {dtype}")
    wanted = expected["logits"][real]
    error = (logits[real].double() - wanted).norm() / wanted.norm()
    require(error.item() < 32 * torch.finfo(dtype).eps, f"{dtype}: relative error {error:.1e}")


def require(condition: bool, complaint: str) -> None:
    """WrongResultError with the complaint unless the condition holds."""
    if not condition:
        raise WrongResultError(complaint)


if __name__ == "__main__":
    sys.exit(main())

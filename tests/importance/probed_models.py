"""Models in float64, padded batches, and Probe Pruning spelled out one unpadded text at a time."""

from __future__ import annotations

import math
from contextlib import contextmanager

import torch
from factories import mask_in_torch, shape_of

from spp_export.calibration.activations import TokenBatch
from spp_export.models.families import FAMILIES
from spp_export.models.loader import load_dense
from spp_export.planning import LayerPlan


def opened(path):
    """(model, family, shape) of a checkpoint."""
    shape = shape_of(path)
    return load_dense(path, torch.float64), FAMILIES[shape.model_type], shape


def padded(texts, *, width=None, filler=0):
    """One right-padded batch of texts, which are lists of token ids."""
    width = width or max(map(len, texts))
    ids = torch.full((len(texts), width), filler)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    return TokenBatch(ids, mask, tuple(range(len(texts))))


def some_texts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 260, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def run(model, batch):
    return model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).logits


@contextmanager
def captured(model, layer):
    """What passes through one layer: residuals, normed inputs, attention's call, consumer inputs.

    Read before any mask, as its hooks are the first.
    """
    seen = {}
    module = model.model.layers[layer]

    def keep(name):
        return lambda _module, args: seen.__setitem__(name, args[0])

    def attention(_module, args, kwargs):
        seen["heads x"] = kwargs["hidden_states"]
        seen["rotary"] = kwargs["position_embeddings"]

    handles = [
        module.input_layernorm.register_forward_pre_hook(keep("heads r")),
        module.post_attention_layernorm.register_forward_pre_hook(keep("channels r")),
        module.mlp.register_forward_pre_hook(keep("channels x")),
        module.self_attn.o_proj.register_forward_pre_hook(keep("heads a")),
        module.mlp.down_proj.register_forward_pre_hook(keep("channels a")),
        module.self_attn.register_forward_pre_hook(attention, with_kwargs=True),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def everything(shape):
    return [
        LayerPlan(tuple(range(shape.kv_heads)), tuple(range(shape.query_heads)), None)
        for _ in range(shape.num_layers)
    ]


def with_kept(layers, layer, kind, kept):
    """The plan with one layer's units of a kind replaced by those of a mask."""
    units = tuple(torch.as_tensor(kept).nonzero().flatten().tolist())
    old = layers[layer]
    new = (
        LayerPlan(old.kv_heads, units, old.channels)
        if kind == "heads"
        else LayerPlan(old.kv_heads, old.query_heads, units)
    )
    return [*layers[:layer], new, *layers[layer + 1 :]]


def chosen_positions(norms, longest=10**9):
    """Positions of one text by the residual norms of its tokens."""
    length = min(len(norms), longest)
    count = min(max(math.ceil(0.5 * length), 2), length)
    order = sorted(range(length), key=lambda s: -norms[s])
    kept = sorted(order[:count])
    return [0, *kept[1:]] if count <= 10 else kept


@torch.no_grad()
def probed_inputs(model, layer, seen, kind, positions):
    """The consumer's inputs [ks,C] when the model's own block runs on some positions only."""
    module = model.model.layers[layer]
    x = seen[f"{kind} x"][:, positions]
    with captured(model, layer) as inner:
        if kind == "heads":
            cos, sin = (part[:, positions] for part in seen["rotary"])
            distance = torch.tensor(positions)[:, None] - torch.tensor(positions)
            window = getattr(module.self_attn, "sliding_window", None)
            if model.config.model_type == "mistral":
                window = model.config.sliding_window
            seen_keys = (distance >= 0) & (distance < (window or 10**9))
            mask = torch.zeros(distance.shape, dtype=x.dtype).masked_fill(~seen_keys, -torch.inf)
            module.self_attn(
                hidden_states=x, position_embeddings=(cos, sin), attention_mask=mask[None, None]
            )
        else:
            module.mlp(x)
    return inner[f"{kind} a"][0]


def explicit_scores(moments_C, weight, units):
    """PPsp with every weight's score written out."""
    table = weight.double() ** 2 * moments_C.double()[None]
    return (table.view(len(table), units, -1) ** 2).sum((0, 2)).sqrt()


def fused(probed, history):
    alpha = probed / (probed + history + 1e-6)
    return alpha * probed + (1 - alpha) * history


@torch.no_grad()
def scenario_by_hand(model, shape, texts, *, kept_of, history=None, full=False, prunes=("heads",)):
    """Scores {kind: [L,units]} and the plan of the prefix; `kept_of(kind, layer, scores)`."""
    layers = everything(shape)
    scores = {"heads": [], "channels": []}
    for layer in range(shape.num_layers):
        module = model.model.layers[layer]
        for kind, consumer in (
            ("heads", module.self_attn.o_proj),
            ("channels", module.mlp.down_proj),
        ):
            sums, counts = {}, {}
            for text in texts:
                with captured(model, layer) as seen, mask_in_torch(model, layers):
                    model(torch.tensor([text]), use_cache=False)
                if full:
                    positions, values = range(len(text)), seen[f"{kind} a"][0]
                else:
                    norms = seen[f"{kind} r"][0].norm(dim=-1).tolist()
                    longest = 10**9 if history is None else history.positions
                    positions = chosen_positions(norms, longest)
                    values = probed_inputs(model, layer, seen, kind, positions)
                for position, value in zip(positions, values, strict=True):
                    sums[position] = sums.get(position, 0) + value**2
                    counts[position] = counts.get(position, 0) + 1
            total = 0
            for position in sums:
                moment = sums[position] / counts[position]
                if history is not None and not full:
                    moment = fused(moment, getattr(history, kind)[layer][position].double())
                total = total + moment
            units = shape.query_heads if kind == "heads" else shape.channels
            found = explicit_scores(total, consumer.weight, units)
            scores[kind].append(found)
            if kind in prunes:
                layers = with_kept(layers, layer, kind, kept_of(kind, layer, found))
    return {kind: torch.stack(values) for kind, values in scores.items()}, layers


def lowest_removed(counts):
    """Keeps the `counts[kind]` units of highest score in every layer."""

    def kept_of(kind, _layer, scores):
        kept = torch.zeros(len(scores), dtype=torch.bool)
        kept[scores.topk(counts[kind]).indices] = True
        return kept

    return kept_of


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

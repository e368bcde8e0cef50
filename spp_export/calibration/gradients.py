"""Backward passes over texts: first-order saliency of each weight and each unit, and how much the
loss feels a change at each token.

The loss of a text x is L_x, its mean next-token negative log-likelihood; the collection's is the
mean of L_x over the N texts that have a next token.

Memory: one fp32 number per weight of the seven projections, the gradient of one matrix at a time
in the model's dtype, and the activations and real-token logits of one batch. No other weight gets
a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from spp_export.calibration.activations import TokenBatch, input_device, model_inputs
from spp_export.common.arrays import FloatArray
from spp_export.common.errors import UsageError
from spp_export.common.processes import answering
from spp_export.common.progress import progress
from spp_export.models.families import Family, Feature, Role
from spp_export.models.helpers import helpers_of
from spp_export.models.products import Matmul, products
from spp_export.models.session import helped_session
from spp_export.models.shape import ModelShape

# Activations of every layer stay until the backward pass, so batches are half of `observe`'s.
BATCH_TOKENS = 1024
# Names as of `importance.Gradients`: the role's attribute of `Family`, and the summed axis.
_REDUCTIONS = {
    "query_rows": ("query", 1),
    "key_rows": ("key", 1),
    "value_rows": ("value", 1),
    "output_columns": ("output", 0),
    "gate_rows": ("gate", 1),
    "up_rows": ("up", 1),
    "down_columns": ("down", 0),
}


def gradient_reductions(
    model: nn.Module,
    family: Family,
    shape: ModelShape,
    batches: Sequence[TokenBatch],
    *,
    description: str = "reading gradients",
    matmul: Matmul = "float32",
) -> dict[str, list[FloatArray]]:
    """Every field of `importance.Gradients` by name: one float32 vector per layer.

    Batches are right-padded, so that no real token sees padding. The model is left as it was found,
    whatever happens. Raises UsageError where weights are offloaded: they can have no gradient.
    """
    _require_weights(model)
    helpers = helpers_of(model)
    if helpers.in_parts:
        raise UsageError(
            "gradients of weights are not taken of a model in parts. Choose a criterion without, "
            "or another --parallel."
        )
    helpers.ask(
        _reductions_too,
        lambda: {"batches": [batch.to_dict() for batch in batches], "matmul": matmul},
    )
    texts = sum(int((batch.attention_mask.sum(1) > 1).sum()) for batch in batches)
    batches = helpers.share(batches)
    done = 0
    with ExitStack() as stack:
        weights = _Weights(model, family, shape)
        stack.enter_context(weights.taking_gradients(model))
        gates = stack.enter_context(_gates(model, family, shape))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(products(input_device(model).type, matmul))
        advance_to = stack.enter_context(
            progress(description, sum(batch.real_tokens for batch in batches))
        )
        for batch in batches:
            if bool((batch.attention_mask.sum(1) > 1).any()):
                # The sum of the texts' losses: 1/N is applied to the result, where it can neither
                # push half-precision gradients under their range nor scale a text's own gate.
                _summed_loss(model, family, batch).backward()
            done += batch.real_tokens
            advance_to(done)
    helpers.add([*weights.sums(), *(total for sums in gates.values() for total in sums)])
    count = max(texts, 1)
    return weights.reduced(count) | {
        name: [(row / count).float().numpy() for row in sums] for name, sums in gates.items()
    }


def gradient_lengths(
    model: nn.Module,
    family: Family,
    shape: ModelShape,
    batches: Sequence[TokenBatch],
    *,
    description: str = "reading gradients",
    matmul: Matmul = "float32",
) -> FloatArray:
    """How much the loss feels a change at each token: |g| [T,L,2] (fp32) of the T real tokens of
    the batches, in their order; g is the gradient of the sum of -log p over all tokens that are
    predicted, with respect to what o_proj (0) and down_proj (1) of a layer write; 0 of down_proj
    where nothing is cut of the MLPs.

    The model is left as it was found. Raises UsageError where weights are offloaded.
    """
    _require_weights(model)
    helpers = helpers_of(model)
    helpers.ask(
        _lengths_too,
        lambda: {"batches": [batch.to_dict() for batch in batches], "matmul": matmul},
    )
    ends = list(accumulate(batch.real_tokens for batch in batches))
    lengths = torch.zeros((sum(ends[-1:]), shape.num_layers, 2))
    own = helpers.share(list(zip(batches, ends, strict=True)))
    with ExitStack() as stack:
        stack.enter_context(_without_weights(model))
        seen = stack.enter_context(_gradients_of_writes(model, family, shape))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(products(input_device(model).type, matmul))
        total, done = sum(batch.real_tokens for batch, _ in own), 0
        advance_to = stack.enter_context(progress(description, total))
        for batch, end in own:
            of_batch = torch.zeros((*batch.input_ids.shape, shape.num_layers, 2))
            if bool(batch.predicted.any()):
                logits, targets = _predicted(model, family, batch, batch.predicted)
                cross_entropy(logits, targets, reduction="sum").backward()
                for (layer, consumer), of_tokens in seen.items():
                    of_batch[:, :, layer, consumer] = of_tokens
            lengths[end - batch.real_tokens : end] = of_batch[batch.attention_mask.bool()]
            done += batch.real_tokens
            advance_to(done)
    helpers.add([lengths])
    return lengths.numpy()


@answering
def _reductions_too(
    opening: Mapping[str, Any], batches: Sequence[Mapping[str, Any]], matmul: Matmul
) -> None:
    session = helped_session(opening)
    family, shape = session.source.family, session.source.shape
    own = [TokenBatch.sent(one) for one in batches]
    gradient_reductions(session.reader, family, shape, own, matmul=matmul)


@answering
def _lengths_too(
    opening: Mapping[str, Any], batches: Sequence[Mapping[str, Any]], matmul: Matmul
) -> None:
    session = helped_session(opening)
    family, shape = session.source.family, session.source.shape
    own = [TokenBatch.sent(one) for one in batches]
    gradient_lengths(session.reader, family, shape, own, matmul=matmul)


@contextmanager
def _without_weights(model: nn.Module) -> Iterator[None]:
    """Gradients of activations alone, from the embeddings on."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    handle = embeddings.register_forward_hook(lambda _, args, out: out.requires_grad_())
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        handle.remove()
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


@contextmanager
def _gradients_of_writes(
    model: nn.Module, family: Family, shape: ModelShape
) -> Iterator[Mapping[tuple[int, int], Tensor]]:
    """By layer and consumer, the lengths [B,S] of the last backward pass."""
    seen: dict[tuple[int, int], Tensor] = {}

    def on_gradient(place: tuple[int, int], gradient: Tensor) -> None:
        seen[place] = shaped(gradient).float().norm(dim=2).cpu()

    def on_forward(place: tuple[int, int], _module: nn.Module, _args: Any, written: Tensor) -> None:
        written.register_hook(partial(on_gradient, place))

    shaped = _BatchShape()
    handles = [shaped.watch(model)]
    try:
        for layer in range(shape.num_layers):
            for consumer, role in enumerate((family.output, family.down)):
                if not role or not (shape.has_heads, shape.has_channels)[consumer][layer]:
                    continue  # nothing is cut of its MLPs, or the layer has none
                module = model.get_submodule(family.layer_name(layer, role))
                hook = partial(on_forward, (layer, consumer))
                handles.append(module.register_forward_hook(hook))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class _BatchShape:
    """Gives activations [B*S,d], as some MLPs read and write them, their axes again."""

    _shape: tuple[int, ...] = ()

    def watch(self, model: nn.Module) -> Any:
        """See the token ids of every call from now on; returns a handle that ends it."""
        embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]

        def look(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._shape = tuple(args[0].shape)

        return embeddings.register_forward_pre_hook(look)

    def __call__(self, values: Tensor) -> Tensor:
        return values.unflatten(0, self._shape) if values.dim() == 2 else values


def has_weights(model: nn.Module) -> bool:
    """Whether every weight is in memory, so that gradients can be had."""
    return all(parameter.device.type != "meta" for parameter in model.parameters())


def _require_weights(model: nn.Module) -> None:
    if not has_weights(model):
        raise UsageError(
            "gradients need every weight in memory, and some are offloaded to the CPU or stay on "
            "disk. Choose a criterion without gradients, or a device that holds the model."
        )


def _summed_loss(model: nn.Module, family: Family, batch: TokenBatch) -> Tensor:
    """Sum over a batch's texts of their mean next-token loss."""
    predicted = batch.attention_mask[:, 1:].bool()
    logits, targets = _predicted(model, family, batch, predicted)
    losses = cross_entropy(logits, targets, reduction="none")
    shares = (1 / predicted.sum(1, keepdim=True).clamp(min=1)).expand(predicted.shape)[predicted]
    return (losses * shares.to(losses)).sum()


def _predicted(
    model: nn.Module, family: Family, batch: TokenBatch, predicted: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits [P,V] (fp32) by which the P tokens of `predicted` [B,S-1] are predicted, and their ids
    [P]; the head sees no other token where the family lets it."""
    inputs = model_inputs(model, batch)
    if family.features & {Feature.MULTIPLIERS, Feature.SOFTCAP}:
        whole = model(**inputs).logits
        logits = whole[:, :-1][predicted.to(whole.device)]
    else:
        decoder = model.get_submodule(family.layers.rpartition(".")[0])
        hidden = decoder(**inputs).last_hidden_state
        # In memory it may have another name than in files.
        head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        logits = head(hidden[:, :-1][predicted.to(hidden.device)])
    return logits.float(), batch.input_ids[:, 1:][predicted].to(logits.device)


class _Weights:
    """The seven projections of every layer, and the sums of their gradients."""

    def __init__(self, model: nn.Module, family: Family, shape: ModelShape) -> None:
        parameters = dict(model.named_parameters())
        places = [
            {
                name: f"{family.layer_name(i, getattr(family, role))}.weight"
                for name, (role, _) in _REDUCTIONS.items()
                if getattr(family, role)
            }
            for i in range(shape.num_layers)
        ]
        self._layers = [
            {name: parameters[place] for name, place in layer.items() if place in parameters}
            for layer in places
        ]
        self._rows = {
            name: family.rows(Role(role), shape) if axis == 1 else slice(None)
            for name, (role, axis) in _REDUCTIONS.items()
        }
        self._channels, self._turned = shape.channels, family.transposed
        self._sums: dict[nn.Parameter, Tensor] = {}

    @contextmanager
    def taking_gradients(self, model: nn.Module) -> Iterator[None]:
        """Give these weights, and no others, a gradient; afterwards all are as before."""
        projections = {weight for layer in self._layers for weight in layer.values()}
        before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
        handles = []
        try:
            for parameter, _, _ in before:
                parameter.grad = None
                parameter.requires_grad_(parameter in projections)
            for weight in projections:
                handles.append(weight.register_post_accumulate_grad_hook(self._take))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter, requires_grad, grad in before:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad

    def _take(self, weight: Tensor) -> None:
        assert isinstance(weight, nn.Parameter)
        assert weight.grad is not None
        if weight in self._sums:
            self._sums[weight] += weight.grad
        else:
            self._sums[weight] = weight.grad.float()
        weight.grad = None

    def sums(self) -> list[Tensor]:
        """Sums of the gradients, in one order; zeros where no text had a next token."""
        weights = dict.fromkeys(weight for layer in self._layers for weight in layer.values())
        for weight in weights:
            if weight not in self._sums:
                self._sums[weight] = torch.zeros_like(weight, dtype=torch.float32)
        return [self._sums[weight] for weight in weights]

    @torch.no_grad()
    def reduced(self, count: int) -> dict[str, list[FloatArray]]:
        """Sums over rows or columns of |W * gradient / count|, per name and layer."""
        reductions: dict[str, list[FloatArray]] = {name: [] for name in _REDUCTIONS}
        for layer in self._layers:
            products = {}
            for weight in dict.fromkeys(layer.values()):
                products[weight] = self._sums.pop(weight).mul_(weight).abs_()
            for name, (_, axis) in _REDUCTIONS.items():
                if name not in layer:  # an MLP without a gate, or a layer without such units
                    reductions[name].append(np.zeros(self._channels, dtype=np.float32))
                    continue
                product = products[layer[name]]
                product = product.T if self._turned else product
                reduced = product[self._rows[name]].sum(axis) / count
                reductions[name].append(reduced.float().cpu().numpy())
        return reductions


@contextmanager
def _gates(
    model: nn.Module, family: Family, shape: ModelShape
) -> Iterator[Mapping[str, list[Tensor]]]:
    """Sums over texts of |sum over tokens of a . dL_x/da|, per layer: head and channel gates.

    Padding adds nothing: no loss looks at it, so its gradient is zero.
    """
    sums = {
        "head_gates": [torch.zeros(shape.query_heads, dtype=torch.float64) for _ in shape.layers],
        "channel_gates": [torch.zeros(shape.channels, dtype=torch.float64) for _ in shape.layers],
    }

    def on_gradient(total: Tensor, values: Tensor, gradient: Tensor) -> None:
        products = shaped(values.float() * gradient.float())
        per_token = products.unflatten(2, (len(total), -1))
        total += per_token.sum((1, 3)).abs().sum(0).double().cpu()

    def on_forward(total: Tensor, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # Detached: a hook that held its own tensor would keep the batch's graph alive.
        args[0].register_hook(partial(on_gradient, total, args[0].detach()))

    shaped = _BatchShape()
    handles = [shaped.watch(model)]
    try:
        for name, role, has in (
            ("head_gates", family.output, shape.has_heads),
            ("channel_gates", family.down, shape.has_channels),
        ):
            for index, total in enumerate(sums[name]) if role else ():
                if not has[index]:
                    continue
                module = model.get_submodule(family.layer_name(index, role))
                handles.append(module.register_forward_pre_hook(partial(on_forward, total)))
        yield sums
    finally:
        for handle in handles:
            handle.remove()

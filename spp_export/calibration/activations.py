"""Forward passes over texts on the frozen dense model, with observers at the places the method
reads.

Observers see one layer's activations at a time and keep only what they reduce them to. Padding
never reaches them: they get the real tokens of a batch, in order, and which text each came from.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from spp_export.calibration.reading import Text, TokenText, token_texts
from spp_export.common.arrays import FloatArray
from spp_export.common.options import WINDOW
from spp_export.common.processes import answering
from spp_export.common.progress import progress
from spp_export.models.families import Family, Feature
from spp_export.models.helpers import Helpers, helpers_of
from spp_export.models.layerwise import stream_of
from spp_export.models.products import Matmul, as_they_are, products
from spp_export.models.routing import expert_block, routed_channels, routed_writes, router_of
from spp_export.models.session import Session, helped_session

_BATCH_TOKENS = 2048
# What a batch takes beside its tokens, in tokens: about 50 on a CPU, and more where a card waits
# for the next call.
_BATCH_COST = 100
# Places inside a block of experts.
_OF_EXPERTS = ("experts", "expert_channels")
# Most channels in one diagonal block of second moments: beyond it the matrix of all of them costs
# more than the rest of the pass (19 thousand channels would be 1.4 GB a layer).
CHANNEL_BLOCK = 1536
# Blocks of the diagonal of a symmetric matrix that is summed.
_MOST_BLOCKS, _FEWEST_ROWS = 8, 192
# What an accelerator must have left, as a share, for sums to live beside the activations.
_FREE_SHARE = 0.25


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded token ids [B,S], their mask [B,S] and the index of each row's text.

    answers [B,S]: which of them are the model's to say; None where all are. gradients [T,L,2]: of
    the T real tokens, where they are known of all.
    """

    input_ids: Tensor
    attention_mask: Tensor
    texts: tuple[int, ...]
    answers: Tensor | None = None
    gradients: FloatArray | None = None

    @property
    def predicted(self) -> Tensor:
        """Whether each token but a row's first one counts where tokens are predicted: [B,S-1]."""
        mask = self.attention_mask[:, 1:].bool()
        return mask if self.answers is None else mask & self.answers[:, 1:]

    @property
    def real_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.attention_mask.sum())

    def to_dict(self) -> dict[str, Any]:
        """The fields, for other ranks."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def sent(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` gave on another rank."""
        return cls(**{**values, "texts": tuple(values["texts"])})


class Observer(Protocol):
    """Something that reduces the activations of one place in every layer.

    `place` is one of

    - "attention_input": the normed stream that q, k and v read, [T,d]
    - "output": the input of o_proj, [T,H*dh]
    - "attention": what the attention block adds to the stream, [T,d]
    - "residual": the stream after attention, before the MLP's norm, [T,d]
    - "mlp_input": the normed stream that gate and up read, [T,d]
    - "down": the input of down_proj, [T,I]
    - "stream": the stream after the MLP, [T,d]
    - "experts": how much each expert writes for a token, `routed_writes` [T,E], in layers that have
      any
    - "expert_channels": what each expert that a token is routed to gives to its down projection,
      times its weight: `routed_channels` [T,k*(1+F)], in layers that have any
    - "residual_per_write", "stream_per_write": the same two, in units of what o_proj and down_proj
      write: where a norm is between, longer by as much as it shortens the writes
    - "output_by_loss", "down_by_loss": "output" and "down", each token times how much the loss
      feels a change of what o_proj and down_proj write there, the `gradients` of its batch; a batch
      that has none is not shown

    A layer that has no such place shows nothing. `text_T` gives the index of the text of each of
    the T real tokens. What `see` is shown may be the model's own memory: an observer reads it and
    keeps no reference.
    """

    place: str

    def see(self, layer: int, values: Tensor, text_T: Tensor) -> None:
        """Take one batch of one layer."""

    def taken(self, layer: int) -> Iterable[Tensor]:
        """What was taken of a layer: tensors that hold, once those of several observers are added
        in place, what one would have taken of all batches."""

    def recipe(self) -> dict[str, Any]:
        """Arguments of `made`, in terms of JSON and arrays."""

    @classmethod
    def made(cls, session: Session, recipe: Mapping[str, Any]) -> Self:
        """An observer that has taken nothing yet, for another rank's share of the batches."""
        return cls(**recipe)


def token_batches(
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    window: int = WINDOW,
    batch_tokens: int = _BATCH_TOKENS,
) -> list[TokenBatch]:
    """Tokenise, cut what is longer than `window`, and batch pieces of similar length together, in
    the order of their lengths.

    A batch holds at most `batch_tokens` tokens, padding included, and at least one piece; the
    pieces of a text have its index. Batches end where that leaves the least to compute, padding and
    what a batch costs by itself.

    Texts that tokenise to nothing are left out. The order is a function of the texts alone.
    """
    pieces = [
        (index, piece)
        for index, text in enumerate(token_texts(tokenizer, texts))
        for piece in text.pieces(window)
    ]
    # Stable: pieces of one length stay in the order of the texts.
    pieces.sort(key=lambda row: row[1].tokens)
    ends = _cheapest_ends([piece.tokens for _, piece in pieces], batch_tokens)
    return [pad_rows(pieces[start:end]) for start, end in pairwise([0, *ends])]


def _cheapest_ends(lengths: Sequence[int], batch_tokens: int) -> list[int]:
    """Where the batches of texts of such lengths, in ascending order, end."""
    cost, begins = [0], [0]
    for end, length in enumerate(lengths, start=1):
        first = max(0, min(end - 1, end - batch_tokens // length))
        least, begin = min(
            (cost[start] + (end - start) * length, -start) for start in range(first, end)
        )
        cost.append(least + _BATCH_COST)
        begins.append(-begin)
    ends = []
    end = len(lengths)
    while end:
        ends.append(end)
        end = begins[end]
    return ends[::-1]


def pad_rows(rows: Sequence[tuple[int, TokenText]]) -> TokenBatch:
    """A batch of texts of one run, each with the index of the text that it is of."""
    size = (len(rows), max(text.tokens for _, text in rows))
    input_ids = torch.zeros(size, dtype=torch.long)
    mask = torch.zeros(size, dtype=torch.long)
    answers = torch.zeros(size, dtype=torch.bool)
    for row, (_, text) in enumerate(rows):
        ((ids,), count) = text.runs, text.tokens
        input_ids[row, :count] = torch.tensor(ids)
        mask[row, :count] = 1
        answers[row, :count] = torch.tensor(list(text.answers[0])) if text.answers else True
    told = any(text.answers for _, text in rows)
    known = [text.gradients for _, text in rows if text.gradients is not None]
    return TokenBatch(
        input_ids,
        mask,
        tuple(index for index, _ in rows),
        answers if told else None,
        np.concatenate(known) if len(known) == len(rows) else None,
    )


def observe(
    model: nn.Module,
    family: Family,
    batches: Sequence[TokenBatch],
    observers: Sequence[Observer],
    *,
    description: str = "reading activations",
    layer_done: Callable[[int], None] = lambda layer: None,
    matmul: Matmul = "float32",
) -> None:
    """Run the decoder over the batches once and give every observer its activations.

    `matmul` is that of the decoder's products; observers multiply what they see as it is.

    `layer_done` is told each layer, in order, once it has been shown all that it will be: of a
    model that runs from disk before the next layer begins, of others at the end.
    """
    helpers = helpers_of(model)
    helpers.ask(
        _observe_too,
        lambda: {
            "batches": [batch.to_dict() for batch in batches],
            "observers": [recipe_of(observer) for observer in observers],
            "matmul": matmul,
        },
    )
    batches = helpers.share(batches)
    decoder = model.get_submodule(family.layers.rpartition(".")[0])
    stream = stream_of(model)
    calls = [model_inputs(model, batch) for batch in batches]
    state = _Current()
    tokens = sum(batch.real_tokens for batch in batches)
    done = 0

    def turn(call: int) -> None:
        keep = batches[call].attention_mask.bool()
        rows = torch.tensor(batches[call].texts)
        state.real = keep.flatten().nonzero().squeeze(1)
        state.texts = rows[:, None].expand_as(keep)[keep]
        state.gradients = batches[call].gradients

    def finish(layer: int) -> None:
        helpers.add(part for observer in observers for part in observer.taken(layer))
        layer_done(layer)

    with (
        torch.no_grad(),
        products(input_device(model).type, matmul),
        _hooks(model, family, observers, state, helpers),
        progress(description, tokens) as advance_to,
    ):
        if stream is not None:
            stream.hidden_states(
                calls,
                turn=turn,
                layer_done=finish,
                advance=lambda share: advance_to(share * tokens),
            )
            return
        for number, call in enumerate(calls):
            turn(number)
            decoder(**call)
            done += batches[number].real_tokens
            advance_to(done)
    layers = model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    for index in range(len(layers)):
        finish(index)


@answering
def _observe_too(
    opening: Mapping[str, Any],
    batches: Sequence[Mapping[str, Any]],
    observers: Sequence[Mapping[str, Any]],
    matmul: Matmul,
) -> None:
    session = helped_session(opening)
    observe(
        session.reader,
        session.source.family,
        [TokenBatch.sent(batch) for batch in batches],
        [made_of(recipe, session) for recipe in observers],
        matmul=matmul,
    )


def recipe_of(observer: Observer) -> dict[str, Any]:
    """What another rank makes an observer of, in terms of JSON and arrays."""
    kind = type(observer)
    return {"module": kind.__module__, "class": kind.__qualname__, "of": observer.recipe()}


def made_of(recipe: Mapping[str, Any], session: Session) -> Observer:
    """The observer of a recipe, for a rank that has the same model."""
    kind: type[Observer] = getattr(import_module(recipe["module"]), recipe["class"])
    return kind.made(session, recipe["of"])


def model_inputs(model: nn.Module, batch: TokenBatch) -> dict[str, Any]:
    """Arguments of one call of a model without a cache."""
    device = input_device(model)
    return {
        "input_ids": batch.input_ids.to(device),
        "attention_mask": batch.attention_mask.to(device),
        "use_cache": False,
    }


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go: accelerate moves them on where it has spread or offloaded the weights."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


class _Current:
    """The batch now running, for hooks that see only a tensor: where its real tokens are among all
    of them, and the text of each."""

    real: Tensor
    texts: Tensor
    gradients: FloatArray | None


@contextmanager
def _hooks(
    model: nn.Module,
    family: Family,
    observers: Sequence[Observer],
    state: _Current,
    helpers: Helpers,
) -> Iterator[None]:
    def show(layer: int, seeing: Sequence[Observer], by_loss: bool, values: Tensor) -> None:
        if not helpers.takes:
            return
        # Some MLPs read [B*S,d] as it is.
        real = values.flatten(0, 1) if values.dim() == 3 else values
        # Without padding, as with one text at a time, nothing has to be copied.
        if len(state.real) < len(real):
            real = real.index_select(0, state.real.to(real.device))
        if by_loss:
            if state.gradients is None:
                return
            consumer = seeing[0].place.startswith("down")
            lengths_T = torch.from_numpy(state.gradients[:, layer, int(consumer)]).to(real.device)
            real = real.float() * lengths_T.float()[:, None]
        text_T = state.texts.to(real.device)
        with as_they_are(real.device.type):
            for observer in seeing:
                observer.see(layer, real, text_T)

    def before(shown: Callable[[Tensor], None]) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            shown(helpers.whole(args[0], getattr(module, "in_features", None)))

        return hook

    def after(shown: Callable[[Tensor], None]) -> Any:
        return lambda _module, _args, output: shown(
            output[0] if isinstance(output, tuple) else output
        )

    widens = family.gate or family.up
    read = {
        "attention_input": family.query,
        "output": family.output,
        # The MLP reads the stream as it is where no norm is before it.
        "residual": family.mlp_norm or widens,
        "mlp_input": widens,
        "down": family.down,
    }
    # Not of the attention as a whole, which in some families adds the stream itself.
    written = {"attention": family.output, "stream": "", **dict.fromkeys(_OF_EXPERTS, "")}
    if Feature.POST_NORM in family.features:
        # Norms leave shares as they are: of the sums, the stream and what was written to it.
        read["residual"], read["stream"] = (name for name, _ in family.norms)
    if Feature.LATENT in family.features:
        # Queries are made of what the norm gives, by way of latents.
        del read["attention_input"]
        written["attention_input"] = family.attention_norm
    if family.features & {Feature.PARALLEL, Feature.ALTERNATING}:
        # What attention writes is first read after the layer, with what an MLP may have written.
        del read["residual"]
        written["residual"] = ""
    layers = model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    lack = _lacking(model, family)
    handles = []
    try:
        for asked in sorted({observer.place for observer in observers}):
            seeing = [observer for observer in observers if observer.place == asked]
            whole, _, by_loss = asked.partition("_by_")
            place, _, per_write = whole.partition("_per_")
            for index, layer in enumerate(layers):
                name = read[place] if place in read else written[place]
                if index in lack.get(place, ()) or (name and not _has(layer, name)):
                    continue  # a layer with another mixer, or without an MLP
                shown: Callable[[Tensor], None] = partial(show, index, seeing, bool(by_loss))
                if per_write and family.write_norms:
                    gain = _Gain()
                    norm = layer.get_submodule(family.write_norms[place == "stream"])
                    handles.append(norm.register_forward_hook(gain.take))
                    shown = partial(gain.show, shown)
                if place in _OF_EXPERTS:
                    if block := expert_block(model, family, index):
                        handles.append(_hook_experts(block, family, place, shown))
                    continue
                if read.get(place) == "":
                    family.refuse((Feature.EXPERTS,), f"reading {place}", "Use --units heads.")
                module = layer.get_submodule(name)
                if place in read:
                    handles.append(module.register_forward_pre_hook(before(shown)))
                else:
                    handles.append(module.register_forward_hook(after(shown)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook_experts(
    block: nn.Module, family: Family, place: str, shown: Callable[[Tensor], None]
) -> Any:
    """Show what each expert of a block writes, or its channels give."""
    router = router_of(block)
    assert router is not None
    count = len(next(x for x in router.parameters() if x.dim() == 2))  # a row for each

    def show_writes(experts: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if place == "experts":
            shown(routed_writes(experts, inputs, output, count))
        else:
            assert family.experts is not None
            shown(routed_channels(experts, inputs, count, family.experts.down_axis))

    return block.get_submodule("experts").register_forward_hook(show_writes)


def _lacking(model: nn.Module, family: Family) -> dict[str, frozenset[int]]:
    """By places: the layers whose attention or MLP is not cut, though it may be there."""
    if family.mixers is None:
        return {}
    settings: Any = model.config
    shape = family.read_shape(settings.to_dict(), element_bytes=4)
    places = dict.fromkeys(("attention_input", "output", "attention"), shape.without_heads)
    return places | dict.fromkeys(("mlp_input", "down"), shape.without_channels)


def _has(layer: nn.Module, name: str) -> bool:
    return name in dict(layer.named_modules())


class _Gain:
    """How much a norm shortened the writes that it just saw, token by token."""

    def take(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """The hook of the norm: lengths before over lengths after, [B,S,1]."""
        before, after = (x.float().norm(dim=-1, keepdim=True) for x in (args[0], output))
        self._shortened = before / after.clamp(min=torch.finfo(torch.float32).tiny)

    def show(self, shown: Callable[[Tensor], None], values: Tensor) -> None:
        """A stream [B,S,d] in units of what the norm is given."""
        shown(values * self._shortened.to(values))


@dataclass
class Router(Observer):
    """Shows a batch to the observers of the collection that it is of: number i has texts from
    `starts[i]` on."""

    place: str
    starts: Sequence[int]
    observers: Sequence[Sequence[Observer]]

    def see(self, layer: int, values: Tensor, text_T: Tensor) -> None:
        """As of `Observer`."""
        part = bisect_right(self.starts, int(text_T[0])) - 1
        for observer in self.observers[part]:
            observer.see(layer, values, text_T)

    def taken(self, layer: int) -> Iterable[Tensor]:
        """As of `Observer`."""
        return [part for seen in self.observers for one in seen for part in one.taken(layer)]

    def recipe(self) -> dict[str, Any]:
        """As of `Observer`."""
        observers = [[recipe_of(observer) for observer in seen] for seen in self.observers]
        return {"place": self.place, "starts": self.starts, "observers": observers}

    @classmethod
    def made(cls, session: Session, recipe: Mapping[str, Any]) -> Router:
        """As of `Observer`."""
        observers = [[made_of(one, session) for one in seen] for seen in recipe["observers"]]
        return cls(recipe["place"], recipe["starts"], observers)


class TextMeans(Observer):
    """Mean over each text's real tokens of a [T,d] stream: `values` is [N,L,d] float32."""

    def __init__(self, place: str, texts: int, layers: int, width: int) -> None:
        self.place = place
        self._size = texts, layers, width
        self._sums: dict[int, Tensor] = {}
        self._counts = torch.zeros(texts, dtype=torch.float64)

    def see(self, layer: int, values: Tensor, text_T: Tensor) -> None:
        """Add the tokens of one batch to their texts' sums."""
        self._of(layer).index_add_(0, text_T.cpu(), values.double().cpu())
        if layer == 0:
            self._counts += torch.bincount(text_T.cpu(), minlength=len(self._counts)).double()

    def taken(self, layer: int) -> Iterable[Tensor]:
        """As of `Observer`."""
        return [self._of(layer), *([] if layer else [self._counts])]

    def recipe(self) -> dict[str, Any]:
        """As of `Observer`."""
        texts, layers, width = self._size
        return {"place": self.place, "texts": texts, "layers": layers, "width": width}

    @property
    def values(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """[N,L,d] means; a text without tokens has zeros."""
        means = np.zeros(self._size, dtype=np.float32)
        for layer in range(means.shape[1]):
            means[:, layer] = (self._of(layer) / self._counts.clamp(min=1)[:, None]).numpy()
        return means

    @property
    def tokens(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[N] how many each text has."""
        counts: np.ndarray[Any, np.dtype[np.int64]] = self._counts.long().numpy()
        return counts

    def _of(self, layer: int) -> Tensor:
        if layer not in self._sums:
            texts, _, width = self._size
            self._sums[layer] = torch.zeros((texts, width), dtype=torch.float64)
        return self._sums[layer]


class MeanSquares(Observer):
    """Sums of squares [L,w] of what one place shows, in fp32, over tokens."""

    def __init__(self, place: str, layers: int, width: int) -> None:
        self.place = place
        self.sums = torch.zeros((layers, width), dtype=torch.float32)

    def see(self, layer: int, values: Tensor, text_T: Tensor) -> None:
        """Add one batch [T,w]."""
        self.sums[layer] += values.float().square().sum(0).cpu()

    def taken(self, layer: int) -> Iterable[Tensor]:
        """As of `Observer`."""
        return [self.sums[layer]]

    def recipe(self) -> dict[str, Any]:
        """As of `Observer`."""
        layers, width = self.sums.shape
        return {"place": self.place, "layers": layers, "width": width}


class ExpertWrites(Observer):
    """Sums over tokens of what experts write [T,E]: `squares` [L,E] of lengths, `lengths` [L,E],
    and `routed` [L,E], how many of the `tokens` [L] each expert writes something for."""

    place = "experts"

    def __init__(self, layers: int, experts: int) -> None:
        self._sums = torch.zeros((3, layers, experts), dtype=torch.float64)
        self.squares, self.lengths, self.routed = self._sums
        self.tokens = torch.zeros(layers, dtype=torch.int64)

    def see(self, layer: int, values: Tensor, text_T: Tensor) -> None:
        """Add one batch."""
        squares = values.double().cpu()
        self.squares[layer] += squares.sum(0)
        self.lengths[layer] += squares.sqrt().sum(0)
        self.routed[layer] += (squares > 0).sum(0)
        self.tokens[layer] += len(squares)

    @property
    def named(self) -> dict[str, Tensor]:
        """The sums, by what they are called in a file of statistics."""
        return {"square": self.squares, "length": self.lengths, "routed": self.routed}

    def taken(self, layer: int) -> Iterable[Tensor]:
        """As of `Observer`."""
        return [self._sums[:, layer], self.tokens[layer : layer + 1]]

    def recipe(self) -> dict[str, Any]:
        """As of `Observer`."""
        _, layers, experts = self._sums.shape
        return {"layers": layers, "experts": experts}


class ExpertChannelSquares(Observer):
    """Sums of squares [L,E,F] over tokens of what `routed_channels` shows of the F channels of E
    experts, of `tokens` [L]."""

    place = "expert_channels"

    def __init__(self, layers: int, experts: int, channels: int) -> None:
        self.sums = torch.zeros((layers, experts, channels), dtype=torch.float64)
        self.tokens = torch.zeros(layers, dtype=torch.int64)

    def see(self, layer: int, values: Tensor, text_T: Tensor) -> None:
        """Add one batch."""
        width = self.sums.shape[2]
        rows = values.view(-1, 1 + width)
        chosen = rows[:, 0].long().cpu()
        self.sums[layer].index_add_(0, chosen, rows[:, 1:].double().square().cpu())
        self.tokens[layer] += len(values)

    @property
    def named(self) -> dict[str, Tensor]:
        """As of `ExpertWrites`."""
        return {"square": self.sums}

    def taken(self, layer: int) -> Iterable[Tensor]:
        """As of `Observer`."""
        return [self.sums[layer], self.tokens[layer : layer + 1]]

    def recipe(self) -> dict[str, Any]:
        """As of `Observer`."""
        layers, experts, channels = self.sums.shape
        return {"layers": layers, "experts": experts, "channels": channels}


class SecondMoments(Observer):
    """Sums of a a^T and of a over tokens, a the inputs [T,w] of one place, per layer in fp32.

    Of a a^T only n diagonal blocks of b channels are kept, [n,b,b]: block i is of channels i*b to
    (i+1)*b, the last one filled up with zeros. `block` = `width` (the default) keeps the whole
    matrix. The sums live beside the activations while that leaves an accelerator a quarter of its
    memory, else on the CPU. Tokens are counted in the layer `first`, the first that has this place.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        *,
        place: str = "output",
        block: int | None = None,
        first: int = 0,
    ) -> None:
        self.place = place
        self._width = width
        self._block = width if block is None else block
        self._products: dict[int, Tensor] = {}
        self.sums = torch.zeros((layers, width), dtype=torch.float32)
        self._tokens = torch.zeros(1, dtype=torch.int64)
        self._first = first

    def see(self, layer: int, values: Tensor, text_T: Tensor) -> None:
        """Add the products of one batch."""
        values = values.float()
        self.sums[layer] += values.sum(0).cpu()
        products = self._of(layer, values.device)
        for total, part in zip(products, values.split(self._block, dim=1), strict=True):
            _add_products(total, part)
        if layer == self._first:
            self._tokens += values.shape[0]

    def taken(self, layer: int) -> Iterable[Tensor]:
        """As of `Observer`."""
        products = self._of(layer, torch.device("cpu"))
        return [products, self.sums[layer], *([self._tokens] if layer == self._first else [])]

    def recipe(self) -> dict[str, Any]:
        """As of `Observer`."""
        layers, width = self.sums.shape
        sizes = {"layers": layers, "width": width, "block": self._block}
        return {**sizes, "place": self.place, "first": self._first}

    @property
    def tokens(self) -> int:
        """How many were seen."""
        return int(self._tokens)

    def products(self, layer: int) -> Tensor:
        """Sums of a a^T [n,b,b] of one layer, on the CPU."""
        products = self._of(layer, torch.device("cpu")).cpu()
        for block in products:
            _mirror(block)
        return products

    def release(self, layer: int) -> None:
        """Free one layer's products, once they are stored elsewhere."""
        self._products.pop(layer, None)

    def _of(self, layer: int, device: torch.device) -> Tensor:
        """A layer's products, which begin beside activations on `device`."""
        if layer not in self._products:
            size = (-(-self._width // self._block), self._block, self._block)
            home = _home(device, 4 * math.prod(size))
            self._products[layer] = torch.zeros(size, dtype=torch.float32, device=home)
        return self._products[layer]


class MixtureMoments(Observer):
    """Second moments E[a a^T] [m,m] of what down_proj reads in some layers, in fp32, over a mixture
    of texts; `scale_N` is that of `mixture_scales`.

    They live where `SecondMoments` do.
    """

    place = "down"

    def __init__(self, layers: Sequence[int], width: int, scale_N: Tensor) -> None:
        self._products: dict[int, Tensor] = {}
        self._layers, self._width, self._scale = layers, width, scale_N

    def see(self, layer: int, values: Tensor, text_T: Tensor) -> None:
        """Add the products of one batch [T,m]."""
        if layer in self._layers:
            scale = self._scale[text_T.cpu()].to(values.device)
            _add_products(self._of(layer, values.device), values.float() * scale[:, None])

    def taken(self, layer: int) -> Iterable[Tensor]:
        """As of `Observer`."""
        return [self._of(layer, torch.device("cpu"))] if layer in self._layers else []

    def recipe(self) -> dict[str, Any]:
        """As of `Observer`."""
        return {"layers": list(self._layers), "width": self._width, "scale_N": self._scale}

    def released(self, layer: int) -> Tensor:
        """One layer's moments, on the CPU, given up for it."""
        moments = self._of(layer, torch.device("cpu")).cpu()
        del self._products[layer]
        _mirror(moments)
        return moments

    def _of(self, layer: int, device: torch.device) -> Tensor:
        if layer not in self._products:
            home = _home(device, 4 * self._width**2)
            self._products[layer] = torch.zeros((self._width, self._width), device=home)
        return self._products[layer]


def mixture_scales(
    batches: Sequence[TokenBatch], parts: Sequence[int], weights: Sequence[float]
) -> Tensor:
    """What makes the squares of a text's tokens count by its part's weight: a factor for each text.

    Text i is of part `parts[i]`, and the tokens of a part share its weight.
    """
    part_of_text = torch.tensor(parts)
    tokens = torch.zeros(len(weights), dtype=torch.float64)
    for batch in batches:
        of_row = part_of_text[torch.tensor(batch.texts)]
        tokens.index_add_(0, of_row, batch.attention_mask.sum(1).double())
    share = torch.tensor(weights, dtype=torch.float64) / tokens.clamp(min=1)
    return share.sqrt().float()[part_of_text]


def channel_block(channels: int) -> int:
    """Channels per block b of down_proj's second moments: the fewest near-equal blocks of at most
    `CHANNEL_BLOCK`."""
    return -(-channels // -(-channels // CHANNEL_BLOCK))


def _add_products(total: Tensor, values: Tensor) -> None:
    """Add the sum of a a^T over the rows of `values` [T,w] to the first w rows and columns of
    `total` [b,b]: to what lies on the diagonal's blocks and right of them. `_mirror` makes the rest
    of it, which is nearly half."""
    width = values.shape[1]
    for start, end in _block_rows(len(total)):
        left, right = values[:, start:end].T, values[:, start:]
        rows = total[start : min(end, width), start:width]
        if total.device == values.device:
            rows.addmm_(left, right)
        else:
            rows += (left @ right).to(total.device)


def _mirror(total: Tensor) -> None:
    """Give a symmetric matrix [b,b] what lies left of the diagonal's blocks."""
    for start, end in _block_rows(len(total)):
        total[end:, start:end] = total[start:end, end:].T


def _block_rows(width: int) -> Iterator[tuple[int, int]]:
    """The blocks of the diagonal, as (start, end): small ones leave little that is computed twice,
    large ones are multiplied at full speed."""
    size = max(_FEWEST_ROWS, -(-width // _MOST_BLOCKS))
    return ((start, min(start + size, width)) for start in range(0, width, size))


def _home(device: torch.device, size: int) -> torch.device:
    """Where sums of `size` bytes of activations on `device` are kept."""
    if device.type != "cuda":
        return torch.device("cpu")
    free, total = torch.cuda.mem_get_info(device)
    return device if free - size >= _FREE_SHARE * total else torch.device("cpu")


class StreamSensitivity(Observer):
    """E 1/||r||^2 [L] over tokens, r the stream at "residual_per_write" or "stream_per_write".

    How much a change of given size in the stream counts where the next block normalises it. The
    inverse is taken per token: first tokens carry norms so large that a mean would see only them.
    """

    def __init__(self, layers: int, place: str = "residual_per_write") -> None:
        self.place = place
        self.sums = torch.zeros(layers, dtype=torch.float64)

    def see(self, layer: int, values: Tensor, text_T: Tensor) -> None:
        """Add one batch of the stream [T,d]."""
        squares = torch.linalg.vector_norm(values, dim=1, dtype=torch.float64).square()
        tiny = torch.finfo(torch.float32).tiny
        self.sums[layer] += squares.clamp(min=tiny).reciprocal().sum().cpu()

    def taken(self, layer: int) -> Iterable[Tensor]:
        """As of `Observer`."""
        return [self.sums[layer : layer + 1]]

    def recipe(self) -> dict[str, Any]:
        """As of `Observer`."""
        return {"layers": len(self.sums), "place": self.place}

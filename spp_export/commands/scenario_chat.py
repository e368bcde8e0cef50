"""`chat` with several plans: the first turn of a conversation decides whose model answers it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from spp_export.commands.chat.chat import DEFAULT_NEW_TOKENS, Answer, Chat, open_chat
from spp_export.commands.chat.models import TorchModel
from spp_export.commands.load import ScenarioModels, load_many
from spp_export.common.progress import Progress, no_progress
from spp_export.formats.onnx.runtime.generation import Chooser, greedy
from spp_export.models.hub import DEMO


class ScenarioChat:
    """A chat per scenario over one set of weights.

    chosen  the scenario that answers; None before the first turn
    """

    def __init__(self, models: ScenarioModels, open_one: Callable[[str], Chat]) -> None:
        self.chosen: str | None = None
        self._models, self._open_one = models, open_one
        # Any will do to see what all have in common.
        self._chat = open_one(next(iter(models)))

    @property
    def model(self) -> TorchModel:
        """The runtime behind the answers."""
        assert isinstance(self._chat.model, TorchModel)
        return self._chat.model

    @property
    def raw(self) -> bool:
        """Whether prompts are continued as they are."""
        return self._chat.raw

    def reset(self) -> None:
        """Forget what was said; the next turn chooses anew."""
        self.chosen = None

    def ask(
        self,
        prompt: str,
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        choose: Chooser = greedy,
        show: Callable[[str], object] = lambda piece: None,
    ) -> Answer:
        """As `Chat.ask`; the first turn sets `chosen`."""
        if self.chosen is None:
            self.chosen = self._models.pick(prompt)
            self._chat = self._open_one(self.chosen)
        return self._chat.ask(prompt, max_new_tokens=max_new_tokens, choose=choose, show=show)


def open_scenario_chat(
    plans: Sequence[str | os.PathLike[str]],
    *,
    model: str = DEMO,
    artifacts: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    threads: int | None = None,
    system: str | None = None,
    raw: bool = False,
    progress: Progress = no_progress,
) -> ScenarioChat:
    """A chat with the slim models of plans, or of exports' plans, made of one dense model.

    Arguments and errors as of `load_many` and `open_chat`.
    """
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if dtype is None and device == "cpu":
        dtype = "float32"
    models = load_many(
        model, plans, artifacts=artifacts, device=device, dtype=dtype, progress=progress
    )

    def open_one(name: str) -> Chat:
        runs = TorchModel(models[name])
        return open_chat(models.session.source.path, model=runs, system=system, raw=raw)

    return ScenarioChat(models, open_one)

"""vLLM in a process of its own: `python vllm_child.py`.

A JSON object on standard input asks: arguments of `vllm.LLM` (`engine`), token ids of each question
(`questions`), a seed for each (`seeds`), arguments of `vllm.SamplingParams` (`sampling`). Lines on
standard output tell how many are `done`; the last one holds the `answers`, token ids of each.
"""

from __future__ import annotations

import json
import os
import sys
from typing import IO, Any


def bar(told: IO[str]) -> Any:
    """A progress bar for vLLM that is drawn nowhere, and tells how far it is."""
    from tqdm import tqdm

    class Told(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "file": open(os.devnull, "w")})  # noqa: SIM115

        def update(self, n: float | None = 1) -> Any:
            shown = super().update(n)
            # Others iterate over prompts that are read in.
            if self.iterable is None:
                print(json.dumps({"done": self.n}), file=told, flush=True)
            return shown

    return Told


def main() -> int:
    """Answer what standard input asks."""
    # vLLM and its processes print to standard output too.
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    from vllm import LLM, SamplingParams

    engine = LLM(**request["engine"])
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for ids in request["questions"]],
        [SamplingParams(**request["sampling"], seed=seed) for seed in request["seeds"]],
        use_tqdm=bar(told),
    )
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    print(json.dumps({"answers": answers}), file=told, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

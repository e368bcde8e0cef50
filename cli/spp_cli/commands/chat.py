"""`spp chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spp_cli import options
from spp_cli.output import Output, write_json
from spp_export.common.errors import UsageError

ANSWERS = "Answers"


def chat(
    out: Annotated[
        list[Path],
        typer.Argument(
            metavar="OUT...",
            help="A directory written by 'spp export', a dense model's directory, or demo. A "
            "plan.json runs over --model; of several plans or exports the first turn picks one.",
        ),
    ],
    model: options.Model = "demo",
    artifacts: options.Artifacts = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", rich_help_panel=ANSWERS, help="Answer this, and end; else a dialogue."
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", rich_help_panel=ANSWERS, help="What the model is told to be, first."
        ),
    ] = None,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw",
            rich_help_panel=ANSWERS,
            help="Go on with the text as it is, without the model's chat template.",
        ),
    ] = False,
    max_new_tokens: Annotated[
        int,
        typer.Option(min=1, metavar="N", rich_help_panel=ANSWERS, help="Longest answer."),
    ] = 256,
    temperature: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="T",
            rich_help_panel=ANSWERS,
            help="0 always takes the likeliest token; more draws among the likely ones.",
        ),
    ] = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            rich_help_panel=ANSWERS,
            help="With --temperature, draw from the likeliest tokens that have this probability "
            "together, above 0 to 1.",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=ANSWERS,
            help="With --temperature, draw from the N likeliest tokens.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", rich_help_panel=options.RUNNING, help="Threads of the CPU to use."
        ),
    ] = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Talk to an export, or to the dense model it came from.

    ONNX runs on ONNX Runtime, GGUF on llama.cpp, safetensors on transformers. Without --prompt
    every line typed or piped in is answered; /reset forgets what was said, /quit ends, Ctrl-C stops
    an answer.

    Several scenarios of one dense model share its weights. Which of them answers is decided by the
    domains of the conversation's first turn.

    Example: spp chat out/chemistry --prompt "What is an acid?"

    Example: spp chat chemistry.plan.json history.plan.json --model demo
    """
    _check(prompt, temperature, top_p, top_k, json)
    import spp_export
    from spp_cli.conversation import answer_once, converse, show_piece
    from spp_cli.units import peak_memory
    from spp_export.formats.onnx.runtime.generation import Sampling

    output = Output(json=json, quiet=quiet)
    share = 1.0 if top_p is None else top_p
    choose = Sampling(temperature=temperature, top_k=top_k or 0, top_p=share, seed=seed)
    how: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "threads": threads,
        "system": system,
        "raw": raw,
    }
    opened: spp_export.Chat | spp_export.ScenarioChat
    if len(out) > 1 or out[0].suffix == ".json":
        opened = spp_export.open_scenario_chat(out, model=model, artifacts=artifacts, **how)
    else:
        opened = spp_export.open_chat(out[0], **how)

    def ask(text: str) -> spp_export.Answer:
        before = getattr(opened, "chosen", None)
        answer = opened.ask(text, max_new_tokens=max_new_tokens, choose=choose, show=show_piece)
        if (now := getattr(opened, "chosen", None)) != before:
            output.note(f"answered by {now}")
        return answer

    if json:
        assert prompt is not None
        answer = opened.ask(prompt, max_new_tokens=max_new_tokens, choose=choose)
        if answer.ending == "interrupted":
            raise KeyboardInterrupt
        facts = {"runtime": opened.model.runtime, "peak_memory_bytes": peak_memory()}
        if isinstance(opened, spp_export.ScenarioChat):
            facts["scenario"] = opened.chosen
        write_json(answer.to_dict() | facts)
    elif prompt is not None:
        answer_once(ask, prompt, output)
    else:
        kept = "/reset forgets what was said"
        told = "every line is continued as it is" if opened.raw else kept
        output.note(f"{opened.model.runtime}; {told}, /quit or Ctrl-D ends.")
        converse(ask, opened.reset, output)


def _check(
    prompt: str | None,
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    json: bool,
) -> None:
    """Refuse what would otherwise be ignored without a word."""
    if json and prompt is None:
        raise UsageError("--json is about one answer. Add --prompt TEXT.")
    for flag, value in (("--top-p", top_p), ("--top-k", top_k)):
        if value is not None and not temperature:
            raise UsageError(
                f"{flag}: without --temperature the likeliest token is always taken. "
                f"Add --temperature 0.7, or drop {flag}."
            )

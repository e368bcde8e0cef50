"""`spp chat`."""

from __future__ import annotations

from dataclasses import dataclass

from spp_cli.options import command
from spp_cli.output import Output, write_json
from spp_export.commands.requests import ANSWERS, ChatRequest
from spp_export.common.errors import UsageError
from spp_export.common.options import non_default, option


@dataclass(frozen=True, kw_only=True)
class Talk(ChatRequest):
    """A conversation, or one answer."""

    prompt: str | None = option(
        None, panel=ANSWERS, metavar="TEXT", help="Answer this, and end; else a dialogue."
    )


@command(Talk)
def chat(request: Talk, out: Output) -> None:
    """Talk to an export, or to the dense model it came from.

    ONNX runs on ONNX Runtime, GGUF on llama.cpp, safetensors on transformers. Without --prompt
    every line typed or piped in is answered; /reset forgets what was said, /quit ends, Ctrl-C stops
    an answer.

    Several scenarios of one dense model share its weights. Which of them answers is decided by the
    domains of the conversation's first turn.

    Example: spp chat out/chemistry --prompt "What is an acid?"

    Example: spp chat chemistry.plan.json history.plan.json --model demo
    """
    if out.json and request.prompt is None:
        raise UsageError("--json is about one answer. Add --prompt TEXT.")
    import spp_export
    from spp_cli.conversation import answer_once, converse, show_piece
    from spp_cli.render.look import peak_memory

    opened = spp_export.chat(**non_default(request, ChatRequest))

    def ask(text: str) -> spp_export.Answer:
        before = getattr(opened, "chosen", None)
        answer = opened.ask(text, show=show_piece)
        if (now := getattr(opened, "chosen", None)) != before:
            out.note(f"answered by {now}")
        return answer

    if out.json:
        assert request.prompt is not None
        answer = opened.ask(request.prompt)
        if answer.ending == "interrupted":
            raise KeyboardInterrupt
        facts = {"runtime": opened.model.runtime, "peak_memory_bytes": peak_memory()}
        if isinstance(opened, spp_export.ScenarioChat):
            facts["scenario"] = opened.chosen
        write_json(answer.to_dict() | facts)
    elif request.prompt is not None:
        answer_once(ask, request.prompt, out)
    else:
        history = "/reset forgets what was said"
        rule = "every line is continued as it is" if opened.raw else history
        out.note(f"{opened.model.runtime}; {rule}, /quit or Ctrl-D ends.")
        converse(ask, opened.reset, out)

"""Which engine answers prompts fastest on a CPU: transformers in batches, llama.cpp in as many
slots, or ONNX Runtime.

`python -m spp_campaigns.answer_engines --model demo SCENARIO` lets each of them answer 32 prompts
of a scenario in turn, all of the same weights in fp32 and with the same threads. No answer ends
early, so that all do the same work. ONNX Runtime is given the tokens and chooses none, which
flatters it. Seconds of the wall clock want a quiet machine; those of the processor, with
`--threads 1`, do not, for then no thread waits for another.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import spp_export
from spp_bench.candidates import onnx_candidate, windows_of
from spp_bench.provenance import physical_cores
from spp_bench.threads import torch_threads
from spp_campaigns.command import finish, machine, parser, scratch, table
from spp_export.calibration.engines import Prompts
from spp_export.calibration.engines.batches import Batches
from spp_export.calibration.reading import question_ids
from spp_export.data.scenario import read_scenario
from spp_export.formats.gguf.options import GGUF_NAME
from spp_export.formats.onnx import OnnxOptions
from spp_export.models.session import Session, open_session

PROMPTS = 32
_COLUMNS = {
    "engine": "{engine}",
    "tokens per second": "{tokens_per_second:.1f}",
    "over transformers": "{over_transformers:.3f}",
    "in processor time": "{over_transformers_processor:.3f}",
    "processor s": "{processor:.1f}",
    "to get ready": "{ready:.1f}",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    made = parser(__doc__, writes=True)
    made.add_argument("scenario", help="file with at least 32 prompts")
    made.add_argument("--model", default="demo", help="directory or demo")
    made.add_argument("--tokens", type=int, default=96, help="tokens of each answer")
    made.add_argument("--threads", type=int, help="all physical cores by default")
    made.add_argument("--rounds", type=int, default=3, help="timed rounds, after one more")
    options = made.parse_args(arguments)
    session = open_session(options.model)
    asked = [
        part for one in read_scenario(options.scenario).conversations for part in one.dialogues
    ]
    questions = question_ids(session.tokenizer, asked)[:PROMPTS]
    prompts = Prompts(questions, options.tokens, 0, {"temperature": 1.0, "top_k": 0}, ())
    threads = options.threads or physical_cores()
    with scratch(options) as place, torch_threads(threads):
        engines, ready = {}, {}
        for name, prepare in _engines(options.model, session, prompts, place, threads).items():
            started = time.process_time()
            engines[name] = prepare()
            ready[name] = time.process_time() - started
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        processor: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(-1, options.rounds):
            for name, answer in engines.items():
                began = time.perf_counter(), time.process_time()
                answer()
                if turn >= 0:
                    seconds[name].append(time.perf_counter() - began[0])
                    processor[name].append(time.process_time() - began[1])
    tokens = len(questions) * options.tokens
    rows = [
        {
            "engine": name,
            "tokens_per_second": round(tokens / statistics.median(times), 2),
            "over_transformers": _over(seconds, name),
            "over_transformers_processor": _over(processor, name),
            "seconds": [round(value, 3) for value in times],
            "processor_seconds": [round(value, 3) for value in processor[name]],
            "processor": round(statistics.median(processor[name]), 3),
            "ready": round(ready[name], 3),
        }
        for name, times in seconds.items()
    ]
    document = {
        "machine": machine("xllamacpp"),
        "model": options.model,
        "threads": threads,
        "prompts": len(questions),
        "tokens": options.tokens,
        "engines": rows,
    }
    title = f"{len(questions)} answers of {options.tokens} tokens by {options.model}"
    finish(options, document, title, table(_COLUMNS, rows))
    return 0


def _over(seconds: Mapping[str, Sequence[float]], name: str) -> float:
    """How many times as fast as transformers, in the median round."""
    pairs = zip(seconds["transformers"], seconds[name], strict=True)
    return round(statistics.median(theirs / own for theirs, own in pairs), 4)


def _engines(
    model: str, session: Session, prompts: Prompts, place: Path, threads: int
) -> dict[str, Callable[[], Callable[[], object]]]:
    """What makes an engine ready: of what lets it answer all prompts once."""

    def transformers() -> Callable[[], object]:
        assert session.model
        return lambda: Batches().answers(session, prompts)

    def llama_cpp() -> Callable[[], object]:
        out = place / "gguf"
        spp_export.convert(model, out, format="gguf", precision="fp32", verify=False)
        return _llama_cpp(out / GGUF_NAME, prompts, threads)

    def onnx_runtime() -> Callable[[], object]:
        out = place / "onnx"
        spp_export.convert(model, out, format="onnx", precision="fp32", verify=False)
        return _onnx_runtime(session, out, prompts, threads)

    return {"transformers": transformers, "llama.cpp": llama_cpp, "ONNX Runtime": onnx_runtime}


def _llama_cpp(path: Path, prompts: Prompts, threads: int) -> Callable[[], object]:
    """A slot for each prompt, all decoded together."""
    import xllamacpp

    rows = len(prompts.questions)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_parallel = rows
    parameters.n_ctx = rows * (max(map(len, prompts.questions)) + prompts.tokens)
    parameters.n_gpu_layers = 0
    parameters.verbosity = 0
    parameters.use_jinja = False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(parameters)

    def answer() -> None:
        reply = server.handle_completions(
            {
                "prompt": [list(question) for question in prompts.questions],
                "n_predict": prompts.tokens,
                "ignore_eos": True,
                "cache_prompt": False,
                **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
            }
        )
        ends = [choice["finish_reason"] for choice in reply.get("choices", ())]
        if ends != ["length"] * rows:
            raise SystemExit(f"llama.cpp: expected {rows} answers of full length, got {reply}.")

    return answer


def _onnx_runtime(
    session: Session, directory: Path, prompts: Prompts, threads: int
) -> Callable[[], object]:
    """Steps of the tokens given, on prompts as long as the longest: its graph knows no sampling."""
    from spp_bench.engines.ort import OrtRunner

    source, options = session.source, OnnxOptions(precision="fp32")
    candidate = onnx_candidate(source, None, options, directory, windows_of(source))
    runner = OrtRunner.load(candidate, "cpu", threads)
    rows, width = len(prompts.questions), max(map(len, prompts.questions))
    runner.reserve(width + prompts.tokens)
    drawn = np.random.default_rng(0).integers(
        0, source.shape.vocab_size, (rows, width + prompts.tokens), dtype=np.int64
    )

    def answer() -> Any:
        runner.prefill(drawn[:, :width])
        runner.decode(drawn[:, width:])
        runner.forget()

    return answer


if __name__ == "__main__":
    sys.exit(main())

"""spp: one big language model in, many small scenario-specific ones out.

Everything a command does is a function here, under the command's name, with the command's options
as keyword arguments:

    spp_export.export("chemistry.txt", keep=0.8, output="out/chemistry")

Importing this package imports neither torch nor transformers; once transformers is imported,
per-layer checkpoints load with its Auto classes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_export.common.contents import contents
from spp_export.models.registration import install as _install

if TYPE_CHECKING:
    from spp_export.commands.cache import CacheContents as CacheContents
    from spp_export.commands.cache import cache as cache
    from spp_export.commands.chat.chat import Answer as Answer
    from spp_export.commands.chat.chat import Chat as Chat
    from spp_export.commands.chat.chat import ScenarioChat as ScenarioChat
    from spp_export.commands.chat.chat import chat as chat
    from spp_export.commands.chat.chat import open_chat as open_chat
    from spp_export.commands.chat.chat import open_scenario_chat as open_scenario_chat
    from spp_export.commands.convert import ConvertResult as ConvertResult
    from spp_export.commands.convert import convert as convert
    from spp_export.commands.diagnose import diagnose as diagnose
    from spp_export.commands.doctor import Examination as Examination
    from spp_export.commands.doctor import doctor as doctor
    from spp_export.commands.evaluate import EvalResult as EvalResult
    from spp_export.commands.evaluate import eval as eval  # noqa: A004
    from spp_export.commands.evaluate import evaluate as evaluate
    from spp_export.commands.evaluate import evaluate_scenarios as evaluate_scenarios
    from spp_export.commands.export import export as export
    from spp_export.commands.export_request import ExportResult as ExportResult
    from spp_export.commands.frontier import FrontierResult as FrontierResult
    from spp_export.commands.frontier import frontier as frontier
    from spp_export.commands.import_artifacts import import_artifacts as import_artifacts
    from spp_export.commands.load import ScenarioModels as ScenarioModels
    from spp_export.commands.load import load as load
    from spp_export.commands.load import load_many as load_many
    from spp_export.commands.plan import plan as plan
    from spp_export.commands.probe import probe as probe
    from spp_export.commands.push import PushResult as PushResult
    from spp_export.commands.push import push as push
    from spp_export.commands.push import push_to_hub as push_to_hub
    from spp_export.commands.recover import RecoverResult as RecoverResult
    from spp_export.commands.recover import recover as recover
    from spp_export.commands.report.report import ReportResult as ReportResult
    from spp_export.commands.report.report import report as report
    from spp_export.commands.requests import EvalRequest as EvalRequest
    from spp_export.commands.requests import ExportRequest as ExportRequest
    from spp_export.commands.requests import RecoverSettings as RecoverSettings
    from spp_export.commands.show import show as show
    from spp_export.commands.verify import verify as verify
    from spp_export.common.errors import SppError as SppError
    from spp_export.common.progress import show_progress as show_progress
    from spp_export.formats.gguf import GgufOptions as GgufOptions
    from spp_export.formats.onnx import OnnxOptions as OnnxOptions
    from spp_export.models.loader import load_dense as load_dense
    from spp_export.models.loader import load_slim as load_slim
    from spp_export.planning.plan import Plan as Plan
    from spp_export.planning.plan_file import read_plan as read_plan
    from spp_export.planning.planner import PlanResult as PlanResult
    from spp_export.planning.request import PlanRequest as PlanRequest

    bench: Callable[..., dict[str, Any]]  # an entry point: spp_bench is on the floor above

# Modules that users may have written down: spp_export.ort, .transformers_cli, .vllm_plugin.
__path__.append(str(Path(__file__).parent / "commands" / "public_paths"))
_install()
__getattr__, __dir__ = contents(__name__, __file__)

"""spp: one big language model in, many small scenario-specific ones out.

Everything a command does is a function here, under the command's name. Importing this package
imports neither torch nor transformers; once transformers is imported, per-layer checkpoints load
with its Auto classes.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_export.models.registration import install as _install

if TYPE_CHECKING:
    from spp_export.commands.chat.chat import (
        Answer,
        Chat,
        ScenarioChat,
        open_chat,
        open_scenario_chat,
    )
    from spp_export.commands.convert import ConvertResult, convert
    from spp_export.commands.diagnose import diagnose
    from spp_export.commands.doctor import Examination, doctor
    from spp_export.commands.evaluate import EvalRequest, EvalResult, evaluate, evaluate_scenarios
    from spp_export.commands.export import export
    from spp_export.commands.export_request import ExportRequest, ExportResult
    from spp_export.commands.import_artifacts import import_artifacts
    from spp_export.commands.load import ScenarioModels, load, load_many
    from spp_export.commands.lora import RecoverSettings
    from spp_export.commands.plan import plan
    from spp_export.commands.probe import probe
    from spp_export.commands.push import PushResult, push_to_hub
    from spp_export.commands.recover import RecoverResult, recover
    from spp_export.commands.report.report import ReportResult, report
    from spp_export.commands.show import show
    from spp_export.commands.verify import verify
    from spp_export.common.errors import SppError
    from spp_export.formats.gguf import GgufOptions
    from spp_export.formats.onnx import OnnxOptions
    from spp_export.models.loader import load_dense, load_slim
    from spp_export.planning import Plan, read_plan
    from spp_export.planning.request import PlanRequest, PlanResult

_WHERE = {
    "Answer": "spp_export.commands.chat.chat",
    "Chat": "spp_export.commands.chat.chat",
    "ConvertResult": "spp_export.commands.convert",
    "Examination": "spp_export.commands.doctor",
    "EvalRequest": "spp_export.commands.evaluate",
    "EvalResult": "spp_export.commands.evaluate",
    "ExportRequest": "spp_export.commands.export_request",
    "ExportResult": "spp_export.commands.export_request",
    "GgufOptions": "spp_export.formats.gguf",
    "OnnxOptions": "spp_export.formats.onnx",
    "Plan": "spp_export.planning",
    "PlanRequest": "spp_export.planning.request",
    "PlanResult": "spp_export.planning.request",
    "PushResult": "spp_export.commands.push",
    "RecoverResult": "spp_export.commands.recover",
    "RecoverSettings": "spp_export.commands.lora",
    "ReportResult": "spp_export.commands.report.report",
    "ScenarioChat": "spp_export.commands.chat.chat",
    "ScenarioModels": "spp_export.commands.load",
    "SppError": "spp_export.common.errors",
    "convert": "spp_export.commands.convert",
    "diagnose": "spp_export.commands.diagnose",
    "doctor": "spp_export.commands.doctor",
    "evaluate": "spp_export.commands.evaluate",
    "evaluate_scenarios": "spp_export.commands.evaluate",
    "export": "spp_export.commands.export",
    "import_artifacts": "spp_export.commands.import_artifacts",
    "load": "spp_export.commands.load",
    "load_dense": "spp_export.models.loader",
    "load_many": "spp_export.commands.load",
    "load_slim": "spp_export.models.loader",
    "open_chat": "spp_export.commands.chat.chat",
    "open_scenario_chat": "spp_export.commands.chat.chat",
    "plan": "spp_export.commands.plan",
    "probe": "spp_export.commands.probe",
    "push_to_hub": "spp_export.commands.push",
    "read_plan": "spp_export.planning",
    "recover": "spp_export.commands.recover",
    "report": "spp_export.commands.report.report",
    "show": "spp_export.commands.show",
    "verify": "spp_export.commands.verify",
}

# The command's name, where the function has one that says more.
_ALIASES = {"chat": "open_chat", "eval": "evaluate", "push": "push_to_hub"}

__all__ = [
    "Answer",
    "Chat",
    "ConvertResult",
    "EvalRequest",
    "EvalResult",
    "Examination",
    "ExportRequest",
    "ExportResult",
    "GgufOptions",
    "OnnxOptions",
    "Plan",
    "PlanRequest",
    "PlanResult",
    "PushResult",
    "RecoverResult",
    "RecoverSettings",
    "ReportResult",
    "ScenarioChat",
    "ScenarioModels",
    "SppError",
    "convert",
    "diagnose",
    "doctor",
    "evaluate",
    "evaluate_scenarios",
    "export",
    "import_artifacts",
    "load",
    "load_dense",
    "load_many",
    "load_slim",
    "open_chat",
    "open_scenario_chat",
    "plan",
    "probe",
    "push_to_hub",
    "read_plan",
    "recover",
    "report",
    "show",
    "verify",
]

# Modules that users may have written down: spp_export.ort, .transformers_cli, .vllm_plugin.
__path__.append(str(Path(__file__).parent / "commands" / "public_paths"))
_install()


def __getattr__(name: str) -> Any:
    found = _ALIASES.get(name, name)
    if found not in _WHERE:
        raise AttributeError(f"module 'spp_export' has no attribute {name!r}")
    return getattr(import_module(_WHERE[found]), found)

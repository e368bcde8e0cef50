"""spp: one big language model in, many small scenario-specific ones out.

Everything a command does is a function here, under the command's name. Importing this package
imports neither torch nor transformers; once transformers is imported, per-layer checkpoints load
with its Auto classes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spp_export.loader_registration import install as _install

if TYPE_CHECKING:
    from spp_export.errors import SppError
    from spp_export.gguf_file import GgufOptions
    from spp_export.loader import load_dense, load_slim
    from spp_export.onnx_graph import OnnxOptions
    from spp_export.pipeline.chat import Answer, Chat, open_chat
    from spp_export.pipeline.convert import ConvertResult, convert
    from spp_export.pipeline.diagnose import diagnose
    from spp_export.pipeline.doctor import Examination, doctor
    from spp_export.pipeline.evaluate import EvalRequest, EvalResult, evaluate, evaluate_scenarios
    from spp_export.pipeline.export import export
    from spp_export.pipeline.export_records import ExportRequest, ExportResult
    from spp_export.pipeline.import_artifacts import import_artifacts
    from spp_export.pipeline.plan import PlanRequest, PlanResult, plan
    from spp_export.pipeline.probe import probe
    from spp_export.pipeline.push import PushResult, push_to_hub
    from spp_export.pipeline.recover import RecoverResult, recover
    from spp_export.pipeline.report import ReportResult, report
    from spp_export.pipeline.scenario_chat import ScenarioChat, open_scenario_chat
    from spp_export.pipeline.scenario_models import ScenarioModels, load, load_many
    from spp_export.pipeline.show import show
    from spp_export.pipeline.verify import verify
    from spp_export.plans import Plan, read_plan
    from spp_export.recovery import RecoverSettings

_WHERE = {
    "Answer": "spp_export.pipeline.chat",
    "Chat": "spp_export.pipeline.chat",
    "ConvertResult": "spp_export.pipeline.convert",
    "Examination": "spp_export.pipeline.doctor",
    "EvalRequest": "spp_export.pipeline.evaluate",
    "EvalResult": "spp_export.pipeline.evaluate",
    "ExportRequest": "spp_export.pipeline.export_records",
    "ExportResult": "spp_export.pipeline.export_records",
    "GgufOptions": "spp_export.gguf_file",
    "OnnxOptions": "spp_export.onnx_graph",
    "Plan": "spp_export.plans",
    "PlanRequest": "spp_export.pipeline.plan",
    "PlanResult": "spp_export.pipeline.plan",
    "PushResult": "spp_export.pipeline.push",
    "RecoverResult": "spp_export.pipeline.recover",
    "RecoverSettings": "spp_export.recovery",
    "ReportResult": "spp_export.pipeline.report",
    "ScenarioChat": "spp_export.pipeline.scenario_chat",
    "ScenarioModels": "spp_export.pipeline.scenario_models",
    "SppError": "spp_export.errors",
    "convert": "spp_export.pipeline.convert",
    "diagnose": "spp_export.pipeline.diagnose",
    "doctor": "spp_export.pipeline.doctor",
    "evaluate": "spp_export.pipeline.evaluate",
    "evaluate_scenarios": "spp_export.pipeline.evaluate",
    "export": "spp_export.pipeline.export",
    "import_artifacts": "spp_export.pipeline.import_artifacts",
    "load": "spp_export.pipeline.scenario_models",
    "load_dense": "spp_export.loader",
    "load_many": "spp_export.pipeline.scenario_models",
    "load_slim": "spp_export.loader",
    "open_chat": "spp_export.pipeline.chat",
    "open_scenario_chat": "spp_export.pipeline.scenario_chat",
    "plan": "spp_export.pipeline.plan",
    "probe": "spp_export.pipeline.probe",
    "push_to_hub": "spp_export.pipeline.push",
    "read_plan": "spp_export.plans",
    "recover": "spp_export.pipeline.recover",
    "report": "spp_export.pipeline.report",
    "show": "spp_export.pipeline.show",
    "verify": "spp_export.pipeline.verify",
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

_install()


def __getattr__(name: str) -> Any:
    found = _ALIASES.get(name, name)
    if found not in _WHERE:
        raise AttributeError(f"module 'spp_export' has no attribute {name!r}")
    return getattr(import_module(_WHERE[found]), found)

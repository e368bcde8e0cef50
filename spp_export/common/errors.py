"""Every error a user can cause or meet, as one tree.

SppError                 exit 2: bad usage or input
├── UsageError           an option, or a combination of options, makes no sense
├── ScenarioError        the scenario text cannot be read
├── ArtifactsError       the artifacts directory is missing, malformed or of another model
├── ModelError           the model is unknown to us or is not what its config says
│   ├── CheckpointError  its safetensors files or index are malformed
│   └── DownloadError    it could not be fetched, or arrived with a wrong hash
├── PlanError            a plan is malformed or does not fit the model
│   └── BudgetError      no plan meets the budget; the message names the nearest that do
├── ProfileError         a latency table is malformed or of another model
├── OutputError          the output cannot be written where it was asked for
├── ResourceError        this machine has too little memory for it
├── ProcessError         one of the processes that torchrun started is gone, or does not answer
└── CheckFailed          exit 1: everything ran and the answer is no
    ├── ParityError      the slim model differs from the masked dense model
    └── QualityError     the quality gate was not met

A message is one line: what is wrong, what was expected and what is there, what to do.
"""

from __future__ import annotations

_LONGEST_REASON = 300


def reason_of(error: BaseException) -> str:
    """What an exception of another library says, in one line: the cause is often in the last of
    several."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):  # which says no more than the key
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= _LONGEST_REASON else f"{text[: _LONGEST_REASON - 3]}..."


class SppError(Exception):
    """Base of every error that `spp` reports as one line; `exit_code` is the process's status."""

    exit_code = 2


class UsageError(SppError):
    """An option, or a combination of options, makes no sense."""


class ScenarioError(SppError):
    """The scenario text cannot be read."""


class ArtifactsError(SppError):
    """The artifacts directory is missing, malformed or made for another model."""


class ModelError(SppError):
    """The model is unknown to us or is not what its config says."""


class CheckpointError(ModelError):
    """Safetensors files or their index are malformed."""


class DownloadError(ModelError):
    """A model could not be fetched, or arrived with a wrong hash."""


class PlanError(SppError):
    """A plan is malformed or does not fit the model."""


class BudgetError(PlanError):
    """No plan meets the budget."""


class ProfileError(SppError):
    """A latency table is malformed or was measured on another model."""


class OutputError(SppError):
    """The output cannot be written to the given place."""


class ResourceError(SppError):
    """This machine has too little memory for the request."""


class ProcessError(SppError):
    """A process that worked for this command is gone, or does not answer."""


class CheckFailed(SppError):
    """Everything ran, and a check failed."""

    exit_code = 1


class ParityError(CheckFailed):
    """The slim model differs from the masked dense model."""


class QualityError(CheckFailed):
    """The quality gate was not met."""

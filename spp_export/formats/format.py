"""What a format is: everything that the commands need of one. README.md shows how to add one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    Literal,
    Protocol,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

from spp_export.common.errors import UsageError
from spp_export.common.installation import install_command, require_package

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from spp_export.calibration.activations import TokenBatch
    from spp_export.calibration.reading import Text
    from spp_export.evaluation.parity import Check, ReferenceLogits
    from spp_export.models.checkpoint.checkpoint import Checkpoint
    from spp_export.models.engines import Engine
    from spp_export.models.families import Family
    from spp_export.models.session import Session
    from spp_export.models.shape import LayerShape, Layout, ModelShape
    from spp_export.planning import Plan
    from spp_export.planning.bound import Predicted


@dataclass(frozen=True)
class FormatOptions:
    """What may be chosen about the files of a format, a field for each.

    The command line is made from the fields. Their metadata have a `help`, and a `flag` where that
    is not their name; their choices are those of a Literal.
    """

    @classmethod
    def chosen(cls, device: str, values: Mapping[str, Any], shape: ModelShape | None = None) -> Any:
        """Options with these values, None of which is no choice, and the defaults for a device and
        a model of this shape.

        Raises UsageError for a choice that no model of this shape can have.
        """
        return cls(**{name: value for name, value in values.items() if value is not None})

    @classmethod
    def choices(cls) -> dict[str, tuple[str, ...]]:
        """The words that each field may be, by its name."""
        allowed = {}
        for name, hint in get_type_hints(cls).items():
            parts = (hint, *get_args(hint))
            words = next((get_args(part) for part in parts if get_origin(part) is Literal), ())
            if words:
                allowed[name] = words
        return allowed

    @classmethod
    def flags(cls) -> dict[str, str]:
        """What each field is called on the command line, by its name."""
        return {
            item.name: item.metadata.get("flag", "--" + item.name.replace("_", "-"))
            for item in fields(cls)
        }

    def check(self, device: str | None = None) -> None:
        """UsageError for options that exclude each other, or files that `device` cannot check; None
        checks none.
        """
        choices, flags = self.choices(), self.flags()
        for name, value in self.to_dict().items():
            known = choices.get(name, ())
            if value is not None and known and value not in known:
                raise UsageError(
                    f"{flags[name]} {value!s:.40}: expected one of {', '.join(known)}."
                )

    def to_dict(self) -> dict[str, Any]:
        """For config.json."""
        return asdict(self)


@dataclass(frozen=True)
class Library:
    """A library that something of ours needs.

    package  as pip names it
    module   as Python imports it
    use      what it is for
    extra    of this package that has it; None where it is a matter of its own
    """

    package: str
    module: str
    use: str
    extra: str | None = None

    @property
    def install(self) -> str:
        """The command that adds it to this installation."""
        return install_command(self.extra or self.package, extra=self.extra is not None)

    def require(self, title: str) -> None:
        """UsageError, with the command, where it is missing; `title` is what needs it."""
        require_package(self.module, title, lambda: self.install)


@dataclass(frozen=True)
class Comparison:
    """What files are checked against: the checkpoint that they were just made from.

    reference  logits of a checkpoint's PyTorch model on some batches, exact and in the files'
               precision
    load       a checkpoint's PyTorch model
    scratch    directory for what is only needed until the files' quality has been measured
    """

    checkpoint: Path
    batches: Sequence[TokenBatch]
    reference: Callable[[Path, Sequence[TokenBatch]], ReferenceLogits]
    load: Callable[[Path], nn.Module]
    device: str
    scratch: Path


@dataclass(frozen=True)
class Promise:
    """What a published directory is checked against: the dense model and the plan.

    prompts  to compare logits on; random tokens drawn with `seed` without any
    scratch  directory for what is only needed until the quality has been measured
    """

    session: Session
    plan: Plan
    prompts: Sequence[Text]
    seed: int
    scratch: Path


@dataclass(frozen=True)
class FileChecks:
    """The result of checking files.

    context    what verify.json says of them beside the checks
    model      what computes like them, for measures of quality; None is the checkpoint's own model
    quantised  whether their weights have fewer bits than any precision, so that it has to be
               measured what that costs
    """

    checks: tuple[Check, ...] = ()
    context: Mapping[str, Any] = field(default_factory=dict)
    model: nn.Module | None = None
    quantised: bool = False


@dataclass(frozen=True)
class CardFacts:
    """What a card says beside what the files are.

    report     the content of verify.json, where there were checks
    slim       of an export: its plan, the dense model's sizes and its own
    converted  of a conversion: the plan of the slim model that was converted
    """

    name: str
    report: Mapping[str, Any] | None
    license_name: str | None
    slim: tuple[Plan, ModelShape, Predicted] | None = None
    converted: Plan | None = None


class ModelFiles(ABC):
    """The files of one checkpoint in one format, planned and not yet written.

    engines        what loads them
    summary        what card and `--json` say of them
    element_bytes  of a weight that is not quantised
    torch_dtype    what PyTorch computes in to be compared with them, as torch spells it
    nbytes         what they take on disk, where that is known exactly, by a name for each part
    """

    engines: tuple[Engine, ...]
    summary: Mapping[str, Any]
    element_bytes: int
    torch_dtype: str
    nbytes: Mapping[str, int]

    @abstractmethod
    def write(self, checkpoint: Path, out: Path) -> None:
        """Everything but plan, card and manifest, from the checkpoint in a directory."""

    @abstractmethod
    def check(self, out: Path, against: Comparison) -> FileChecks:
        """Every check on what was just written to `out`."""

    @abstractmethod
    def card(self, facts: CardFacts) -> str:
        """The content of README.md."""


# Takes in tokens after those it has taken in before, and gives the logits [V] after the last.
Feed = Callable[[Sequence[int]], "NDArray[Any]"]


class RunningModel(Protocol):
    """A causal language model that continues one sequence at a time."""

    @property
    def runtime(self) -> str:
        """What runs it."""

    @property
    def context_length(self) -> int:
        """Most tokens of a sequence."""

    def start(self, capacity: int) -> Feed:
        """A new sequence, of at most `capacity` tokens."""


@runtime_checkable
class ReadsText(Protocol):
    """A running model with a tokenizer of its own, which its users' texts go through."""

    def tokenize(self, text: str, *, around: bool, capacity: int) -> list[int]:
        """Ids of a text, special tokens in it read as such; `around`: with those that begin and end
        a text. A sequence of at most `capacity` tokens is to follow."""


OptionsT = TypeVar("OptionsT", bound=FormatOptions)


class Format(ABC, Generic[OptionsT]):
    """One format; an instance of it stands in the registry.

    name       on the command line ("onnx")
    title      in a sentence ("ONNX")
    kind       what a directory of it is called ("ONNX export")
    engine     what it is for ("ONNX Runtime")
    options    what may be chosen about its files
    weights    pattern of the files that hold the model
    others     patterns of what an older export must not leave beside new weights
    marker     the file that makes a directory one of this format, whatever else is there
    reference  what its files are checked against, in words
    converted  whether it is made from a slim checkpoint, not the slim checkpoint itself
    ragged     whether it holds layers whose KV groups differ in size
    libraries   libraries for it
    required   those, by their import names, without which nothing is written or checked
    runs       those without which 'spp chat' does not run it
    """

    name: ClassVar[str]
    title: ClassVar[str]
    kind: ClassVar[str]
    engine: ClassVar[str]
    options: type[OptionsT]
    weights: ClassVar[str]
    others: ClassVar[tuple[str, ...]] = ()
    marker: ClassVar[str | None] = None
    reference: ClassVar[str] = "the PyTorch model of the same weights"
    converted: ClassVar[bool] = True
    ragged: ClassVar[bool] = False
    libraries: ClassVar[tuple[Library, ...]] = ()
    required: ClassVar[tuple[str, ...]] = ()
    runs: ClassVar[tuple[str, ...]] = ()

    def require(self) -> None:
        """UsageError unless all that writing and checking takes is installed."""
        for library in self.libraries:
            if library.module in self.required:
                library.require(self.title)

    def holds(self, names: Iterable[str]) -> bool:
        """Whether files of these names hold a model in this format."""
        return any(Path(name).match(self.weights) for name in names)

    def refusal(self, family: Family, layout: Layout) -> str | None:
        """Why this format holds no model of a family in a layout; None where it holds some. What is
        refused of all the same, for its config.json or its plan, is told by `prepare`."""
        if layout == "ragged" and not self.ragged:
            return "the KV groups of a layer must be alike: export with --pad"
        if layout == "ragged" and not family.uneven_groups:
            return "every KV head must serve as many query heads"
        if layout == "uniform" and not family.uniform:
            return "the stock config has neither a size of heads nor a width of the MLP"
        return None

    def uniform_units(self, family: Family) -> str:
        """What can go in layout `uniform`, as of `Family.uniform`."""
        return family.uniform

    @abstractmethod
    def prepare(self, options: OptionsT, checkpoint: Checkpoint, plan: Plan) -> ModelFiles:
        """Files of a checkpoint, which need not be written yet; its path has the tokenizer.

        `plan` says where the checkpoint comes from. Raises ModelError for what the format cannot
        hold.
        """

    @abstractmethod
    def disk(
        self, options: OptionsT, stored_dtype: str, parameters: int, verify: bool
    ) -> dict[str, int]:
        """About how many bytes each part takes, of a model stored in `stored_dtype` ("BF16")."""

    def working_bytes(self, options: OptionsT) -> int:
        """Of a value of a tensor on its way through memory."""
        return 4

    def verify_dtype(self, directory: Path) -> str | None:
        """What PyTorch must compute in to be compared with a directory; None leaves it open."""
        return None

    @abstractmethod
    def verify(self, directory: Path, against: Promise) -> FileChecks:
        """Every check on a published directory, against the dense model and the plan."""

    @abstractmethod
    def facts(self, directory: Path) -> dict[str, Any]:
        """What `show` says of a directory's files. Raises ModelError where they are not ours."""

    @abstractmethod
    def engines_for(
        self, config: Mapping[str, Any], layout: str, layers: Sequence[LayerShape]
    ) -> tuple[Engine, ...]:
        """Engines for a directory with this config.json; none where it is malformed."""

    @abstractmethod
    def describe(self, summary: Mapping[str, Any], size: str) -> list[str]:
        """Lines for the terminal on files of this `ModelFiles.summary` and size."""

    def refuse(self, path: Path) -> UsageError:
        """The error for a file where a directory is expected."""
        return UsageError(
            f"{path}: expected a directory, got a file. Give a directory that 'spp export' wrote, "
            "a dense model's, or 'demo'."
        )

    @abstractmethod
    def run(
        self, directory: Path, *, device: str, dtype: str | None, threads: int | None
    ) -> RunningModel:
        """The model in a directory. Raises UsageError where it cannot be run here."""

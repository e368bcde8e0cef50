"""The options of a plan. Imports nothing heavy: help pages are made from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from spp_export.common.errors import UsageError
from spp_export.common.options import (
    BUDGET,
    SHARE,
    SHARE_OR_NONE,
    AnswerTokens,
    CalibrationTokens,
    Matmul,
    Numbers,
    PathLike,
    Seed,
    check_word,
    option,
    parse_count,
)
from spp_export.models.shape import Layout, Units
from spp_export.planning.plan import Compensation

if TYPE_CHECKING:
    from spp_export.calibration.answers import Answering
    from spp_export.data.artifacts import Artifacts
    from spp_export.models.session import Session
    from spp_export.planning.budget import Budget
    from spp_export.planning.latency import LatencyTable

Policy = Literal["exact", "published"]
Comparable = Literal["standardised", "share", "raw", "shifted", "stream"]
Cost = Literal["params", "kv-bytes", "latency"]
Regime = Literal["in-domain", "cross-domain", "out-of-domain"]
DEFAULT_MULTIPLE = 64
# Of what `--cost` counts, that the plans of `spp frontier` keep.
FRONTIER_SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)


@dataclass(frozen=True, kw_only=True)
class PlanRequest(AnswerTokens, CalibrationTokens, Matmul, Seed):
    """The options of a plan in `spp plan` and `spp export`."""

    units: Units = option(
        "heads",
        help="What may be removed: attention heads, MLP channels, or both; of models of experts "
        "channels of every expert are meant, and whole experts, or all of these, may go.",
    )
    layout: Layout = option(
        "per-layer",
        help="uniform: every layer alike, a stock model. per-layer: layers differ, and less is "
        "lost. ragged: single query heads go, for transformers alone.",
    )
    # No choice of words here: a new criterion takes one file, and importing all of them is slow.
    criterion: str | None = option(
        None,
        metavar="NAME",
        help="Importance of a unit; by default fisher, obs where more than 30 % goes or gradients "
        "are not at hand, and energy where compensation is not lstsq. Others are axis, taylor, "
        "wanda-sp, flap, ppsp, llm-pruner, ...; a wrong name lists all.",
    )
    comparable: str | None = option(
        None,
        type=Comparable,
        help="How scores of different layers are made comparable; the criterion's own way by "
        "default.",
    )
    policy: Policy = option(
        "exact",
        help="exact: the best plan under the budget. published: the released algorithm, for "
        "comparison.",
    )
    compensate: Compensation = option(
        "lstsq", help="How the kept weights make up for what is removed; lstsq by default."
    )
    whole_moments: bool = option(
        True,
        help="Re-fit MLPs of more than 1,536 channels on the moments of all of these together, if "
        "memory takes them in at most four passes over the text; in blocks otherwise.",
    )
    regime: str | None = option(
        None,
        type=Regime,
        help="Probe temperatures to use; chosen from the text by default.",
    )
    shrinkage: float | None = option(
        None,
        metavar="SHARE",
        numbers=SHARE_OR_NONE,
        help="How far the diagnosed mixture is shrunk towards all domains alike, 0 to 1; chosen on "
        "validation text by default.",
    )
    adapt: bool = option(True, help="Let the scenario's own text add its statistics to the pools'.")
    keep: float | None = option(
        None,
        panel=BUDGET,
        metavar="SHARE",
        numbers=SHARE,
        help="Share of the parameters of the units that stays: of q, k, v and o for heads; 0.8 "
        "where no budget is given. Of what --cost says, where that is another.",
    )
    max_params: int | None = option(
        None,
        panel=BUDGET,
        metavar="N",
        least=1,
        parse=parse_count,
        help="Most parameters of the whole slim model; 12k, 1.5M and 2G are understood.",
    )
    max_kv_bytes: int | None = option(
        None,
        panel=BUDGET,
        metavar="N",
        least=1,
        parse=parse_count,
        help="Most bytes of KV cache per token, in the stored dtype.",
    )
    strength: float | None = option(
        None,
        panel=BUDGET,
        metavar="ETA",
        numbers=SHARE_OR_NONE,
        help="From 0 to 1; higher removes more, and narrow scenarios lose more than broad ones.",
    )
    cost: Cost = option(
        "params",
        panel=BUDGET,
        help="What units compete by, and what --keep is a share of: their parameters, the KV "
        "cache, or the time of their blocks by --profile.",
    )
    profile: PathLike | None = option(
        None,
        panel=BUDGET,
        metavar="FILE",
        help="Table of latency for --cost latency, written by 'spp bench --profile'.",
    )
    max_latency: float | None = option(
        None,
        panel=BUDGET,
        metavar="MS",
        numbers=Numbers("milliseconds above 0, such as 12.5", above=True),
        help="Most milliseconds of a step of the slim model by the profile; with --cost latency.",
    )
    allow_empty_layers: bool | None = option(
        None,
        panel=BUDGET,
        help="Let a layer keep no attention, or no MLP, where that is best; by default wherever "
        "layout and family can have such layers. vLLM serves none of them.",
    )
    width_multiple: int = option(
        DEFAULT_MULTIPLE,
        panel=BUDGET,
        least=1,
        metavar="N",
        help="MLP widths are multiples of this many channels.",
    )
    tp: int = option(
        1,
        panel=BUDGET,
        least=1,
        metavar="N",
        help="Cards that a server will spread every layer over: heads and channels divide by it.",
    )
    kv_divisors: bool = option(
        False,
        panel=BUDGET,
        help="Numbers of KV heads divide the dense model's: vLLM's pages where windows differ.",
    )

    @property
    def limits(self) -> tuple[float | None, ...]:
        """The limits of a budget, of which at most one is set."""
        return (self.keep, self.max_params, self.max_kv_bytes, self.strength, self.max_latency)

    @property
    def budget(self) -> Budget:
        """The budget; the default share where there is no limit."""
        from spp_export.planning.budget import DEFAULT_KEEP, Budget

        return Budget(
            keep=DEFAULT_KEEP if self.limits == (None,) * 5 else self.keep,
            max_params=self.max_params,
            max_kv_bytes=self.max_kv_bytes,
            strength=self.strength,
            units=self.units,
            cost=self.cost,
            max_latency=self.max_latency,
        )

    @property
    def answering(self) -> Answering:
        """How the dense model answers prompts."""
        from spp_export.calibration.answers import Answering

        return Answering(self.answer_tokens, self.seed)

    def criterion_for(self, session: Session, artifacts: Artifacts, removed: float = 0.0) -> str:
        """The criterion; the default one for a share `removed` where none is named."""
        from spp_export.planning.scoring import default_criterion

        return self.criterion or default_criterion(
            session, artifacts, self.compensate, self.answer_tokens, removed, self.units
        )

    def check(self) -> None:
        """UsageError for an unknown word or an invalid budget."""
        from spp_export.importance import CRITERIA
        from spp_export.importance.base import SetCriterion
        from spp_export.planning.scoring import CRITERION_NAMES, DEFAULT_CRITERION

        super().check()
        check_word("--criterion", self.criterion or CRITERION_NAMES[0], CRITERION_NAMES)
        check_word("--comparable", self.comparable or "raw", get_args(Comparable))
        self.budget.to_dict()
        self._check_cost()
        if self.policy == "published" and (self.strength is None or self.layout == "uniform"):
            raise UsageError(
                "--policy published takes its own budget, --strength ETA, and the per-layer layout "
                "or the ragged one."
            )
        if self.tp > 1 and (self.layout == "ragged" or self.policy == "published"):
            raise UsageError("--tp: only regular plans of policy exact divide among cards.")
        if self.kv_divisors and self.policy == "published":
            raise UsageError("--kv-divisors: policy published chooses heads otherwise.")
        criterion = CRITERIA.get(self.criterion or DEFAULT_CRITERION[self.compensate])
        if isinstance(criterion, SetCriterion) and self.comparable is not None:
            raise UsageError(
                f"--comparable: {criterion.name} weighs losses in one currency; leave it out."
            )

    def _check_cost(self) -> None:
        if (self.cost == "latency") != (self.profile is not None):
            raise UsageError(
                "--cost latency and --profile FILE go together: the file is the table that "
                "'spp bench --profile' wrote."
            )
        if self.cost == "latency" and self.layout == "ragged":
            raise UsageError("--layout ragged: tables of latency have regular layers only.")
        if self.cost != "params" and self.policy == "published":
            raise UsageError("--policy published takes no --cost: it has a budget of its own.")
        self.latency()

    def latency(self) -> LatencyTable | None:
        """The table of latency, if any. Raises ProfileError."""
        from spp_export.planning.latency import read_latency_table

        return None if self.profile is None else read_latency_table(self.profile)

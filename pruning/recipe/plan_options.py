"""The options of a plan; the other groups are in `pruning.recipe.options`."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from moe_jax.errors import InputError
from pruning.recipe.group import About, Options
from pruning.recipe.names import ATTRIBUTIONS, CRITERIA, PLANNERS, SMOOTHINGS, WEIGHTS
from pruning.recipe.values import check_rate, check_share, layer_rates

BUDGETS = ("prune_rate", "target_parameters", "target_bytes", "target_factor")  # at most one
LayerLoss = Literal["energy", "attribution", "nll_ig"]
MOST_SMALLER = 1000  # times: beyond what channels and bits of experts can give
AUTO = "auto"  # the planner that measures rules and takes the best
# What makes a rule, beside its planner; all other options say what any rule must keep to.
RULE = ("criterion", "attribution", "weights", "rho_max", "layer_loss", "smoothing", "passes",
        "align", "per_layer")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Options):
    """Plan: how many channels stay, and which.

    A rule of `compare` is one of these; `moe-compress plan` decides all of them anew from the same
    statistics.
    """

    prune_rate: Annotated[
        float | None,
        About(
            "fraction of routed-expert channels to remove, in [0, 1); default 0.25 where no "
            "target is given",
            shown="RATE",
        ),
    ] = None
    target_parameters: Annotated[
        int | None,
        About(
            "most parameters of the pruned model instead of a rate, such as 3B",
            least=1,
            shown="AMOUNT",
        ),
    ] = None
    target_bytes: Annotated[
        int | None,
        About(
            "most bytes of the first export's weights instead of a rate, such as 6GB",
            least=1,
            shown="AMOUNT",
        ),
    ] = None
    target_factor: Annotated[
        float | None,
        About(
            "how many times smaller the first export's weights are to be than the dense model's, "
            "in bytes written, instead of a rate, such as 5.27",
            shown="FACTOR",
        ),
    ] = None
    criterion: Annotated[
        str | None,
        About(
            "channel score; default shapley, or noise with weights_only, or what planner auto "
            "finds best",
            names=CRITERIA,
        ),
    ] = None
    attribution: Annotated[
        str | None,
        About(
            "expert score; default ala, or aimer with weights_only; S(b,alpha,beta) is a member "
            "of the norm family",
            names=ATTRIBUTIONS,
        ),
    ] = None
    planner: Annotated[
        str | None,
        About(
            "how the budget is allocated; auto plans by some eight rules, measures each on "
            "calibration windows that it keeps out of the statistics, and takes the one that loses "
            "least, with what is named of criterion, attribution, weights, align and so on held "
            "in all of them; default auto, or fair where one of these is named or no text is read",
            names=(*PLANNERS, AUTO),
        ),
    ] = None
    weights: Annotated[
        str | None,
        About("how experts count in the planner's objective; default its own", names=WEIGHTS),
    ] = None
    rho_max: Annotated[
        float,
        About("coverage beyond which a channel is worth nothing, in (0, 1]", shown="SHARE"),
    ] = 1.0
    layer_loss: Annotated[
        LayerLoss,
        About(
            "what weighs layers, for planners that do: the share of the residual stream that "
            'their experts write ("energy"), the sum of their "attribution", or the end-to-end '
            'loss of their experts together ("nll_ig", which needs --nll-ig)'
        ),
    ] = "energy"
    smoothing: Annotated[str, About("how the layer losses are smoothed", names=SMOOTHINGS)] = "sqrt"
    passes: Annotated[
        int,
        About(
            "how often the smoothing is applied; the paper's figure has 1, its release 4",
            least=0,
            most=1000,
        ),
    ] = 1
    align: Annotated[
        Literal["paper", "paper_scores", "dp", "hull"],
        About(
            "how widths become multiples of the block: the paper's rule, the same by lost score, "
            "or the exact optimum by table (slow) or by hull"
        ),
    ] = "paper"
    per_layer: Annotated[bool, About("alignment keeps to each layer's budget")] = False
    width: Annotated[
        Literal["free", "capped", "layer", "uniform", "experts", "combined"] | None,
        About(
            'what may differ from what: "free" per expert, "capped" up to --cap, one per "layer", '
            '"uniform" for the model, whole "experts", or "combined": whole experts go at '
            "--expert-rate, channels of the others make up the rest; default follows the exports: "
            "free for ragged, layer for layered, uniform for padded"
        ),
    ] = None
    cap: Annotated[int | None, About('widest expert of width "capped"', least=1)] = None
    expert_rate: Annotated[
        float,
        About('fraction of experts that width "combined" removes, in [0, 1)', shown="RATE"),
    ] = 0.0
    layer_rate: Annotated[
        tuple[str, ...],
        About(
            "prune rates of single layers; the other layers make up the rest",
            shown="LAYER=RATE",
        ),
    ] = ()
    skip_layers: Annotated[
        tuple[int, ...], About("layers left alone, as by LAYER=0", shown="LAYER")
    ] = ()
    block: Annotated[
        int | None, About("widths are multiples of it; default the group size", least=1)
    ] = None
    minimum: Annotated[
        int | None,
        About(
            "least width of an expert that is kept, in whole blocks; others are emptied, unless "
            "with --keep-experts; default one block",
            least=1,
        ),
    ] = None
    keep_experts: Annotated[
        bool, About("empty no expert: each keeps at least --minimum channels")
    ] = False
    grid: Annotated[
        int | None,
        About(
            "channels stay or go in whole groups of so many neighbours (default 1); 128 keeps all "
            "codes of a model in 8-bit floats, the group size those of one in 4-bit groups",
            least=1,
        ),
    ] = None
    emptied: Annotated[
        Literal["zero", "mean"],
        About(
            "what experts without channels add: zero, or the mean of what they added over the "
            "text, which needs --expert-details and a ragged export"
        ),
    ] = "zero"
    cut_router: Annotated[
        bool,
        About(
            "emptied experts are gone for the router, too: their tokens go to other experts, as "
            "many for each as before; padded formats, which stock classes load, need as many left "
            "in every layer (--width experts --per-layer), ragged ones do not"
        ),
    ] = False
    top_k: Annotated[
        int | None,
        About("with --cut-router, experts per token, fewer than the model has", least=1),
    ] = None
    seed: Annotated[int, About("seed of whatever is random", least=0)] = 0

    def check(self) -> None:
        """Raise InputError if a share is out of range or options contradict each other."""
        if self.prune_rate is not None:
            check_rate("prune_rate", self.prune_rate)
        if self.target_factor is not None and not 1 <= self.target_factor <= MOST_SMALLER:
            raise InputError(
                f"target_factor={self.target_factor} must lie in [1, {MOST_SMALLER}]; choose e.g. 4"
            )
        given = {name: value for name in BUDGETS if (value := getattr(self, name)) is not None}
        if len(given) > 1:
            listed = ", ".join(f"{name}={value}" for name, value in given.items())
            raise InputError(f"{listed} exclude each other; give one of them")
        check_rate("expert_rate", self.expert_rate)
        check_share("rho_max", self.rho_max, "the paper uses 1")
        for given_for, name, unset in (("capped", "cap", None), ("combined", "expert_rate", 0.0)):
            if getattr(self, name) != unset and self.width != given_for:
                raise InputError(
                    f"{name}={getattr(self, name)} needs width={given_for!r}, not {self.width!r}"
                )
        if self.width == "capped" and self.cap is None:
            raise InputError("width='capped' needs a cap; give e.g. half the expert width")
        if self.keep_experts and self.width in ("experts", "combined"):
            raise InputError(
                f"width={self.width!r} removes whole experts, keep_experts forbids it; leave out "
                "one of the two"
            )
        if self.top_k is not None and not self.cut_router:
            raise InputError(
                f"top_k={self.top_k} needs cut_router, after which fewer experts may be left than "
                "a token goes to; add --cut-router, or leave --top-k away"
            )
        if self.cut_router and self.emptied != "zero":
            raise InputError(
                f"emptied={self.emptied!r} puts constants in the place of emptied experts, whose "
                "rows of the router cut_router removes; choose one of the two"
            )
        _ = self.layer_rates

    @property
    def layer_rates(self) -> dict[int, float]:
        """Prune rates of the layers that have one of their own, by the model's layer number."""
        return layer_rates([*self.layer_rate, *(f"{layer}=0" for layer in self.skip_layers)])

    @property
    def named(self) -> tuple[str, ...]:
        """Options of `RULE` that differ from their defaults."""
        defaults = {field.name: field.default for field in dataclasses.fields(PlanOptions)}
        return tuple(name for name in RULE if getattr(self, name) != defaults[name])

    @property
    def used_criterion(self) -> str:
        """The channel score, the usual one where it is open."""
        return self.criterion or "shapley"

    @property
    def used_attribution(self) -> str:
        """The expert score, the usual one where it is open."""
        return self.attribution or "ala"

    @property
    def used_planner(self) -> str:
        """The planner, the usual one where nothing is measured."""
        return self.planner if self.planner not in (None, AUTO) else "fair"

    def fixed(self) -> Self:
        """The same with the usual rule where it is open, which nothing measures."""
        return dataclasses.replace(
            self,
            criterion=self.used_criterion,
            attribution=self.used_attribution,
            planner=self.used_planner,
        )

    @property
    def has_budget(self) -> bool:
        """Whether a rate or a target is given."""
        return any(getattr(self, name) is not None for name in BUDGETS)

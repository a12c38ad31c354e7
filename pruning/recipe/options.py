"""The options of a run in groups; each is declared once, with help, range and default.

Command line, YAML and Python share them: a flag is made from a field (`pruning.cli.flags`), a
recipe inherits all groups (`pruning.recipe.recipe`), and a function takes the group that it reads.
"""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from convert.export_format import GROUP_SIZES, FormatName
from moe_jax.errors import InputError
from pruning.recipe.values import layer_rates, typed

BUDGETS = ("prune_rate", "target_parameters", "target_bytes")  # one of them at most


@dataclass(frozen=True)
class About:
    """What an option means to a user, and its least value."""

    help: str
    least: int | None = None


def about(group: type, name: str) -> About:
    """The description of a field of an option group."""
    hint = typing.get_type_hints(group, include_extras=True)[name]
    return next(extra for extra in typing.get_args(hint)[1:] if isinstance(extra, About))


@dataclass(frozen=True, kw_only=True)
class Options:
    """A group of options: values are brought to their field's type, and checked, when made.

    Raises:
      InputError: a value of another type or out of range; it names the option.
    """

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self)).items():
            object.__setattr__(self, name, typed(name, getattr(self, name), kind))
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), about(type(self), field.name).least
            if value is not None and least is not None and value < least:
                raise InputError(f"{field.name}={value} must be at least {least}")
        for group in reversed(type(self).__mro__):
            if "check" in vars(group):
                group.check(self)  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """Model and output."""

    model: Annotated[str, About('checkpoint folder, or "demo" for the embedded model')]
    output: Annotated[str, About("folder to write")]
    overwrite: Annotated[bool, About("replace an existing output folder")] = False

    def check(self) -> None:
        """Raise InputError if a folder has no name."""
        for name in ("model", "output"):
            if not getattr(self, name):
                raise InputError(f"{name}='' must name a folder")


@dataclass(frozen=True, kw_only=True)
class TextOptions(Options):
    """Text: what is scored, and what quality is measured on."""

    calibration: Annotated[
        tuple[str, ...],
        About("text files, FILE or FILE=WEIGHT; .jsonl and .jsonl.gz hold a document a line"),
    ] = ()
    calibration_field: Annotated[
        str, About("JSON field with the text, of calibration and evaluation files")
    ] = "text"
    evaluation: Annotated[
        tuple[str, ...],
        About(
            "text files to measure quality on, plain or JSON lines; default a sixteenth of the "
            "calibration windows, which are then not scored"
        ),
    ] = ()
    evaluation_tokens: Annotated[int, About("tokens read of each evaluation text", least=2)] = 16384
    max_tokens: Annotated[int, About("bound on the calibration tokens", least=1)] = 131072
    window: Annotated[
        int | None,
        About(
            "tokens per calibration and evaluation window; default the model's context, at most "
            "2048",
            least=2,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(Options):
    """Scores: what is collected, and how."""

    weights_only: Annotated[
        bool,
        About(
            "read no calibration text: the weights alone decide what is kept, which is a preview; "
            "only criterion noise, weight or random and attribution aimer, weight or uniform work"
        ),
    ] = False
    gradients: Annotated[
        bool, About("also collect end-to-end gradient scores (about three times the time)")
    ] = False
    expert_details: Annotated[
        bool,
        About("also collect what wanda, MoNE, NAEE and GRAPE need (about twice the time)"),
    ] = False
    weight_gradients: Annotated[
        bool, About("also collect criterion wg, in a sweep of its own (about five times)")
    ] = False
    nll_ig: Annotated[
        int | None,
        About(
            "also collect attribution nll_ig with this many steps, e.g. 4: an expert's worth to "
            "the end-to-end loss, at several times the time",
            least=1,
        ),
    ] = None
    nll_ablate: Annotated[
        bool,
        About(
            "also collect attribution nll_ablate, the exact loss without each expert: as many "
            "partial forward passes as there are experts"
        ),
    ] = False
    nll_grad2: Annotated[
        bool,
        About(
            "also collect attribution nll_grad2 from second derivatives; the model must fit in "
            "memory twice"
        ),
    ] = False
    until_stable: Annotated[
        float | None,
        About(
            "stop scoring once the kept sets before and after a part of the calibration text "
            "overlap by this much (Jaccard index, in (0, 1]), such as 0.98; default scores it all"
        ),
    ] = None
    batch: Annotated[int, About("windows per step", least=1)] = 8
    dtype: Annotated[Literal["float32", "bfloat16"], About("of the activations")] = "float32"

    def check(self) -> None:
        """Raise InputError if the overlap is no share."""
        if self.until_stable is not None and not 0 < self.until_stable <= 1:
            raise InputError(f"until_stable={self.until_stable} must lie in (0, 1]; choose 0.98")

    @property
    def groups(self) -> frozenset[str]:
        """What is collected beyond the forward sums, names of `pruning.scores.statistics.SUMS`."""
        asked = {
            "gradients": self.gradients,
            "expert-details": self.expert_details,
            "weight-gradients": self.weight_gradients,
            "nll-ig": self.nll_ig is not None,
            "nll-ablate": self.nll_ablate,
            "nll-grad2": self.nll_grad2,
            "weights-only": self.weights_only,
        }
        return frozenset(name for name, on in asked.items() if on)


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
            "target is given"
        ),
    ] = None
    target_parameters: Annotated[
        int | None,
        About("most parameters of the pruned model instead of a rate, such as 3B", least=1),
    ] = None
    target_bytes: Annotated[
        int | None,
        About("most bytes of the first export's weights instead of a rate, such as 6GB", least=1),
    ] = None
    criterion: Annotated[
        str | None, About("channel score; default shapley, or noise with weights_only")
    ] = None
    attribution: Annotated[
        str | None, About("expert score; default ala, or aimer with weights_only")
    ] = None
    planner: Annotated[str, About("how the budget is allocated")] = "fair"
    weights: Annotated[
        str | None,
        About("how experts count in the planner's objective; default the planner's own"),
    ] = None
    rho_max: Annotated[
        float, About("coverage beyond which a channel is worth nothing, in (0, 1]")
    ] = 1.0
    layer_loss: Annotated[
        Literal["energy", "attribution", "nll_ig"],
        About(
            "what weighs layers, for planners that do: the share of the residual stream that "
            'their experts write ("energy"), the sum of their "attribution", or the end-to-end '
            'loss of their experts together ("nll_ig", which needs --nll-ig)'
        ),
    ] = "energy"
    smoothing: Annotated[str, About("of the layer losses")] = "sqrt"
    passes: Annotated[
        int,
        About(
            "how often the smoothing is applied; the paper's figure has 1, its release 4", least=0
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
        float, About('fraction of experts that width "combined" removes, in [0, 1)')
    ] = 0.0
    layer_rate: Annotated[
        tuple[str, ...],
        About("prune rates of single layers, LAYER=RATE; the other layers make up the rest"),
    ] = ()
    skip_layers: Annotated[tuple[int, ...], About("layers left alone, as by LAYER=0")] = ()
    block: Annotated[
        int | None, About("widths are multiples of it; default the group size", least=1)
    ] = None
    minimum: Annotated[
        int | None, About("least width of a kept expert; default one block", least=1)
    ] = None
    emptied: Annotated[
        Literal["zero", "mean"],
        About(
            "what experts without channels add: zero, or the mean of what they added over the "
            "text, which needs --expert-details and a ragged export"
        ),
    ] = "zero"
    seed: Annotated[int, About("of whatever is random", least=0)] = 0

    def check(self) -> None:
        """Raise InputError if a share is out of range or options contradict each other."""
        if self.prune_rate is not None and not 0 <= self.prune_rate < 1:
            raise InputError(f"prune_rate={self.prune_rate} must lie in [0, 1); choose e.g. 0.25")
        given = {name: value for name in BUDGETS if (value := getattr(self, name)) is not None}
        if len(given) > 1:
            listed = ", ".join(f"{name}={value}" for name, value in given.items())
            raise InputError(f"{listed} exclude each other; give one of them")
        if not 0 <= self.expert_rate < 1:
            raise InputError(f"expert_rate={self.expert_rate} must lie in [0, 1); choose e.g. 0.25")
        if not 0 < self.rho_max <= 1:
            raise InputError(f"rho_max={self.rho_max} must lie in (0, 1]; the paper uses 1")
        for given_for, name, unset in (("capped", "cap", None), ("combined", "expert_rate", 0.0)):
            if getattr(self, name) != unset and self.width != given_for:
                raise InputError(
                    f"{name}={getattr(self, name)} needs width={given_for!r}, not {self.width!r}"
                )
        if self.width == "capped" and self.cap is None:
            raise InputError("width='capped' needs a cap; give e.g. half the expert width")
        _ = self.layer_rates

    @property
    def layer_rates(self) -> dict[int, float]:
        """Prune rates of the layers that have one of their own, by the model's layer number."""
        return layer_rates([*self.layer_rate, *(f"{layer}=0" for layer in self.skip_layers)])

    @property
    def has_budget(self) -> bool:
        """Whether a rate or a target is given."""
        return any(getattr(self, name) is not None for name in BUDGETS)


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """Export: the formats, and their bits."""

    export: Annotated[
        tuple[FormatName, ...],
        About("formats to write: ragged (a width per expert), layered (per layer) or padded (one)"),
    ] = ()
    bits: Annotated[Literal[4, 16], About("of the weights")] = 4
    group_size: Annotated[
        int | None,
        About(
            "weights per 4-bit scale; default the largest of 128, 64, 32 that leaves an expert at "
            "least eight groups, else 32"
        ),
    ] = None
    quantizer: Annotated[
        Literal["rtn", "gptq"],
        About(
            'how 4-bit codes are chosen: "rtn" rounds to nearest, "gptq" keeps the outputs on '
            "calibration text close, at the cost of two more passes over it"
        ),
    ] = "rtn"
    mtp: Annotated[
        Literal["drop", "keep", "prune"],
        About(
            'what becomes of layers that predict further tokens, with which servers draft: "drop" '
            'leaves them out, "keep" copies them (padded formats only if the expert width stays), '
            '"prune" cuts their experts to the model\'s width, without a text; never 4-bit'
        ),
    ] = "drop"

    def check(self) -> None:
        """Raise InputError if the group size is none of those, or a format comes twice."""
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise InputError(f"group_size={self.group_size} must be one of {GROUP_SIZES}")
        if len(set(self.export)) < len(self.export):
            raise InputError(f"export={list(self.export)} must name each format once")


def fields_of(group: type[Options]) -> tuple[str, ...]:
    """Names of a group's options."""
    return tuple(field.name for field in dataclasses.fields(group))


def part_of(recipe: Options, group: type[Options]) -> Any:
    """The options of one group out of a recipe."""
    return group(**{name: getattr(recipe, name) for name in fields_of(group)})

"""The options of a run in groups; each is declared once, with help, range and default.

Those of a plan are in `plan_options`; arguments that no recipe has in `pruning.cli.arguments`.

Command line, YAML and Python share them: a flag is made from a field (`pruning.cli.flags`), a
recipe inherits all groups (`pruning.recipe.recipe`), and a function takes the group that it reads.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from convert.export_format import GROUP_SIZES, FormatName
from moe_jax.errors import InputError
from pruning.recipe.group import About, Options
from pruning.recipe.plan_options import BUDGETS, LayerLoss, PlanOptions
from pruning.recipe.values import check_share

__all__ = [
    "BUDGETS",
    "COMPARED_BITS",
    "COMPARED_TOKENS",
    "EVALUATION_TOKENS",
    "MOST_BATCH",
    "TEXT_FILES",
    "WHOLE_TEXT",
    "ExportOptions",
    "LayerLoss",
    "PlanOptions",
    "RunOptions",
    "ScoreOptions",
    "TextOptions",
    "fields_of",
    "part_of",
]

EVALUATION_TOKENS = 16384  # of each text, beside other work
COMPARED_BITS = ("4", "8", "16", "auto")  # of weights, under the same plans
COMPARED_TOKENS = 4096  # of each text, under many plans
MOST_BATCH = 4096  # windows a step: a batch is filled up to so many
TEXT_FILES = "prose, or rows of JSON, CSV, TSV or parquet, as their content says; .gz, .zst too"
WHOLE_TEXT = 1 << 20  # tokens of each text where measuring is the work


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """Model and output."""

    model: Annotated[
        str,
        About(
            "checkpoint folder, OWNER/NAME[@REVISION] in the local Hugging Face cache, or "
            '"demo" for the embedded model',
            shown="MODEL",
        ),
    ]
    output: Annotated[str, About("folder to write", shown="FOLDER")]
    overwrite: Annotated[bool, About("replace an existing output folder")] = False
    scratch: Annotated[
        str | None,
        About(
            "folder for hidden states and other temporary files; default the output folder",
            shown="FOLDER",
        ),
    ] = None
    memory_limit: Annotated[
        int | None,
        About(
            "most memory that any stage takes, such as 1.5GB, without a change of its results: "
            "layers are not read ahead and states lie on disk where they must; default what is "
            "free",
            least=1,
            shown="SIZE",
        ),
    ] = None

    @property
    def scratch_folder(self) -> Path:
        """Where temporary files go."""
        return Path(self.scratch or self.output)

    def check(self) -> None:
        """Raise InputError if a folder has no name."""
        for name in ("model", "output", "scratch"):
            if getattr(self, name) == "":
                raise InputError(f"{name}='' must name a folder")


@dataclass(frozen=True, kw_only=True)
class TextOptions(Options):
    """Text: what is scored, and what quality is measured on."""

    calibration: Annotated[
        tuple[str, ...],
        About(
            "text files, FILE or FILE=WEIGHT, with :field=NAME or :template='{NAME}\\n{NAME}' "
            f"behind where text stands in other fields; {TEXT_FILES}",
            shown="FILE",
        ),
    ] = ()
    calibration_field: Annotated[
        str,
        About("field of rows that holds the text", shown="FIELD", flag="text-field"),
    ] = "text"
    first_tokens: Annotated[
        bool,
        About(
            "begin texts and calibration windows with the tokens that the tokenizer puts first, "
            "such as <s>, if it does (default true)"
        ),
    ] = True
    loss_on: Annotated[
        Literal["all", "answers"],
        About(
            "tokens of conversations that count in losses and their gradients; the prompts before "
            "answers are read all the same, and statistics of activations are of all tokens"
        ),
    ] = "all"
    evaluation: Annotated[
        tuple[str, ...],
        About(
            "text files to measure quality on, read like the others; default a sixteenth of the "
            "calibration windows, which are then not scored",
            shown="FILE",
        ),
    ] = ()
    evaluation_tokens: Annotated[
        int | None,
        About(
            f"most tokens measured of each evaluation text; default {EVALUATION_TOKENS}, of "
            f"compare {COMPARED_TOKENS}",
            least=2,
        ),
    ] = None
    max_tokens: Annotated[
        int, About("most tokens of calibration text, all files together", least=1)
    ] = 131072
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
        About("also collect what wanda, moe_pruner, MoNE, NAEE, DEK, GRAPE need (twice the time)"),
    ] = False
    weight_gradients: Annotated[
        bool, About("also collect criterion wg, in a sweep of its own (about five times)")
    ] = False
    obs: Annotated[
        bool,
        About(
            "also collect criterion obs, what removing a channel costs once others have taken "
            "over, by a quarter of the text; as a rule planner auto does where plans are repaired"
        ),
    ] = False
    nll_ig: Annotated[
        int | None,
        About(
            "also collect attribution nll_ig with this many steps, e.g. 4: an expert's worth to "
            "the end-to-end loss, at several times the time",
            least=1,
            most=1024,
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
            "use no more parts of the calibration text than until the kept sets before and after "
            "one overlap by this much (Jaccard index, in (0, 1]), such as 0.98; default uses all",
            shown="OVERLAP",
        ),
    ] = None
    batch: Annotated[int, About("windows per step", least=1, most=MOST_BATCH)] = 8
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        About("type of the activations; bfloat16 is faster on accelerators and with AMX"),
    ] = "float32"

    def check(self) -> None:
        """Raise InputError if the overlap is no share."""
        if self.until_stable is not None:
            check_share("until_stable", self.until_stable, "choose 0.98")

    @property
    def groups(self) -> frozenset[str]:
        """What is collected beyond the forward sums, names of `pruning.scores.statistics.SUMS`."""
        asked = {
            "gradients": self.gradients,
            "expert-details": self.expert_details,
            "weight-gradients": self.weight_gradients,
            "obs": self.obs,
            "nll-ig": self.nll_ig is not None,
            "nll-ablate": self.nll_ablate,
            "nll-grad2": self.nll_grad2,
            "weights-only": self.weights_only,
        }
        return frozenset(name for name, on in asked.items() if on)


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """Export: the formats, and their bits."""

    export: Annotated[
        tuple[FormatName, ...],
        About(
            "formats to write: ragged (a width per expert), layered (per layer) or padded (one); "
            "default ragged-int4, or what the model's family has",
            shown="FORMAT",
        ),
    ] = ()
    bits: Annotated[
        Literal[4, 8, 16, "auto"],
        About(
            "bits of the weights; 8 is padded-fp8, floats in blocks, unless --export names "
            "ragged-int8 or padded-int8; auto chooses channels and 4, 8 or 16 bits of each layer "
            "within --target-bytes or --target-factor, as ragged-mixed"
        ),
    ] = 4
    group_size: Annotated[
        int | None,
        About(
            "weights per scale of integers; default the largest of 128, 64, 32 that leaves an "
            "expert at least eight groups, else 32"
        ),
    ] = None
    quantizer: Annotated[
        Literal["rtn", "gptq"],
        About(
            'how 4-bit codes are chosen: "rtn" rounds to nearest, "gptq" keeps the outputs on '
            "calibration text close, at the cost of two more passes over it"
        ),
    ] = "rtn"
    repair: Annotated[
        Literal["none", "expert", "layer"] | None,
        About(
            "how the down-projections of what is kept take over what the rest did, by least "
            'squares on the calibration text, before any rounding: each "expert" for itself, or '
            'those of a "layer" together; default layer, or none without text or where exports '
            "take codes of the model over"
        ),
    ] = None
    requantize: Annotated[
        bool,
        About(
            "round all linear layers of a model that is stored in 4-bit groups or 8-bit blocks "
            "anew; without it exports of these bits take its codes over, and what it stores in 16 "
            "bits stays so"
        ),
    ] = False
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

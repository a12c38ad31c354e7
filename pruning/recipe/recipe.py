"""The one place where options are declared: command line, YAML and Python share it."""

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from moe_jax.errors import InputError
from pruning.recipe.exports import EXPORTS, FLOAT4, Export, choose_exports, is_packed, width_policy
from pruning.recipe.values import check_weights_only, layer_rates, typed

GROUP_SIZES = (128, 64, 32)
# What `moe-compress plan` can decide anew from the same statistics.
PLANNING = (
    "target_parameters", "target_bytes", "criterion", "attribution", "planner", "weights",
    "rho_max", "layer_loss", "smoothing", "passes", "align", "per_layer", "width", "cap",
    "expert_rate", "layer_rate", "skip_layers", "block", "minimum", "emptied",
)  # fmt: skip
LEAST = {
    "max_tokens": 1, "window": 2, "block": 1, "minimum": 1, "batch": 1, "seed": 0, "passes": 0,
    "cap": 1, "target_parameters": 1, "target_bytes": 1, "nll_ig": 1,
}  # fmt: skip
BUDGETS = ("prune_rate", "target_parameters", "target_bytes")  # one of them at most


@dataclass(frozen=True, kw_only=True)
class CompressionRecipe:
    """Everything that decides a compression run.

    Attributes:
      model: checkpoint folder, or "demo" for the embedded model.
      output: folder to write.
      calibration: text files, FILE or FILE=WEIGHT; .jsonl and .jsonl.gz hold a document a line.
      calibration_field: JSON field with the text, of calibration and evaluation files.
      evaluation: text files to measure quality on, plain or JSON lines, 16384 tokens of each;
        default a sixteenth of the calibration windows, which are then not scored.
      max_tokens: bound on the calibration tokens.
      window: tokens per calibration and evaluation window; default the model's context, at most
        2048.
      prune_rate: fraction of routed-expert channels to remove, in [0, 1); default 0.25 where no
        target is given.
      target_parameters: most parameters of the pruned model instead of a rate, such as 3B.
      target_bytes: most bytes of the first export's weights instead of a rate, such as 6GB.
      bits: 4 or 16.
      group_size: weights per 4-bit scale; default the largest of 128, 64, 32 that leaves an
        expert at least eight groups, else 32.
      quantizer: how 4-bit codes are chosen: "rtn" rounds to nearest, "gptq" keeps the outputs on
        calibration text close, at the cost of two more passes over it.
      weights_only: read no calibration text: the weights alone decide what is kept, which is a
        preview; only criterion noise, weight or random and attribution aimer, weight or uniform
        work.
      criterion: channel score; default shapley, or noise with weights_only.
      attribution: expert score; default ala, or aimer with weights_only.
      planner: how the budget is allocated: paper, maxmin, fair, fair0.5, fair2, linear, uniform,
        random, fair_two_level, linear_two_level, global_topk, normalized_topk, layer_topk, moe_i2,
        cd_moe.
      weights: how experts count in the planner's objective: paper, attribution, mass,
        normalized_mass, equal; default the planner's own.
      rho_max: coverage beyond which a channel is worth nothing, in (0, 1].
      layer_loss: what weighs layers, for planners that do: the share of the residual stream that
        their experts write ("energy"), the sum of their "attribution", or the end-to-end loss of
        their experts together ("nll_ig", which needs --nll-ig).
      smoothing: of the layer losses: sqrt, identity, power0.25, power0.75, log5, log20, clip,
        huber.
      passes: how often the smoothing is applied; the paper's figure has 1, its release 4.
      align: how widths become multiples of the block: the paper's rule, the same by lost score, or
        the exact optimum by table (slow) or by hull.
      per_layer: alignment keeps to each layer's budget.
      width: what may differ from what: "free" per expert, "capped" up to --cap, one per "layer",
        "uniform" for the model, whole "experts", or "combined": whole experts go at --expert-rate,
        channels of the others make up the rest; default follows the exports: free for ragged,
        layer for layered, uniform for padded.
      cap: widest expert of width "capped".
      expert_rate: fraction of experts that width "combined" removes, in [0, 1).
      layer_rate: prune rates of single layers, LAYER=RATE; the other layers make up the rest.
      skip_layers: layers left alone, as by LAYER=0.
      block: widths are multiples of it; default the group size.
      minimum: least width of a kept expert; default one block.
      emptied: what experts without channels add: zero, or the mean of what they added over the
        text, which needs --expert-details and a ragged export.
      gradients: also collect end-to-end gradient scores (about three times the time).
      weight_gradients: also collect criterion wg, in a sweep of its own (about five times).
      expert_details: also collect what wanda, MoNE, NAEE and GRAPE need (about twice the time).
      nll_ig: also collect attribution nll_ig with this many steps, e.g. 4: an expert's worth to
        the end-to-end loss, at several times the time.
      nll_ablate: also collect attribution nll_ablate, the exact loss without each expert: as many
        partial forward passes as there are experts.
      nll_grad2: also collect attribution nll_grad2 from second derivatives; the model must fit in
        memory twice.
      export: formats to write: ragged (a width per expert), layered (per layer) or padded (one).
      mtp: what becomes of layers that predict further tokens, with which servers draft: "drop"
        leaves them out, "keep" copies them (padded formats only if the expert width stays),
        "prune" cuts their experts to the model's width, without a text; never 4-bit.
      until_stable: stop scoring once the kept sets before and after a part of the calibration
        text overlap by this much (Jaccard index, in (0, 1]), such as 0.98; default scores it all.
      batch: windows per step.
      dtype: of the activations.
      seed: of whatever is random.
      overwrite: replace an existing output folder.
    """

    model: str
    output: str
    calibration: tuple[str, ...] = ()
    calibration_field: str = "text"
    evaluation: tuple[str, ...] = ()
    max_tokens: int = 131072
    window: int | None = None
    prune_rate: float | None = None
    target_parameters: int | None = None
    target_bytes: int | None = None
    bits: Literal[4, 16] = 4
    group_size: int | None = None
    quantizer: Literal["rtn", "gptq"] = "rtn"
    weights_only: bool = False
    criterion: str | None = None
    attribution: str | None = None
    planner: str = "fair"
    weights: str | None = None
    rho_max: float = 1.0
    layer_loss: Literal["energy", "attribution", "nll_ig"] = "energy"
    smoothing: str = "sqrt"
    passes: int = 1
    align: Literal["paper", "paper_scores", "dp", "hull"] = "paper"
    per_layer: bool = False
    width: Literal["free", "capped", "layer", "uniform", "experts", "combined"] | None = None
    cap: int | None = None
    expert_rate: float = 0.0
    layer_rate: tuple[str, ...] = ()
    skip_layers: tuple[int, ...] = ()
    block: int | None = None
    minimum: int | None = None
    emptied: Literal["zero", "mean"] = "zero"
    gradients: bool = False
    expert_details: bool = False
    weight_gradients: bool = False
    nll_ig: int | None = None
    nll_ablate: bool = False
    nll_grad2: bool = False
    export: tuple[Export, ...] = ()
    mtp: Literal["drop", "keep", "prune"] = "drop"
    until_stable: float | None = None
    batch: int = 8
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self)).items():
            object.__setattr__(self, name, typed(name, getattr(self, name), kind))
        for name in ("model", "output"):
            if not getattr(self, name):
                raise InputError(f"{name}='' must name a folder")
        self._check_budget()
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise InputError(f"group_size={self.group_size} must be one of {GROUP_SIZES}")
        if len(set(self.export)) < len(self.export):
            raise InputError(f"export={list(self.export)} must name each format once")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name}={value} must be at least {least}")

    def _check_budget(self) -> None:
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
        if self.until_stable is not None and not 0 < self.until_stable <= 1:
            raise InputError(f"until_stable={self.until_stable} must lie in (0, 1]; choose 0.98")
        _ = self.layer_rates
        check_weights_only(self)

    @property
    def layer_rates(self) -> dict[int, float]:
        """Prune rates of the layers that have one of their own, by the model's layer number."""
        return layer_rates([*self.layer_rate, *(f"{layer}=0" for layer in self.skip_layers)])

    def resolved(
        self,
        d_expert: int,
        d_model: int,
        max_position: int,
        inputs: Iterable[int] = (),
        formats: Sequence[str] = EXPORTS,
    ) -> "CompressionRecipe":
        """The recipe with every default that depends on the model filled in.

        `inputs` are the input widths of further linear layers that go to 4 bits, `formats` the
        exports that the model's family has.

        Raises:
          InputError: a group size or block that the model's widths do not allow, or 4-bit exports
            of a 16-bit recipe.
        """
        exports = choose_exports(self.export, formats, self.bits, self.group_size, self.quantizer)
        widths = [("expert width", d_expert), ("model width", d_model)]
        widths += [("input width of a linear layer", size) for size in inputs]
        sizes = [size for _, size in widths]
        group = self.group_size or _default_group(d_expert, sizes)
        group = GROUP_SIZES[-1] if FLOAT4 in exports and not self.group_size else group
        packed = any(is_packed(name) for name in exports)
        for label, size in widths:
            if packed and size % group:
                fits = [g for g in GROUP_SIZES if not any(n % g for n in sizes)]
                raise InputError(
                    f"group_size={group} does not divide the {label} {size}; "
                    + (f"choose --group-size {fits[0]}" if fits else "export with --bits 16")
                )
        block = self.block or (group if d_expert % group == 0 else 1)
        if packed and block % group:
            raise InputError(
                f"block={block} must be a multiple of group_size={group}, so that every group of "
                f"4-bit weights is whole; choose --block {group}"
            )
        return dataclasses.replace(
            self,
            export=tuple(exports),
            group_size=group,
            criterion=self.criterion or ("noise" if self.weights_only else "shapley"),
            attribution=self.attribution or ("aimer" if self.weights_only else "ala"),
            block=block,
            minimum=self.minimum or block,
            prune_rate=0.25 if self._has_no_budget else self.prune_rate,
            width=self.width or width_policy(exports),
            window=min(self.window or 2048, max_position),
        )

    @property
    def _has_no_budget(self) -> bool:
        return all(getattr(self, name) is None for name in BUDGETS)

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

    def to_yaml(self) -> str:
        """The recipe as YAML, every field written out."""
        values = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }
        return yaml.safe_dump(values, sort_keys=False)


def load_recipe(path: Path, **overrides: Any) -> CompressionRecipe:
    """Read a YAML recipe; `overrides` win over the file.

    Raises:
      InputError: not a mapping, or a key that no recipe has.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"recipe {path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"recipe {path} must be a mapping of option: value")
    known = [field.name for field in dataclasses.fields(CompressionRecipe)]
    for name in values:
        if name not in known:
            (near,) = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            raise InputError(
                f"recipe {path}: {name!r} is unknown; the nearest is {near!r}, known are "
                f"{', '.join(known)}"
            )
    if any(overrides.get(name) is not None for name in BUDGETS):
        values = {key: value for key, value in values.items() if key not in BUDGETS}
    if overrides.get("width") is not None:
        # What only another width understands goes with it.
        values = {key: value for key, value in values.items() if key not in ("cap", "expert_rate")}
    fields: dict[str, Any] = {**values, **overrides}
    for name in ("model", "output"):
        if name not in fields:
            raise InputError(
                f"recipe {path}: {name} is missing; write it there or on the command line"
            )
    try:
        return CompressionRecipe(**fields)
    except ValueError as error:
        raise InputError(f"recipe {path}: {error}") from None


def _default_group(d_expert: int, widths: Iterable[int]) -> int:
    for group in GROUP_SIZES:
        if not any(width % group for width in widths) and d_expert // group >= 8:
            return group
    return GROUP_SIZES[-1]

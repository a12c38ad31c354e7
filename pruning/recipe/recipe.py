"""A compression run as one value: all option groups together, and the same resolved for a model."""

import dataclasses
import os
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml

from convert.export_format import (
    FLOAT4,
    FLOAT8,
    FLOAT8_BLOCK,
    FORMATS,
    GROUP_SIZES,
    ExportFormat,
    FormatName,
    Storage,
)
from moe_jax.errors import InputError, choose
from pruning.kit.hub import NAME
from pruning.kit.yaml_files import YAML_ERRORS, read_yaml
from pruning.recipe.exports import choose_exports, width_policy
from pruning.recipe.group import about
from pruning.recipe.options import (
    BUDGETS,
    EVALUATION_TOKENS,
    ExportOptions,
    PlanOptions,
    RunOptions,
    ScoreOptions,
    TextOptions,
    fields_of,
)
from pruning.recipe.plan_options import AUTO
from pruning.recipe.values import NEEDS_TEXT, window_within

GROUPED: Set[Storage] = {"int4", "int8", "mixed", "mxfp4"}  # whose scales are of groups of a row
TEXTS = ("calibration", "evaluation")  # options that name files
GROUPS = (RunOptions, TextOptions, ScoreOptions, PlanOptions, ExportOptions)


@dataclass(frozen=True, kw_only=True)
class CompressionRecipe(ExportOptions, PlanOptions, ScoreOptions, TextOptions, RunOptions):
    """Everything that decides a compression run; the groups say what each option means.

    Raises:
      InputError: an option is of another type, out of range, or contradicts another.
    """

    def check(self) -> None:
        """Raise InputError if a recipe without calibration text asks for what needs some."""
        values = {name: getattr(self, name) for name in NEEDS_TEXT}
        asked = [f"{n}={value!r}" for n, value in values.items() if value != NEEDS_TEXT[n]]
        if self.weights_only and asked:
            raise InputError(
                f"weights_only reads no calibration text, which {', '.join(asked)} needs; leave "
                "out one or the other"
            )
        if self.cut_router and self.repair not in (None, "none"):
            raise InputError(
                f"repair={self.repair!r} reckons with each token's experts as they were, which "
                "cut_router changes; leave out one or the other"
            )
        if self.weights_only and self.repair not in (None, "none"):
            raise InputError(
                f"weights_only reads no calibration text, which repair={self.repair!r} needs; "
                "leave out one or the other"
            )

    def resolved(
        self,
        d_expert: int,
        d_model: int,
        max_position: int,
        inputs: Iterable[int] = (),
        formats: Sequence[str] = FORMATS,
        native: int | None = None,
    ) -> "ResolvedRecipe":
        """The recipe with every default that depends on the model filled in.

        `inputs` are the input widths of further linear layers that go to 4 bits, `formats` the
        exports that the model's family has, `native` the group size of a model that is stored in
        4 bits whose codes exports can take over.

        Raises:
          InputError: a group size or block that the model's widths do not allow, or exports of
            other bits than the recipe's, or a window longer than the model's context.
        """
        exports = choose_exports(self.export, formats, self.bits, self.group_size, self.quantizer)
        widths = [("expert width", d_expert), ("model width", d_model)]
        widths += [("input width of a linear layer", size) for size in inputs]
        storages: set[Storage] = {ExportFormat(name).storage for name in exports}
        copied = self._copied(native, storages)
        group = copied or self._group([size for _, size in widths], exports)
        if storages & GROUPED:
            _check_group(group, widths)
        block = self._block(d_expert, group, storages)
        if self.grid is not None and block % self.grid:
            raise InputError(
                f"block={block} must be a multiple of grid={self.grid}, in which channels stay or "
                f"go; choose --block {self.grid}, or --grid 1"
            )
        # Weights that the model stores in few bits would be rounded a second time, and behind a
        # cut router tokens meet other experts.
        kept = bool(copied) or FLOAT4 in exports or self.cut_router
        repair = self.repair or ("none" if kept or self.weights_only else "layer")
        width = "experts" if self.cut_router else width_policy(exports)
        given = {name: getattr(self, name) for name in fields_of(CompressionRecipe)}
        rule = self._rule()
        filled = {
            "export": tuple(exports),
            "group_size": group,
            **rule,
            # Of a rule that is open, repair's own score is measured too.
            "obs": self.obs or (rule["criterion"] is None and repair != "none"),
            "block": block,
            "minimum": self.minimum or block,
            "prune_rate": self.prune_rate if self.has_budget else 0.25,
            "width": self.width or width,
            "repair": repair,
            "window": window_within(self.window, max_position),
            "evaluation_tokens": self.evaluation_tokens or EVALUATION_TOKENS,
        }
        return ResolvedRecipe(**{**given, **filled})

    def _rule(self) -> dict[str, str | None]:
        """Criterion, attribution and planner; what planner auto is to find stays open."""
        if self.weights_only:
            usual = {"criterion": "noise", "attribution": "aimer", "planner": "fair"}
        elif (self.planner or AUTO) == AUTO and not (self.planner is None and self.named):
            usual = {"criterion": None, "attribution": None, "planner": AUTO}
        else:
            usual = {"criterion": "shapley", "attribution": "ala", "planner": "fair"}
        return {name: getattr(self, name) or value for name, value in usual.items()}

    def _copied(self, native: int | None, storages: Set[Storage]) -> int | None:
        # Weights per scale of the model whose codes an export takes over.
        if native is None or self.requantize or "int4" not in storages:
            return None
        if self.quantizer == "gptq":
            raise InputError(
                "quantizer='gptq' chooses new codes, and the model is stored in 4 bits already; "
                "add --requantize to round it a second time, or leave --quantizer away"
            )
        if self.repair not in (None, "none"):
            raise InputError(
                f"repair={self.repair!r} changes weights, and the 4-bit codes of the model are "
                "taken over; add --requantize to round a second time, or leave --repair away"
            )
        if self.group_size not in (None, native):
            raise InputError(
                f"group_size={self.group_size} is not that of the model, {native}, whose codes are "
                "taken over; leave --group-size away, or add --requantize to round a second time"
            )
        return native

    def _block(self, d_expert: int, group: int, storages: Set[Storage]) -> int:
        # What widths are multiples of: whole groups of the weights that share a scale.
        if "fp8" in storages and d_expert % FLOAT8_BLOCK:
            cures = ["--bits 16"] * (self.bits == 8) + ["--export padded-bf16"] * bool(self.export)
            raise InputError(
                f"{FLOAT8} has blocks of {FLOAT8_BLOCK}, which do not divide the expert width "
                f"{d_expert}; choose {' and '.join(cures)}"
            )
        step = FLOAT8_BLOCK if "fp8" in storages else group
        block = self.block or (step if d_expert % step == 0 else 1)
        if "fp8" in storages and block % FLOAT8_BLOCK:
            raise InputError(
                f"block={block} must be a multiple of {FLOAT8_BLOCK}, so that every block of 8-bit "
                f"weights is whole; choose --block {FLOAT8_BLOCK}"
            )
        if storages & GROUPED and block % group:
            raise InputError(
                f"block={block} must be a multiple of group_size={group}, so that every group of "
                f"weights is whole; choose --block {group}"
            )
        return block

    def _group(self, widths: Sequence[int], exports: Sequence[FormatName]) -> int:
        # Weights per scale; the first width is an expert's.
        if self.group_size or FLOAT4 in exports:
            return self.group_size or GROUP_SIZES[-1]
        for group in GROUP_SIZES:
            if not any(width % group for width in widths) and widths[0] // group >= 8:
                return group
        return GROUP_SIZES[-1]

    def placed(self) -> Self:
        """The recipe with absolute paths, which mean the same from every working directory."""
        absolute = os.path.abspath  # of FILE=WEIGHT as of any other path
        texts = {name: tuple(map(absolute, getattr(self, name))) for name in TEXTS}
        is_name = NAME.fullmatch(self.model) and not os.path.exists(self.model)  # on the hub
        model = self.model if self.model == "demo" or is_name else absolute(self.model)
        scratch = None if self.scratch is None else absolute(self.scratch)
        output = absolute(self.output)
        return dataclasses.replace(self, model=model, output=output, scratch=scratch, **texts)

    def to_yaml(self) -> str:
        """The recipe as YAML, every field written out."""
        values = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }
        return yaml.safe_dump(values, sort_keys=False)


@dataclass(frozen=True, kw_only=True)
class ResolvedRecipe(CompressionRecipe):
    """A recipe for one model: what depends on it is decided; planner auto leaves a rule open."""

    export: Annotated[tuple[FormatName, ...], about(ExportOptions, "export")] = ()
    group_size: Annotated[int, about(ExportOptions, "group_size")] = 32
    planner: Annotated[str, about(PlanOptions, "planner")] = AUTO
    block: Annotated[int, about(PlanOptions, "block")] = 1
    minimum: Annotated[int, about(PlanOptions, "minimum")] = 1
    width: Annotated[
        Literal["free", "capped", "layer", "uniform", "experts", "combined"],
        about(PlanOptions, "width"),
    ] = "free"
    window: Annotated[int, about(TextOptions, "window")] = 2048
    repair: Annotated[Literal["none", "expert", "layer"], about(ExportOptions, "repair")] = "layer"
    evaluation_tokens: Annotated[int, about(TextOptions, "evaluation_tokens")] = EVALUATION_TOKENS


def load_recipe(path: Path, **overrides: Any) -> CompressionRecipe:
    """Read a YAML recipe; `overrides` win over the file.

    Relative paths in one that a person wrote are relative to the working directory, like those of
    the command line; ours are stored absolute.

    Raises:
      InputError: not a mapping, or a key that no recipe has.
    """
    try:
        values = read_yaml(path)
    except YAML_ERRORS as error:
        raise InputError(f"recipe {path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"recipe {path} must be a mapping of option: value")
    known = dict.fromkeys(fields_of(CompressionRecipe))
    if any(overrides.get(name) is not None for name in BUDGETS):
        values = {key: value for key, value in values.items() if key not in BUDGETS}
    if overrides.get("width") is not None:
        # What only another width understands goes with it.
        values = {key: value for key, value in values.items() if key not in ("cap", "expert_rate")}
    fields: dict[str, Any] = {**values, **overrides}
    try:
        for name in values:
            choose(known, name, "option")
        for name in ("model", "output"):
            if name not in fields:
                raise InputError(f"{name} is missing; write it there or on the command line")
        return CompressionRecipe(**fields)
    except InputError as error:
        raise InputError(f"recipe {path}: {error}") from None


def _check_group(group: int, widths: Sequence[tuple[str, int]]) -> None:
    for label, size in widths:
        if size % group:
            fits = [g for g in GROUP_SIZES if not any(n % g for _, n in widths)]
            cure = f"choose --group-size {fits[0]}" if fits else "export with --bits 16"
            raise InputError(f"group_size={group} does not divide the {label} {size}; {cure}")

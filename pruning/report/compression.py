"""What a run did, as a value and as report.json; `compression_page` makes report.html of it."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.text import Text

from moe_jax.errors import InputError, choose
from moe_jax.files import replace_text
from moe_jax.json_files import read_json
from pruning.kit.words import megabytes, percent
from pruning.report.choice_table import choice_table
from pruning.report.compression_tables import (
    allocation_table,
    quality_table,
    seen_warning,
    sizes_table,
    stages_table,
    verification_table,
)
from pruning.report.html import fragment
from pruning.report.severity import Severity, severity
from pruning.report.stored import faults
from pruning.report.table import TextTable, as_rich

VERSION = 3
RANDOM = "random"


@dataclass(frozen=True)
class Headline:
    """One number that people ask for first, and the words around it."""

    number: str
    unit: str
    detail: str


@dataclass(frozen=True)
class CompressionReport:
    """The schema of report.json: these fields and "version"; all values are plain JSON.

    L layers with experts, E experts, K points of a curve. Sizes are bytes, times seconds, losses
    nats per token. The fields after `verification` are empty in a report of an earlier version.

    Attributes:
      model: path, family, fingerprint, parameters, bytes (of its weight files).
      recipe: every option of the resolved recipe by name, with the rule that planner auto took.
      environment: moe-jax (version), date (UTC), device, cores, python, jax.
      calibration: tokens (scored), sources: per file path, sha256, weight, documents, tokens
        (those set aside for measuring included), and how it was read: format, field, begins,
        options, lacking (see `TokenBatch`); stability of the kept set over the parts of the
        text (see pruning.stages.parts), null for weights_only; router_entropy [L] mean over
        tokens in nats and usage [L][E] share of a layer's routed tokens, if any text was read. 0
        tokens: the weights alone decided.
      plan: provenance of the plan: choices, budget, channels kept, experts emptied; with planner
        auto `choice`: candidates (rule, added loss per text and mean, taken), refused (reason).
      layer_indices: [L] index of each expert layer in the model.
      d_expert: channels per expert before pruning.
      counts: [L][E] channels kept.
      attribution: [L][E] expert scores.
      expert_coverage: [L][E] share of the expert's channel score that is kept, in [0, 1].
      layer_coverage: [L] the same for a layer's experts together.
      layer_loss: raw [L] and smoothed [L]; all 1 if no text was read.
      concentration: fractions [K] of an expert's channels, curves [L][E][K] of their score share;
        gini [L] and fraction_holding [L] nine tenths of a layer's score, and both of the model.
      repair: mode, tokens, experts that keep something and how many of them changed, and starved of
        text; layers, and of how many of them the repair of their experts alone (`expert`) or of all
        together (`layer`) was taken; {} without a repair.
      quantization: per layer of the model what GPTQ did: nearest and gptq, squared output errors on
        held-out text relative to what the layer adds, matrices and fallbacks; [] without GPTQ.
      sizes: source_bytes, channels, channels_kept, active_parameters (of the source and of every
        export: what a token meets on average over the calibration text), exports: per name bytes
        (written), active_bytes (that a token meets), parameters, bits_per_parameter, padded_bytes
        (null for a padded export), and of a source in few bits rounded_again: relative squared
        error of rounding its weights a second time, 0 if they were taken over.
      quality: per text and model (dense, pruned, each export as read from disk): nll, perplexity,
        tokens, and against the dense model kl and top1 (null for the dense model).
      evaluation: window and stride in tokens; stride is null without a text; seen, per text the
        share of its runs of 13 tokens that calibration has shown, null if it has none so long;
        sources as those of calibration.
      stages: per stage name, seconds, peak_memory_bytes (of the process until its end).
      sample: prompt, dense, compressed, export (which one wrote it); "" for huge models or
        without a text.
      verification: per check export, check, ok, detail, done; where done is false nothing was
        compared, for the reason in detail, and ok is true (reports without done did all).
      samples: the same of the first texts that are measured, each with the text's name.
      random: seed, and quality per text of random channels at the same size, in 16 bits: what
        every choice of channels must beat.
      alone: per export what pruning alone (pruned_bytes, 16 bits) and rounding alone
        (rounded_bytes, nothing pruned; null for a 16-bit export) would give.
      loading: per export the fields of `pruning.report.loading.Loading`.
      command: the command line that repeats the run.
      not_run: why there is no "random", no "samples" and so on, by the name of the field.
    """

    model: dict[str, Any]
    recipe: dict[str, Any]
    environment: dict[str, Any]
    calibration: dict[str, Any]
    plan: dict[str, Any]
    layer_indices: list[int]
    d_expert: int
    counts: list[list[int]]
    attribution: list[list[float]]
    expert_coverage: list[list[float]]
    layer_coverage: list[float]
    layer_loss: dict[str, list[float]]
    concentration: dict[str, Any]
    quantization: list[dict[str, Any]]
    sizes: dict[str, Any]
    quality: dict[str, dict[str, dict[str, Any]]]
    evaluation: dict[str, Any]
    stages: list[dict[str, Any]]
    sample: dict[str, str]
    verification: list[dict[str, Any]]
    samples: list[dict[str, str]] = field(default_factory=list)
    random: dict[str, Any] = field(default_factory=dict)
    alone: dict[str, dict[str, int | None]] = field(default_factory=dict)
    loading: dict[str, dict[str, Any]] = field(default_factory=dict)
    command: str = ""
    not_run: dict[str, str] = field(default_factory=dict)
    repair: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        broken = [f.name for f in dataclasses.fields(self) if not _finite(getattr(self, f.name))]
        if broken:
            raise InputError(f"the report's {', '.join(broken)} hold NaN or infinity")

    @property
    def smallest_export(self) -> str:
        """Name of the export with the fewest bytes."""
        exports = self.sizes["exports"]
        return min(exports, key=lambda name: exports[name]["bytes"])

    @property
    def bytes(self) -> int:
        """Bytes of the weight files of the smallest export."""
        return self.sizes["exports"][self.smallest_export]["bytes"]

    @property
    def kept_share(self) -> float:
        """Share of the routed-expert channels that is kept, in [0, 1]."""
        return self.sizes["channels_kept"] / self.sizes["channels"]

    def times_smaller(self, export: str | None = None) -> float:
        """Bytes of the source over those of an export, by default of the smallest.

        Raises:
          InputError: no such export.
        """
        exports = self.sizes["exports"]
        size = choose(exports, export or self.smallest_export, "export")
        return self.sizes["source_bytes"] / size["bytes"]

    def perplexity(self, text: str | None = None, model: str | None = None) -> float:
        """Perplexity of a model on a text; arguments and errors as for `loss`."""
        return math.exp(self.loss(text, model))

    def added_loss(self, text: str | None = None, model: str | None = None) -> float:
        """Nats per token that a model loses to the dense one; as for `loss`."""
        return self.loss(text, model) - self.loss(text, "dense")

    def loss(self, text: str | None = None, model: str | None = None) -> float:
        """Mean loss of a model, nats per token.

        Args:
          text: name of an evaluation text; default the mean over the tokens of all texts.
          model: an export, default the smallest; or "dense", "pruned" (before rounding to 4 bits),
            "random" (random channels at the same size).

        Raises:
          InputError: nothing was measured, or no such text or model.
        """
        return self._mean("nll", text, model or self.smallest_export)

    def of_random(self, text: str | None = None) -> float | None:
        """What pruning adds over what random channels add, both before rounding.

        None if that was not measured, or random channels add nothing.
        """
        if not self.quality or not self.random:
            return None
        chance = self.added_loss(text, RANDOM)
        return self.added_loss(text, "pruned") / chance if chance > 0 else None

    def severity(self, text: str | None = None, model: str | None = None) -> Severity:
        """The loss of a model in one word, see `pruning.report.severity`; as for `loss`."""
        return severity(self.added_loss(text, model), self.of_random(text))

    def _mean(self, key: str, text: str | None, model: str) -> float:
        if not self.quality:
            raise InputError("no text was measured; compress again with --evaluation")
        texts = self.quality if text is None else {text: choose(self.quality, text, "text")}
        chance = self.random.get("quality", {})
        found = [
            choose(models | ({RANDOM: chance[name]} if name in chance else {}), model, "model")
            for name, models in texts.items()
        ]
        return float(np.average([q[key] for q in found], weights=[q["tokens"] for q in found]))

    def headlines(self) -> list[Headline]:
        """Times smaller, quality lost and tokens, all of the smallest export."""
        name, source = self.smallest_export, self.sizes["source_bytes"]
        smaller = Headline(
            f"{self.times_smaller():.2f}",
            "times smaller",
            f"{megabytes(source)} MB become {megabytes(self.bytes)} MB ({name})",
        )
        evaluated = sum(models["dense"]["tokens"] for models in self.quality.values())
        measured = f"{evaluated:,} tokens evaluated" if evaluated else "none evaluated"
        tokens = Headline(f"{self.calibration['tokens']:,}", "tokens scored", measured)
        if not self.calibration["tokens"]:
            tokens = Headline("no text", "scored", f"the weights alone decided; {measured}")
        if not self.quality or any(name not in models for models in self.quality.values()):
            lost = Headline("?", "quality lost", "not measured; name a text with --evaluation")
            return [smaller, lost, tokens]
        added, of_random = self.added_loss(), self.of_random()
        beside = "" if of_random is None else f"; pruning adds {of_random:.2f} of what random does"
        lost = Headline(
            f"{added:+.3f}",
            "nats per token",
            f"{self.severity()}: perplexity times {math.exp(added):.3f}{beside}; same top token as "
            f"dense at {percent(self._mean('top1', None, name))}",
        )
        return [smaller, lost, tokens]

    def tables(self) -> list[TextTable]:
        """Sizes, quality, the rules measured if any, allocation, verification and stages."""
        choice = self.plan.get("choice")
        return [
            sizes_table(self.sizes, self.model),
            quality_table(self.quality, self.evaluation),
            *([choice_table(choice)] if choice else []),
            allocation_table(self.plan, self.sizes, self.model, self.concentration),
            verification_table(self.verification),
            stages_table(self.stages),
        ]

    def terminal_table(self) -> Group:
        """Headlines and tables for a terminal; names fold where it is narrow, none is cut."""
        parts: list = []
        for line in self.headlines():
            parts.append(Text.assemble((f"{line.number} {line.unit}", "bold"), f"  {line.detail}"))
        if warning := seen_warning(self.evaluation):
            parts.append(Text(warning))
        return Group(*parts, *map(as_rich, self.tables()))

    def save(self, folder: Path) -> None:
        """Write report.json, whole or not at all."""
        values = {"version": VERSION, **dataclasses.asdict(self)}
        replace_text(Path(folder) / "report.json", json.dumps(values, indent=2) + "\n")

    def _repr_html_(self) -> str:
        return fragment(self.headlines(), self.tables())

    @classmethod
    def load(cls, path: Path) -> "CompressionReport":
        """Read report.json.

        Raises:
          InputError: missing, of another version, or damaged at any depth.
        """
        if not Path(path).is_file():
            raise InputError(f"{path} does not exist; run `moe-compress compress` first")
        try:
            values = read_json(Path(path))
        except InputError as error:
            told = str(error)[:1000]
            raise InputError(
                f"{path} is not a report ({told}); remove it and compress again"
            ) from None
        version = values.pop("version", None)
        names = [one.name for one in dataclasses.fields(cls)]
        old = names[: names.index("samples")]  # those of every version
        if version != VERSION or not set(old) <= set(values) <= set(names):
            raise InputError(
                f"{path} is not a report of version {VERSION}; remove it and compress again"
            )
        if wrong := faults(values):
            told = ", ".join(dict.fromkeys(wrong))
            raise InputError(f"{path} is damaged ({told}); remove it and compress again")
        return cls(**values)


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)

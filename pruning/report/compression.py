"""What a run did, as a file: report.json for programs, report.html for people."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.errors import InputError
from moe_jax.files import replace_text
from pruning.report.compression_page import fragment, page

VERSION = 3


@dataclass(frozen=True)
class CompressionReport:
    """The schema of report.json: these fields and "version"; all values are plain JSON.

    L layers with experts, E experts, K points of a curve. Sizes are bytes, times seconds, losses
    nats per token.

    Attributes:
      model: path, family, fingerprint, parameters, bytes (of its weight files).
      recipe: every option of the resolved recipe by name.
      environment: moe-jax (version), date (UTC), device, cores, python, jax.
      calibration: tokens (scored), sources: per file path, sha256, weight, documents, tokens
        (those set aside for measuring included); stability of the kept set over the parts of the
        text (see pruning.stages.parts), null for weights_only; router_entropy [L] mean over
        tokens in nats and usage [L][E] share of a layer's routed tokens, if any text was read. 0
        tokens: the weights alone decided.
      plan: provenance of the plan: choices, budget, channels kept, experts emptied.
      layer_indices: [L] index of each expert layer in the model.
      d_expert: channels per expert before pruning.
      counts: [L][E] channels kept.
      attribution: [L][E] expert scores.
      expert_coverage: [L][E] share of the expert's channel score that is kept, in [0, 1].
      layer_coverage: [L] the same for a layer's experts together.
      layer_loss: raw [L] and smoothed [L]; all 1 if no text was read.
      concentration: fractions [K] of an expert's channels, curves [L][E][K] of their score share.
      quantization: per layer of the model what GPTQ did: nearest and gptq, squared output errors on
        held-out text relative to what the layer adds, matrices and fallbacks; [] without GPTQ.
      sizes: source_bytes, channels, channels_kept, active_parameters (of the source and of every
        export: what a token meets on average over the calibration text), exports: per name bytes
        (written), parameters, bits_per_parameter, padded_bytes (null for a padded export).
      quality: per text and model (dense, pruned, each export as read from disk): nll, perplexity,
        tokens, and against the dense model kl and top1 (null for the dense model).
      evaluation: window and stride in tokens; stride is null without a text; seen, per text the
        share of its runs of 13 tokens that calibration has shown, null if it has none so long.
      stages: per stage name, seconds, peak_memory_bytes (of the process until its end).
      sample: prompt, dense, compressed, export (which one wrote it); "" for huge models or
        without a text.
      verification: per check export, check, ok, detail.
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

    def __post_init__(self) -> None:
        broken = [f.name for f in dataclasses.fields(self) if not _finite(getattr(self, f.name))]
        if broken:
            raise InputError(f"the report's {', '.join(broken)} hold NaN or infinity")

    def save(self, folder: Path) -> None:
        """Write report.json and report.html, each atomically."""
        values = {"version": VERSION, **dataclasses.asdict(self)}
        replace_text(Path(folder) / "report.json", json.dumps(values, indent=2) + "\n")
        replace_text(Path(folder) / "report.html", page(self))

    def _repr_html_(self) -> str:
        return fragment(self)

    @classmethod
    def load(cls, path: Path) -> "CompressionReport":
        """Read report.json.

        Raises:
          InputError: missing, or of another version.
        """
        if not Path(path).is_file():
            raise InputError(f"{path} does not exist; run `moe-compress compress` first")
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            version = values.pop("version", None)
        except (json.JSONDecodeError, AttributeError) as error:
            raise InputError(f"{path} is not a report ({error}); compress again") from None
        names = {field.name for field in dataclasses.fields(cls)}
        if version != VERSION or set(values) != names:
            raise InputError(f"{path} is not a report of version {VERSION}; compress again")
        return cls(**values)


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)

"""The model card of an export: its facts gathered, and the one place that writes it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from convert.checkpoint import Checkpoint
from convert.clients import client_table
from convert.export_format import ExportFormat
from moe_jax.config import LatentAttentionConfig
from moe_jax.files import replace_text
from pruning.budget.plan import PruningPlan
from pruning.budget.record import tool_version
from pruning.demo import DEMO
from pruning.report.card import (
    BaseFacts,
    CardFacts,
    FolderFacts,
    PlanFacts,
    Quality,
    model_card,
)
from pruning.report.loading import Loading
from pruning.stages.sizes import export_of, folder_bytes

CARD, BASE_CARD = "README.md", "BASE_README.md"
INHERITED = ("license", "license_name", "license_link", "language")


def card_files(
    base: Checkpoint, plan: PruningPlan, form: ExportFormat, *, quantizer: str
) -> dict[str, str | Path]:
    """Files of a new export by name: its card, on which nothing is measured yet, and the base's."""
    files: dict[str, str | Path] = {CARD: model_card(card_facts(base, plan, form, quantizer))}
    if (base.about.folder / CARD).is_file():
        files[BASE_CARD] = base.about.folder / CARD
    return files


def write_card(
    folder: Path,
    base: Checkpoint,
    plan: PruningPlan,
    form: ExportFormat,
    *,
    quantizer: str,
    quality: Quality,
    evaluation: Mapping[str, Any],
) -> None:
    """Replace the card of an export, atomically, once its quality is known.

    Args:
      folder: the export.
      base, plan, form: what it was made from.
      quantizer: "rtn" or "gptq".
      quality: per text and model: nll, perplexity, tokens, kl, top1; other exports are left out.
      evaluation: as in the report.
    """
    shown = {
        text: {name: found[name] for name in ("dense", "pruned", form.name) if name in found}
        for text, found in quality.items()
    }
    facts = card_facts(base, plan, form, quantizer, quality=shown, evaluation=evaluation)
    replace_text(folder / CARD, model_card(facts))


def card_facts(
    base: Checkpoint,
    plan: PruningPlan,
    form: ExportFormat,
    quantizer: str,
    *,
    quality: Quality | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> CardFacts:
    """What the card of an export says, from shapes, the plan and the base folder alone."""
    return CardFacts(
        base=_base_facts(base),
        plan=_plan_facts(plan),
        folder=_folder_facts(base, plan, form, quantizer),
        loading=loading(base, plan, form),
        quality=quality,
        evaluation=evaluation or {},
        version=tool_version(),
    )


def loading(base: Checkpoint, plan: PruningPlan, form: ExportFormat) -> Loading:
    """What decides how programs load an export."""
    verdicts = client_table(export_of(base.about, plan, form))
    return Loading(
        form=form.name,
        clients={name: (found.verdict, found.rule) for name, found in verdicts.items()},
        has_tokenizer=any(base.about.folder.glob("tokenizer*")),
        has_latent_attention=isinstance(base.config.attention, LatentAttentionConfig),
        has_linear_attention=bool(base.config.linear_layers),
        auto_class=base.about.family.auto_class,
    )


def _base_facts(base: Checkpoint) -> BaseFacts:
    about, folder = base.about, base.about.folder
    repository, revision = hub_origin(folder)
    return BaseFacts(
        name=repository or _folder_name(folder),
        repository=repository,
        revision=revision,
        inherited=_inherited(folder / CARD),
        has_card=(folder / CARD).is_file(),
        hash=base.fingerprint,
        family=about.family.model_type,
        parameters=about.weights() + about.mtp_weights,
        bytes=folder_bytes(folder),
    )


def _plan_facts(plan: PruningPlan) -> PlanFacts:
    counts = plan.counts
    return PlanFacts(
        hash=plan.tensors_hash,
        provenance=plan.provenance,
        channels=int(plan.keep.size),
        kept=int(counts.sum()),
        fewest=int(counts.min()),
        most=int(counts.max()),
        experts=int(counts.size),
        emptied=int((counts == 0).sum()),
        has_constants=plan.constants is not None,
    )


def _folder_facts(
    base: Checkpoint, plan: PruningPlan, form: ExportFormat, quantizer: str
) -> FolderFacts:
    export, packed = export_of(base.about, plan, form), form.is_packed
    plain = dataclasses.replace(export, form=form.like(storage="bf16"))
    stored = (shape for _, shape in plain.specs.values())
    return FolderFacts(
        written_as=export.config["model_type"],
        form=form.name,
        group_size=form.group_size if packed else None,
        quantizer=("rtn" if form.is_float4 else quantizer) if packed else None,
        parameters=export.parameters,
        stored=sum(int(np.prod(shape, dtype=np.int64)) for shape in stored),
        bytes=export.nbytes,
        mtp=form.mtp if base.about.mtp else None,
        mtp_width=export.mtp_width,
    )


def hub_origin(folder: Path) -> tuple[str | None, str | None]:
    """Repository and commit of a folder in the Hub's cache, (None, None) of any other.

    The cache keeps a model at models--OWNER--NAME/snapshots/COMMIT.
    """
    place, kind = folder.absolute().parent.parent.name, folder.absolute().parent.name
    if kind != "snapshots" or not place.startswith("models--"):
        return None, None
    return place.removeprefix("models--").replace("--", "/", 1), folder.name


def _folder_name(folder: Path) -> str:
    return "demo" if folder == DEMO / "model" else folder.resolve().name


def _inherited(card: Path) -> dict[str, Any]:
    """Licence and languages in the front matter of the base's card, if it has any."""
    if not card.is_file():
        return {}
    before, *parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    try:
        # Strings only: YAML takes the language "no" for a truth value.
        fenced = not before and len(parts) == 2
        found = yaml.load(parts[0], yaml.BaseLoader) if fenced else None
    except yaml.YAMLError:  # people write cards; an unreadable one states no licence
        found = None
    values = found if isinstance(found, dict) else {}
    return {name: values[name] for name in INHERITED if name in values}

"""The model card of an export: its facts gathered, and the one place that writes it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoint import Checkpoint
from convert.clients import client_table
from convert.export_format import ExportFormat
from convert.model_card import CARD, front_matter
from convert.writer import Content
from moe_jax.config import LatentAttentionConfig
from moe_jax.errors import InputError
from moe_jax.files import replace_text
from moe_jax.json_files import read_json
from pruning.budget.plan import PruningPlan
from pruning.budget.record import tool_version
from pruning.demo import DEMO
from pruning.kit.fitting import fits
from pruning.report.card import (
    BaseFacts,
    CardFacts,
    FolderFacts,
    PlanFacts,
    Quality,
    Recovery,
    model_card,
)
from pruning.report.loading import Loading
from pruning.shrink.rounding import RoundingError
from pruning.stages.made_by import MADE_BY, provenance_text
from pruning.stages.repair import repair_facts
from pruning.stages.sizes import export_of, folder_bytes

BASE_CARD = "BASE_README.md"
ROUNDING = "rounding.json"  # in an export: what a second rounding did to the weights
INHERITED = ("license", "license_name", "license_link", "language")


def card_files(
    base: Checkpoint,
    plan: PruningPlan,
    form: ExportFormat,
    *,
    quantizer: str,
    again: RoundingError | None = None,
    repair: Path | None = None,
    recovery: Recovery = (),
) -> dict[str, Content]:
    """Files of a new export by name: its card, on which no quality is measured yet, the base's, and
    if `again` knows of it once the tensors are written, what a second rounding did."""

    def card() -> str:
        error = None if again is None else again.relative
        found = repair_facts(repair)
        facts = card_facts(
            base, plan, form, quantizer, found, rounded_again=error, recovery=recovery
        )
        return model_card(facts)

    files: dict[str, Content] = {CARD: card}
    if again is not None:
        files[ROUNDING] = lambda: json.dumps({"relative_squared_error": again.relative}) + "\n"
    files[MADE_BY] = provenance_text(base, plan, repair)
    if (base.about.folder / CARD).is_file():
        files[BASE_CARD] = base.about.folder / CARD
    return files


def rounded_again(folder: Path) -> float | None:
    """Relative squared error of a second rounding of an export's weights, 0 if none was rounded
    again; None where the model has its weights in 16 bits.

    Raises:
      InputError: the file that says it is damaged.
    """
    path = folder / ROUNDING
    if not path.is_file():
        return None
    found = read_json(path).get("relative_squared_error")
    if not fits(found, float):
        raise InputError(f"{path} is damaged; remove {folder} and export again")
    return found


def write_card(
    folder: Path,
    base: Checkpoint,
    plan: PruningPlan,
    form: ExportFormat,
    *,
    quantizer: str,
    repair: Mapping[str, Any],
    quality: Quality,
    evaluation: Mapping[str, Any],
    verification: Sequence[Mapping[str, Any]],
    recovery: Recovery = (),
) -> None:
    """Replace the card of an export, atomically, once its quality is known.

    Args:
      folder: the export.
      base, plan, form: what it was made from.
      quantizer: "rtn" or "gptq".
      repair: as in the report.
      quality: per text and model: nll, perplexity, tokens, kl, top1; other exports are left out.
      evaluation, verification: as in the report; checks of other exports are left out.
      recovery: as of `CardFacts`.
    """
    names = ("dense", "pruned", "recovered", form.name)
    shown = {
        text: {name: found[name] for name in names if name in found}
        for text, found in quality.items()
    }
    facts = card_facts(
        base, plan, form, quantizer, repair,
        rounded_again=rounded_again(folder), quality=shown, evaluation=evaluation,
        checks=[check for check in verification if check["export"] == form.name],
        recovery=recovery,
    )  # fmt: skip
    replace_text(folder / CARD, model_card(facts))


def card_facts(
    base: Checkpoint,
    plan: PruningPlan,
    form: ExportFormat,
    quantizer: str,
    repair: Mapping[str, Any],
    *,
    rounded_again: float | None = None,
    quality: Quality | None = None,
    evaluation: Mapping[str, Any] | None = None,
    checks: Sequence[Mapping[str, Any]] = (),
    recovery: Recovery = (),
) -> CardFacts:
    """What the card of an export says, from shapes, the plan and the base folder alone."""
    folder = _folder_facts(base, plan, form, quantizer)
    return CardFacts(
        base=_base_facts(base),
        plan=_plan_facts(plan),
        folder=dataclasses.replace(folder, rounded_again=rounded_again),
        loading=loading(base, plan, form),
        quality=quality,
        evaluation=evaluation or {},
        checks=checks,
        repair=repair,
        recovery=recovery,
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
        inherited=_inherited(folder),
        has_card=(folder / CARD).is_file(),
        hash=base.fingerprint,
        family=about.family.model_type,
        parameters=about.weights() + about.mtp_weights,
        bytes=folder_bytes(folder),
    )


def _plan_facts(plan: PruningPlan) -> PlanFacts:
    counts = plan.counts
    return PlanFacts(
        hash=plan.content_hash,
        provenance=plan.provenance,
        channels=int(plan.keep.size),
        kept=int(counts.sum()),
        fewest=int(counts.min()),
        most=int(counts.max()),
        experts=int(counts.size),
        emptied=int((counts == 0).sum()),
        has_constants=plan.constants is not None,
        cut_router=plan.cut_router,
        top_k=plan.top_k,
        merged=bool(plan.merged),
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
        group_size=form.group_size if packed and not form.is_float8 else None,
        quantizer=(quantizer if form.is_int4 else "rtn") if packed else None,
        parameters=export.parameters,
        stored=sum(int(np.prod(shape, dtype=np.int64)) for shape in stored),
        bytes=export.nbytes,
        mtp=form.mtp if base.about.mtp else None,
        mtp_width=export.mtp_width,
        native=export.native is not None,
        requantize=form.requantize,
        rounded_again=None,
        layer_bits=form.layer_bits,
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


def _inherited(folder: Path) -> dict[str, Any]:
    """Licence and languages in the front matter of the base's card, if it has any."""
    values = front_matter(folder)
    return {name: values[name] for name in INHERITED if name in values}

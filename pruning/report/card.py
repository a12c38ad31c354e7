"""The README.md of an exported folder: facts in, a Hugging Face model card out (card.md)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convert.export_format import MIXED, ExportFormat
from pruning.budget.record import recorded_options
from pruning.kit.words import percent
from pruning.recipe.plan_options import RULE
from pruning.report.choice_table import choice_table
from pruning.report.html import render
from pruning.report.loading import Loading
from pruning.report.phrases import check_result, repair_words, second_rounding
from pruning.text.held_out import not_held_out

Quality = Mapping[str, Mapping[str, Mapping[str, Any]]]  # text -> model -> field -> value
Recovery = Sequence[Sequence[str]]  # (what, value) of a training after pruning


@dataclass(frozen=True)
class BaseFacts:
    """The model that a folder was made from.

    Attributes:
      name: its repository, else its folder.
      repository, revision: OWNER/NAME on the Hugging Face Hub and commit, None if unknown.
      inherited: front matter of its own card that stays true: licence, languages.
      has_card: whether the export holds that card as BASE_README.md.
      hash: fingerprint of its weights, 64 hexadecimal digits.
      family: model type.
      parameters, bytes: bytes are those of its weight files and index.
    """

    name: str
    repository: str | None
    revision: str | None
    inherited: Mapping[str, Any]
    has_card: bool
    hash: str
    family: str
    parameters: int
    bytes: int


@dataclass(frozen=True)
class PlanFacts:
    """What a plan keeps of the routed experts.

    Attributes:
      hash: SHA-256 of plan.safetensors.
      provenance: what the plan says of itself.
      channels, kept: intermediate channels before and after.
      fewest, most: channels that an expert keeps.
      experts, emptied: how many there are, and how many of them keep no channel.
      has_constants: whether those add a constant.
      cut_router: whether the router knows them no more.
      top_k: experts per token then, None for as many as in the base.
      merged: whether weights of experts were averaged in groups.
    """

    hash: str
    provenance: Mapping[str, Any]
    channels: int
    kept: int
    fewest: int
    most: int
    experts: int
    emptied: int
    has_constants: bool
    cut_router: bool = False
    top_k: int | None = None
    merged: bool = False

    @property
    def removed(self) -> float:
        """Share of the expert channels that is gone."""
        return 1 - self.kept / self.channels

    @property
    def is_nested(self) -> bool:
        """Whether a larger plan of the same sweep narrowed the choice."""
        said = self.provenance
        return said.get("nested_in") is not None and not said.get("nested_alike")


@dataclass(frozen=True)
class FolderFacts:
    """What the export stores.

    Attributes:
      written_as: model type in its config.json.
      form: name of the format.
      group_size: weights per scale, None in other formats.
      quantizer: "rtn", "gptq", or None in 16 bits.
      parameters: that are left after pruning.
      stored: parameters in the files, where padding counts.
      bytes: of weight files and index.
      mtp: what has become of the layers that predict further tokens, None if the base has none.
      mtp_width: channels of each of their experts.
      native: whether the codes of a base in few bits were taken over.
      requantize: whether that was refused.
      rounded_again: relative squared error of rounding weights that the base stores in few bits, 0
        if none was; None if it stores 16 bits, or the folder does.
      layer_bits: of the linear layers of each layer, if these have bits of their own.
    """

    written_as: str
    form: str
    group_size: int | None
    quantizer: str | None
    parameters: int
    stored: int
    bytes: int
    mtp: str | None
    mtp_width: int
    native: bool
    requantize: bool
    rounded_again: float | None
    layer_bits: tuple[int, ...] = ()

    @property
    def shape(self) -> str:
        """ragged, layered or padded."""
        return self.form.partition("-")[0]

    @property
    def bits(self) -> str:
        """bf16, int4, int8, mxfp4, fp8 or mixed."""
        return self.form.partition("-")[2]

    @property
    def layers_by_bits(self) -> list[tuple[int, int]]:
        """Bits, and how many layers have them, fewest bits first; of layers that differ."""
        return sorted(Counter(self.layer_bits).items())

    @property
    def twin(self) -> str:
        """The model type that the folder's architecture is known by elsewhere."""
        return self.written_as.removeprefix("ragged_")


@dataclass(frozen=True)
class CardFacts:
    """What a card says; nothing on it comes from elsewhere.

    Attributes:
      base, plan, folder, loading: see there.
      quality: per text the dense model, the pruned one and this folder, None before measuring.
      evaluation: window and stride in tokens, and what of the texts calibration has seen.
      checks: of this folder, as in the report; none before it is verified.
      repair: as in the report.
      recovery: what was trained on what, in rows of a table; none without training.
      version: of moe-jax.
    """

    base: BaseFacts
    plan: PlanFacts
    folder: FolderFacts
    loading: Loading
    quality: Quality | None
    evaluation: Mapping[str, Any]
    checks: Sequence[Mapping[str, Any]]
    repair: Mapping[str, Any]
    recovery: Recovery
    version: str


def model_card(facts: CardFacts) -> str:
    """The card as Markdown with YAML front matter."""
    return render(
        "card.md",
        front=_front_matter(facts),
        base=facts.base,
        plan=facts.plan,
        folder=facts.folder,
        loading=facts.loading,
        sizes=_sizes(facts),
        quality=_quality(facts.quality or {}),
        evaluation=facts.evaluation,
        repaired=repair_words(facts.repair) if facts.repair else "",
        rounded_again=""
        if facts.folder.rounded_again is None
        else second_rounding(facts.folder.rounded_again),
        seen_warning=not_held_out(facts.evaluation.get("seen", {})),
        checks=[[c["check"], check_result(c), c["detail"]] for c in facts.checks],
        made=_made(facts),
        choice=choice_table(choice) if (choice := facts.plan.provenance.get("choice")) else None,
        recovery=facts.recovery,
        recipe=_recipe(facts),
        sources=[
            [s["text"], f"{s['documents']:,}", f"{s['tokens']:,}", f"`{s['sha256']}`"]
            for s in facts.plan.provenance.get("sources") or ()
        ],
        version=facts.version,
    )


def _front_matter(facts: CardFacts) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if facts.base.repository is not None:
        values["base_model"] = facts.base.repository
        # The Hub has no word for a model that is only pruned.
        if facts.folder.bits != "bf16":
            values["base_model_relation"] = "quantized"
    sees = facts.loading.auto_class == "AutoModelForImageTextToText"
    task = "image-text-to-text" if sees else "text-generation"
    values |= {"library_name": "transformers", "pipeline_tag": task}
    pruned = ["pruned"] if facts.plan.removed else []
    return values | {
        "tags": ["moe", *pruned, facts.folder.bits, "moe-jax"], **facts.base.inherited,
    }  # fmt: skip


def _sizes(facts: CardFacts) -> list[list[str]]:
    base, plan, folder = facts.base, facts.plan, facts.folder
    bits = base.bytes * 8 / base.parameters, folder.bytes * 8 / folder.parameters
    return [
        ["parameters", f"{base.parameters:,}", f"{folder.parameters:,}"],
        ["expert channels", f"{plan.channels:,}", f"{plan.kept:,}"],
        ["bytes of weight files", f"{base.bytes:,}", f"{folder.bytes:,}"],
        ["times smaller", "1.00", f"{base.bytes / folder.bytes:.2f}"],
        ["bits per parameter", f"{bits[0]:.2f}", f"{bits[1]:.2f}"],
    ]


def _quality(quality: Quality) -> list[list[str]]:
    return [
        [text, name, f"{found['perplexity']:.3f}", f"{found['nll']:.4f}",
         "" if found["kl"] is None else f"{found['kl']:.4f}", percent(found["top1"]),
         f"{found['tokens']:,}"]
        for text, models in quality.items()
        for name, found in models.items()
    ]  # fmt: skip


def _made(facts: CardFacts) -> list[list[str]]:
    said, base = facts.plan.provenance, facts.base
    rows = [["base model", f"`{base.name}`"]]
    if base.revision is not None:
        rows.append(["revision", f"`{base.revision}`"])
    rows += [
        ["hash of its config, headers and sampled weights (moe-jax)", f"`{base.hash}`"],
        ["SHA-256 of plan.safetensors", f"`{facts.plan.hash}`"],
    ]
    if said.get("planned_for"):
        rows.append(["planned for", f"another model of the same shape, `{said['planned_for']}`"])
    if said.get("criterion"):
        planner = said.get("planner") or f"none (width {said.get('width')})"
        rule = f"criterion {said['criterion']}, attribution {said.get('attribution')}"
        rows.append(["rule", f"{rule}, planner {planner}"])
    if said.get("merge"):
        rows.append(["experts merged by", f"`{said['merge']}` of `moe-compress compare --merge`"])
    if said.get("width"):
        rows.append(["width policy", str(said["width"])])
    if facts.plan.is_nested:
        rows.append(["planned", f"in a sweep, within the plan of prune rate {said['nested_in']}"])
    return [*rows, ["format", f"`{facts.folder.form}`"], ["made with", f"moe-jax {facts.version}"]]


def _recipe(facts: CardFacts) -> dict[str, Any]:
    """Options under the names of recipe.yaml, as far as plan and export know them."""
    said, folder = facts.plan.provenance, facts.folder
    values: dict[str, Any] = {"model": facts.base.name}
    if sources := said.get("sources") or ():
        values["calibration"] = [
            s["text"] + (f"={s['weight']:g}" if s["weight"] != 1 else "") + s.get("options", "")
            for s in sources
        ]
    # Without a text of its own, measuring takes windows that are then not scored.
    if said.get("evaluation"):
        values["evaluation"] = said["evaluation"]
    options = {**(said.get("scoring") or {}), **recorded_options(said)}
    if choice := said.get("choice"):  # what was asked for repeats it, windows kept out as before
        options = {k: v for k, v in options.items() if k not in RULE} | choice["asked"]
    values |= {k: v for k, v in options.items() if v is not None and v is not False and v != []}
    values["prune_rate"] = said.get("prune_rate", facts.plan.removed)
    values |= {name: said[name] for name in ("block", "minimum") if said.get(name) is not None}
    values |= {"mtp": folder.mtp} if folder.mtp else {}
    if facts.repair or said.get("repair"):
        values["repair"] = facts.repair.get("mode", "none")
    values |= {"export": [folder.form]}
    values |= {} if folder.form == MIXED else {"bits": ExportFormat(folder.form).bits}
    if folder.group_size is not None:
        values |= {"group_size": folder.group_size, "quantizer": folder.quantizer}
    return values | ({"requantize": True} if folder.requantize and folder.bits != "bf16" else {})

"""The README.md of an exported folder: facts in, a Hugging Face model card out."""

from collections.abc import Mapping
from typing import Any

import yaml

from pruning.budget.record import recorded_options
from pruning.report.card_clients import loading
from pruning.report.card_facts import CardFacts
from pruning.text.held_out import not_held_out

UNKNOWN_BASE = "# base_model: OWNER/NAME (the folder it was made from does not say)"
UNKNOWN_LICENSE = "# license: the folder it was made from has no model card that names one"


def model_card(facts: CardFacts) -> str:
    """The card as Markdown with YAML front matter."""
    base = ["The card of the base model is kept as [BASE_README.md](BASE_README.md)."]
    parts = [
        _front_matter(facts),
        f"# {_title(facts)}",
        _summary(facts),
        *(base if facts.has_base_card else []),
        "## How to load it",
        loading(
            facts.form,
            facts.clients,
            has_tokenizer=facts.has_tokenizer,
            has_latent_attention=facts.has_latent_attention,
            has_linear_attention=facts.has_linear_attention,
        ),
        "## Sizes",
        _sizes(facts),
        "## Quality",
        _quality(facts),
        "## How it was made",
        _made(facts),
        "### Recipe",
        _recipe(facts),
        "### Calibration text",
        _calibration(facts),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(facts: CardFacts) -> str:
    values: dict[str, Any] = {}
    if facts.repository is not None:
        values["base_model"] = facts.repository
        # The Hub has no word for a model that is only pruned.
        if facts.group_size is not None:
            values["base_model_relation"] = "quantized"
    values |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    tags = ["moe", *(["pruned"] if facts.removed else []), facts.bits, "moe-jax"]
    values |= {"tags": tags, **facts.inherited}
    notes = [UNKNOWN_BASE] * (facts.repository is None)
    notes += [UNKNOWN_LICENSE] * ("license" not in facts.inherited)
    return "\n".join(["---", _yaml(values).rstrip(), *notes, "---"])


def _title(facts: CardFacts) -> str:
    what = f"{facts.removed:.1%} of the expert channels removed" if facts.removed else "not pruned"
    return f"{facts.model}, {what}, {facts.bits}"


def _summary(facts: CardFacts) -> str:
    twin = f", written as `{facts.written_as.removeprefix('ragged_')}`"
    other = twin if facts.written_as.removeprefix("ragged_") != facts.family else ""
    lines = [
        f"The Mixture-of-Experts model `{facts.model}` (`{facts.family}`{other}), made smaller by "
        f"moe-jax {facts.version} without training. {_pruning(facts)} {_layout(facts)} "
        f"{_precision(facts)}"
    ]
    if facts.emptied:
        adds = "a constant, their mean output on the calibration text" if facts.has_constants else (
            "nothing"
        )  # fmt: skip
        lines.append(
            f"{facts.emptied:,} of {facts.experts:,} experts keep no channel. The router still "
            f"chooses them as before and they add {adds}."
        )
    if facts.mtp is not None:
        lines.append(_mtp(facts))
    return "\n\n".join(lines)


def _mtp(facts: CardFacts) -> str:
    found = "The layers of the base that predict further tokens (multi-token prediction) are"
    if facts.mtp == "drop":
        return f"{found} left out, so that programs cannot draft tokens with them."
    if facts.mtp == "keep":
        return f"{found} kept as they were, in 16 bits."
    return (
        f"{found} there, in 16 bits; each of their experts has {facts.mtp_width:,} channels, those "
        "that add most to its output on noise, since no text was run through them."
    )


def _pruning(facts: CardFacts) -> str:
    if not facts.removed:
        return "Every channel of every expert is there."
    return (
        f"Of its {facts.channels:,} intermediate channels in routed experts "
        f"{facts.channels_kept:,} are kept ({1 - facts.removed:.1%}); all else of the model is "
        "there. What is kept is rounded to the format and not otherwise changed."
    )


def _layout(facts: CardFacts) -> str:
    fewest, most = facts.widths
    if fewest == most:
        return f"All experts are {most:,} channels wide."
    if facts.shape == "ragged":
        return f"Every expert has its own width, {fewest:,} to {most:,} channels."
    if facts.shape == "layered":
        return (
            f"Experts keep {fewest:,} to {most:,} channels and are, where those of a layer differ, "
            "filled up with zeros to one width per layer."
        )
    return (
        f"Experts keep {fewest:,} to {most:,} channels and are filled up with zeros to one width."
    )


def _precision(facts: CardFacts) -> str:
    if facts.group_size is None:
        return "Weights are bfloat16."
    if facts.bits == "mxfp4":
        return "Expert weights are MXFP4 (blocks of 32), rounded to nearest; the others bfloat16."
    how = "chosen by GPTQ on the calibration text" if facts.quantizer == "gptq" else (
        "rounded to nearest"
    )  # fmt: skip
    return (
        f"Linear layers are 4-bit integers, symmetric, one scale per {facts.group_size} weights, "
        f"{how} (compressed-tensors `pack-quantized`); embeddings, norms, routers, "
        f"{'linear attention ' if facts.has_linear_attention else ''}and the output head are not."
    )


def _sizes(facts: CardFacts) -> str:
    dense, here = facts.source_bytes, facts.written_bytes
    bits = dense * 8 / facts.parameters, here * 8 / facts.parameters_left
    rows = [
        ["parameters", f"{facts.parameters:,}", f"{facts.parameters_left:,}"],
        ["expert channels", f"{facts.channels:,}", f"{facts.channels_kept:,}"],
        ["bytes of weight files", f"{dense:,}", f"{here:,}"],
        ["times smaller", "1.00", f"{dense / here:.2f}"],
        ["bits per parameter", f"{bits[0]:.2f}", f"{bits[1]:.2f}"],
    ]
    note = (
        "Bits per parameter: all bytes of the weight files, so scales, headers and whatever stays "
        "in 16 bits too, over the parameters that are left."
    )
    if facts.parameters_stored != facts.parameters_left:
        note += (
            f" The folder stores {facts.parameters_stored:,} parameters: what the format adds, "
            "such as zeros that fill up experts, holds bytes but is not counted as a parameter."
        )
    return f"{_table(['', 'base', 'this folder'], rows)}\n\n{note}"


def _quality(facts: CardFacts) -> str:
    if not facts.quality:
        return (
            "Nothing was measured when this card was written. `moe-compress eval . --text FILE` "
            "says how likely the model finds a text."
        )
    rows = []
    for text, models in facts.quality.items():
        for name, found in models.items():
            kl = "" if found["kl"] is None else f"{found['kl']:.4f}"
            top1 = "" if found["top1"] is None else f"{found['top1']:.1%}"
            rows.append([text, name, f"{found['perplexity']:.3f}", f"{found['nll']:.4f}", kl, top1,
                         f"{found['tokens']:,}"])  # fmt: skip
    header = ["text", "model", "perplexity", "nats per token", "KL", "top-1", "tokens"]
    window, stride = facts.evaluation["window"], facts.evaluation["stride"]
    note = (
        f"Windows of {window:,} tokens, {stride:,} apart. dense: the base model. pruned: without "
        f"rounding to 4 bits, as computed in memory. {facts.form}: this folder, read from disk. "
        "KL: divergence of the dense model's predictions from this model's, nats per token. top-1: "
        "positions with the same most likely token as the dense model."
    )
    warning = not_held_out(facts.evaluation.get("seen", {}))
    return f"{_table(header, rows)}\n\n{f'{warning} {note}'.lstrip()}"


def _made(facts: CardFacts) -> str:
    said = facts.provenance
    rows = [["base model", f"`{facts.model}`"]]
    if facts.revision is not None:
        rows.append(["revision", f"`{facts.revision}`"])
    rows += [
        ["hash of its config, headers and sampled weights (moe-jax)", f"`{facts.model_hash}`"],
        ["SHA-256 of plan.safetensors", f"`{facts.plan_hash}`"],
    ]
    if said.get("criterion"):
        planner = said.get("planner") or f"none (width {said.get('width')})"
        rule = f"criterion {said['criterion']}, attribution {said['attribution']}"
        rows.append(["rule", f"{rule}, planner {planner}"])
    if said.get("width"):
        rows.append(["width policy", str(said["width"])])
    if _is_nested(facts):
        rows.append(["planned", f"in a sweep, within the plan of prune rate {said['nested_in']}"])
    rows += [["format", f"`{facts.form}`"], ["made with", f"moe-jax {facts.version}"]]
    return _table(["", ""], rows)


def _recipe(facts: CardFacts) -> str:
    said = facts.provenance
    sources = said.get("sources") or ()
    values: dict[str, Any] = {"model": facts.model}
    if sources:
        values["calibration"] = [
            s["text"] if s["weight"] == 1 else f"{s['text']}={s['weight']:g}" for s in sources
        ]
    # Without a text of its own, measuring takes windows that are then not scored.
    if said.get("evaluation"):
        values["evaluation"] = said["evaluation"]
    options = {**(said.get("scoring") or {}), **recorded_options(said)}
    values |= {k: v for k, v in options.items() if v is not None and v is not False and v != []}
    values["prune_rate"] = said.get("prune_rate", facts.removed)
    values |= {name: said[name] for name in ("block", "minimum") if said.get(name) is not None}
    values |= {"mtp": facts.mtp} if facts.mtp else {}
    values |= {"export": [facts.form], "bits": 16 if facts.group_size is None else 4}
    if facts.group_size is not None:
        values |= {"group_size": facts.group_size, "quantizer": facts.quantizer}
    repeats = "plans this rate alone, which differs a little" if _is_nested(facts) else "repeats it"
    return (
        "What the plan and the export say of themselves, under the names of recipe.yaml; files "
        "without their folders. With those in place `moe-compress compress --recipe FILE --output "
        f"FOLDER` {repeats}.\n\n```yaml\n{_yaml(values)}```"
    )


def _is_nested(facts: CardFacts) -> bool:
    """Whether a larger plan of the same sweep narrowed the choice."""
    said = facts.provenance
    return said.get("nested_in") is not None and not said.get("nested_alike")


def _calibration(facts: CardFacts) -> str:
    said = facts.provenance
    if "tokens" not in said:
        return "The plan does not say what it was scored on."
    if not said["tokens"]:
        return "No text was read: the weights alone decided, which is a preview."
    scored = f"{said['tokens']:,} tokens were scored."
    if not said.get("sources"):
        return f"{scored} The plan does not name the texts."
    rows = [
        [s["text"], f"{s['documents']:,}", f"{s['tokens']:,}", f"`{s['sha256']}`"]
        for s in said["sources"]
    ]
    note = "Tokens of a file: as drawn from it, those set aside for measuring included."
    table = _table(["file", "documents", "tokens", "SHA-256"], rows)
    return f"{scored}\n\n{table}\n\n{note}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, default_flow_style=None, width=100)

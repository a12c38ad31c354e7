"""Short tables of what the stages answer; the reports have tables of their own."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pruning.budget.plan import PruningPlan
from pruning.report.compression_tables import verification_table
from pruning.report.table import TextTable
from pruning.stages.checks import Check

NUMBERS = {"nll": ".4f", "perplexity": ",.3f", "kl": ".4f", "top1": ".1%"}


def model_table(found: Mapping[str, Any]) -> TextTable:
    """What `inspect` says of a checkpoint."""
    rows = [[name.replace("_", " "), _value(name, value)] for name, value in found.items()]
    return TextTable("Model", ["what", "value"], rows)


def _value(name: str, value: Any) -> str:
    if name == "bytes":
        return f"{value:,} ({value / 1e6:,.1f} MB)"
    if name == "routed_share":
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def plans_table(plans: Iterable[tuple[Path, PruningPlan]]) -> TextTable:
    """How many channels every plan keeps, and of what."""
    rows = []
    for folder, plan in plans:
        said, kept = plan.provenance, int(plan.counts.sum())
        coverage = said.get("coverage_aligned")
        rows.append([
            str(folder), f"{1 - kept / plan.keep.size:.4g}", f"{kept:,}",
            f"{plan.counts.min():,} to {plan.counts.max():,}", str(int((plan.counts == 0).sum())),
            "" if coverage is None else f"{coverage:.4f}",
            # Equal widths need no planner.
            f"{said.get('planner') or said.get('width', '')}-{said.get('criterion', '')}",
        ])  # fmt: skip
    header = ["plan", "pruned", "channels kept", "an expert keeps", "emptied", "coverage", "rule"]
    note = "Coverage: share of the score that is kept, experts weighted as the planner does."
    return TextTable("Plans", header, rows, note)


def exports_table(sizes: Mapping[Path, int]) -> TextTable:
    """Folders of weights and their sizes."""
    rows = [[path.name, f"{size / 1e6:,.2f}", str(path)] for path, size in sizes.items()]
    return TextTable("Exports", ["format", "MB", "folder"], rows)


def checks_table(checks: Sequence[Check]) -> TextTable:
    """What was verified."""
    return verification_table([dataclasses.asdict(check) for check in checks])


def quality_table(found: Mapping[str, Any]) -> TextTable:
    """Likelihood of every text under every model that `evaluate` measured."""
    texts = found["texts"]
    single = all("nll" in quality for quality in texts.values())
    models = {"model": texts} if single else texts
    rows = []
    for model, measured in models.items():
        for text, quality in measured.items():
            cells = [_number(quality.get(name), form) for name, form in NUMBERS.items()]
            rows.append([model, text, f"{quality['tokens']:,}", *cells])
    header = ["model", "text", "tokens", "nats per token", "perplexity", "KL", "same top token"]
    columns = [i for i in range(len(header)) if i == 0 or any(row[i] for row in rows)][single:]
    note = f"Windows of {found['window']:,} tokens, {found['stride']:,} apart."
    if not single:
        note += " KL and same top token: against the dense model."
    return TextTable(
        "Quality", [header[i] for i in columns], [[r[i] for i in columns] for r in rows], note
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)

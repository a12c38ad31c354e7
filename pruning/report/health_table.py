"""What models write by themselves, as a table."""

from collections.abc import Mapping
from typing import Any

from pruning.kit.words import percent
from pruning.report.table import TextTable


def health_table(health: Mapping[str, Mapping[str, Any]]) -> TextTable:
    """One row a model, as of `Health`."""
    rows = [
        [
            name, f"{one['tokens']:.1f}", percent(one["truncated"]), percent(one["repeated"]),
            f"{one['entropy']:.3f}",
            "" if one["followed"] is None else f"{one['followed']:.1f}", percent(one["sums"]),
        ]
        for name, one in health.items()
    ]  # fmt: skip
    header = ["model", "tokens", "truncated", "repeated", "entropy", "as dense", "sums right"]
    number = next(iter(health.values()))["prompts"]
    note = (
        f"{number:,} beginnings and as many sums, continued by the likeliest token each time. "
        "tokens: mean length. truncated: not ended when no more tokens were allowed. repeated: "
        "phrases of four tokens that the same continuation had before. entropy: of the next token, "
        "nats. as dense: tokens, on average, until a continuation leaves that of the dense model."
    )
    return TextTable("What it writes", header, rows, note)

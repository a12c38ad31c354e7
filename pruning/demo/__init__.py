"""The embedded demo model: how its corpus, tokenizer and weights are made."""

from pathlib import Path

DEMO = Path(__file__).parent

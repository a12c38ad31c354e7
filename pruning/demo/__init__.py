"""The embedded demo model: how its corpus, tokenizer and weights are made."""

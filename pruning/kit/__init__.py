"""What every room leans on: registries, progress, errors, words for bytes and shares.

Imports nothing of `pruning`.
"""

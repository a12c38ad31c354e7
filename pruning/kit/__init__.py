"""What every room leans on: progress, errors, words for bytes and shares.

Imports nothing of `pruning`.
"""

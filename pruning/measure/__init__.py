"""How good a model still is: loss, agreement with the dense one, scores against the truth.

Imports `kit`, `text`, `scores`, `budget`.
"""

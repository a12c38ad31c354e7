"""A plan becomes smaller weights: cut, masked, rounded to 4 bits.

Imports `kit`, `scores`, `budget`.
"""

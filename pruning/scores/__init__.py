"""Windows become worth: the sums of one sweep, and what channels, experts and layers score.

Imports `kit`, `moe_jax`.
"""

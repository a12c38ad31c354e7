"""Worth becomes a plan: which channels of which experts stay.

Imports `kit`, `recipe`, `scores`.
"""

"""Whole stories: compress, apply, compare, audit, estimate.

Imports `stages` and what stages import.
"""

"""One step each, from file to file: open, score, plan, export, verify.

Imports every room above and `convert`.
"""

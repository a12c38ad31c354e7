"""The options of a run, in groups; the one place where they are declared.

Imports `kit`, and no jax: `--help` must not wait.
"""

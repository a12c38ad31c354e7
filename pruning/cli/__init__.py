"""The command line: flags, commands and their errors.

Imports `runs` and all that runs import; jax only once a command has been understood.
"""

from pruning.cli.main import main

__all__ = ["main"]

"""What argparse cannot check of the options that no recipe has."""

import argparse
import os
from pathlib import Path

from moe_jax.errors import InputError


def check_evaluation(options: argparse.Namespace) -> None:
    """Options of `eval`."""
    for name, least in (("window", 2), ("stride", 1), ("max_tokens", 2), ("batch", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            flag = name.replace("_", "-")
            raise InputError(f"{name}={value} must be at least {least}; change --{flag}")
    if len(options.prune_rate or []) > 1 and not os.access(options.folder, os.W_OK):
        raise InputError(f"{options.folder} gets sweep.csv and sweep.html; make it writable first")
    _check_json(options.json)


def _check_json(path: Path | None) -> None:
    if path is not None and not path.absolute().parent.is_dir():
        raise InputError(f"json={path} lies in no existing folder; make it first")


def check_estimate(options: argparse.Namespace) -> None:
    """Options of `estimate`."""
    if options.tensor_parallel < 1:
        raise InputError(f"tensor_parallel={options.tensor_parallel} must be at least 1")
    _check_json(options.json)

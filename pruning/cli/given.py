"""What parsed options say beside those of a command: memory, place and progress."""

import argparse
from typing import Any

import jax

from pruning.cli.flags import given_options
from pruning.kit.progress import Steps
from pruning.recipe.place_options import PlaceOptions

Options = argparse.Namespace


def limit_of(options: Options) -> dict[str, Any]:
    """The memory limit, where one is given."""
    limit = getattr(options, "memory_limit", None)
    return {} if limit is None else {"memory_limit": limit}


def places_of(options: Options) -> PlaceOptions:
    """The devices and processes that are named."""
    return PlaceOptions(**given_options(options, PlaceOptions))


def follows(options: Options) -> bool:
    """Whether another process shows what this command found; nothing is shown or written then."""
    follows = jax.process_index() > 0
    options.json = None if follows else options.json
    return follows


def steps_of(options: Options) -> Steps:
    """Where progress goes."""
    return Steps(quiet=options.quiet, verbose=options.verbose)

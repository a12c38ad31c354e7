"""The command `moe-compress`: parse, run, show; and what becomes of errors."""

import argparse
import importlib.metadata
import logging
import os
import platform
import sys
import traceback

from moe_jax.errors import InputError, LostProcess
from pruning.cli.flags import recipe_from
from pruning.cli.grammar import build_parser
from pruning.kit.errors import VerificationError
from pruning.kit.hub import download

ONE_PROCESS = ("plan", "eval", "paper", "report")
WITH_RECIPE = ("compress", "score", "estimate", "apply", "compare", "paper")
FUNCTIONS = {"prune": "export", "eval": "evaluate"}
FAULTY = (
    "this is a fault of the program, not of what you gave it; please report it with your command "
    "and the lines above"
)
LOST = "the same command, given to all processes again, goes on from what is finished"
FAILED_CHECK, BAD_INPUT, FAULT, INTERRUPTED = 1, 2, os.EX_SOFTWARE, 130
LOST_PROCESS = os.EX_TEMPFAIL


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
      arguments: default those of the process.

    Returns:
      The exit code: 0, 1 for a failed check, 2 for bad input, 70 for a fault of the program, 75
      if another process is lost, 130 if interrupted.
    """
    try:
        try:
            code = _main(arguments)
            if code != 0:
                _leave_others(code)
            return code
        finally:  # also after --help, which leaves by SystemExit
            sys.stdout.flush()
            sys.stderr.flush()
    except BrokenPipeError:  # who read our output, such as head, has seen enough
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        return 0


def _main(arguments: list[str] | None) -> int:
    options = build_parser().parse_args(arguments)
    _log(options.verbose)
    try:
        _run(options)
    except BrokenPipeError:
        raise
    except VerificationError as error:
        return _fail(f"verification failed: {error}", FAILED_CHECK, options.debug)
    except (InputError, OSError) as error:
        return _fail(str(error), BAD_INPUT, options.debug)
    except LostProcess as error:
        return _fail(f"another process has ended: {error}; {LOST}", LOST_PROCESS, options.debug)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from here", INTERRUPTED, options.debug)
    except Exception:
        return _fail(f"{FAULTY} ({_versions()})", FAULT, True)
    return 0


def _run(options: argparse.Namespace) -> None:
    if options.command == "completion":
        from pruning.cli.completion import script

        print(script(options.shell))
        return
    _read_recipe(options)
    if getattr(options, "download", False):
        named = options.made if "made" in options else options
        download(getattr(named, "model", None) or options.folder, quiet=options.quiet)
    # Products of many threads are XLA's; on the small ones of repair, those of numpy's BLAS would
    # wait for each other twenty times as long as they work. It reads this when it is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Only now: jax takes seconds to import, and a typing error should not.
    from pruning.cli import commands
    from pruning.cli.output import check_json, show
    from pruning.runs.places import refuse_processes

    if options.command in ONE_PROCESS:
        refuse_processes(options.command)
    check_json(options.json)
    function = getattr(commands, str(FUNCTIONS.get(options.command, options.command)))
    show(function(options), options.json)


def _leave_others(code: int) -> None:
    """End at once if other processes share the work: leaving in order would wait for them."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _read_recipe(options: argparse.Namespace) -> None:
    """Add the recipe of a command that has one, its options checked."""
    if options.command not in WITH_RECIPE:
        return
    if options.command == "estimate":
        if options.rates:
            options.prune_rate = options.rates[0]  # a recipe has one rate only
        if options.recipe is None and "output" not in options:  # its disk is looked at
            options.output = "out"
    options.made = recipe_from(options)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"moe-compress: {message}", file=sys.stderr)
    return code


def _log(verbose: bool) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for package in ("moe_jax", "convert", "pruning"):
        logging.getLogger(package).setLevel(logging.INFO if verbose else logging.WARNING)


def _versions() -> str:
    found = [f"Python {platform.python_version()}", platform.platform()]
    for name in ("moe-jax", "jax"):
        installed = importlib.metadata.distributions(name=name)
        found += [f"{name} {package.version}" for package in installed][:1]
    return ", ".join(found)

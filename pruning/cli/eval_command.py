"""The command `eval`: likelihood of texts, tasks, or what a model writes by itself."""

from pathlib import Path
from typing import Any

from moe_jax.errors import InputError
from pruning.cli.flags import given_options
from pruning.cli.given import Options, limit_of, steps_of
from pruning.cli.output import Outcome
from pruning.cli.tables import quality_table
from pruning.recipe.health_options import HealthOptions
from pruning.recipe.options import TextOptions
from pruning.recipe.task_options import TaskOptions
from pruning.report.health_table import health_table
from pruning.report.task_table import compared_table
from pruning.runs import evaluate as evaluating
from pruning.runs import health as writing
from pruning.runs import tasks as asking


def evaluate(options: Options) -> Outcome:
    """Likelihood of texts, or tasks, under a folder or under the plans of a sweep."""
    if given_options(options, TaskOptions):
        return _tasks(options)
    if given_options(options, HealthOptions):
        return _health(options)
    found = evaluating.evaluate(
        options.folder,
        options.text or (),
        options.rates or (),
        text_field=options.text_field,
        stride=options.stride,
        batch=options.batch,
        dtype=options.dtype,
        **given_options(options, TextOptions),
        **limit_of(options),
        steps=steps_of(options),
    )
    pages = [Path(options.folder, "sweep.html")] if len(options.rates or ()) > 1 else []
    return Outcome(found, [quality_table(found)], pages)


def _tasks(options: Options) -> Outcome:
    given: dict[str, Any] = {"tasks": ()} | given_options(options, TaskOptions)
    TaskOptions(**given)  # what is out of range is said first
    if options.text or options.stride is not None:
        raise InputError("tasks and text are two measurements; leave --text and --stride out")
    if limit_of(options):
        raise InputError("tasks are asked in as much memory as they take; leave --memory-limit out")
    text = given_options(options, TextOptions)
    found = asking.evaluate_tasks(
        options.folder,
        rates=options.rates or (),
        **given,
        **{name: text[name] for name in ("window", "first_tokens") if name in text},
        batch=options.batch,
        dtype=options.dtype,
        steps=steps_of(options),
    )
    tables = found.pop("tables")
    shown = [part for name, table in tables.items() for part in (f"{name}:", table)]
    compared = [compared_table(name, rows) for name, rows in found["compared"].items()]
    return Outcome(found, [*shown, *compared], [Path(file) for file in found["files"].values()])


def _health(options: Options) -> Outcome:
    given: dict[str, Any] = given_options(options, HealthOptions)
    if "generate" not in given:
        raise InputError("new_tokens are those of continuations; add --generate N")
    text = given_options(options, TextOptions)
    unread = [name for name in ("window", "loss_on") if name in text]
    unread += ["stride"] * (options.stride is not None) + list(limit_of(options))
    if unread:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in unread)
        raise InputError(f"{flags}: of no meaning with --generate; leave it out")
    found = writing.generation_health(
        options.folder,
        options.text or (),
        options.rates or (),
        **given,
        text_field=options.text_field,
        **text,
        batch=options.batch,
        dtype=options.dtype,
        steps=steps_of(options),
    )
    lines = [f"beginning: {found['beginnings'][0]!r}"]
    lines += [f"{name}: {texts[0]!r}" for name, texts in found["written"].items()]
    return Outcome(found, [health_table(found["health"]), *lines])

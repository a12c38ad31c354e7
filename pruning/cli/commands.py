"""What each sub-command does with its parsed options: it calls a function and shows the result.

Commands with a recipe find it, checked, in `options.made`.
"""

import argparse
import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import jax

from convert.checkpoint import open_checkpoint
from convert.mtp import mtp_layers
from moe_jax.errors import InputError
from pruning.cli.flags import given_options, recipe_from
from pruning.cli.output import Outcome, stdout
from pruning.cli.tables import (
    checks_table,
    exports_table,
    model_table,
    plans_table,
    quality_table,
)
from pruning.demo import model_folder
from pruning.kit.progress import Steps
from pruning.recipe.health_options import HealthOptions
from pruning.recipe.options import ExportOptions, PlanOptions, TextOptions
from pruning.recipe.place_options import PlaceOptions
from pruning.recipe.recipe import CompressionRecipe
from pruning.recipe.recover_options import RecoverOptions
from pruning.recipe.task_options import TaskOptions
from pruning.report.audit_page import audit_tables
from pruning.report.choice_table import choice_table
from pruning.report.comparison_draws import draw_tables
from pruning.report.comparison_sizes import size_tables
from pruning.report.cost_tables import estimate_tables
from pruning.report.health_table import health_table
from pruning.report.task_table import compared_table
from pruning.runs import apply as applying
from pruning.runs import audit as auditing
from pruning.runs import compare as comparing
from pruning.runs import compress as compressing
from pruning.runs import estimate as estimating
from pruning.runs import evaluate as evaluating
from pruning.runs import export as exporting
from pruning.runs import health as writing
from pruning.runs import plan as planning
from pruning.runs import recover as recovering
from pruning.runs import report as reporting
from pruning.runs import score as scoring
from pruning.runs import tasks as asking
from pruning.runs import verify as verifying
from pruning.stages.score import STATISTICS
from pruning.stages.sizes import folder_bytes
from pruning.stages.writer import only_writer

Options = argparse.Namespace

gc.freeze()  # every stage collects garbage, which what was imported never becomes


def compress(options: Options) -> Outcome:
    """Everything; shows the report."""
    report = compressing.compress(options.made, _steps(options))
    folder = Path(options.made.output)
    sample, lines = report.sample, []
    shown = (("prompt", "prompt"), ("dense", "dense"), (sample["export"], "compressed"))
    for label, key in shown if sample["prompt"] else ():
        lines.append(f"{label}: {sample[key]!r}")
    values = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    pages = [folder / "exports" / name for name in report.sizes["exports"]]
    parts = [report.terminal_table(), *lines, ""]
    return Outcome(values, parts, [*pages, folder / "report.html"])


def score(options: Options) -> Outcome:
    """Statistics of a model."""
    recipe = options.made
    found = scoring.score(recipe, _steps(options), _places(options))
    if _follows(options):
        return Outcome(None)
    path = Path(recipe.output) / STATISTICS
    tokens = int(found.total_tokens)
    said = f"{tokens:,} tokens scored" if tokens else "the weights scored, no text"
    said += f"; next: moe-compress plan {recipe.output} --prune-rate 0.25 0.5"
    values = {"statistics": str(path), "tokens": tokens, "collected": sorted(found.groups)}
    return Outcome(values, [said], [path])


def inspect(options: Options) -> Outcome:
    """What a checkpoint is."""
    base = open_checkpoint(model_folder(options.model))
    about, c = base.about, base.config
    routed = sum(map(sum, about.widths)) * 3 * c.d_model
    total = about.weights()
    found = {
        "folder": str(about.folder),
        "family": about.family.model_type,
        "bytes": folder_bytes(about.folder),
        "parameters": total,
        "mtp_layers": mtp_layers(about.family, about.hf_config) if about.mtp else 0,
        "mtp_tensors": len(about.mtp),
        "mtp_parameters": about.mtp_weights,
        "routed_expert_parameters": routed,
        "routed_share": round(routed / total, 4),
        "layers": c.num_layers,
        "expert_layers": len(c.moe_layers),
        "experts_per_layer": c.moe.num_experts,
        "experts_per_token": c.moe.experts_per_token,
        "channels_per_expert": c.moe.d_expert,
        "shared_expert_width": c.moe.d_shared,
        "d_model": c.d_model,
        "vocab_size": c.vocab_size,
        "context": c.max_position,
    }
    if options.fingerprint:
        with _steps(options).bar("read the weights") as on_step:
            base.hash_weights(on_step)
        found["fingerprint"] = base.fingerprint
    return Outcome(found, [model_table(found)])


def estimate(options: Options) -> Outcome:
    """What a compression gives and costs; one set of tables per prune rate."""
    found = estimating.estimate(
        options.made,
        options.rates or (),
        tensor_parallel=options.tensor_parallel,
        probe=options.probe,
        recovery_tokens=options.recovery_tokens,
    )
    return Outcome(found, [table for one in found for table in estimate_tables(one)])


def plan(options: Options) -> Outcome:
    """One plan in the folder, or one per rate below plans/."""
    given = given_options(options, PlanOptions) | _limit(options)
    plans = planning.plan_folder(
        options.folder, options.rates or (), steps=_steps(options), **given
    )
    values = [{"plan": f"{folder}/plan.json", **one.provenance} for folder, one in plans]
    pages = [Path(options.folder, "sweep.html")] if len(plans) > 1 else [plans[0][0] / "plan.json"]
    chosen = [one.provenance["choice"] for _, one in plans if "choice" in one.provenance]
    return Outcome(values, [plans_table(plans), *map(choice_table, chosen)], pages)


def export(options: Options) -> Outcome:
    """The exports of the plan in a folder."""
    given = given_options(options, ExportOptions) | _limit(options)
    folders = exporting.export_folder(
        options.folder,
        overwrite=getattr(options, "overwrite", False),
        steps=_steps(options),
        **given,
    )
    sizes = {folder: folder_bytes(folder) for folder in folders}
    return Outcome([str(folder) for folder in folders], [exports_table(sizes)])


def apply(options: Options) -> Outcome:
    """Exports of a plan made elsewhere, each verified."""
    recipe = options.made
    checks = applying.apply_plan(
        options.plan,
        recipe.model,
        recipe.output,
        export=recipe.export,
        bits=recipe.bits,
        group_size=recipe.group_size,
        requantize=recipe.requantize,
        mtp=recipe.mtp,
        calibration=recipe.calibration,
        repair=recipe.repair,
        allow_other_model=options.allow_other_model,
        overwrite=recipe.overwrite,
        memory_limit=recipe.memory_limit,
        steps=_steps(options),
    )
    names = dict.fromkeys(check.export for check in checks)
    folders = [Path(recipe.output) / "exports" / name for name in names]
    sizes = {folder: folder_bytes(folder) for folder in folders}
    values = {
        "exports": {str(folder): size for folder, size in sizes.items()},
        "checks": [dataclasses.asdict(check) for check in checks],
    }
    return Outcome(values, [exports_table(sizes), checks_table(checks)])


def verify(options: Options) -> Outcome:
    """Check every export of a folder."""
    checks = verifying.verify(options.folder, _steps(options), **_limit(options))
    return Outcome([dataclasses.asdict(check) for check in checks], [checks_table(checks)])


def recover(options: Options) -> Outcome:
    """A pruned model trained and exported; shows what came back."""
    given = {name: () for name in ("text", "output")} | given_options(options, RecoverOptions)
    if not given["output"]:
        raise InputError("output is missing; give it with --output")
    report = recovering.recover(options.folder, steps=_steps(options), **given)
    folder = Path(given["output"])
    pages = [*(folder / "exports" / name for name in report.exports), folder / "recover.html"]
    return Outcome(dataclasses.asdict(report), [report.terminal_table(), ""], pages)


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
        **_limit(options),
        steps=_steps(options),
    )
    pages = [Path(options.folder, "sweep.html")] if len(options.rates or ()) > 1 else []
    return Outcome(found, [quality_table(found)], pages)


def _tasks(options: Options) -> Outcome:
    given: dict[str, Any] = {"tasks": ()} | given_options(options, TaskOptions)
    TaskOptions(**given)  # what is out of range is said first
    if options.text or options.stride is not None:
        raise InputError("tasks and text are two measurements; leave --text and --stride out")
    if _limit(options):
        raise InputError("tasks are asked in as much memory as they take; leave --memory-limit out")
    text = given_options(options, TextOptions)
    found = asking.evaluate_tasks(
        options.folder,
        rates=options.rates or (),
        **given,
        **{name: text[name] for name in ("window", "first_tokens") if name in text},
        batch=options.batch,
        dtype=options.dtype,
        steps=_steps(options),
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
    unread += ["stride"] * (options.stride is not None) + list(_limit(options))
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
        steps=_steps(options),
    )
    lines = [f"beginning: {found['beginnings'][0]!r}"]
    lines += [f"{name}: {texts[0]!r}" for name, texts in found["written"].items()]
    return Outcome(found, [health_table(found["health"]), *lines])


def audit(options: Options) -> Outcome:
    """Rank correlation of every score with the true ablation; shows the best of them."""
    source, output = Path(options.model), getattr(options, "output", None)
    given, is_scored = {}, options.model != "demo" and (source / STATISTICS).is_file()
    if is_scored:
        asked = given_options(options, CompressionRecipe)
        given = {name: asked[name] for name in ("batch", "seed") if name in asked}
        given["output"] = output
    found = auditing.audit(
        source if is_scored else recipe_from(options),
        experts=options.experts,
        channels=options.channels,
        tokens=options.sample_tokens,
        steps=_steps(options),
        where=_places(options),
        **given,
    )
    if _follows(options):
        return Outcome(None)
    return Outcome(found, audit_tables(found), [Path(output or source) / "audit.html"])


def report(options: Options) -> Outcome:
    """Show a finished run's report and write report.html again."""
    with only_writer(options.folder):
        found = reporting.report(options.folder, _steps(options))
    values = json.loads((options.folder / "report.json").read_text(encoding="utf-8"))
    return Outcome(values, [found.terminal_table(), ""], [options.folder / "report.html"])


def compare(options: Options) -> Outcome:
    """Rules ranked at equal size."""
    recipe = options.made
    given = {
        "rates": options.rates, "rules": options.rules, "bits": options.compared_bits,
        "target_bytes": options.compared_bytes, "target_factors": options.compared_factors,
        "repair": options.repaired, "draws": options.draws,
    }  # fmt: skip
    found = comparing.compare(
        recipe, **{name: value for name, value in given.items() if value}, steps=_steps(options),
        where=_places(options),
    )  # fmt: skip
    if _follows(options):
        return Outcome(None)
    tables: list[Any] = [found.terminal_table(stdout().width)] if found.rates else []
    shown = [*tables, *size_tables(found), *draw_tables(found), ""]
    return Outcome(dataclasses.asdict(found), shown, [Path(recipe.output) / "compare.html"])


def _limit(options: Options) -> dict[str, Any]:
    """The memory limit, where one is given."""
    limit = getattr(options, "memory_limit", None)
    return {} if limit is None else {"memory_limit": limit}


def _places(options: Options) -> PlaceOptions:
    return PlaceOptions(**given_options(options, PlaceOptions))


def _follows(options: Options) -> bool:
    """Whether another process shows what this command found; nothing is shown or written then."""
    follows = jax.process_index() > 0
    options.json = None if follows else options.json
    return follows


def _steps(options: Options) -> Steps:
    return Steps(quiet=options.quiet, verbose=options.verbose)

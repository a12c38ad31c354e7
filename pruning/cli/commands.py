"""What each sub-command does with its parsed options: it calls a function and shows the result.

Commands with a recipe find it, checked, in `options.made`.
"""

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

from convert.checkpoint import open_checkpoint
from convert.mtp import mtp_layers
from moe_jax.errors import InputError
from pruning.cli.eval_command import evaluate as evaluate
from pruning.cli.flags import given_options, recipe_from
from pruning.cli.given import Options, follows, limit_of, places_of, steps_of
from pruning.cli.output import Outcome, stdout
from pruning.cli.tables import (
    checks_table,
    exports_table,
    model_table,
    plans_table,
)
from pruning.demo import model_folder
from pruning.recipe.options import ExportOptions, PlanOptions
from pruning.recipe.paper_options import PaperOptions
from pruning.recipe.recipe import CompressionRecipe
from pruning.recipe.recover_options import RecoverOptions
from pruning.recipe.task_options import TaskOptions
from pruning.report.audit_page import audit_tables
from pruning.report.choice_table import choice_table
from pruning.report.comparison_compute import compute_tables
from pruning.report.comparison_draws import draw_tables
from pruning.report.comparison_sets import set_tables
from pruning.report.comparison_sizes import size_tables
from pruning.report.comparison_tasks import task_tables
from pruning.report.cost_tables import estimate_tables
from pruning.runs import apply as applying
from pruning.runs import audit as auditing
from pruning.runs import compare as comparing
from pruning.runs import compress as compressing
from pruning.runs import estimate as estimating
from pruning.runs import export as exporting
from pruning.runs import paper as papering
from pruning.runs import plan as planning
from pruning.runs import recover as recovering
from pruning.runs import report as reporting
from pruning.runs import score as scoring
from pruning.runs import verify as verifying
from pruning.runs.calibration_sets import parse_sets
from pruning.stages.score import STATISTICS
from pruning.stages.sizes import folder_bytes
from pruning.stages.writer import only_writer

gc.freeze()  # every stage collects garbage, which what was imported never becomes


def compress(options: Options) -> Outcome:
    """Everything; shows the report."""
    report = compressing.compress(options.made, steps_of(options), places_of(options))
    if follows(options):
        return Outcome(None)
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
    found = scoring.score(recipe, steps_of(options), places_of(options))
    if follows(options):
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
        with steps_of(options).bar("read the weights") as on_step:
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
    given = given_options(options, PlanOptions) | limit_of(options)
    plans = planning.plan_folder(
        options.folder, options.rates or (), steps=steps_of(options), **given
    )
    values = [{"plan": f"{folder}/plan.json", **one.provenance} for folder, one in plans]
    pages = [Path(options.folder, "sweep.html")] if len(plans) > 1 else [plans[0][0] / "plan.json"]
    chosen = [one.provenance["choice"] for _, one in plans if "choice" in one.provenance]
    return Outcome(values, [plans_table(plans), *map(choice_table, chosen)], pages)


def export(options: Options) -> Outcome:
    """The exports of the plan in a folder."""
    given = given_options(options, ExportOptions, PlanOptions) | limit_of(options)
    folders = exporting.export_folder(
        options.folder,
        overwrite=getattr(options, "overwrite", False),
        steps=steps_of(options),
        where=places_of(options),
        **given,
    )
    if follows(options):
        return Outcome(None)
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
        cut_router=recipe.cut_router,
        top_k=recipe.top_k,
        allow_other_model=options.allow_other_model,
        overwrite=recipe.overwrite,
        memory_limit=recipe.memory_limit,
        steps=steps_of(options),
        where=places_of(options),
    )
    if follows(options):
        return Outcome(None)
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
    limit, where = limit_of(options), places_of(options)
    checks = verifying.verify(options.folder, steps_of(options), where=where, **limit)
    if follows(options):
        return Outcome(None)
    return Outcome([dataclasses.asdict(check) for check in checks], [checks_table(checks)])


def recover(options: Options) -> Outcome:
    """A pruned model trained and exported; shows what came back."""
    given = {name: () for name in ("text", "output")} | given_options(options, RecoverOptions)
    if not given["output"]:
        raise InputError("output is missing; give it with --output")
    report = recovering.recover(
        options.folder, steps=steps_of(options), where=places_of(options), **given
    )
    if follows(options):
        return Outcome(None)
    folder = Path(given["output"])
    pages = [*(folder / "exports" / name for name in report.exports), folder / "recover.html"]
    return Outcome(dataclasses.asdict(report), [report.terminal_table(), ""], pages)


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
        layers_alone=options.layers_alone,
        steps=steps_of(options),
        where=places_of(options),
        **given,
    )
    if follows(options):
        return Outcome(None)
    return Outcome(found, audit_tables(found), [Path(output or source) / "audit.html"])


def report(options: Options) -> Outcome:
    """Show a finished run's report and write report.html again."""
    with only_writer(options.folder):
        found = reporting.report(options.folder, steps_of(options))
    values = json.loads((options.folder / "report.json").read_text(encoding="utf-8"))
    return Outcome(values, [found.terminal_table(), ""], [options.folder / "report.html"])


def compare(options: Options) -> Outcome:
    """Rules ranked at equal size."""
    recipe = options.made
    given = {
        "rates": options.rates, "rules": options.rules, "bits": options.compared_bits,
        "target_bytes": options.compared_bytes, "target_factors": options.compared_factors,
        "repair": options.repaired, "draws": options.draws, "top_k": options.compared_top_k,
        "skip_below": options.skip_below, "merges": options.merge,
        "cut_router": options.compared_cut,
        "calibration_sets": parse_sets(options.calibration_sets or ()),
    }  # fmt: skip
    judged = _judged(options)
    found = comparing.compare(
        recipe, **{name: value for name, value in given.items() if value},
        judged=judged, steps=steps_of(options), where=places_of(options),
    )  # fmt: skip
    if follows(options):
        return Outcome(None)
    tables: list[Any] = [found.terminal_table(stdout().width)] if found.rates else []
    for of in (size_tables, compute_tables, task_tables, set_tables, draw_tables):
        tables += of(found)
    page = Path(recipe.output) / "compare.html"
    return Outcome(dataclasses.asdict(found), [*tables, ""], [page])


def paper(options: Options) -> Outcome:
    """The paper's tables of a model."""
    recipe = options.made
    found = papering.paper(
        recipe, options.rates or (), options.rules or (), bits=options.compared_bits or (),
        judged=_judged(options), options=PaperOptions(**given_options(options, PaperOptions)),
        steps=steps_of(options),
    )  # fmt: skip
    return Outcome(
        dataclasses.asdict(found), [*found.tables(), ""], [Path(recipe.output) / "paper.html"]
    )


def _judged(options: Options) -> TaskOptions | None:
    """The tasks that models are asked beside texts; their results go to the recipe's folder."""
    asked: dict[str, Any] = {"tasks": ()} | given_options(options, TaskOptions) | {"output": None}
    return TaskOptions(**asked) if any(asked.values()) else None

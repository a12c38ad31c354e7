"""What each sub-command does with its parsed options; a returned value is printed as JSON."""

import argparse
import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
from rich.console import Console

from convert.checkpoint import Checkpoint, open_checkpoint
from convert.export_format import FORMATS
from convert.mtp import mtp_layers
from moe_jax.errors import InputError
from moe_jax.files import replace_text
from pruning.budget.decide import PruningPlan
from pruning.cli.flags import recipe_from
from pruning.cli.option_checks import check_estimate, check_evaluation
from pruning.kit.progress import Steps
from pruning.measure.quality import make_windows
from pruning.recipe.options import PlanOptions, fields_of
from pruning.recipe.recipe import ResolvedRecipe
from pruning.report.audit_page import audit_tables
from pruning.report.compression import CompressionReport
from pruning.report.compression_tables import as_rich, terminal_table
from pruning.report.cost_tables import estimate_tables
from pruning.runs import apply as apply_stage
from pruning.runs import audit as audit_stage
from pruning.runs import compare as comparing
from pruning.runs import compress as pipeline
from pruning.runs import estimate as estimating
from pruning.runs import rates as sweep_stage
from pruning.scores.statistics import ChannelStatistics
from pruning.stages import gptq as gptq_stage
from pruning.stages import job as stages
from pruning.stages import preflight
from pruning.stages import score as scoring
from pruning.stages.sizes import folder_bytes, form_of
from pruning.stages.stored import stored_base, stored_plans, stored_recipe
from pruning.stages.verify import random_probe, require_verified, written_mtp
from pruning.text.calibration import TextSource
from pruning.text.tokenizer import open_codec

Options = argparse.Namespace
# What `moe-compress plan` can decide anew from the same statistics.
PLANNING = tuple(name for name in fields_of(PlanOptions) if name != "prune_rate")


def compress(options: Options) -> None:
    """Everything; prints the table."""
    report = pipeline.compress(options.recipe, Steps(quiet=options.quiet))
    Console().print(terminal_table(report))
    sample = report.sample
    shown = (("prompt", "prompt"), ("dense", "dense"), (sample["export"], "compressed"))
    for label, key in shown if sample["prompt"] else ():
        # Console would break the line anew in a narrow terminal.
        print(f"{label}: {sample[key]!r}")
    print(f"\n{options.recipe.output}/report.html")


def score(options: Options) -> None:
    """Statistics of a model."""
    job = stages.open_job(options.recipe)
    steps = Steps(quiet=options.quiet)
    preflight.prepare(job, steps, exports=False)
    scoring.score(job, steps)


def inspect(options: Options) -> dict:
    """What a checkpoint is, as JSON."""
    base = open_checkpoint(stages.model_folder(options.model))
    about, c = base.about, base.config
    routed = sum(map(sum, about.widths)) * 3 * c.d_model
    total = about.weights()
    return {
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
        "fingerprint": base.fingerprint,
    }


def estimate(options: Options) -> None:
    """What a compression gives and costs; prints tables, one set per prune rate."""
    check_estimate(options)
    base = estimating.open_described(stages.model_folder(options.recipe.model))
    found = estimating.estimates(
        base, options.recipe, options.rates,
        tensor_parallel=options.tensor_parallel,
        probe=isinstance(base, Checkpoint) if options.probe is None else options.probe,
    )  # fmt: skip
    if options.json is not None:
        replace_text(options.json, json.dumps(found, indent=2) + "\n")
    console = Console()
    for table in (table for one in found for table in estimate_tables(one)):
        console.print(as_rich(table))
        console.print(table.note, style="dim", highlight=False)


def _save_sweep(
    folder: Path,
    base: Checkpoint,
    plans: list[tuple[ResolvedRecipe, PruningPlan]],
    statistics: ChannelStatistics,
    steps: Steps,
    quality: dict[float | None, dict] | None = None,
) -> None:
    rates = [one.prune_rate for one, _ in plans if one.prune_rate is not None]
    made = [result for _, result in plans]
    sweep_stage.sweep_of(plans[0][0], rates, made, statistics, base, quality).save(folder)
    steps.say(f"{folder}/sweep.html")


def plan(options: Options) -> list[dict]:
    """One plan in the folder, or one per rate below plans/."""
    recipe = stored_recipe(options.folder, options, *PLANNING)
    rates = options.prune_rate or []
    base = stored_base(recipe)
    plans, statistics = stored_plans(options.folder, recipe, base, rates)
    made, single = [], len(rates) <= 1
    for one, result in plans:
        target = options.folder if single else options.folder / f"plans/{one.prune_rate}"
        made.append((dataclasses.replace(one, output=str(target)), result))
    for one, result in made:
        target = Path(one.output)
        result.save(target)
        if target != options.folder:
            # `export` and `verify` take the plans of a sweep like any other folder.
            replace_text(target / "recipe.yaml", one.to_yaml())
    if not single:
        _save_sweep(options.folder, base, plans, statistics, Steps(quiet=options.quiet))
    return [{"plan": f"{one.output}/plan.json", **result.provenance} for one, result in made]


def export(options: Options) -> list[str]:
    """The exports of the plan in a folder."""
    recipe = stored_recipe(options.folder, options, "export", "mtp")
    steps = Steps(quiet=options.quiet)
    result, base = PruningPlan.load(options.folder), stored_base(recipe)
    overwrite, exports = getattr(options, "overwrite", False), options.folder / "exports"
    preflight.check_exports(base, result, recipe, exports, steps, overwrite=overwrite)
    codes = None
    if stages.codes_folder(recipe) is not None:
        codes = gptq_stage.quantize(stages.open_job(recipe), result, steps)
    for name in recipe.export:
        form, target = form_of(recipe, name, result), exports / name
        stages.export(base, result, form, target, steps, codes=codes, overwrite=overwrite)
    return [str(exports / name) for name in recipe.export]


def apply(options: Options) -> dict:
    """Exports of a plan made elsewhere, each verified."""
    recipe = options.recipe
    checks = apply_stage.apply_plan(
        options.plan,
        recipe.model,
        recipe.output,
        export=recipe.export,
        bits=recipe.bits,
        group_size=recipe.group_size,
        mtp=recipe.mtp,
        overwrite=recipe.overwrite,
        steps=Steps(quiet=options.quiet),
    )
    exports = Path(recipe.output) / "exports"
    names = dict.fromkeys(check.export for check in checks)
    return {
        "exports": {str(exports / name): folder_bytes(exports / name) for name in names},
        "checks": [dataclasses.asdict(check) for check in checks],
    }


def verify(options: Options) -> list[dict]:
    """Check every export of a folder."""
    recipe = stored_recipe(options.folder, options)
    base, result = stored_base(recipe), PruningPlan.load(options.folder)
    folders = [path for name in FORMATS if (path := options.folder / "exports" / name).is_dir()]
    if not folders:
        raise InputError(f"{options.folder}/exports holds nothing; run `moe-compress export` first")
    checks = []
    for target in folders:
        # `export` may have been told otherwise than the recipe.
        form = form_of(recipe, target.name, result)
        form = dataclasses.replace(form, mtp=written_mtp(target, base.about))
        codes = stages.codes_folder(recipe)
        checks += stages.verify(base, result, form, target, random_probe(base), codes)
    require_verified(checks)
    return [dataclasses.asdict(check) for check in checks]


def evaluate(options: Options) -> dict | None:
    """Likelihood of texts under a folder, or under the plans of a sweep."""
    check_evaluation(options)
    steps, plans, statistics = Steps(quiet=options.quiet), [], None
    if options.prune_rate:
        recipe = stored_recipe(options.folder, options)
        base = stored_base(recipe)
        sources: dict = {"dense": base}
        plans, statistics = stored_plans(options.folder, recipe, base, options.prune_rate)
        for one, result in plans:
            sources[f"prune-rate {one.prune_rate}"] = stages.pruned_source(base, result, None)
    else:
        base = open_checkpoint(stages.model_folder(str(options.folder)))
        sources = {"model": base}
    codec = open_codec(base.about.folder, base.config.vocab_size)
    window = min(options.window or 2048, base.config.max_position)
    texts = {}
    for path in options.text:
        tokens = stages.read_tokens(TextSource(path, options.text_field), codec, options.max_tokens)
        texts[str(path)] = make_windows(tokens, window=window, stride=options.stride)
    stride = next(iter(texts.values())).stride
    references: dict = {}
    found = {
        name: {
            text: quality.to_dict()
            for text, quality in stages.measure(
                source, texts, references, steps, name, batch=options.batch, dtype=jnp.float32
            ).items()
        }
        for name, source in sources.items()
    }
    if statistics is not None and len(plans) > 1:
        quality = {one.prune_rate: found[f"prune-rate {one.prune_rate}"] for one, _ in plans}
        quality[None] = found["dense"]
        _save_sweep(options.folder, base, plans, statistics, steps, quality)
    shown = found["model"] if "model" in found else found
    result = {"folder": str(options.folder), "window": window, "stride": stride, "texts": shown}
    if options.json is None:
        return result
    replace_text(options.json, json.dumps(result, indent=2) + "\n")
    return None


def audit(options: Options) -> None:
    """Rank correlation of every score with the true ablation; prints the best of them."""
    sample = {name: getattr(options, f"sample_{name}") for name in ("experts", "channels")}
    audit_stage.check_sample(**sample, tokens=options.sample_tokens)
    steps, folder = Steps(quiet=options.quiet), Path(options.model)
    if (folder / scoring.STATISTICS).is_file():
        recipe = stored_recipe(folder, options, "batch", "seed")
        if recipe.weights_only:
            raise InputError(
                f"{folder} was scored without text (weights_only), and the audit measures losses "
                "on text; score the model with --calibration"
            )
        job = stages.open_job(recipe)
        statistics, _ = scoring.stored_statistics(folder, job.base)
        target = Path(getattr(options, "output", folder))
    else:
        job = stages.open_job(recipe_from(options))
        preflight.prepare(job, steps, exports=False)
        statistics, _ = scoring.score(job, steps)
        target = job.output
    found = audit_stage.audit(
        job, statistics, target, steps, **sample, tokens=options.sample_tokens
    )
    for table in audit_tables(found):
        Console().print(as_rich(table))
    print(f"{target}/audit.html")


def report(options: Options) -> None:
    """Print a finished run's table and write report.html again."""
    found = CompressionReport.load(options.folder / "report.json")
    found.save(options.folder)
    Console().print(terminal_table(found))


def compare(options: Options) -> None:
    """Rules ranked at equal size; prints the table."""
    recipe = options.recipe
    found = comparing.compare(
        recipe,
        options.rates,
        options.rules or ["standard"],
        evaluation_tokens=options.evaluation_tokens,
        steps=Steps(quiet=options.quiet),
    )
    console = Console()
    console.print(found.terminal_table(console.width))
    print(f"\n{recipe.output}/compare.html")

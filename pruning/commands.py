"""What each sub-command does with its parsed options; a returned value is printed as JSON."""

import argparse
import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from convert.checkpoint import open_checkpoint
from pruning import pipeline, stages
from pruning.evaluate import make_windows
from pruning.plan import PruningPlan
from pruning.progress import Steps
from pruning.recipe import CompressionRecipe, load_recipe
from pruning.report import CompressionReport, terminal_table
from pruning.statistics import load_statistics
from pruning.tokenizer import open_codec

Options = argparse.Namespace


def compress(options: Options) -> None:
    """Everything; prints the table."""
    report = pipeline.compress(options.recipe, Steps(quiet=options.quiet))
    Console().print(terminal_table(report))
    sample = report.sample
    Console().print(f"\nprompt: {sample['prompt']!r}\nanswer: {sample['compressed']!r}",
                    markup=False, highlight=False)  # fmt: skip
    print(f"\n{options.recipe.output}/report.html")


def score(options: Options) -> None:
    """Statistics of a model."""
    job = stages.open_job(options.recipe)
    pipeline.prepare_output(job.recipe)
    stages.score(job, Steps(quiet=options.quiet))


def inspect(options: Options) -> dict:
    """What a checkpoint is, as JSON."""
    base = open_checkpoint(stages.model_folder(options.model))
    c = base.config
    routed = sum(map(sum, base.widths)) * 3 * c.d_model
    total = stages.parameter_count(base)
    return {
        "folder": str(base.folder),
        "family": base.family.model_type,
        "bytes": stages.folder_bytes(base.folder),
        "parameters": total,
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


def _recipe(folder: Path, options: Options, *names: str) -> CompressionRecipe:
    """The recipe stored in an output folder, with the given flags on top."""
    if not (folder / "recipe.yaml").is_file():
        raise ValueError(f"{folder}/recipe.yaml does not exist; run `moe-compress score` first")
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
    return load_recipe(folder / "recipe.yaml", **given)


def _base(recipe: CompressionRecipe):
    return open_checkpoint(stages.model_folder(recipe.model), dtype=jnp.bfloat16)


def plan(options: Options) -> list[dict]:
    """One plan in the folder, or one per rate below plans/."""
    names = ("criterion", "attribution", "planner", "width", "block", "minimum")
    recipe = _recipe(options.folder, options, *names)
    base, rates = _base(recipe), options.prune_rate or [recipe.prune_rate]
    statistics, provenance = load_statistics(options.folder / "statistics.safetensors")
    recipes = [dataclasses.replace(recipe, prune_rate=rate) for rate in rates]
    made = []
    for one in recipes:
        target = options.folder if len(rates) == 1 else options.folder / f"plans/{one.prune_rate}"
        made.append((target, stages.plan(one, statistics, provenance, base)))
    for target, result in made:
        target.mkdir(parents=True, exist_ok=True)
        result.save(target)
    return [{"plan": str(target / "plan.json"), **result.provenance} for target, result in made]


def export(options: Options) -> list[str]:
    """The exports of the plan in a folder."""
    recipe = _recipe(options.folder, options, "export", "overwrite")
    base, result = _base(recipe), PruningPlan.load(options.folder)
    written = []
    for name in recipe.export:
        target = options.folder / "exports" / name
        form = stages.form_of(recipe, name)
        overwrite = getattr(options, "overwrite", False)
        stages.export(base, result, form, target, Steps(quiet=options.quiet), overwrite=overwrite)
        written.append(str(target))
    return written


def verify(options: Options) -> list[dict]:
    """Check every export of a folder."""
    recipe = _recipe(options.folder, options)
    base, result = _base(recipe), PruningPlan.load(options.folder)
    folders = sorted((options.folder / "exports").glob("*"))
    if not folders:
        raise ValueError(f"{options.folder}/exports holds nothing; run `moe-compress export` first")
    probe = np.random.default_rng(0).integers(
        0, base.config.vocab_size, (2, min(pipeline.PROBE_TOKENS, base.config.max_position))
    )
    checks = []
    for target in folders:
        form = stages.form_of(recipe, target.name)
        checks += stages.verify(base, result, form, target, probe.astype(np.int32))
    failed = [f"{c.export}: {c.check}: {c.detail}" for c in checks if not c.ok]
    if failed:
        raise pipeline.VerificationError("; ".join(failed))
    return [dataclasses.asdict(check) for check in checks]


def evaluate(options: Options) -> dict | None:
    """Likelihood of texts under a folder, or under the plans of a sweep."""
    steps = Steps(quiet=options.quiet)
    if options.prune_rate:
        recipe = _recipe(options.folder, options)
        base = _base(recipe)
        statistics, provenance = load_statistics(options.folder / "statistics.safetensors")
        sources: dict = {"dense": base}
        for rate in options.prune_rate:
            one = dataclasses.replace(recipe, prune_rate=rate)
            result = stages.plan(one, statistics, provenance, base)
            sources[f"prune-rate {rate}"] = stages.pruned_source(base, result, None)
    else:
        base = open_checkpoint(stages.model_folder(str(options.folder)))
        sources = {"model": base}
    codec = open_codec(base.folder, base.config.vocab_size)
    window = min(options.window or 2048, base.config.max_position)
    texts = {}
    for path in options.text:
        if not path.is_file():
            raise ValueError(f"text {path} does not exist; check the path")
        tokens = codec.encode(path.read_text(encoding="utf-8"))[: options.max_tokens]
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
    shown = found["model"] if "model" in found else found
    result = {"folder": str(options.folder), "window": window, "stride": stride, "texts": shown}
    if options.json is None:
        return result
    temporary = options.json.with_name(options.json.name + ".tmp-write")
    temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    temporary.replace(options.json)
    return None


def report(options: Options) -> None:
    """Print a finished run's table and write report.html again."""
    found = CompressionReport.load(options.folder / "report.json")
    found.save(options.folder)
    Console().print(terminal_table(found))

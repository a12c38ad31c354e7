"""Rule, repair and training at several rates: loss, KL, bytes and minutes, a table in Markdown.

A row is the loss that a model adds on the evaluation texts, mean over them. Every rate is one run
of `compress` with planner auto and layer repair, from whose statistics the paper's rule is planned
too, and one of `recover` for each kind of training, which begins with the repaired weights. Kinds
that end in "-int4" are trained through the rounding. What is finished in the folder is read again,
so that the bench can be interrupted.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml

from moe_jax.stream import LayerSource
from pruning.budget.decide import plan_pruning
from pruning.budget.plan import PruningPlan
from pruning.budget.rules import RULES
from pruning.kit.progress import Steps
from pruning.measure.quality import Reference
from pruning.recipe.recipe import CompressionRecipe
from pruning.runs.compress import compress
from pruning.runs.recover import recover
from pruning.scores.statistics import load_statistics
from pruning.shrink.prune import PrunedSource
from pruning.shrink.rounding import QuantizedSource
from pruning.stages.job import Job, open_job
from pruning.stages.measure import measure
from pruning.stages.score import STATISTICS
from pruning.stages.sizes import export_of, form_of

FORMATS = ("ragged-bf16", "ragged-int4")
PAPER = "paper-act"  # the rule of arXiv 2606.18304
SHOWN = [f"{bits} {what}" for bits in ("bf16", "int4") for what in ("+nats", "KL", "MB")]
HEADER = ("rate", "model", *SHOWN, "minutes", "MB of memory")

Measured = dict[str, tuple[float, float]]  # format -> mean nats per token, mean KL
Row = tuple[float, str, Measured, dict[str, int], float, int]  # rate, model, .., bytes, s, bytes


class Bench:
    """All rows of one rate.

    Args:
      recipe: of `compress`, its rate and output included.
      text: files to train on.
      trained: kinds of training.
      options: others of `recover`.
    """

    def __init__(
        self, recipe: CompressionRecipe, text: tuple[str, ...], trained: list[str], **options
    ) -> None:
        self.recipe, self.text, self.trained, self.options = recipe, text, trained, options
        self.references: dict[str, Reference] = {}

    def rows(self) -> Iterator[Row]:
        """The rules without repair, the repair, and each training; seconds are those of the step
        that a row adds."""
        report = compress(self.recipe, Steps(quiet=True))
        job, rate = open_job(self.recipe), float(self.recipe.prune_rate or 0)
        took = {stage["name"]: stage["seconds"] for stage in report.stages}
        peak = max(stage["peak_memory_bytes"] for stage in report.stages)
        score = sum(seconds for name, seconds in took.items() if name.startswith("score"))
        rules = sum(seconds for name, seconds in took.items() if "rule" in name)
        repair = sum(seconds for name, seconds in took.items() if name.startswith("repair"))
        self.dense = self._means(job, job.base)[0]
        for name, plan, seconds in (
            (PAPER, self._paper(job), score),
            ("chosen rule", PruningPlan.load(job.output), score + rules),
        ):
            pruned = PrunedSource(job.base, plan)
            four = QuantizedSource(pruned, form_of(job.recipe, FORMATS[1]).group_size)
            found = dict(
                zip(FORMATS, (self._means(job, one) for one in (pruned, four)), strict=True)
            )
            sizes = {
                form: export_of(job.base.about, plan, form_of(job.recipe, form, plan)).nbytes
                for form in FORMATS
            }
            yield rate, name, found, sizes, seconds, peak
        yield rate, "+ repair", _reported(report.quality), sizes, repair, peak
        for kind in self.trained:
            train, aware = kind.removesuffix("-int4"), kind.endswith("-int4")
            one = recover(
                job.output, text=self.text, output=f"{job.output}-{kind}", export=FORMATS,
                train=train, quantize_aware=aware, steps=Steps(quiet=True), **self.options,
            )  # fmt: skip
            took = one.training
            yield (
                rate, f"+ {kind}", _reported(one.quality), one.exports, took["seconds"],
                took["peak_memory_bytes"],
            )  # fmt: skip

    def _paper(self, job: Job) -> PruningPlan:
        """The plan of the paper's rule at this rate, from the same statistics."""
        statistics, _ = load_statistics(job.output / STATISTICS)
        own = {name: getattr(job.recipe, name) for name in ("prune_rate", "block", "seed")}
        return plan_pruning(
            statistics,
            dataclasses.replace(RULES[PAPER].options, **own),
            experts_per_token=job.base.config.moe.experts_per_token,
            layer_indices=job.base.config.moe_layers,
        )

    def _means(self, job: Job, source: LayerSource) -> tuple[float, float]:
        how = {"batch": job.recipe.batch, "dtype": job.dtype}
        steps = Steps(quiet=True)
        found = measure(source, job.evaluation, self.references, steps, "a model", **how)
        return _means([quality.to_dict() for quality in found.values()])


def _means(found: list[dict[str, float | None]]) -> tuple[float, float]:
    nll, kl = (float(np.mean([one[name] or 0.0 for one in found])) for name in ("nll", "kl"))
    return nll, kl


def _reported(quality: dict[str, dict[str, dict]]) -> Measured:
    return {form: _means([models[form] for models in quality.values()]) for form in FORMATS}


def main() -> None:
    """Print a row per rate and model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--folder", type=Path, required=True, help="of all runs")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 0.25, 0.75])
    parser.add_argument("--trained", nargs="*", default=["router", "dora", "full", "full-int4"])
    parser.add_argument("--text", nargs="+", required=True, help="files to train on")
    parser.add_argument("--tokens", default="300K", help="of them (default 300K)")
    parser.add_argument("--max-tokens", type=int, default=65536, help="calibration tokens")
    parser.add_argument("--calibration", nargs="+", default=())
    parser.add_argument("--evaluation", nargs="+", default=())
    parser.add_argument("--evaluation-tokens", type=int, default=4096, help="of each text")
    parser.add_argument("--window", type=int, default=None)
    parser.add_argument(
        "--options", nargs="*", default=(), metavar="NAME=VALUE", help="others of recover, as YAML"
    )
    given = parser.parse_args()
    options = {name: yaml.safe_load(value) for name, value in
               (one.split("=", 1) for one in given.options)}  # fmt: skip
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}", flush=True)
    for rate in given.rates:
        recipe = CompressionRecipe(
            model=given.model, output=str(given.folder / f"{rate}"), prune_rate=rate,
            calibration=tuple(given.calibration), evaluation=tuple(given.evaluation),
            evaluation_tokens=given.evaluation_tokens, max_tokens=given.max_tokens,
            window=given.window, export=FORMATS, planner="auto", repair="layer",
        )  # fmt: skip
        options = {"tokens": given.tokens, "window": given.window, **options}
        bench = Bench(recipe, tuple(given.text), given.trained, **options)
        for rate, name, found, sizes, seconds, memory in bench.rows():
            cells = [f"{rate:g}", name]
            for form in FORMATS:
                nll, kl = found[form]
                cells += [f"{nll - bench.dense:.4f}", f"{kl:.4f}", f"{sizes[form] / 1e6:.2f}"]
            cells += [f"{seconds / 60:.1f}", f"{memory / 1e6:,.0f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

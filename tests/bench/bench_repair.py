"""What repair without training gives: added loss on held-out text, repaired and not, same plan."""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pruning.kit.progress import Steps
from pruning.measure.quality import Reference
from pruning.recipe.recipe import CompressionRecipe
from pruning.shrink.prune import PrunedSource
from pruning.shrink.repair_model import Mode, repair_model, with_repair
from pruning.stages import plan as planning
from pruning.stages import preflight
from pruning.stages import score as scoring
from pruning.stages.job import open_job
from pruning.stages.measure import measure

Row = tuple[float, str, float, float]  # rate, mode, mean added loss in nats per token, seconds


def measured(
    model: str,
    tokens: int,
    rates: Sequence[float],
    modes: Sequence[Mode],
    evaluated: int = 4096,
    **options,
) -> Iterator[Row]:
    """Added loss of the plan of `fair-shapley` on the evaluation texts: as it is, and repaired.

    Args:
      model: a folder, or "demo".
      tokens: of calibration text, for scores and repair.
      rates: fractions of the channels to remove.
      modes: of repair.
      evaluated: tokens of each evaluation text.
      options: others of the recipe, such as the texts.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe = CompressionRecipe(
            model=model, output=f"{folder}/out", max_tokens=tokens, bits=16,
            evaluation_tokens=evaluated, planner="fair", **options,
        )  # fmt: skip
        job, steps = open_job(recipe), Steps(quiet=True)
        preflight.prepare(job, steps)
        scored = scoring.score(job, steps)
        references: dict[str, Reference] = {}

        def loss(source) -> float:
            how = {"batch": job.recipe.batch, "dtype": job.dtype}
            found = measure(source, job.evaluation, references, steps, "x", **how)
            return float(np.mean([quality.nll for quality in found.values()]))

        dense = loss(job.base)
        for rate in rates:
            asked = dataclasses.replace(job.recipe, prune_rate=rate)
            plan = planning.plan(asked, *scored, job.base.about)
            pruned = PrunedSource(job.base, plan)
            yield rate, "none", loss(pruned) - dense, 0.0
            for mode in modes:
                start, place = time.perf_counter(), Path(folder, f"{rate}-{mode}")
                repair_model(
                    job.base, plan, job.calibration.tokens, job.calibration.valid, place,
                    mode=mode, provenance={}, batch=job.recipe.batch, dtype=job.dtype,
                )  # fmt: skip
                seconds = time.perf_counter() - start
                yield rate, mode, loss(with_repair(pruned, plan, place)) - dense, seconds


def main() -> None:
    """Print a row per setting; end with an error if anything got worse."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--modes", nargs="+", default=["expert", "layer"])
    parser.add_argument("--evaluated", type=int, default=4096, help="tokens of each text")
    parser.add_argument("--calibration", nargs="+", default=())
    parser.add_argument("--evaluation", nargs="+", default=())
    given = parser.parse_args()
    texts = {"calibration": tuple(given.calibration), "evaluation": tuple(given.evaluation)}
    worse, none = False, 0.0
    print("| tokens | rate | repair | added nats/token | of none | seconds |")
    print("|---|---|---|---|---|---|")
    for tokens in given.tokens:
        rows = measured(given.model, tokens, given.rates, given.modes, given.evaluated, **texts)
        for rate, mode, added, seconds in rows:
            none = added if mode == "none" else none
            worse |= added > none
            shown = f"{added:.4f} | {added / none:.3f} | {seconds:.0f}"
            print(f"| {tokens} | {rate} | {mode} | {shown} |", flush=True)
    raise SystemExit("repair made something worse" if worse else 0)


if __name__ == "__main__":
    main()

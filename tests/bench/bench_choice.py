"""What planner auto takes, against every rule it chose among and the paper's, on other text."""

import argparse
import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.errors import InputError
from moe_jax.stream import forward_hidden
from pruning.budget.candidates import CANDIDATES, candidate
from pruning.budget.plan import PruningPlan
from pruning.kit.progress import Steps
from pruning.measure.quality import Reference, window_losses
from pruning.recipe.recipe import CompressionRecipe
from pruning.shrink.masked import masked_hidden
from pruning.shrink.prune import PrunedSource
from pruning.shrink.repair_model import repair_model, with_repair
from pruning.stages import plan as planning
from pruning.stages import preflight
from pruning.stages import score as scoring
from pruning.stages.choose import choose
from pruning.stages.job import Job, open_job
from pruning.stages.measure import open_texts
from pruning.text.windows import Windows

PIECE = 128  # tokens whose loss is one sample of a standard error
TOGETHER = 8  # plans that share a reading of the weights
Losses = dict[str, np.ndarray]  # of a model: nats of each piece of each text, [texts, pieces]


class HeldOut:
    """Losses of models on texts that took no part, kept in a file between runs."""

    def __init__(self, job: Job, files: list[str], tokens: int, place: Path) -> None:
        """Read the first `tokens` of every file, in whole pieces and one window each."""
        tokens -= tokens % PIECE
        texts, _ = open_texts(tuple(files), job.codec, tokens, tokens)
        rows = [text.tokens for text in texts.values()]
        if any(row.shape != (1, tokens) for row in rows):
            raise SystemExit(f"a text of --held-out has fewer than {tokens} tokens")
        self.job, self.names, self.tokens = job, list(texts), np.concatenate(rows)
        self.valid = np.concatenate([text.valid for text in texts.values()])
        self.how = {"batch": min(job.recipe.batch, len(rows)), "dtype": job.dtype}
        digest = hashlib.sha256(self.tokens.tobytes()).hexdigest()[:16]
        self.place = place / f"held_out-{digest}.npz"
        self.known: Losses = dict(np.load(self.place)) if self.place.is_file() else {}

    def of_plans(self, plans: Mapping[str, PruningPlan]) -> None:
        """Run plans masked, by name; those that are known not again."""
        missing = [name for name in plans if name not in self.known]
        for start in range(0, len(missing), TOGETHER):
            group = missing[start : start + TOGETHER]
            hidden = masked_hidden(
                self.job.base, self.tokens, self.valid, [plans[name] for name in group], **self.how
            )
            for name, states in zip(group, hidden, strict=True):
                self._add(name, states)

    def of_source(self, name: str, source: Callable) -> None:
        """Run a model, unless it is known; `source` opens it."""
        if name not in self.known:
            self._add(name, forward_hidden(source(), self.tokens, self.valid, **self.how))

    def _add(self, name: str, states: np.ndarray) -> None:
        cut = (-1, PIECE)
        tokens, valid = self.tokens.reshape(cut), self.valid.reshape(cut)
        windows = Windows(tokens, valid, valid[:, :-1] & valid[:, 1:], PIECE, PIECE)
        reference = Reference(self.job.base.head, states.reshape(*cut, states.shape[-1]))
        losses = window_losses(reference, windows) / (PIECE - 1)
        self.known[name] = losses.reshape(len(self.tokens), -1)
        np.savez(self.place, **self.known)

    def added(self, name: str) -> np.ndarray:  # [texts, pieces]
        """Nats per token beyond the dense model."""
        return self.known[name] - self.known["dense"]


def ratio(one: np.ndarray, two: np.ndarray) -> str:
    """Added loss over added loss, and its standard error from the pieces."""
    found = one.mean() / two.mean()
    apart = one - found * two
    error = np.sqrt(sum(apart.var(axis=1, ddof=1)) / apart.shape[1]) / len(apart) / two.mean()
    return f"{found:.3f} +- {error:.3f}"


def fixed_plans(
    job: Job, scored: tuple, rates: list[float]
) -> dict[tuple[str, float], PruningPlan]:
    """Of every candidate that has one, from the same statistics."""
    found = {}
    for rate in rates:
        recipe = dataclasses.replace(job.recipe, prune_rate=rate)
        for name, rule in CANDIDATES.items():
            try:
                one = candidate(rule, recipe, frozenset(scored[0].groups))
                found[name, rate] = planning.plan(one, *scored, job.base.about)
            except InputError as error:
                print(f"{name} at {rate}: {error}", flush=True)
    return found


def repaired(job: Job, plan: PruningPlan, place: Path) -> tuple[Callable, float]:
    """What opens the repaired model of a plan, and the seconds that the repair took."""
    start, text = time.perf_counter(), job.calibration
    about = {"plan": plan.content_hash, "tokens": text.total, "mode": "layer"}
    repair_model(
        job.base, plan, text.tokens, text.valid, place, mode="layer", provenance=about,
        batch=job.recipe.batch, dtype=job.dtype,
    )  # fmt: skip
    return lambda: with_repair(
        PrunedSource(job.base, plan), plan, place
    ), time.perf_counter() - start


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of processor time that something takes, and what it returns."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def without_obs(job: Job) -> Job:
    """The same text for statistics without obs, in a folder of their own."""
    place = Path(job.recipe.output) / "without-obs"
    place.mkdir(exist_ok=True)
    recipe = dataclasses.replace(job.recipe, obs=False, output=str(place))
    return dataclasses.replace(job, recipe=recipe)


def measured(job: Job, rates: list[float], steps: Steps) -> tuple[tuple, dict[float, PruningPlan]]:
    """Statistics and the plan chosen at every rate; prints the seconds that they take."""
    plain, _ = timed(lambda: scoring.score(without_obs(job), steps))
    with_obs, scored = timed(lambda: scoring.score(job, steps))
    seconds: list[float] = []
    chosen: dict[float, PruningPlan] = {}
    for rate in rates:
        asked = dataclasses.replace(job.recipe, prune_rate=rate)
        choice = partial(choose, [asked], *scored, job.base, lambda: job, steps)
        took, ((_, chosen[rate]),) = timed(choice)
        seconds.append(took)
    obs = with_obs - plain
    print(f"seconds of the processor: {plain:.1f} to score, {obs:.1f} for obs beside,",
          "to choose at every rate (less where known before)",
          *(f"{one:.1f}" for one in seconds))  # fmt: skip
    print(f"obs and the first choice over scoring: {(obs + seconds[0]) / plain:.2f}")
    for one in steps.stages:
        print(f"  {one['name']}: {one['seconds']:.1f} s, {one['peak_memory_bytes'] / 1e6:,.0f} MB")
    return scored, chosen


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--output", required=True, help="folder of statistics and losses")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument(
        "--repair",
        type=float,
        nargs="*",
        default=[0.25, 0.5],
        help="rates at which every plan is repaired; without one, rules are chosen by masking",
    )
    parser.add_argument("--calibration", nargs="+", default=[])
    parser.add_argument("--max-tokens", type=int, default=24576)
    parser.add_argument("--window", type=int, help="tokens; default as of compress")
    parser.add_argument("--held-out", nargs="+", required=True)
    parser.add_argument(
        "--evaluated", type=int, default=1536, help="tokens of each text; 0 for seconds alone"
    )
    return parser.parse_args()


def main() -> None:
    """Print both tables."""
    given = arguments()
    place, steps = Path(given.output), Steps(quiet=True)
    recipe = CompressionRecipe(
        model=given.model, output=str(place), calibration=tuple(given.calibration),
        evaluation=tuple(given.held_out), max_tokens=given.max_tokens, window=given.window,
        planner="auto", repair=None if given.repair else "none",
    )  # fmt: skip
    job = open_job(recipe)
    preflight.prepare(job, steps)
    scored, chosen = measured(job, given.rates, steps)
    if not given.evaluated:
        return
    fixed = fixed_plans(job, scored, given.rates)
    whole = PruningPlan(np.ones_like(chosen[given.rates[0]].keep), job.base.config.moe_layers)
    text = HeldOut(job, given.held_out, given.evaluated, place)
    plans = {one.content_hash: one for one in [*fixed.values(), *chosen.values()]}
    text.of_plans({"dense": whole, **plans})
    print(f"\n{text.tokens.size:,} tokens of {', '.join(text.names)}; masked:")
    print_choice(text, fixed, chosen)
    if given.repair:
        print_repair(text, fixed, chosen, given.repair)


def print_choice(
    text: HeldOut,
    fixed: dict[tuple[str, float], PruningPlan],
    chosen: dict[float, PruningPlan],
    prefix: str = "",
) -> None:
    """Added loss of every rule, mean over the texts; the last rows are of the one taken.

    Of models whose names are that of their plan behind `prefix`.
    """
    print("| rule |", " | ".join(f"{rate:.0%}" for rate in chosen), "|")
    print("|---" * (1 + len(chosen)), end="|\n")
    added = {
        key: text.added(prefix + plan.content_hash)
        for key, plan in fixed.items() if key[1] in chosen
    }  # fmt: skip
    for name in CANDIDATES:
        row = [f"{added[name, rate].mean():.4f}" if (name, rate) in added else "-"
               for rate in chosen]  # fmt: skip
        print(f"| {name} |", " | ".join(row), "|")
    taken, over = [], []
    for rate, plan in chosen.items():
        rows = plan.provenance["choice"]["candidates"]
        name = next(one["rule"] for one in rows if one["taken"])
        best = min((one for key, one in added.items() if key[1] == rate), key=np.mean)
        auto = text.added(prefix + plan.content_hash)
        taken.append(f"{auto.mean():.4f} {name}")
        over.append(ratio(auto, best))
    print("| taken |", " | ".join(taken), "|")
    print("| over the best |", " | ".join(over), "|", flush=True)


def print_repair(
    text: HeldOut,
    fixed: dict[tuple[str, float], PruningPlan],
    chosen: dict[float, PruningPlan],
    rates: list[float],
) -> None:
    """The same once all plans are repaired; then the one taken against it and the paper's, each
    unrepaired."""
    asked = [plan for (_, rate), plan in fixed.items() if rate in rates]
    for plan in dict.fromkeys([*map(chosen.get, rates), *asked]):
        name = f"repaired-{plan.content_hash}"
        if name not in text.known:
            source, seconds = repaired(text.job, plan, text.place.parent / "bench-repair")
            text.of_source(name, source)
            print(f"repaired in {seconds:.0f} s: {text.added(name).mean():.4f}", flush=True)
    print("\nrepaired:")
    print_choice(text, fixed, {rate: chosen[rate] for rate in rates}, "repaired-")
    print("\n| rate | paper-act | taken | taken, repaired | over taken | over paper-act |")
    print("|---" * 6, end="|\n")
    for rate in rates:
        plan, paper = chosen[rate], text.added(fixed["paper-act", rate].content_hash)
        auto, mended = text.added(plan.content_hash), text.added(f"repaired-{plan.content_hash}")
        losses = " | ".join(f"{one.mean():.4f}" for one in (paper, auto, mended))
        print(f"| {rate:.0%} | {losses} | {ratio(mended, auto)} | {ratio(mended, paper)} |",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

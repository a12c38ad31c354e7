"""The paper's tables and figures of one model, by one command."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from moe_jax.files import replace_text
from moe_jax.json_files import read_json
from pruning.budget.plan import PruningPlan
from pruning.budget.rules import RULES, select_rules
from pruning.kit.progress import Steps
from pruning.recipe.paper_options import PaperOptions
from pruning.recipe.recipe import CompressionRecipe
from pruning.recipe.recover_options import DEFAULT_TOKENS
from pruning.recipe.task_options import TaskOptions
from pruning.report.compared import CHOSEN, Result
from pruning.report.comparison import Comparison
from pruning.report.paper import Paper, Timed, best_of, labelled
from pruning.report.paper_page import PAGE, paper_page
from pruning.runs.auto_rule import chosen_plans
from pruning.runs.cap import refuse_limit
from pruning.runs.compare import RATES, compare
from pruning.runs.compared import Kept, Scored, require_windows, task_plan
from pruning.runs.compared_job import opened
from pruning.runs.compared_task import Task, task_of
from pruning.runs.controls import Controls, tasks
from pruning.runs.paper_folder import COMPARED, ROWS, TABLES, TIMED, begin
from pruning.runs.paper_recovery import Trainer
from pruning.runs.tasks import open_tasks
from pruning.runs.throughput import REPEATS, TOKENS, timed_blocks, timed_layer
from pruning.scores.statistics import ChannelStatistics
from pruning.stages import score as scoring
from pruning.stages.job import Job
from pruning.stages.model_record import identify
from pruning.stages.writer import only_writer

BITS = (16, 4)
REPAIR: Literal["layer"] = "layer"  # of what planner auto takes, as `compress` repairs it


def paper(
    recipe: CompressionRecipe,
    rates: Sequence[float] = (),
    rules: Sequence[str] = (),
    *,
    bits: Sequence[int] = (),
    judged: TaskOptions | None = None,
    options: PaperOptions | None = None,
    steps: Steps | None = None,
) -> Paper:
    """Run the protocol of arXiv 2606.18304 on a model: its tables, and figures 9 and 10.

    `compare` measures every plan, `recover` trains it, and what that exports is measured on the
    same texts and tasks. An interrupted run is repeated with the same arguments and goes on.

    Args:
      recipe: model, texts, block and output, as of `compare`; its planner options are not read.
      rates: prune rates; default 0.25 and 0.5.
      rules: of `compare`; default the paper's, what planner auto takes, all that drop whole experts
        by what a pass collects anyway, and uniform. Of those that drop whole experts the one that
        loses least has rows.
      bits: of the weights, 4, 8 or 16; default 16 and 4.
      judged: tasks of lm-evaluation-harness; without them the tables have losses alone.
      options: recovery and figure 10.
      steps: where progress goes; default stderr.

    Returns:
      The tables, which are in the output folder as paper.html, paper.md and paper.csv.

    Raises:
      InputError: bad input, before any expensive work, or another process writes there.
      FullDiskError: the disk is full; what is finished stays.
    """
    refuse_limit(recipe, "paper")
    names = select_rules([one for one in rules if one != CHOSEN], RULES) or protocol(recipe)
    chooses = CHOSEN in rules or not rules
    controls = Controls(
        rates=rates or RATES, bits=tuple(dict.fromkeys(bits or BITS)), chooses=chooses,
        repair=REPAIR if chooses else "", repaired=(CHOSEN,),
    )  # fmt: skip
    if chooses:
        names = _in_order([*names, CHOSEN], rules)
    run = _Run(recipe, controls, names, judged, options or PaperOptions(), steps or Steps())
    with only_writer(recipe.output):
        return run.paper()


def protocol(recipe: CompressionRecipe) -> list[str]:
    """The protocol's rules but for what planner auto takes, as far as a recipe collects what they
    need."""
    dropping = [
        name for name, rule in RULES.items()
        if rule.family == "whole experts" and rule.options.width == "experts"
        and rule.needs <= recipe.groups
    ]  # fmt: skip
    return ["paper-act", *dropping, "uniform-act"]


def _in_order(names: Sequence[str], asked: Sequence[str]) -> list[str]:
    """Ours behind the paper's, unless the rules were asked for in another order."""
    order = list(asked) or ["paper-act", CHOSEN]
    place = order.index(CHOSEN)
    others = [name for name in names if name != CHOSEN]
    return [*others[:place], CHOSEN, *others[place:]]


@dataclasses.dataclass(frozen=True)
class _Run:
    recipe: CompressionRecipe
    controls: Controls
    names: Sequence[str]
    judged: TaskOptions | None
    options: PaperOptions
    steps: Steps

    @property
    def output(self) -> Path:
        return Path(self.recipe.output)

    @property
    def compared(self) -> CompressionRecipe:
        """The recipe of the comparison, which has a folder of its own in ours."""
        return dataclasses.replace(
            self.recipe, output=str(self.output / COMPARED), overwrite=False,
            obs=self.recipe.obs or bool(self.controls.repair),
        )  # fmt: skip

    def paper(self) -> Paper:
        job, trainer = self._checked()
        begun = begin(self.output, self._asked(job), overwrite=self.recipe.overwrite)
        dropping = [name for name in self.names if _drops(name)]
        best = "".join(dropping[:1])
        if len(dropping) > 1:
            best = best_of(self._compare(self.names, None), dropping)
            if not best:
                self.steps.say("no rule that drops whole experts has a plan at each of the rates")
        names = [name for name in self.names if name not in dropping or name == best]
        found = self._compare(names, self.judged)
        methods = labelled(names, best, self.controls.repair)
        identify(job.base, job.output, self.steps)
        whole = scoring.score(job, self.steps)  # which is found
        recovered = None
        if trainer is not None:
            # What planner auto takes is trained as it is repaired.
            trained = [one for one in methods if one.rule != CHOSEN or one.repair]
            recovered = trainer.results(found, trained, self._plans(job, whole, names))
        made = Paper(found, recovered, methods, self._words(), *self._timed(job, whole[0], begun))
        replace_text(self.output / TABLES, made.markdown())
        replace_text(self.output / ROWS, made.csv())
        replace_text(self.output / PAGE, paper_page(made))
        return made

    def _checked(self) -> tuple[Job, Trainer | None]:
        """Open everything and refuse what cannot end well, before the weights are read."""
        with self.steps.bar("open"):
            job, _ = opened(self.compared, self.controls)
        if self.controls.repair:
            require_windows(job, "name --rules without auto")
        loaded = open_tasks(self.judged, self.steps) if self.judged else {}
        if self.options.recover == "none":
            return job, None
        trainer = Trainer(
            job, self.output, self.options, self.controls.bits, self.judged, loaded, self.steps
        )
        rows = 1 + len(self.names) - sum(map(_drops, self.names))
        trainer.check(rows * len(self.controls.rates))
        return job, trainer

    def _asked(self, job: Job) -> dict[str, Any]:
        """What decides the rows; more rates and rules, and tasks, only add to them."""
        recipe, options = self.recipe, dataclasses.asdict(self.options)
        training = {name: options[name] for name in options if name.startswith("recover")}
        return {
            "model": job.recipe.model, "calibration": list(recipe.calibration),
            "evaluation": list(recipe.evaluation), "tokens": job.calibration.total,
            "window": job.recipe.window, "block": job.recipe.block, "seed": recipe.seed,
            "bits": list(self.controls.bits),
            **training, "recover_text": list(self.options.recover_text),
        }  # fmt: skip

    def _compare(self, names: Sequence[str], judged: TaskOptions | None) -> Comparison:
        own = self.controls
        return compare(
            self.compared, own.rates, names, bits=own.bits, repair=own.repair or None,
            repaired=own.repaired, judged=judged, steps=self.steps,
        )  # fmt: skip

    def _plans(
        self, job: Job, whole: Scored, names: Sequence[str]
    ) -> Callable[[Result], PruningPlan]:
        """The plan of each result of the comparison, made again."""
        budgets: dict[Task, Kept] = dict(tasks(job, names, self.controls))
        repair = self.controls.repair
        budgets |= chosen_plans(job, *whole, budgets, list(budgets), repair, self.steps)

        def plan_of(result: Result) -> PruningPlan:
            task = task_of(result)
            return task_plan(job, *whole, task, budgets[task])

        return plan_of

    def _timed(
        self, job: Job, statistics: ChannelStatistics, begun: dict[str, Any]
    ) -> tuple[tuple[Timed, ...], dict[str, Any]]:
        """Figure 10, measured once, and all that the tables say of where they were made."""
        rates, blocks = self.controls.rates, self.options.figure_blocks
        told = {**begun, "layer": timed_layer(job), "timed_tokens": TOKENS, "repeats": REPEATS}
        if not blocks:
            return (), told
        file = self.output / TIMED
        key = {"rates": list(rates), "blocks": list(blocks), "layer": told["layer"],
               "model": job.base.fingerprint}  # fmt: skip
        found = read_json(file) if file.is_file() else {}
        if found.get("key") != key:
            timed = timed_blocks(job, statistics, rates, blocks, self.steps)
            found = {"key": key, "timed": [dataclasses.asdict(one) for one in timed]}
            replace_text(file, json.dumps(found, indent=1) + "\n")
        rows = (Timed(**{**one, "tokens_per_second": tuple(one["tokens_per_second"])})
                for one in found["timed"])  # fmt: skip
        return tuple(rows), told

    def _words(self) -> str:
        """What was trained."""
        if self.options.recover == "none":
            return ""
        tokens, layers = self.options.recover_tokens or DEFAULT_TOKENS, ""
        if self.options.recover_mode == "layer":
            layers = ", layer by layer"
        return f"{self.options.recover} on {tokens:,} tokens at most{layers}"


def _drops(name: str) -> bool:
    """Whether a rule drops whole experts."""
    return name in RULES and RULES[name].options.width == "experts"

"""The plans of the paper's tables trained, exported and measured as `compare` measured them."""

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from convert.checkpoint import Checkpoint, open_checkpoint
from moe_jax.errors import InputError
from moe_jax.files import replace_text
from pruning.budget.plan import PruningPlan
from pruning.demo import demo_texts
from pruning.kit.memory import free_memory
from pruning.kit.progress import Steps
from pruning.kit.words import amount
from pruning.measure.paired import compare_results
from pruning.measure.quality import Reference
from pruning.recipe.paper_options import PaperOptions
from pruning.recipe.recover_options import DEFAULT_WINDOW, RecoverOptions
from pruning.recipe.task_options import TaskOptions
from pruning.report.compared import Result
from pruning.report.comparison import Comparison
from pruning.report.paper import Method
from pruning.runs.asked_models import DENSE, AskedModel
from pruning.runs.compared_sizes import formats
from pruning.runs.recover import recover
from pruning.runs.recovery_costs import recovery_costs
from pruning.runs.tasks import ask
from pruning.stages import repair as repairing
from pruning.stages.folder import RECIPE
from pruning.stages.job import Job
from pruning.stages.judged import RESULTS
from pruning.stages.measure import measure
from pruning.stages.model_record import remember
from pruning.stages.preflight import require_space
from pruning.stages.recover_job import training_text
from pruning.stages.sizes import dense_bytes

STUDENTS, RECOVERED = "students", "recovered"
FILE = "compare.json"


@dataclasses.dataclass(frozen=True)
class Trainer:
    """What trains every plan in the same way.

    Attributes:
      job: of the comparison, whose texts everything is measured on.
      output: of the whole run.
      options: what is trained, on what.
      bits: of the weights, for which an export each is written.
      judged: tasks to ask; None for none.
      loaded: these tasks.
      steps: where progress goes.
    """

    job: Job
    output: Path
    options: PaperOptions
    bits: Sequence[int]
    judged: TaskOptions | None
    loaded: dict[str, Any]
    steps: Steps

    def recover_options(self, output: Path) -> RecoverOptions:
        """Those of each training."""
        recipe, asked = self.job.recipe, self.options
        texts = asked.recover_text or recipe.calibration
        if not texts and recipe.model == "demo":
            texts = tuple(map(str, demo_texts("calibration")))
        train: Any = asked.recover
        return RecoverOptions(
            text=texts, output=str(output), tokens=asked.recover_tokens, train=train,
            mode=asked.recover_mode, export=tuple(formats(self.job, self.bits).values()),
            text_field=recipe.calibration_field, loss_on=recipe.loss_on, dtype=recipe.dtype,
            window=min(recipe.window, DEFAULT_WINDOW), batch=recipe.batch, seed=recipe.seed,
            scratch=str(self.predictions), keep_predictions=asked.recover_mode == "model",
        )  # fmt: skip

    @property
    def predictions(self) -> Path:
        """Folder of what the dense model predicts, once for all trainings."""
        scratch = Path(self.job.recipe.scratch or self.output / RECOVERED)
        own = sha256(str(self.output.resolve()).encode()).hexdigest()[:16]
        return scratch / f"{self.output.name}-{own}-predictions"

    def check(self, plans: int) -> None:
        """Refuse what would end badly after hours: the text, the memory, the disk.

        Args:
          plans: how many are trained.
        """
        recipe, base = self.job.recipe, self.job.base.about
        if not (self.options.recover_text or recipe.evaluation or recipe.model == "demo"):
            raise InputError(
                "recovery trains on the calibration files, of which windows are held out here to "
                "measure on; name other text to measure on with --evaluation, or to train on with "
                "--recover-text, or choose --recover none"
            )
        options = self.recover_options(self.output / RECOVERED).filled()
        assert options.window and options.tokens and options.train
        text, held = training_text(options, self.job.codec, options.window)
        if (self.output / RECOVERED).exists():  # its parts know what they still need
            return
        costs = recovery_costs(base, recipe, text.total + held.total)
        trained = costs["trained"][options.train]
        needed, free = trained["memory_bytes"][options.mode], free_memory()
        if needed > free and options.mode == "model":
            raise InputError(
                f"training a plan in memory takes about {amount(needed)}, {amount(free)} are free; "
                "choose --recover-mode layer, --recover router, or --recover none"
            )
        written = sum(dense_bytes(base) * one // 16 for one in self.bits)
        parts = {
            "recovered exports, at most": plans * written,
            "checkpoints": trained["checkpoint_bytes"],
        }
        predictions = {"predictions": costs["predictions_bytes"] * (options.mode == "model")}
        if recipe.scratch is None:
            parts |= predictions
        else:
            require_space(Path(recipe.scratch), predictions)
        require_space(self.output, parts)

    def results(
        self, pruned: Comparison, methods: Sequence[Method],
        plan_of: Callable[[Result], PruningPlan],
    ) -> Comparison:  # fmt: skip
        """Train what each of the methods keeps at each rate, and measure it.

        Args:
          pruned: what was measured of the same plans.
          methods: whose.
          plan_of: the plan of a result.

        Returns:
          All that is trained; it is in the output folder as it comes.
        """
        found = self._earlier(pruned)
        wanted = {(one.rule, one.repair) for one in methods}
        plans: dict[tuple[str, str, float], list[Result]] = {}
        for one in pruned.results:
            if (one.rule, one.repair) in wanted and not one.seed:
                plans.setdefault((one.rule, one.repair, one.rate), []).append(one)
        references: dict[str, Reference] = {}
        for group in plans.values():
            known = {_place(one) for one in found.results if one.tasks or not self.judged}
            if all(_place(one) in known for one in group):
                continue
            own = self._trained(group, plan_of(group[0]), references)
            kept = [one for one in found.results if _place(one) not in set(map(_place, own))]
            found = dataclasses.replace(found, results=(*kept, *own))
            found.save(self.output / RECOVERED)
        shutil.rmtree(self.predictions, ignore_errors=True)
        shown = {_place(one) for group in plans.values() for one in group}
        return found.only(lambda one: _place(one) in shown)

    def _earlier(self, pruned: Comparison) -> Comparison:
        """What is trained already, of the same options, without answers to other tasks."""
        told = dataclasses.asdict(self.options)
        key = pruned.key | {"recovery": {name: told[name] for name in told if "recover" in name}}
        empty = dataclasses.replace(pruned, key=_plain(key), results=(), refused=())
        file = self.output / RECOVERED / FILE
        found = Comparison.load(file) if file.is_file() else empty
        if found.key != empty.key:
            return empty
        if found.asked != pruned.asked:
            bare = tuple(dataclasses.replace(one, tasks=[]) for one in found.results)
            return dataclasses.replace(found, asked=pruned.asked, results=bare)
        return found

    def _trained(
        self, group: Sequence[Result], plan: PruningPlan, references: dict[str, Reference]
    ) -> list[Result]:
        """One plan trained and measured, in each of the bits."""
        job, first = self.job, group[0]
        name = f"{first.rule}-{first.rate:g}"
        student = self._student(self.output / STUDENTS / name, plan, first)
        options = self.recover_options(self.output / RECOVERED / name)
        self.steps.say(f"recovery of {first.name} at {first.place}")
        recover(student, steps=self.steps, **vars(options))
        how: dict[str, Any] = {"batch": job.recipe.batch, "dtype": job.dtype}
        if not references:
            measure(job.base, job.evaluation, references, self.steps, "dense", **how)
        found = []
        for one in group:
            form = formats(job, [one.bits])[one.bits]
            export = Path(options.output) / "exports" / form
            model = open_checkpoint(export)  # as `eval` reads it
            quality = measure(model, job.evaluation, references, self.steps, form, **how)
            told = {text: value.to_dict() for text, value in quality.items()}
            tasks = self._answers(model, f"recovered {name} {form}") if self.judged else []
            found.append(dataclasses.replace(one, quality=told, tasks=tasks))
        return found

    def _student(self, folder: Path, plan: PruningPlan, result: Result) -> Path:
        """A folder that `recover` takes: the plan, its recipe, and the repair if it has one."""
        job = self.job
        repair: Any = result.repair or "none"
        recipe = dataclasses.replace(
            job.recipe, output=str(folder), prune_rate=result.rate, repair=repair,
            export=tuple(formats(job, self.bits).values()),
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        plan.save(folder)
        replace_text(folder / RECIPE, recipe.placed().to_yaml())
        remember(job.base, folder)
        repairing.repair(dataclasses.replace(job, recipe=recipe), plan, self.steps)
        return folder

    def _answers(self, model: Checkpoint, name: str) -> list[dict[str, Any]]:
        """What tasks show of an export beside the dense model, whose answers are kept."""
        recipe, judged = self.job.recipe, self.judged
        assert judged is not None
        how = {"window": None, "first_tokens": recipe.first_tokens, "batch": recipe.batch,
               "dtype": recipe.dtype}  # fmt: skip
        place = self.job.output / RESULTS

        def results_of(asked: AskedModel) -> Mapping[str, Any]:
            return ask(asked, self.loaded, place, judged, how, self.steps)["results"]

        dense = results_of(AskedModel(DENSE, self.job.base, self.job.base, DENSE))
        other = results_of(AskedModel(name, model, model, name))
        return [row.to_dict() for row in compare_results(dense, other)]


def _place(result: Result) -> tuple[str, str, float, int]:
    return result.rule, result.repair, result.rate, result.bits


def _plain(key: dict[str, Any]) -> dict[str, Any]:
    """A key as JSON gives it back."""
    own = {n: list(v) if isinstance(v, tuple) else v for n, v in key["recovery"].items()}
    return key | {"recovery": own}

"""Tasks of lm-evaluation-harness under a checkpoint, or under a pruned model and its dense one."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from convert.checkpoint import Checkpoint, open_checkpoint
from convert.export_format import FORMATS
from moe_jax.errors import InputError
from moe_jax.json_files import read_json
from moe_jax.stream import LayerSource
from pruning.demo import DEMO, model_folder
from pruning.kit.progress import Steps
from pruning.measure.answer_record import AnswerRecord
from pruning.measure.paired import compare_results
from pruning.recipe.options import MOST_BATCH
from pruning.recipe.task_options import TaskOptions
from pruning.recipe.values import check_whole, window_within
from pruning.stages.export import pruned_source
from pruning.stages.folder import RECIPE
from pruning.stages.job import DTYPES
from pruning.stages.judged import RESULTS, keep_compared
from pruning.stages.made_by import say_stale
from pruning.stages.remarks import say_context
from pruning.stages.stored import stored_base, stored_plans, stored_recipe
from pruning.stages.writer import only_writer
from pruning.text.tokenizer import open_codec

DENSE = "dense"


@dataclass(frozen=True)
class _Model:
    """One of the models that are asked.

    Attributes:
      name: in tables.
      source: its layers.
      checkpoint: whose tokenizer it has.
      place: what results call it: its folder, and of a plan the rate.
      plan: hash of the plan that it is of, where it is masked.
    """

    name: str
    source: LayerSource
    checkpoint: Checkpoint
    place: str
    plan: str = ""

    def identity(self, steps: Steps) -> str:
        """A hash of the model."""
        if self.checkpoint.weights_hash is None:
            with steps.bar(f"identify {self.name}") as on_step:
                self.checkpoint.hash_weights(on_step)
        return self.checkpoint.fingerprint + self.plan


def evaluate_tasks(
    folder: str | os.PathLike,
    tasks: Sequence[str],
    rates: Sequence[float] = (),
    *,
    window: int | None = None,
    first_tokens: bool = True,
    batch: int = 8,
    dtype: Literal["float32", "bfloat16"] = "float32",
    steps: Steps | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure a model on tasks of lm-evaluation-harness, as the harness does.

    A pruned model is measured beside its dense one where the run it comes from is known.

    Args:
      folder: a checkpoint, or "demo"; an export in the output folder of a run; that folder itself
        for all exports in it, or with `rates` for plans.
      tasks: names of tasks, groups or tags of the harness, wildcards too, also joined by commas.
      rates: prune rates, each planned from the stored statistics and measured by masking.
      window: most tokens that the model reads at once; default its context.
      first_tokens: begin texts with the tokens that the tokenizer puts first, if it does.
      batch: rows of 2,048 tokens a step, or as many tokens in shorter rows.
      dtype: of the activations.
      steps: where progress goes; default stderr.
      options: other fields of `TaskOptions`: task_path, fewshot, limit, output.

    Returns:
      `folder`; `results` by model, as the harness has them, and its `tables`; `files` with them;
      `compared`, a list of `Paired` for each model but the dense one.

    Raises:
      InputError: lm_eval is missing, a name or number is wrong, a task or the folder cannot be
        read, or another process writes into the output folder.
    """
    asked = TaskOptions(tasks=tuple(tasks), **options)
    check_whole("batch", batch, 1, MOST_BATCH, "; change --batch")
    if window is not None:
        check_whole("window", window, 2, cure="; change --window")
    _require_harness()
    steps = steps or Steps()
    models, run = _models(folder, rates, steps)
    if run is not None and stored_recipe(run).memory_limit is not None:
        steps.say(f"the memory limit in {run / RECIPE} does not hold for tasks")
    place = _place(asked, folder, run)
    how = {"window": window, "first_tokens": first_tokens, "batch": batch, "dtype": dtype}
    found = _evaluate(models, run, asked, place, how, steps)
    return {"folder": str(folder), **found}


def _place(asked: TaskOptions, folder: str | os.PathLike, run: Path | None) -> Path:
    """Where results go."""
    if asked.output is not None:
        return Path(asked.output)
    if run is None:
        raise InputError(
            f"output is missing, where results of tasks go: {folder} is in no output folder of a "
            "run; name a folder with --output"
        )
    return run / RESULTS


def _evaluate(
    models: Sequence[_Model],
    run: Path | None,
    asked: TaskOptions,
    place: Path,
    how: dict[str, Any],
    steps: Steps,
) -> dict[str, Any]:
    """Ask every model, the dense one first, and set the others against it."""
    from pruning.measure.tasks import load_tasks  # lm_eval, which takes seconds

    loaded = load_tasks(asked.names, _task_folder(asked.task_path), steps)
    with only_writer(place):
        found = {one.name: _ask(one, loaded, place, asked, how, steps) for one in models}
        rows = {
            name: compare_results(found[DENSE]["results"], one["results"])
            for name, one in found.items()
            if DENSE in found and name != DENSE
        }
        for one in models:
            if one.name in rows and run is not None and not one.plan:
                keep_compared(place, Path(one.place), rows[one.name])
    return {
        "results": {name: one["written"] for name, one in found.items()},
        "compared": {name: [row.to_dict() for row in some] for name, some in rows.items()},
        "files": {name: str(one["file"]) for name, one in found.items()},
        "tables": {name: one["table"] for name, one in found.items()},
    }


def _task_folder(path: str | None) -> Path | None:
    return None if path is None else DEMO / "tasks" if path == "demo" else Path(path)


def _require_harness() -> None:
    try:
        import_module("lm_eval")
    except ImportError:
        raise InputError(
            "tasks need lm-evaluation-harness; pip install 'moe-jax[tasks]', or pip install "
            "'lm_eval>=0.4.13'"
        ) from None


def _models(
    folder: str | os.PathLike, rates: Sequence[float], steps: Steps
) -> tuple[list[_Model], Path | None]:
    """The models that a folder stands for, the dense one first, and the folder of their run."""
    path = Path(folder)
    say_stale(path, steps)
    if rates:
        return _planned(path, rates, steps), path
    is_output = (path / RECIPE).is_file() and not (path / "config.json").is_file()
    if is_output and folder != "demo":  # which is the embedded model, whatever lies here
        exports = [path / "exports" / name for name in FORMATS]
        exports = [export for export in exports if (export / "config.json").is_file()]
        if not exports:
            raise InputError(
                f"{path} holds no export; write one with `moe-compress export {path}`, or measure "
                "plans with --prune-rate"
            )
        return [*_dense(path, steps), *map(_stored, exports)], path
    run = path.absolute().parent.parent
    if path.absolute().parent.name == "exports" and (run / RECIPE).is_file():
        return [*_dense(run, steps), _stored(path)], run
    base = open_checkpoint(model_folder(folder))
    return [_Model("model", base, base, str(folder))], None


def _stored(export: Path) -> _Model:
    base = open_checkpoint(export)
    return _Model(export.name, base, base, str(export))


def _dense(run: Path, steps: Steps) -> list[_Model]:
    """The dense model of a run; none where it is not there any more, which is said."""
    try:
        base = stored_base(stored_recipe(run), steps)
    except InputError as error:
        steps.say(f"there is no dense model to compare with: {error}")
        return []
    return [_Model(DENSE, base, base, str(base.about.folder))]


def _planned(run: Path, rates: Sequence[float], steps: Steps) -> list[_Model]:
    """The dense model of a run, and a masked one for each rate."""
    recipe = stored_recipe(run)
    base = stored_base(recipe, steps)
    models = [_Model(DENSE, base, base, str(base.about.folder))]
    for one, plan in stored_plans(run, recipe, base, rates, steps)[0]:
        name = f"prune-rate {one.prune_rate}"
        place = f"{run}/{name.replace(' ', '-')}"
        masked = pruned_source(base, plan, None)
        models.append(_Model(name, masked, base, place, plan.content_hash))
    return models


def _ask(
    model: _Model,
    loaded: dict[str, Any],
    place: Path,
    asked: TaskOptions,
    how: dict[str, Any],
    steps: Steps,
) -> dict[str, Any]:
    """Results of one model, the harness's table of them, their file, and what it says of tasks."""
    from pruning.measure.harness import Asked, HarnessModel
    from pruning.measure.tasks import run_tasks, save_results, tables

    started = time.monotonic()
    config, window = model.checkpoint.config, how["window"]
    most = config.max_position if window is None else window_within(window, config.max_position)
    if window is not None:
        say_context(config, window, steps)
    codec = open_codec(
        model.checkpoint.about.folder, config.vocab_size, first_tokens=how["first_tokens"]
    )
    identity = model.identity(steps)
    known = sha256(f"{identity} {how['dtype']}".encode()).hexdigest()[:16]
    harness = HarnessModel(
        model.source,
        codec,
        Asked(name=model.name, max_length=most, batch=how["batch"], dtype=DTYPES[how["dtype"]]),
        AnswerRecord(place / "answers" / f"{known}.jsonl"),
        steps,
    )
    how_many = {"fewshot": asked.fewshot, "limit": asked.limit}
    results = run_tasks(harness, loaded, **how_many, steps=steps)
    told = {"pretrained": model.place, "model_sha": identity, "max_length": most, **how_many,
            "dtype": how["dtype"], "batch_size": how["batch"],
            "add_bos_token": how["first_tokens"]}  # fmt: skip
    table = tables(results)
    file = save_results({**results}, place, told, time.monotonic() - started)
    written = read_json(file)["results"]
    return {"results": results, "table": table, "file": file, "written": written}

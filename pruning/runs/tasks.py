"""Tasks of lm-evaluation-harness under a checkpoint, or under a pruned model and its dense one."""

import os
import time
from collections.abc import Sequence
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from moe_jax.errors import InputError
from moe_jax.json_files import read_json
from pruning.demo import DEMO
from pruning.kit.progress import Steps
from pruning.measure.answer_record import AnswerRecord
from pruning.measure.paired import compare_results
from pruning.recipe.options import MOST_BATCH
from pruning.recipe.task_options import TaskOptions
from pruning.recipe.values import check_whole, window_within
from pruning.runs.asked_models import DENSE, AskedModel, asked_models
from pruning.stages.folder import RECIPE
from pruning.stages.job import DTYPES
from pruning.stages.judged import RESULTS, keep_compared
from pruning.stages.remarks import say_context
from pruning.stages.stored import stored_recipe
from pruning.stages.writer import only_writer
from pruning.text.tokenizer import open_codec


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
    models, run = asked_models(folder, rates, steps)
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
    models: Sequence[AskedModel],
    run: Path | None,
    asked: TaskOptions,
    place: Path,
    how: dict[str, Any],
    steps: Steps,
) -> dict[str, Any]:
    """Ask every model, the dense one first, and set the others against it."""
    loaded = open_tasks(asked, steps)
    with only_writer(place):
        found = {one.name: ask(one, loaded, place, asked, how, steps) for one in models}
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


def open_tasks(asked: TaskOptions, steps: Steps) -> dict[str, Any]:
    """The tasks that are asked for, and their documents, as the harness takes them.

    Raises:
      InputError: lm_eval is missing, or a task cannot be read.
    """
    _require_harness()
    from pruning.measure.tasks import load_tasks  # lm_eval, which takes seconds

    return load_tasks(asked.names, _task_folder(asked.task_path), steps)


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


def ask(
    model: AskedModel,
    loaded: dict[str, Any],
    place: Path,
    asked: TaskOptions,
    how: dict[str, Any],
    steps: Steps,
) -> dict[str, Any]:
    """Ask one model; answers that it has given before are not asked for again.

    Args:
      model: who is asked.
      loaded: what `open_tasks` found.
      place: folder of results and answers.
      asked: how many documents, with how many examples.
      how: `window`, `first_tokens`, `batch` and `dtype` as of `evaluate_tasks`.
      steps: where progress goes.

    Returns:
      `results` of the harness, its `table` of them, the `file`, and what that has as `written`.
    """
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

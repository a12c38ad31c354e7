"""Tasks of lm-evaluation-harness: found, run with a model of ours, and written as it writes them.

Importing this module needs lm_eval.
"""

import contextlib
import difflib
import fnmatch
import io
import logging
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from moe_jax.errors import InputError
from moe_jax.json_files import read_json
from pruning.kit.progress import Steps
from pruning.measure.harness import HarnessModel

DRAWS = 1000  # of a bootstrapped standard error, which runs in this process alone
ONE_PROCESS = "DISABLE_MULTIPROC"  # what the harness calls it
SHOWN = 300  # characters of an error of the harness


def load_tasks(names: Sequence[str], folder: Path | None, steps: Steps) -> dict[str, Any]:
    """Tasks, and their documents.

    Args:
      names: of tasks, groups or tags, also with wildcards such as "arc_*".
      folder: YAML files of tasks, which win over the harness's own; the data files they name lie
        relative to it. None for the harness's own alone.
      steps: where progress goes.

    Returns:
      What `lm_eval.evaluator.evaluate` takes.

    Raises:
      InputError: a name is unknown, or a task's documents are not to be had or not for us.
    """
    place = None if folder is None else folder.resolve()
    if place is not None and not place.is_dir():
        raise InputError(f"task_path={folder} is no folder; name the one with the YAML files")
    found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    with steps.bar("read the tasks") as on_step, _quiet(steps):
        manager = _manager(names, place)
        wanted = [one for name in names for one in _matches(name, manager, folder)]
        for number, name in enumerate(dict.fromkeys(wanted)):
            with contextlib.chdir(place) if place else contextlib.nullcontext():
                for kind, entries in _load(manager, name).items():
                    found[kind] |= entries
            on_step(number + 1, len(wanted))
    for name, task in found["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise InputError(
                f"task {name} runs code that a model has written, or shows it pictures; neither is "
                "done here; leave it out of --tasks"
            )
    return found


def run_tasks(
    model: HarnessModel,
    loaded: dict[str, Any],
    *,
    fewshot: int | None,
    limit: int | None,
    steps: Steps,
) -> dict[str, Any]:
    """Ask a model, and judge its answers.

    Args:
      model: who is asked.
      loaded: what `load_tasks` found.
      fewshot: examples before every question; None for as many as each task has by itself. Tasks
        that want none keep none.
      limit: most documents of each task.
      steps: where progress goes.

    Returns:
      The harness's results, with "samples".
    """
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002 - of which the harness draws
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        task.set_config("num_fewshot", own or 0 if fewshot is None or own == 0 else fewshot)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    with _quiet(steps):
        found = evaluate(model, loaded, limit=limit, bootstrap_iters=DRAWS, log_samples=True)
    assert found is not None  # of one process it is
    return dict(found)


def save_results(
    results: dict[str, Any], output: Path, told: dict[str, Any], seconds: float
) -> Path:
    """Write results and samples where and as the harness does, for programs that read these.

    Args:
      results: of `run_tasks`.
      output: folder; a folder of the model's name is made in it.
      told: "pretrained", what the model was named, and what else is to stand in "config".
      seconds: that it took.

    Returns:
      The file of the results; those of samples lie beside it.

    Raises:
      InputError: it could not be written.
    """
    tracker = EvaluationTracker(output_path=str(output))
    tracker.general_config_tracker.start_time -= seconds
    tracker.general_config_tracker.log_experiment_args("moe-jax", told, None, None, False)
    written = {name: value for name, value in results.items() if name != "samples"}
    written |= {
        "config": {"model": "moe-jax", "model_args": told, "bootstrap_iters": DRAWS,
                   "random_seed": DEFAULT_RANDOM_SEED, "numpy_seed": DEFAULT_OTHER_SEED,
                   "fewshot_seed": DEFAULT_OTHER_SEED, **told},
        "date": time.time() - seconds,
        "lm_eval_version": version("lm_eval"),
    }  # fmt: skip
    tracker.save_results_aggregated(written, results["samples"])
    for task, samples in results["samples"].items():
        tracker.save_results_samples(task, samples)
    name = str(tracker.general_config_tracker.model_name_sanitized)
    path = output / name / f"results_{getattr(tracker, 'date_id', '')}.json"
    try:  # the tracker says nothing of what went wrong
        read_json(path)
    except OSError:
        raise InputError(f"{path} could not be written; is there room on the disk?") from None
    return path


def tables(results: dict[str, Any]) -> str:
    """The harness's own tables of its results."""
    columns = ("results", "groups") if results.get("groups") else ("results",)
    return "\n".join(make_table(results, column) for column in columns)


def _manager(names: Sequence[str], folder: Path | None) -> TaskManager:
    """The tasks that are known; the harness's own 14,000 are read only where they are needed."""
    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        found = [fnmatch.filter(own.all_tasks, name) for name in names]
        # A group may have members of the harness's.
        if all(found) and not any(one in own.all_groups for some in found for one in some):
            return own
    return TaskManager(include_path=None if folder is None else str(folder))


def _matches(name: str, manager: TaskManager, folder: Path | None) -> list[str]:
    if found := fnmatch.filter(manager.all_tasks, name):
        return found
    near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    where = "" if folder is None else f" and no YAML file in {folder} that can be read has it"
    raise InputError(
        f"tasks: lm-evaluation-harness knows no {name!r}{where}; {hint}its names are those of "
        "`lm_eval ls tasks`, yours those in YAML files of a folder that --task-path names"
    )


def _load(manager: TaskManager, name: str) -> dict[str, Any]:
    try:
        return dict(manager.load([name]))
    except Exception as error:  # of YAML, of `datasets`, of the network
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise InputError(
            f"task {name} cannot be loaded: {type(error).__name__}: {str(error)[:SHOWN]}; "
            f"documents that are not in the cache of `datasets` need the network{offline}; without "
            "it name a folder with YAML and data files of the task with --task-path"
        ) from None


@contextlib.contextmanager
def _quiet(steps: Steps) -> Iterator[None]:
    """The harness prints on both streams, and would fork a process with many threads."""
    logger, told = logging.getLogger("lm_eval"), os.environ.get(ONE_PROCESS)
    level, aside = logger.level, sys.stderr if steps.verbose else io.StringIO()
    logger.setLevel(level if steps.verbose else logging.ERROR)
    os.environ[ONE_PROCESS] = "1"
    try:
        with contextlib.redirect_stdout(aside), contextlib.redirect_stderr(aside):
            yield
    finally:
        logger.setLevel(level)
        del os.environ[ONE_PROCESS]
        os.environ |= {} if told is None else {ONE_PROCESS: told}

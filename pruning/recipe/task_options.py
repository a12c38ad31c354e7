"""The options of `eval` and `compare` that are about tasks of lm-evaluation-harness."""

from dataclasses import dataclass
from typing import Annotated

from moe_jax.errors import InputError
from pruning.recipe.group import About, Options


@dataclass(frozen=True, kw_only=True)
class TaskOptions(Options):
    """Tasks of lm-evaluation-harness, instead of text."""

    tasks: Annotated[
        tuple[str, ...],
        About(
            "tasks, groups or tags of the harness, such as arc_easy,hellaswag; eval measures an "
            "export beside the dense model of its run, an output folder with all of its exports; "
            "needs pip install 'moe-jax[tasks]'",
            shown="TASK",
        ),
    ]
    task_path: Annotated[
        str | None,
        About(
            "YAML files of tasks that the harness does not have, or that need no network; the data "
            "files that they name lie relative to DIR, and Python that they name is run; demo for "
            "the three in the package",
            shown="DIR",
        ),
    ] = None
    fewshot: Annotated[
        int | None,
        About(
            "examples before every question (default: as many as each task says)",
            least=0,
            shown="N",
        ),
    ] = None
    limit: Annotated[
        int | None, About("most documents of each task (default all)", least=1, shown="N")
    ] = None
    output: Annotated[
        str | None,
        About(
            "where results go, and answers that an interrupted run goes on from; default tasks in "
            "the output folder of the run",
            shown="FOLDER",
        ),
    ] = None

    @property
    def names(self) -> list[str]:
        """Every name, also of those joined by commas."""
        return [name for word in self.tasks for name in word.split(",") if name]

    def check(self) -> None:
        """Raise InputError if there is no task, or a folder has no name."""
        if not self.names:
            raise InputError("there is no task to measure; name one with --tasks")
        for name in ("task_path", "output"):
            if getattr(self, name) == "":
                raise InputError(f"{name}='' must name a folder")

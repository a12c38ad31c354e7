"""Progress with an estimate of the time left, on stderr, and what every stage cost."""

import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pruning.kit.memory import release_memory

OnStep = Callable[[int, int], None]  # (steps done, steps in all)


def counter(total: int, on_step: OnStep | None) -> Callable[[int], None]:
    """A function that counts so many more steps as done and says so to `on_step`."""
    done = 0

    def count(steps: int) -> None:
        nonlocal done
        done += steps
        if on_step:
            on_step(done, total)

    return count


def reset_peak_memory() -> bool:
    """Begin a new peak, where Linux allows it; says whether it did."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory(since_reset: bool = False) -> int:
    """Largest resident size of this process, bytes: of its life, or since the last reset."""
    if since_reset:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.findall(r"^VmHWM:\s*(\d+) kB", status, re.M)[0])
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


class Screen(Console):
    """A console that leaves a reader who has gone to the command line, rich would exit with 1."""

    def on_broken_pipe(self) -> None:
        """Called where a BrokenPipeError was caught, which goes on from here."""
        raise


@dataclass
class Steps:
    """Shows stages as they run and remembers seconds and peak memory of each.

    Attributes:
      quiet: show nothing.
      verbose: also say what every stage took, and what was read.
      stages: name, seconds and peak_memory_bytes of the stages that ended; the peak is the
        stage's own on Linux, elsewhere that of the process until then.
    """

    quiet: bool = False
    verbose: bool = False
    stages: list[dict] = field(default_factory=list)
    console: Console = field(default_factory=lambda: Screen(file=sys.stderr))

    @contextmanager
    def bar(self, name: str) -> Iterator[OnStep]:
        """Run a stage; the value is a function of (steps done, steps in all)."""
        release_memory()
        started, reset = time.monotonic(), reset_peak_memory()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, disable=self.quiet) as progress:
            task = progress.add_task(f"{name:28s}", total=1)
            yield lambda done, total: progress.update(task, completed=done, total=total)
            progress.update(task, completed=progress.tasks[task].total)
        seconds, peak = round(time.monotonic() - started, 2), peak_memory(reset)
        self.stages.append({"name": name, "seconds": seconds, "peak_memory_bytes": peak})
        self.detail(f"  {name}: {seconds:,.2f} s, at most {peak / 1e6:,.0f} MB of memory")

    def say(self, text: str) -> None:
        """One line for people, on stderr."""
        if not self.quiet:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def detail(self, text: str) -> None:
        """A line that only `verbose` shows."""
        if self.verbose:
            self.say(text)

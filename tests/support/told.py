"""What a stage tells of its progress, kept for a test to look at."""

import contextlib

from pruning.kit.progress import Steps


class Told(Steps):
    """Steps that show nothing.

    Attributes:
      lines, details: what was said, and what is said with --verbose alone.
      bars: (done, total) as every bar was moved, by its name.
    """

    def __init__(self):
        super().__init__(quiet=True)
        self.lines: list[str] = []
        self.details: list[str] = []
        self.bars: dict[str, list[tuple[int, int]]] = {}

    @contextlib.contextmanager
    def bar(self, name):
        moved = self.bars.setdefault(name, [])
        yield lambda done, total: moved.append((done, total))
        self.stages.append({"name": name})

    def say(self, text):
        self.lines.append(text)

    def detail(self, text):
        self.details.append(text)

"""Write the questions of the tasks beside the demo: `python -m pruning.demo.questions`."""

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pruning.demo import DEMO, demo_texts

FOLDER = DEMO / "tasks"
PLACES = 25  # of each text, at which its continuation is asked for
CONTEXT, CHOICE = 240, 40  # characters
EXCERPTS, EXCERPT = 5, 600  # of each text, and characters
SUMS = 40


def continuations() -> Iterator[dict[str, Any]]:
    """How does a text go on? Three of four answers are from elsewhere in the same text."""
    draw = random.Random(0)
    for name in demo_texts("evaluation"):
        text = Path(name).read_text(encoding="utf-8")
        # From the middle on: the beginnings are what other measurements read.
        first, step = len(text) // 2, len(text) // (2 * PLACES + 2)
        starts = [_word(text, first + number * step) for number in range(PLACES)]
        for start in starts:
            others = draw.sample([one for one in starts if one != start], 3)
            ends = [text[one : one + CHOICE] for one in (start, *others)]
            order = draw.sample(range(4), 4)
            yield {
                "context": text[start - CONTEXT : start],
                "choices": [ends[i] for i in order],
                "answer": order.index(0),
            }


def sums() -> Iterator[dict[str, Any]]:
    """Sums of two digits, after two examples."""
    draw = random.Random(1)
    for one, two in draw.sample([(a, b) for a in range(10) for b in range(10)], SUMS):
        yield {"question": f"2 + 3 = 5\n4 + 4 = 8\n{one} + {two} =", "answer": str(one + two)}


def excerpts() -> Iterator[dict[str, Any]]:
    """Parts of the second halves of the texts."""
    for name in demo_texts("evaluation"):
        text = Path(name).read_text(encoding="utf-8")
        first, step = len(text) // 2, len(text) // (2 * EXCERPTS + 2)
        for number in range(EXCERPTS):
            start = _word(text, first + number * step)
            yield {"text": text[start : start + EXCERPT]}


def _word(text: str, place: int) -> int:
    """Where the next word ends: what is asked for begins with the space behind it."""
    return next(i for i in range(place, len(text)) if text[i] == " " and text[i - 1].isalnum())


def write_questions(folder: Path = FOLDER) -> None:
    """Write a file for each task."""
    files: dict[str, Iterable[dict[str, Any]]] = {
        "next": continuations(), "sums": sums(), "text": excerpts(),
    }  # fmt: skip
    for name, rows in files.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write_questions()

"""Answers that a model has given, in a file that an interrupted run goes on from."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from moe_jax.errors import InputError
from moe_jax.files import replace_text
from moe_jax.json_files import parse_json


class AnswerRecord:
    """Answers by question: a line of JSON each, added as they come.

    Args:
      file: read if it is there; a line that a killed run left torn is removed.

    Raises:
      InputError: another line is damaged.
    """

    def __init__(self, file: Path):
        self._file = file
        self._found: dict[str, Any] = {}
        lines = file.read_text(encoding="utf-8").splitlines(True) if file.is_file() else []
        if lines and not lines[-1].endswith("\n"):
            replace_text(file, "".join(lines[:-1]))
            lines.pop()
        for number, text in enumerate(lines, 1):
            try:
                line = parse_json(text)
                self._found[line["question"]] = line["answer"]
            except (InputError, TypeError, KeyError):
                raise InputError(
                    f"{file}:{number} is damaged; remove the file, and measure again"
                ) from None

    def __contains__(self, question: str) -> bool:
        return question in self._found

    def __getitem__(self, question: str) -> Any:
        return self._found[question]

    def add(self, found: dict[str, Any]) -> None:
        """Keep answers, of JSON types, by the hash of their question."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in found.items()]
        with open(self._file, "a", encoding="utf-8") as file:
            file.write("".join(lines))
        self._found |= found


def question_hash(*parts: Any) -> str:
    """What a question is known by: a hash of its parts, which are of JSON types."""
    return sha256(json.dumps(parts).encode()).hexdigest()[:32]

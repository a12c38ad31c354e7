"""Other calibration texts than the one given: draws of it, and sets that are compared with it."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from moe_jax.errors import InputError
from pruning.stages.job import Job, calibration_text
from pruning.stages.measure import first_tokens
from pruning.text.calibration import TokenBatch, hold_out
from pruning.text.held_out import seen_shares
from pruning.text.windows import Windows

DRAWS, SETS = "draws", "sets"  # folders of their statistics
Sets = Mapping[str, TokenBatch]
_NEXT = re.compile(r",(?=[\w.-]+=)")
_NAME = re.compile(r"\w[\w.-]*")


def parse_sets(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Files by the name of their set, from words NAME=FILE,NAME=FILE.

    A set named again has several files; FILE is what `TextSource.parse` reads.

    Raises:
      InputError: an entry of another form, or fewer than two sets.
    """
    found: dict[str, tuple[str, ...]] = {}
    for entry in (entry for word in words for entry in _NEXT.split(word)):
        name, _, file = entry.partition("=")
        if not _NAME.fullmatch(name) or not file:
            raise InputError(
                f"calibration_sets: {entry!r} must be NAME=FILE, a name of letters, digits, '.', "
                "'_' and '-'; write --calibration-sets web=web.txt,code=code.jsonl"
            )
        found[name] = (*found.get(name, ()), file)
    if len(found) == 1:
        raise InputError(
            f"calibration_sets={next(iter(found))} is one set, which is compared with nothing; "
            "name two or more, or give the text as --calibration"
        )
    return found


def with_sets(
    job: Job, files: Mapping[str, Sequence[str]], tokens: int, *, mix: bool
) -> tuple[Job, Sets]:
    """The job that measures on a part of every set, which none of them then shows.

    Args:
      job: opened, with texts that are measured besides.
      files: of each set, from `parse_sets`.
      tokens: most of each set that are measured on.
      mix: whether the calibration text is to be equal parts of all sets.

    Returns:
      (the job, what is scored of each set).

    Raises:
      InputError: a set is too short, or is named like another text that is measured on.
    """
    sets: dict[str, TokenBatch] = {}
    measured: dict[str, Windows] = {}
    for name, own in files.items():
        recipe = dataclasses.replace(job.recipe, calibration=tuple(own))
        try:
            text = calibration_text(recipe, job.codec)
        except InputError as error:
            raise InputError(f"calibration set {name!r}: {error}") from None
        sets[name], held = hold_out(text)
        if not held.scored.any():
            raise InputError(
                f"calibration set {name!r} has {len(text.tokens)} windows of {job.recipe.window} "
                "tokens, too few to set some aside for measuring; give more text or a shorter "
                "--window"
            )
        measured[name] = first_tokens(held.windows(), tokens)
    if twice := sorted(measured.keys() & job.evaluation.keys()):
        raise InputError(
            f"{', '.join(twice)} names a calibration set and an evaluation text; rename the set"
        )
    calibration = mixed(list(sets.values())) if mix else job.calibration
    texts = {**measured, **job.evaluation}
    return dataclasses.replace(job, calibration=calibration, evaluation=texts), sets


def mixed(texts: Sequence[TokenBatch]) -> TokenBatch:
    """As many windows as the longest text has, in equal parts of all, evenly spread over each."""
    most = max(len(text.tokens) for text in texts)
    parts, first = [], 0
    for text in texts:
        count = len(text.tokens)
        taken = min(count, -(-most // len(texts)))
        rows = np.linspace(0, count - 1, taken).round().astype(int)
        noted = tuple({**source, "windows": taken} for source in text.sources)
        files = np.zeros(count, int) if text.files is None else text.files
        whole = dataclasses.replace(text, sources=noted, files=files + first)
        parts.append(whole.of(rows))
        first += len(noted)

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    counted = None
    if any(part.counted is not None for part in parts):
        each = [part.valid if part.counted is None else part.counted for part in parts]
        counted = np.concatenate(each)
    sources = tuple(source for part in parts for source in part.sources)
    return TokenBatch(joined("tokens"), joined("valid"), sources, counted, joined("files"))


def drawn(job: Job, draw: int) -> Job:
    """The job with as many windows of its calibration text, drawn with replacement.

    Args:
      job: of the whole text.
      draw: which one; 0 is the job itself. The recipe's seed counts, too.

    Returns:
      A job that scores into a folder of its own.
    """
    if not draw:
        return job
    count, seed = len(job.calibration.tokens), job.recipe.seed
    rows = np.sort(np.random.default_rng([seed, draw]).integers(count, size=count))
    text = job.calibration.of(rows)
    noted = tuple({**source, "drawn": [seed, draw]} for source in text.sources)
    folder = job.output / DRAWS / str(draw)
    return dataclasses.replace(
        job,
        calibration=dataclasses.replace(text, sources=noted),
        recipe=dataclasses.replace(job.recipe, output=str(folder)),
    )


def source_of(job: Job, name: str, draw: int, sets: Sets) -> Job:
    """The job that scores a set, or a draw of the calibration text; itself for neither."""
    if not name:
        return drawn(job, draw)
    recipe = dataclasses.replace(job.recipe, output=str(job.output / SETS / name))
    return dataclasses.replace(job, calibration=sets[name], recipe=recipe)


def most_seen(job: Job, sets: Sets, texts: Mapping[str, Windows]) -> dict[str, float | None]:
    """As `seen_shares`, by the calibration text or the set that shows most of each text."""
    shares = [seen_shares(text, texts) for text in (job.calibration, *sets.values())]
    known = {name: [share for one in shares if (share := one[name]) is not None] for name in texts}
    return {name: max(found, default=None) for name, found in known.items()}

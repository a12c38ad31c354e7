"""How likely a model finds continuations: many short texts through few passes over its weights."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.errors import InputError
from moe_jax.stream import Batches, LayerSource, in_batches, layer_forward, pad_rows, sweep
from moe_jax.transformer import DecoderLayer, Head
from pruning.kit.progress import counter
from pruning.measure.quality import POSITIONS

PASS_BYTES = 2 << 30  # hidden states on the host in one pass over the weights
STEP_TOKENS = 2048  # of each row of a batch, as evaluation has them; of shorter rows there are more
SHORTEST = 16  # tokens that rows are padded to, at least

Answer = tuple[float, bool]


@dataclass(frozen=True)
class Question:
    """A text whose end is asked for.

    Attributes:
      tokens: at least two ids; all but the last are read.
      scored: how many of the last are predicted, fewer than there are.
    """

    tokens: tuple[int, ...]
    scored: int

    @property
    def read(self) -> tuple[int, ...]:
        """What the model is given."""
        return self.tokens[:-1]


def answer(
    source: LayerSource,
    questions: Sequence[Question],
    *,
    batch: int = 8,
    dtype=jnp.float32,
    on_step: Callable[[int, int], None] | None = None,
) -> Iterator[dict[int, Answer]]:
    """Predict the ends of texts.

    What one text reads may begin another's, as among the choices of one token of a question: such
    texts are run once. Texts are run longest first, as many in one reading of the weights as
    `PASS_BYTES` hold, in rows of a power of two of tokens.

    Args:
      source: the model, streamed.
      questions: the texts.
      batch: rows of 2,048 tokens a step, or as many tokens in shorter rows.
      dtype: of the activations.
      on_step: told of the tokens done, times layers, and of how many there are.

    Yields:
      After each pass, by place in `questions`: the summed log-probability of the end in nats, and
      whether each of its tokens is the likeliest.

    Raises:
      InputError: the model's output is not finite.
    """
    c = source.config
    held = PASS_BYTES // (c.d_model * np.dtype(dtype).itemsize)
    passes = _passes(_rows(questions), c.max_position, held)
    sizes = [sum(length * len(rows) for length, rows in one) for one in passes]
    count = counter(len(source) * sum(sizes), on_step)
    for one, size in zip(passes, sizes, strict=True):
        texts = [
            (part, _batches(source, [read for read, _ in part], length, batch))
            for length, rows in one
            for part in _parts(rows, _most(length, c.max_position, batch))
        ]
        states = _last_states(source, [text for _, text in texts], dtype, partial(count, size))
        wanted = [
            _Wanted(place, questions[place], x[row])
            for (part, _), x in zip(texts, states, strict=True)
            for row, (_, places) in enumerate(part)
            for place in places
        ]
        yield _answers(source.head, wanted)


# --- which texts are run, and in what shapes ---

_Row = tuple[tuple[int, ...], list[int]]  # what is read, and the places of the questions in it


def _rows(questions: Sequence[Question]) -> list[_Row]:
    """What has to be run, longest first: in order, a text that begins others stands before them."""
    rows: list[_Row] = []
    for place in sorted(range(len(questions)), key=lambda i: questions[i].read, reverse=True):
        read = questions[place].read
        if rows and rows[-1][0][: len(read)] == read:
            rows[-1][1].append(place)
        else:
            rows.append((read, [place]))
    return sorted(rows, key=lambda row: -len(row[0]))


def _passes(rows: list[_Row], context: int, held: int) -> list[list[tuple[int, list[_Row]]]]:
    """Rows by the length that they are padded to, in passes of so many tokens."""
    passes: list[list[_Row]] = [[]]
    room = held
    for row in rows:
        room -= _padded(len(row[0]), context)
        if room < 0 and passes[-1]:
            passes.append([])
            room = held - _padded(len(row[0]), context)
        passes[-1].append(row)
    key = lambda row: _padded(len(row[0]), context)  # noqa: E731
    return [[(length, list(some)) for length, some in groupby(one, key)] for one in passes if one]


def _padded(length: int, context: int) -> int:
    return min(context, max(SHORTEST, power_of_two(length)))


def power_of_two(least: int) -> int:
    """The smallest power of two that is no less."""
    return 1 << (least - 1).bit_length()


def _most(length: int, context: int, batch: int) -> int:
    """Rows of a step."""
    return max(1, batch * min(STEP_TOKENS, context) // length)


def _parts(rows: list[_Row], most: int) -> list[list[_Row]]:
    """Whole batches, and what is left: two shapes for each length."""
    whole = len(rows) // most * most
    return [part for part in (rows[:whole], rows[whole:]) if part]


def _batches(source: LayerSource, texts: list[tuple[int, ...]], length: int, batch: int) -> Batches:
    most = _most(length, source.config.max_position, batch)
    rows = min(most, power_of_two(len(texts)))  # whatever is left of them: few shapes for all
    tokens = np.zeros((-(-len(texts) // rows) * rows, length), np.int32)
    valid = np.zeros(tokens.shape, bool)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
        valid[row, : len(text)] = True
    return in_batches(source, tokens, valid, rows)


# --- through the model ---


def _last_states(
    source: LayerSource, texts: list[Batches], dtype, on_layer: Callable[[], None]
) -> list[np.ndarray]:
    """Hidden states before the head of each of `texts`, [B, T, D]."""

    def step(
        index: int, layer: DecoderLayer, states: list[list[np.ndarray]]
    ) -> list[list[np.ndarray]]:
        for text, x in zip(texts, states, strict=True):
            text.each(x, lambda part, place, rows: layer_forward(layer, part, place))
        return states

    embedded = [text.embedded(source, dtype) for text in texts]
    states = sweep(source, embedded, step, on_layer=lambda index: on_layer())
    return [np.concatenate(x) for x in states]


@dataclass(frozen=True)
class _Wanted:
    """A question, its place, and the states of the row that it was run in, [T, D]."""

    place: int
    question: Question
    states: np.ndarray

    @property
    def last(self) -> np.ndarray:
        """States that predict the tokens that are scored."""
        end = len(self.question.tokens) - 1
        return self.states[end - self.question.scored : end]


@jax.jit
def _predict(head: Head, x: Array, targets: Array) -> tuple[Array, Array]:
    """Log-probabilities of targets [P] after states [P, D], and whether they are the likeliest."""
    logp = jax.nn.log_softmax(head(x), axis=-1)
    chosen = jnp.take_along_axis(logp, targets[:, None], axis=-1)[:, 0]
    return chosen, jnp.argmax(logp, axis=-1) == targets


def _answers(head: Head, wanted: list[_Wanted]) -> dict[int, Answer]:
    states = np.concatenate([one.last for one in wanted])
    targets = np.concatenate(
        [np.asarray(one.question.tokens[-one.question.scored :], np.int32) for one in wanted]
    )
    logp, likeliest = np.zeros(len(targets)), np.zeros(len(targets), bool)
    for start in range(0, len(targets), POSITIONS):
        part = slice(start, start + POSITIONS)
        x, y = (jnp.asarray(pad_rows(v[part], POSITIONS)) for v in (states, targets))
        found = _predict(head, x, y)
        logp[part], likeliest[part] = (np.asarray(v)[: len(targets[part])] for v in found)
    if not np.isfinite(logp).all():
        raise InputError("a log-likelihood is not finite; the model's weights are broken")
    ends = np.cumsum([one.question.scored for one in wanted])
    return {
        one.place: (
            float(logp[end - one.question.scored : end].sum()),
            bool(likeliest[end - one.question.scored : end].all()),
        )
        for one, end in zip(wanted, ends, strict=True)
    }

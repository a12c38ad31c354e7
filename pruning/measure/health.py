"""What a model writes by itself: whether it ends, repeats itself, is sure, and can add."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.generation import generate
from moe_jax.stream import LayerSource
from moe_jax.transformer import init_caches
from pruning.measure.quality import mean_entropy, measure_quality
from pruning.text.windows import Windows

CACHE_BYTES = 2 << 30  # keys and values of the prompts that are continued together
REPEATED = 4  # tokens of a phrase
SHOWN = "2 + 3 = 5\n9 - 4 = 5\n3 * 2 = 6\n"  # before every sum
SUM_TOKENS = 8  # of an answer

Continuations = list[list[int]]


@dataclass(frozen=True)
class Health:
    """What continuations of a model are like, all of them the likeliest token each time.

    Attributes:
      prompts: how many beginnings were continued.
      tokens: mean length of a continuation.
      truncated: share that had not ended when the most new tokens were written.
      repeated: share of the phrases of four tokens that the same continuation had before.
      entropy: of the next token, mean over those written, in nats.
      followed: mean number of tokens until a continuation leaves the reference's, which is
        continued from the same beginnings; None for the reference.
      sums: share of sums that are right.
    """

    prompts: int
    tokens: float
    truncated: float
    repeated: float
    entropy: float
    followed: float | None
    sums: float

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return asdict(self)


def continuations(
    source: LayerSource,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    stop: Sequence[int] = (),
    ended: Callable[[list[int]], bool] = lambda new: False,
    dtype=jnp.float32,
    on_step: Callable[[int, int], None] | None = None,
) -> Continuations:
    """The likeliest continuation of every prompt, as many together as `CACHE_BYTES` hold.

    Args:
      source: the model; of one on a disk all layers are read for every token.
      prompts: token ids.
      new_tokens: most that are added.
      stop: ids that end a continuation, and belong to it.
      ended: told the new tokens, whether they end there.
      dtype: of the activations.
      on_step: told of the prompts done, and of how many there are.

    Raises:
      InputError: prompt and new tokens exceed the model's context.
    """
    longest, found = max(map(len, prompts)), []
    most = prompts_together(source, longest + new_tokens, dtype)
    for start in range(0, len(prompts), most):
        some = prompts[start : start + most]
        found += generate(
            source, some, max_new_tokens=new_tokens, stop=stop, ended=ended, length=longest,
            dtype=dtype,
        )  # fmt: skip
        if on_step is not None:
            on_step(len(found), len(prompts))
    return found


def prompts_together(source: LayerSource, slots: int, dtype) -> int:
    """How many prompts have room for so many tokens each in `CACHE_BYTES`, at least one."""
    caches = jax.eval_shape(lambda: init_caches(source.config, 1, slots, dtype))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))
    return max(1, CACHE_BYTES // size)


def repeated_share(written: Continuations) -> float:
    """Share of all phrases of `REPEATED` tokens that stood before in the same continuation; 0 of
    none."""
    again = total = 0
    for tokens in written:
        phrases = [tuple(tokens[i : i + REPEATED]) for i in range(len(tokens) - REPEATED + 1)]
        total += len(phrases)
        again += len(phrases) - len(set(phrases))
    return again / max(1, total)


def followed_tokens(written: Continuations, reference: Continuations) -> float:
    """Mean number of tokens that continuations share with others before they part."""
    shared = []
    for one, other in zip(written, reference, strict=True):
        same = [a == b for a, b in zip(one, other, strict=False)]
        shared.append(same.index(False) if False in same else len(same))
    return float(np.mean(shared))


def written_entropy(
    source: LayerSource, prompts: Sequence[Sequence[int]], written: Continuations, **how
) -> float:
    """Entropy of the next token wherever one was written, mean in nats; `how` as of
    `measure_quality`.

    Raises:
      InputError: the model's output is not finite.
    """
    texts = [[*prompt, *new] for prompt, new in zip(prompts, written, strict=True)]
    longest = max(map(len, texts))
    tokens = np.zeros((len(texts), longest), np.int32)
    valid, scored = np.zeros(tokens.shape, bool), np.zeros((len(texts), longest - 1), bool)
    for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        tokens[row, : len(text)], valid[row, : len(text)] = text, True
        scored[row, len(prompt) - 1 : len(text) - 1] = True
    windows = Windows(tokens, valid, scored, longest, longest - 1)
    return mean_entropy(measure_quality(source, windows, **how)[1], windows)


def sums(number: int, seed: int = 0) -> list[tuple[str, int]]:
    """Short sums, differences and products of numbers from 1 to 9 behind three examples, and what
    they come to; differences are not negative."""
    rng, found = np.random.default_rng(seed), []
    for place in range(number):
        low, high = sorted(rng.integers(1, 10, 2).tolist())
        sign, value = (("+", high + low), ("-", high - low), ("*", high * low))[place % 3]
        found.append((f"{SHOWN}{high} {sign} {low} =", value))
    return found


def is_right(said: str, value: int) -> bool:
    """Whether the first number of an answer's first line is this."""
    found = re.search(r"\d+", said.lstrip().partition("\n")[0])
    return found is not None and int(found[0]) == value

"""Greedy and sampled generation with a key/value cache, for looking at what a model says."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import make_context
from moe_jax.errors import InputError
from moe_jax.stream import LayerSource
from moe_jax.transformer import Cache, DecoderLayer, Head, init_caches


@jax.jit
def _step(layer: DecoderLayer, x: Array, context, cache: Cache) -> tuple[Array, Cache]:
    return layer.step(x, context, cache)


def generate(
    model: LayerSource,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    stop: Sequence[int] = (),
    ended: Callable[[list[int]], bool] = lambda new: False,
    length: int = 0,
    dtype=jnp.float32,
) -> list[list[int]]:
    """Continue prompts.

    Args:
      model: the model; layers that are not in memory are read again for every token.
      prompts: token ids; prompts of different lengths are padded on the left.
      max_new_tokens: tokens to add at most.
      temperature: 0 takes the most likely token; otherwise samples.
      top_k: sample among the k most likely tokens only; 0 among all.
      seed: of the sampling.
      stop: token ids after which a sequence ends; they are included.
      ended: told the new tokens of a sequence, whether it ends with the last of them.
      length: to pad prompts to, if they are shorter: one shape is one compilation.
      dtype: of the activations.

    Returns:
      The new tokens of each prompt.

    Raises:
      InputError: if a prompt is empty or the text would not fit the model's context.
    """
    c, (current, mask) = model.config, _left_padded(prompts, length)
    reach = _reach(max(map(len, prompts)), max_new_tokens, c.max_position)
    caches = init_caches(c, len(prompts), current.shape[1] + max_new_tokens, dtype)
    key, position = jax.random.key(seed), jnp.zeros(len(prompts), jnp.int32)
    written: list[list[int]] = [[] for _ in prompts]
    going = range(len(prompts))  # rows that have not ended
    for _ in range(max_new_tokens):
        context = make_context(c.attention, c.max_position, mask, position, reach)
        x = model.embedding(current, dtype)
        for index in range(len(model)):
            x, caches[index] = _step(model.layer(index), x, context, caches[index])
        key, now = jax.random.split(key)
        chosen = _choose(_next_logits(model.head, x), now, temperature, top_k)
        tokens = np.asarray(chosen).tolist()
        for row in going:
            written[row].append(tokens[row])
        going = [row for row in going if not (tokens[row] in stop or ended(written[row]))]
        if not going:
            break
        position = context.position[:, -1] + 1
        current, mask = chosen[:, None], jnp.ones((len(prompts), 1), bool)
    return written


def _reach(longest: int, more: int, most: int) -> int:
    """Positions that prompts and what is added take."""
    if longest + more > most:
        raise InputError(
            f"{longest} prompt tokens + max_new_tokens={more} exceed the context of {most} "
            "positions; shorten one of them"
        )
    return longest + more


def _left_padded(
    prompts: Sequence[Sequence[int]], length: int
) -> tuple[np.ndarray, np.ndarray | Array]:
    """Tokens int32 [B, T] and which of them are no padding, bool [B, T]; T is at least `length`."""
    if not prompts or min(len(prompt) for prompt in prompts) == 0:
        raise InputError("every prompt needs at least one token; start with the model's bos token")
    longest = max(length, *(len(prompt) for prompt in prompts))
    tokens = np.zeros((len(prompts), longest), np.int32)
    valid = np.zeros((len(prompts), longest), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        valid[row, longest - len(prompt) :] = True
    return tokens, valid


@jax.jit
def _next_logits(head: Head, x: Array) -> Array:  # [B, T, D] -> [B, V]
    return head(x[:, -1])


def _choose(logits: Array, key: Array, temperature: float, top_k: int) -> Array:  # [B, V] -> [B]
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if top_k:
        floor = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32)

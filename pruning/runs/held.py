"""What layers, logits and the states of texts take in memory, whatever a stage does with them."""

import functools
import math
from dataclasses import dataclass

import jax.numpy as jnp

from convert.description import Description
from convert.rules import ruled_tensors
from moe_jax.config import ModelConfig
from moe_jax.experts.grouped_matmul import COPIES_POOLS
from pruning.kit.memory import Allowance
from pruning.measure.quality import POSITIONS
from pruning.recipe.recipe import ResolvedRecipe
from pruning.scores.details import SAMPLE
from pruning.scores.grams import sample_size
from pruning.scores.grouped import SLOTS as BETWEEN
from pruning.stages.between_sizes import in_memory
from pruning.stages.measure import held_states
from pruning.stages.probe_windows import compared, probe_shapes

PROCESS_BYTES = 600 << 20  # Python, jax, its compiler and the programs of a stage
GRADIENT_PROGRAMS = 100 << 20  # what compiling gradients takes more, tests/pruning/runs
LOGITS_HELD = 5  # of a probe: two programs', their difference, its size, and who is asked
LOSS_LOGITS, COMPARED_LOGITS = 3, 4  # copies that XLA holds of a loss, and of two models'
LAYERS_HELD = 2.1  # the one at work and the one being read ahead, tests/convert/test_memory.py
LAYER_HELD = 1.1  # where none is read ahead
WIDENED = 9  # bytes of a weight in few bits on its way: its code, its scale and its value


def fixed_bytes(base: Description) -> int:
    """Bytes of a process that has read what is in no layer."""
    return PROCESS_BYTES + 2 * outer_weights(base.config)


@dataclass(frozen=True)
class Held:
    """Weights of the largest layer, or group of its experts, that is at work.

    Attributes:
      own: that give way to those of the next.
      rest: that stay for all groups of a layer; 0 for a whole one.
      wide: of the largest matrix that is widened to float32 as it is read, by itself.
    """

    own: int
    rest: int = 0
    wide: int = 0

    @property
    def total(self) -> int:
        """Weights of both."""
        return self.own + self.rest


def pruned_bytes(base: Description, layer: Held, allowance: Allowance) -> int:
    """Bytes of the layers that a sweep holds and of one that is made of one of them, as whatever is
    pruned on the fly takes; of so many weights. Of weights in few bits, and of groups, 256 experts
    of DeepSeek-V3 took what two that are made take."""
    plain = base.quantization is None and allowance.experts is None
    made = 2 * layer.total + copied_bytes(layer) if plain else 4 * layer.total
    return layers_held(layer, 2, allowance) + made


def copied_bytes(layer: Held) -> int:
    """Bytes of the copy of a layer that loops over experts are given, if they are."""
    return 2 * layer.total if COPIES_POOLS else 0


def export_bytes(base: Description, allowance: Allowance, by_group: bool) -> int:
    """Peak bytes of a process that exports, see `pruned_bytes`; `by_group` if it can take layers in
    groups of experts."""
    layer = largest_layer(base, allowance, by_group)
    return fixed_bytes(base) + pruned_bytes(base, layer, allowance)


def verify_bytes(base: Description, allowance: Allowance, by_group: bool) -> int:
    """Peak bytes of a process that verifies: those of exporting, and then layers of the export as
    float32, beside what the probe gives, which is logits, the hidden states of all windows, and
    what the experts make of one."""
    c, shapes = base.config, probe_shapes(base.config)
    layer = largest_layer(base, allowance, by_group)
    probe = LOGITS_HELD * compared(shapes) * c.vocab_size
    states = 1 if allowance.experts is None else 1 + BETWEEN
    probe += states * sum(shape.windows * shape.length for shape in shapes) * c.d_model
    row = c.moe.experts_per_token * 4 * (c.moe.d_expert + c.d_model)
    probe += max(shape.length for shape in shapes) * row
    wide = 4 * outer_weights(c) + layers_held(layer, 4, allowance)
    return fixed_bytes(base) + max(pruned_bytes(base, layer, allowance), wide) + 4 * probe


def between_bytes(config: ModelConfig, tokens: int, allowance: Allowance) -> int:
    """Bytes of memory in which a text lies between the groups of a layer; 0 for layers that are
    taken whole, or if it lies in a file."""
    return in_memory([BETWEEN * tokens * config.d_model * 4], allowance)


def kept_between(config: ModelConfig, tokens: int, allowance: Allowance) -> int:
    """The same of a text that lies there however much memory it takes."""
    return BETWEEN * tokens * config.d_model * 4 if allowance.experts else 0


def experts_at_once(config: ModelConfig, allowance: Allowance) -> int:
    """Experts that are in memory together where layers can be taken in groups."""
    return min(config.moe.num_experts, allowance.experts or config.moe.num_experts)


def gram_bytes(config: ModelConfig, allowance: Allowance) -> int:
    """The Grams of a layer's experts, or a group's, on the device, on the host and, of one of them,
    in float64."""
    return (2 * 4 * experts_at_once(config, allowance) + 4 * 8) * config.moe.d_expert**2


def details_bytes(config: ModelConfig, step: int) -> int:
    """What `--expert-details` takes with so many tokens at work: rows of a batch, or of all experts
    for the same tokens."""
    moe, d_model = config.moe, config.d_model
    batch = 8 * step * moe.experts_per_token * d_model
    outputs = min(SAMPLE, step) * moe.num_experts * (4 * d_model + 5 * moe.d_expert)
    return 4 * max(batch, outputs)


def sample_states(
    config: ModelConfig, recipe: ResolvedRecipe, share: float, allowance: Allowance
) -> int:
    """The hidden states of a sample of the text, and what lies between groups of it."""
    tokens = math.prod(sample_size(_windows(recipe), recipe.window, share))
    states = tokens * config.d_model * jnp.dtype(recipe.dtype).itemsize
    return states + kept_between(config, tokens, allowance)


def sample_bytes(
    config: ModelConfig, recipe: ResolvedRecipe, share: float, allowance: Allowance
) -> int:
    """The hidden states of a sample of the text, its rows at work, and Grams."""
    tokens = math.prod(sample_size(_windows(recipe), recipe.window, share))
    work = rows_at_work(config, recipe, tokens) * (4 * config.moe.d_expert + 4 * config.d_model) * 4
    states = sample_states(config, recipe, share, allowance)
    return states + work + gram_bytes(config, allowance)


def _windows(recipe: ResolvedRecipe) -> int:
    return math.ceil(recipe.max_tokens / recipe.window)


def evaluation_bytes(
    config: ModelConfig, tokens: int, step: int, layers: int, allowance: Allowance
) -> int:
    """Bytes that measuring quality on texts takes beside the process.

    Args:
      config: of the models.
      tokens: of all windows of all texts.
      step: tokens of a batch.
      layers: bytes of the layers that are held.
      allowance: what may be spent.

    Returns:
      The states of all texts, or of a batch if they lie in a file, and the layers with a batch at
      work or, once these are gone, the logits of two models.
    """
    rows = min(step, tokens) * config.moe.experts_per_token
    work = rows * 3 * config.moe.d_expert * 4
    layers += between_bytes(config, tokens, allowance)
    states = held_states(config, tokens)
    if states > allowance.of(states):
        states = held_states(config, min(step, tokens))
    return states + max(layers + work, logits_held(config, COMPARED_LOGITS))


def outer_weights(config: ModelConfig) -> int:
    """Weights of the embedding and the head."""
    return (1 if config.tie_embeddings else 2) * config.vocab_size * config.d_model


def largest_layer(base: Description, allowance: Allowance, by_group: bool = True) -> Held:
    """The layer that has most, or of those that are taken in groups of experts, if that is allowed
    and `by_group` can be done, the group and what stays with it."""
    at_once = allowance.experts if by_group else None
    rest, experts, wide = _layer_weights(base)
    if at_once is None:
        return Held(max(map(sum, zip(rest, experts, strict=True))))
    wide *= base.quantization is not None
    share = min(1.0, at_once / base.config.moe.num_experts)
    layers = [
        Held(math.ceil(share * own), stays, wide) if own else Held(stays, 0, wide)
        for own, stays in zip(experts, rest, strict=True)
    ]
    return max(layers, key=lambda layer: layers_held(layer, 2, allowance))


@functools.lru_cache(maxsize=4)
def _layer_weights(base: Description) -> tuple[list[int], list[int], int]:
    """Of every layer the weights of no expert and those of experts, and of the largest tensor;
    asked for many times of a model that may have tens of thousands."""
    rest, experts = ([0] * base.config.num_layers for _ in range(2))
    wide = 0
    for name, shape, rule in ruled_tensors(base.family, base.config, base.widths):
        if rule is not None:
            of = experts if rule.is_of_expert else rest
            of[int(name.split(".")[2])] += math.prod(shape)
            wide = max(wide, math.prod(shape))
    return rest, experts, wide


def layers_held(layer: Held, item: int, allowance: Allowance) -> int:
    """Bytes of the layers, or groups, that a sweep holds, of so many weights of so many bytes."""
    copies = LAYERS_HELD if allowance.read_ahead else LAYER_HELD
    return int(item * (copies * layer.own + layer.rest)) + WIDENED * layer.wide


def logits_held(config: ModelConfig, copies: int) -> int:
    """The head widened to float32, and copies of the logits of as many tokens as are at work."""
    return 4 * config.vocab_size * (config.d_model + copies * POSITIONS)


def rows_at_work(config: ModelConfig, recipe: ResolvedRecipe, tokens: int) -> int:
    """Copies of a batch's tokens, one for each of their experts."""
    return min(recipe.batch * recipe.window, tokens) * config.moe.experts_per_token

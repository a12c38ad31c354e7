"""What scoring takes on disk, known from shapes before anything is written."""

import math

from convert.description import Description
from pruning.kit.memory import allowance
from pruning.recipe.recipe import ResolvedRecipe
from pruning.scores import grouped, states
from pruning.scores.asked import Asked
from pruning.scores.end_to_end import ig_chunk
from pruning.scores.parts import rows_of_parts, windows_at_work
from pruning.scores.statistics import field_shapes


def statistics_bytes(base: Description, recipe: ResolvedRecipe) -> int:
    """Bytes of the statistics that a recipe collects of a model."""
    c = base.config
    sizes = (len(c.moe_layers), c.moe.num_experts, c.moe.d_expert, c.d_model)
    return 8 * sum(map(math.prod, field_shapes(*sizes, recipe.groups).values()))


def scratch_bytes(base: Description, recipe: ResolvedRecipe, windows: int) -> int:
    """Bytes of the largest scratch file that scoring so many windows takes; 0 if none is.

    The sweep always has one, from which a killed run goes on; the others follow one another, and
    have one if their states do not fit in memory.
    """
    c, sizes = base.config, []
    if windows:
        parts = rows_of_parts(windows, recipe.until_stable is not None)
        _, padded = windows_at_work(parts, recipe.batch)
        slots = Asked(recipe.gradients).slots(c)
        size = _state_bytes(base, recipe, slots, padded)
        if allowance().experts:  # and what lies between the groups of a layer
            between = grouped.SLOTS * padded * recipe.window * c.d_model * 4
            size += between if between > allowance().of(states.MEMORY_STATES) else 0
        sizes.append(size)
    texts = []  # (windows, copies) whose states are held at once
    if recipe.weight_gradients:
        texts.append((windows, 1))
    if steps := recipe.nll_ig:
        texts.append((min(windows, ig_chunk(steps)), steps))
    for count, copies in texts:
        padded = copies * math.ceil(count / recipe.batch) * recipe.batch
        size = _state_bytes(base, recipe, states.layer_slots(c), padded)
        sizes.append(size if size > allowance().of(states.MEMORY_STATES) else 0)
    return max(sizes, default=0)


def _state_bytes(base: Description, recipe: ResolvedRecipe, slots: int, windows: int) -> int:
    shape = (windows, recipe.window, base.config.d_model)
    return states.state_bytes(slots, shape, recipe.dtype)

"""What repair and GPTQ hold between the groups of a layer, in memory or in files: its sizes."""

from collections.abc import Sequence

from convert.description import Description
from moe_jax.config import ModelConfig
from pruning.kit.memory import Allowance, allowance
from pruning.recipe.recipe import ResolvedRecipe
from pruning.scores.states import MEMORY_STATES
from pruning.shrink.gptq_groups import SLOTS as GPTQ_SLOTS
from pruning.shrink.progress import HELD_OUT
from pruning.shrink.repair_groups import SLOTS as REPAIR_SLOTS
from pruning.shrink.repair_model import LEAST_WINDOWS
from pruning.stages.sizes import form_of


def of_repair(config: ModelConfig, tokens: int, kept: int) -> list[int]:
    """Bytes of each array that a repair holds: the text, changes of the down-projections as float32
    with one of every expert's bias, and two sets of these.

    Args:
      config: of the model.
      tokens: of the text.
      kept: channels of the layer.
    """
    d, changed = config.d_model, kept + config.moe.num_experts
    return [4 * REPAIR_SLOTS * tokens * d, 4 * changed * d, *2 * [2 * kept * d]]


def of_gptq(config: ModelConfig, tokens: int, held: int, group_size: int) -> list[int]:
    """Bytes of each array that GPTQ holds: the text, and codes and scales of three matrices.

    Args:
      config: of the model.
      tokens: of the text.
      held: tokens of it that are held out, which go three ways instead of one.
      group_size: weights per scale.
    """
    weights = config.moe.num_experts * config.moe.d_expert * config.d_model
    states = 4 * GPTQ_SLOTS * (tokens + 2 * held) * config.d_model
    return [states, *3 * [weights // 2, 4 * weights // group_size]]


def in_memory(sizes: Sequence[int], allowed: Allowance) -> int:
    """Bytes of what lies in memory; 0 for layers that are taken whole."""
    return sum(size for size in sizes if _fits(size, allowed)) if allowed.experts else 0


def in_files(sizes: Sequence[int], allowed: Allowance) -> int:
    """Bytes of what does not; 0 for layers that are taken whole."""
    return sum(size for size in sizes if not _fits(size, allowed)) if allowed.experts else 0


def between_files(
    base: Description, recipe: ResolvedRecipe, windows: int, kept: int | None = None
) -> int:
    """Most bytes of scratch files that repair or GPTQ takes, under the allowance of the run.

    Args:
      base: the dense model.
      recipe: a resolved one.
      windows: of calibration text.
      kept: most channels that a layer keeps; default all.
    """
    c, padding, found = base.config, recipe.batch - 1, [0]
    tokens = (windows + 2 * padding) * recipe.window  # of what is learnt from and what is held out
    if recipe.repair != "none" and windows >= LEAST_WINDOWS:
        most = c.moe.num_experts * c.moe.d_expert if kept is None else kept
        found.append(in_files(of_repair(c, tokens, most), allowance()))
    packed = any(form_of(recipe, name).is_int4 for name in recipe.export)
    if recipe.quantizer == "gptq" and packed:
        held = (max(1, windows // HELD_OUT) + padding) * recipe.window
        found.append(in_files(of_gptq(c, tokens, held, recipe.group_size), allowance()))
    return max(found)


def _fits(size: int, allowed: Allowance) -> bool:
    return size <= allowed.of(MEMORY_STATES)

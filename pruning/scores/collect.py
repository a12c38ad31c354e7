"""Statistics of a whole text, or of the weights alone, for those who call the library."""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from moe_jax.groups import each_group, own_experts
from moe_jax.spread import ALONE, Spread
from moe_jax.stream import LayerSource
from pruning.kit.progress import OnStep
from pruning.scores.asked import Asked
from pruning.scores.noise import noise_rows, noise_worth
from pruning.scores.parts import in_parts
from pruning.scores.states import temporary_states
from pruning.scores.statistics import ChannelStatistics, field_shapes
from pruning.scores.sweep_log import Memory
from pruning.scores.text_sweep import TextSweep
from pruning.scores.weight_facts import slots_of, weight_facts


def collect_statistics(
    source: LayerSource,
    tokens: np.ndarray,
    valid: np.ndarray,
    *,
    counted: np.ndarray | None = None,
    gradients: bool = False,
    expert_details: bool = False,
    obs: bool = False,
    batch: int = 8,
    dtype=jnp.float32,
    scratch: Path | None = None,
    on_step: OnStep | None = None,
    spread: Spread = ALONE,
) -> ChannelStatistics:
    """Measure a model on calibration text: the one pass that every criterion and budget shares.

    Every layer is read once, and once more for gradients.

    Args:
      source: the dense model, in memory or on disk; at most two of its layers are held.
      tokens: int32 [B, T].
      valid: bool [B, T]; other positions contribute exactly nothing.
      counted: bool [B, T], tokens whose prediction counts in the loss; default all. Gradients alone
        read it: statistics of activations are of all valid tokens.
      gradients: also run the backward sweep of the end-to-end next-token loss.
      expert_details: also collect vectors per expert and pairs of experts.
      obs: also find what removing a channel costs once others have taken over what they can, see
        `pruning.scores.elimination`; not where devices share the experts of a layer.
      batch: sequences per step.
      dtype: of the activations; sums are float32 inside a batch, float64 across batches.
      scratch: folder of hidden states that do not fit in memory; default the system's.
      on_step: receives (layer visits done, layer visits in all).
      spread: devices and processes that share the windows; all processes call this alike, and get
        the statistics of all windows.

    Returns:
      The statistics.

    Raises:
      InputError: if the model has no expert layer or its experts were already pruned unevenly.
      FullDiskError: there is no room in the scratch folder.
    """
    slots_of(source)
    asked, config = Asked(gradients, expert_details, obs=obs), source.config
    text = in_parts(source, tokens, valid, counted, [np.arange(len(tokens))], batch, spread)
    shape = (*text.batches.tokens.shape, config.d_model)
    with temporary_states(asked.slots(config), shape, dtype, scratch) as states:
        found = TextSweep(source, text, asked, dtype, states, Memory(), on_step, spread, scratch)
        found.forward()
        found.backward()
    return found.finished(found.part(0), 1)


def collect_weights(
    source: LayerSource, visit: Callable[[], None] = lambda: None
) -> ChannelStatistics:
    """What the weights alone say: statistics over no token, for plans without calibration text.

    Args:
      source: the dense model.
      visit: called after each layer.

    Returns:
      Statistics whose sums are all zero, with `noise`.
    """
    slots, c = slots_of(source), source.config
    shapes = field_shapes(len(slots), c.moe.num_experts, c.moe.d_expert, finished=False)
    sums = {name: np.zeros(shape) for name, shape in shapes.items()}
    rows, worth = noise_rows(c.d_model), np.zeros(sums["down_norm"].shape)
    for index, slot in slots.items():
        for layer in each_group(source, index):
            own = own_experts(layer)
            for name, (value,) in weight_facts(layer, c.moe.d_expert).items():
                sums[name][slot, own] = value
            worth[slot, own] = noise_worth(layer, rows)
            del layer  # before the next group is read
        visit()
    return ChannelStatistics.from_arrays({**sums, "noise": worth})

"""What a sweep over a text collects, and what that takes."""

from dataclasses import dataclass

from moe_jax.config import ModelConfig
from pruning.scores.states import layer_slots

EDGES = 2  # slots that hold what one step leaves to the next, in turns


@dataclass(frozen=True)
class Asked:
    """What a sweep collects beyond the forward sums.

    Attributes:
      gradients: sums of the end-to-end next-token loss, by a way down.
      expert_details: vectors per expert and pairs of experts.
      each_prefix: what needs the whole text, for every number of parts instead; not so obs.
      obs: what each channel costs once others have taken over, by the sample of the text.
    """

    gradients: bool = False
    expert_details: bool = False
    each_prefix: bool = False
    obs: bool = False

    @property
    def groups(self) -> tuple[str, ...]:
        """Their names in `ChannelStatistics`."""
        asked = (
            ("gradients", self.gradients),
            ("expert-details", self.expert_details),
            ("obs", self.obs),
        )
        return tuple(name for name, on in asked if on)

    def slots(self, config: ModelConfig) -> int:
        """States of the text that are alive at once."""
        return EDGES + (layer_slots(config) if self.gradients else 0)

    def steps(self, config: ModelConfig) -> int:
        """Steps of the sweep: layers upwards, the loss, layers downwards."""
        layers, lowest = config.num_layers, config.moe_layers[0]
        return layers + (1 + layers - lowest if self.gradients else 0)
